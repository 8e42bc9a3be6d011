"""Scoring by the 2025 rules: two files in, a :class:`Result` out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io import Dataset, open_dataset
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.compat import COUNT_COLUMNS, METRICS, Rules, get_metrics, get_rules
from vcelltools.scoring.effects import Effects, make_effects
from vcelltools.scoring.frames import ScoreTable, read_aggregate
from vcelltools.scoring.genebuckets import GeneBuckets
from vcelltools.scoring.metrics import Pair, compute
from vcelltools.scoring.result import Ceiling, Component, Result
from vcelltools.scoring.sides import Cells, ReadOptions, Scale, Side, find_scale, read_cells, reduce_side
from vcelltools.stream import get_threads

if TYPE_CHECKING:
    from anndata import AnnData

PERT_COL = "target_gene"
CONTROL = "non-targeting"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of a scoring; see :func:`vcelltools.score`."""

    profile: str = "vcc"
    compat: str = "ours"
    pert_col: str = PERT_COL
    control: str = CONTROL
    epsilon: float = 0.0
    cpm_filter: float | None = None
    allow_discrete: bool = False
    to_cp10k: bool = False
    skip: tuple[str, ...] = ()
    ceiling: bool = False
    ceiling_seed: int = 0
    baseline: str | Path | None = None
    bootstrap: int = 1000
    layer: str | None = None
    threads: int | None = None

    def check(self) -> tuple[Rules, list[str]]:
        """Return the rule set and the metrics; a :class:`UsageError` where they do not go together."""
        rules = get_rules(self.compat)
        names = get_metrics(self.profile, self.skip)
        if self.epsilon < 0:
            raise UsageError(f"epsilon is {self.epsilon}; zero or more expected")
        extended = [m for m in names if METRICS[m].kind == "extended"]
        if extended and rules.name != "ours":
            raise UsageError(
                f"the profile {self.profile!r} is ours; {rules.name} has no {extended[0]!r}",
                hint="another --profile, or leave --compat out",
            )
        if self.cpm_filter is not None and rules.global_bh:
            raise UsageError("--cpm-filter is not part of the rules of vcc2025", hint="leave one of the two out")
        if self.allow_discrete and self.to_cp10k:
            raise UsageError(
                "--allow-discrete keeps counts as they are, --to-cp10k converts them", hint="leave one of the two out"
            )
        return rules, names

    def read_options(self, rules: Rules, *, test: bool) -> ReadOptions:
        """Return how the kernel is to reduce a file."""
        moment = None
        if self.allow_discrete:
            moment = "log1p"
        elif self.cpm_filter is not None:
            moment = "expm1"
        return ReadOptions(
            test=test,
            exact=rules.exact_p,
            moment=moment,
            # pdex 0.3 sums along the cells, 0.1 each gene of a group by itself, both in the precision of the data
            single=rules.peer_precision and rules.fold_limit is None and test and not self.allow_discrete,
            pairwise=rules.fold_limit is not None and test,
            raw=self.allow_discrete,
            cp10k=self.to_cp10k,
            threads=self.threads,
        )


@dataclass(kw_only=True)
class Opened:
    """A file, its labels and its scale."""

    dataset: Dataset
    cells: Cells
    scale: Scale


def open_side(source: str | os.PathLike | AnnData, options: Options, *, need_control: bool = True) -> Opened:
    """Open a file and read its labels and scale; the caller closes the data set."""
    dataset = open_dataset(source, layer=options.layer)
    try:
        cells = read_cells(dataset, options.pert_col, options.control if need_control else None)
        if len(cells.labels) < 2:
            raise DataError(f"{dataset.label}: obs/{options.pert_col} holds no perturbation beside the control")
        scale = find_scale(dataset, with_library=options.to_cp10k, threads=options.threads)
    except BaseException:
        dataset.close()
        raise
    return Opened(dataset=dataset, cells=cells, scale=scale)


def _list_some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _differences(what: str, pred_label: str, missing: list[str], extra: list[str], hint: str = "") -> DataError:
    parts = []
    if missing:
        parts.append(f"lacks {len(missing):,} of the truth's {what}: {_list_some(missing)}")
    if extra:
        parts.append(f"has {len(extra):,} {what} that the truth lacks: {_list_some(extra)}")
    return DataError(f"{pred_label}: {'; '.join(parts)}", hint=f"prediction and truth need the same {what}{hint}")


def match_genes(pred: np.ndarray, real: np.ndarray, pred_label: str) -> np.ndarray | None:
    """Return where each of the truth's genes stands in the prediction; None where the order is the same.

    Raises
    ------
    DataError
        With the genes that are missing and the ones that are extra.
    """
    if len(pred) == len(real) and bool(np.all(pred == real)):
        return None
    a, b = set(pred), set(real)
    missing, extra = [g for g in real if g not in a], [g for g in pred if g not in b]
    if missing or extra:
        raise _differences("genes", pred_label, missing, extra)
    if len(a) < len(pred) or len(b) < len(real):
        raise DataError(
            f"{pred_label}: gene names repeat, and stand in another order than in the truth",
            hint="make the names unique, or bring both files into one order",
        )
    position = {g: i for i, g in enumerate(pred)}
    return np.array([position[g] for g in real], np.int64)


def match_labels(pred: Cells, real: Cells, control: str, pred_label: str) -> None:
    """Check that both files have the same perturbations; the control is looked at elsewhere."""
    a, b = set(pred.labels) - {control}, set(real.labels) - {control}
    missing, extra = sorted(b - a), sorted(a - b)
    if missing or extra:
        hint = "; vcelltools sample TRUTH --by COLUMN --matching PRED writes the truth of those predicted"
        raise _differences("perturbations", pred_label, missing, extra, hint if missing and not extra else "")


def check_scales(pred: Opened, real: Opened, options: Options) -> list[str]:
    """Refuse two different scales; return warnings about counts that will be scaled apart."""
    if options.to_cp10k or pred.scale.empty or real.scale.empty:
        return []
    if pred.scale.kind != real.scale.kind:
        raise DataError(
            f"{pred.dataset.label} holds {pred.scale.kind} and {real.dataset.label} holds {real.scale.kind}: "
            "they are on different scales",
            hint="--to-cp10k brings both to log1p of counts per ten thousand",
        )
    if pred.scale.kind == "counts" and not options.allow_discrete:
        a, b = (float(np.median(s.scale.library_n)) for s in (pred, real))  # type: ignore[arg-type]
        if b > 0 and abs(a / b - 1) > 0.05:
            return [
                f"counts are scaled to each file's own median library size, {a:g} in the prediction and {b:g} in the "
                "truth; --to-cp10k scales both alike"
            ]
    return []


def get_bulk(side: Side, rules: Rules) -> np.ndarray:
    """Return (k, g) pseudobulks, rounded to the precision of the data; ours computes on with them in float64."""
    mean = side.sums.mean_kg.astype(side.dtype)
    return mean if rules.peer_precision else mean.astype(np.float64)


def controls_differ(pred: Side, real: Side) -> bool:
    """Tell whether the prediction's controls are other cells than the truth's, judged by their sums."""
    a, b = pred.sums, real.sums
    if a.size_k[pred.control] != b.size_k[real.control]:
        return True
    if not np.array_equal(a.nnz_kg[pred.control], b.nnz_kg[real.control]):
        return True
    return not np.allclose(a.sum_kg[pred.control], b.sum_kg[real.control], rtol=1e-6, atol=1e-6)


def make_pair(
    pred: Side,
    real: Side,
    pred_de: Effects | None,
    real_de: Effects | None,
    rules: Rules,
    threads: int,
    edistance: Any = None,
) -> Pair:
    """Put two sides together for the metrics."""
    a, b = get_bulk(pred, rules), get_bulk(real, rules)
    return Pair(
        names=real.names,
        genes=real.genes,
        pred_pg=a[pred.perts],
        real_pg=b[real.perts],
        pred_control_g=a[pred.control],
        real_control_g=b[real.control],
        pred_de=pred_de,
        real_de=real_de,
        rules=rules,
        edistance=edistance,
        threads=threads,
    )


def compute_all(pair: Pair, names: list[str]) -> ScoreTable:
    """Compute the metrics in order."""
    columns: dict[str, list[float | None]] = {}
    for name in names:
        columns |= compute(name, pair)
    return ScoreTable(names=pair.names, columns=columns)


def evaluate(
    pred_source: str | os.PathLike | AnnData,
    real_source: str | os.PathLike | AnnData | None,
    options: Options,
    *,
    truth: Truth | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Score a prediction.

    Parameters
    ----------
    truth
        The truth, reduced before (from a truth pack); else it is read from ``real_source``.
    """
    rules, names = options.check()
    given: dict[str, float | None] | None = None
    if options.baseline is not None:  # read before the long work
        given = {**read_aggregate(options.baseline)}
    with_pack = truth is not None
    if truth is None:
        if real_source is None:
            raise UsageError("no truth to score against", hint="--truth real.h5ad, or [score] truth in vcelltools.toml")
        truth = reduce_truth(real_source, options, progress=progress)
    real = truth.side
    threads = get_threads(options.threads)
    need_de = any(METRICS[m].kind in ("de", "extended") for m in names) or options.profile != "pds"
    warnings = list(truth.notes)
    try:
        opened = open_side(pred_source, options, need_control=not rules.force_controls)
    except BaseException:
        truth.close()
        raise
    try:
        match_labels(opened.cells, _as_cells(real), options.control, opened.dataset.label)
        order = match_genes(opened.dataset.var.index, real.genes, opened.dataset.label)
        if not with_pack:
            assert truth.opened is not None
            warnings += check_scales(opened, truth.opened, options)
        elif opened.scale.kind != real.scale and not (options.to_cp10k or opened.scale.empty):
            raise DataError(f"{opened.dataset.label} holds {opened.scale.kind}, the truth pack {real.scale}")
        pred, forced = _reduce_pred(opened, truth, options, rules, need_de, order, progress, real_source)
        warnings += forced + pred.notes
        if opened.cells.n_missing:
            warnings.append(f"{pred.label}: {opened.cells.n_missing:,} cells without a label were left out")
        pred_de, real_de = None, None
        if need_de:
            discrete = options.allow_discrete
            pred_de = make_effects(
                pred, rules, epsilon=options.epsilon, cpm_filter=options.cpm_filter, discrete=discrete
            )
            real_de = truth.effects
        edistance = None
        if "pearson_edistance" in names:
            edistance = lambda: (_edistance(opened, truth, pred, order, options, rules, progress), truth.edistance())  # noqa: E731
        pair = make_pair(pred, real, pred_de, real_de, rules, threads, edistance)
        table = compute_all(pair, names)
    finally:
        opened.dataset.close()
        truth.close()
    return assemble(
        pair=pair, table=table, truth=truth, pred=pred, rules=rules, names=names, options=options, baseline=given,
        warnings=warnings,
    )  # fmt: skip


def _as_cells(side: Side) -> Cells:
    return Cells(
        labels=side.labels, codes=np.zeros(0, np.int32), order=side.order, appearance=side.appearance, n_missing=0
    )


def _reduce_pred(
    opened: Opened,
    truth: Truth,
    options: Options,
    rules: Rules,
    test: bool,
    order: np.ndarray | None,
    progress: Progress,
    real_source: str | os.PathLike | AnnData | None,
) -> tuple[Side, list[str]]:
    """Reduce the prediction; with the truth's controls in place of its own where the rules say so and they differ."""
    real = truth.side
    read = options.read_options(rules, test=test)
    control = options.control
    warnings: list[str] = []
    own = control in opened.cells.labels
    if own:
        pred = reduce_side(
            opened.dataset, opened.cells, control, opened.scale, read, gene_order=order, progress=progress,
            phase="prediction",
        )  # fmt: skip
        if not rules.force_controls or not controls_differ(pred, real):
            return pred, warnings
        warnings.append(
            f"{opened.dataset.label}: its controls differ from the truth's, which were used in their place; "
            "--compat cell-eval scores them as they are"
        )
    else:
        warnings.append(f"{opened.dataset.label}: holds no controls; the truth's were used")
    if truth.opened is None and real_source is not None:
        truth.opened = open_side(real_source, options)
    if truth.opened is None:
        raise DataError(
            f"{opened.dataset.label}: its controls are not the truth's, and a truth pack does not keep them",
            hint="give --truth, or --compat cell-eval for controls as they are",
        )
    # the labels of the truth; the prediction's own controls are left out
    position = {v: i for i, v in enumerate(real.labels)}
    lookup = np.array([position.get(v, -1) if v != control else -1 for v in opened.cells.labels] + [-1], np.int32)
    cells = Cells(
        labels=real.labels,
        codes=lookup[opened.cells.codes],
        order=tuple(v for v in opened.cells.order if v != control),
        appearance=tuple(v for v in opened.cells.appearance if v != control),
        n_missing=opened.cells.n_missing,
    )
    source = truth.opened
    part = np.where(source.cells.codes == real.control, np.int32(real.control), np.int32(-1))
    pred = reduce_side(
        opened.dataset,
        cells,
        control,
        opened.scale,
        read,
        gene_order=order,
        borrowed=(source.dataset, part, source.scale),
        progress=progress,
        phase="prediction with the truth's controls",
    )
    return pred, warnings


def _edistance(
    opened: Opened,
    truth: Truth,
    pred: Side,
    order: np.ndarray | None,
    options: Options,
    rules: Rules,
    progress: Progress,
) -> np.ndarray:
    from vcelltools.scoring.edistance import energy_distances

    borrowed = None
    if rules.force_controls and truth.opened is not None:
        own = options.control in opened.cells.labels
        same = own and int((opened.cells.codes == opened.cells.labels.index(options.control)).sum()) == int(
            truth.side.sums.size_k[truth.side.control]
        )
        if not same or controls_differ(pred, truth.side):
            borrowed = truth.opened
    return energy_distances(
        opened.dataset, opened.cells, opened.scale, options.control, raw=options.allow_discrete,
        cp10k=options.to_cp10k, threads=options.threads, control_from=borrowed,
        gene_order=order if borrowed is not None else None, progress=progress,
    )  # fmt: skip


@dataclass(kw_only=True)
class Truth:
    """The truth, reduced once, with the baseline that belongs to it.

    Attributes
    ----------
    side, effects
        The reduced file and its table (None without differential expression).
    opened
        The open file; None where the truth came from a pack.
    base_value_g, base_u_pg, base_p_pg
        The mean baseline: its one profile, and how that ranks among the controls.
    base_means
        Metric -> mean of the baseline's scores; see :meth:`score_baseline`.
    energy_p
        Energy distances, once they were computed.
    ceiling
        The split-half ceiling, where it was asked for.
    from_pack
        Whether it came from a pack, which keeps no p-values.
    """

    side: Side
    effects: Effects | None
    opened: Opened | None
    options: Options
    base_u_pg: np.ndarray | None = None
    base_p_pg: np.ndarray | None = None
    base_value_g: np.ndarray | None = None
    energy_p: np.ndarray | None = None
    ceiling: Ceiling | None = None
    base_means: dict[str, float | None] | None = None
    from_pack: bool = False
    notes: list[str] = field(default_factory=list)

    def score_baseline(self, rules: Rules, names: list[str]) -> dict[str, float | None]:
        """Return the mean scores of the mean baseline, computed once."""
        if self.base_means is None:
            from vcelltools.scoring.baseline import baseline_table

            # every cell of the baseline is the same, so its energy distances are one number and have no correlation
            table = baseline_table(self, rules, [n for n in names if n != "pearson_edistance"], self.options)
            self.base_means = {k: v["mean"] for k, v in table.aggregate(skip_nan=rules.null_empty).items()}
        return self.base_means

    def edistance(self) -> np.ndarray:
        """Return the truth's energy distances, computed once."""
        if self.energy_p is None:
            from vcelltools.scoring.edistance import energy_distances

            if self.opened is None:
                raise DataError("the truth pack holds no energy distances", hint="make it with --profile full")
            o = self.opened
            self.energy_p = energy_distances(
                o.dataset, o.cells, o.scale, self.options.control, raw=self.options.allow_discrete,
                cp10k=self.options.to_cp10k, threads=self.options.threads,
            )  # fmt: skip
        return self.energy_p

    def close(self) -> None:
        """Close the file; the reduced numbers stay."""
        if self.opened is not None:
            self.opened.dataset.close()


def reduce_truth(source: str | os.PathLike | AnnData, options: Options, *, progress: Progress = SILENT) -> Truth:
    """Read the truth; the file stays open for its controls and energy distances."""
    from vcelltools.scoring.baseline import get_mean_profile

    rules, names = options.check()
    opened = open_side(source, options)
    try:
        need_de = any(METRICS[m].kind in ("de", "extended") for m in names) or options.profile != "pds"
        buckets: list[GeneBuckets] = []
        read = options.read_options(rules, test=need_de)
        side = reduce_side(
            opened.dataset, opened.cells, options.control, opened.scale, read, keep=buckets, progress=progress,
            phase="truth",
        )  # fmt: skip
        notes = list(side.notes)
        if opened.cells.n_missing:
            notes.append(f"{side.label}: {opened.cells.n_missing:,} cells without a label were left out")
        value = get_mean_profile(side)
        truth = Truth(side=side, effects=None, opened=opened, options=options, base_value_g=value, notes=notes)
        if need_de:
            truth.effects = make_effects(
                side, rules, epsilon=options.epsilon, cpm_filter=options.cpm_filter, discrete=options.allow_discrete
            )
            u, _, p = buckets[0].rank_constant(value, side.sums.size_k[side.perts], side.control, side.sums)
            truth.base_u_pg, truth.base_p_pg = u, p
        del buckets
        if options.ceiling:
            from vcelltools.scoring.ceiling import split_half_ceiling

            truth.ceiling = split_half_ceiling(opened, options, rules, names, progress=progress)
    except BaseException:
        opened.dataset.close()
        raise
    return truth


def assemble(
    *,
    pair: Pair,
    table: ScoreTable,
    truth: Truth,
    pred: Side,
    rules: Rules,
    names: list[str],
    options: Options,
    baseline: dict[str, float | None] | None,
    warnings: list[str],
) -> Result:
    """Aggregate, put baseline and ceiling beside the values, and judge."""
    aggregate = table.aggregate(skip_nan=rules.null_empty)
    base = truth.score_baseline(rules, names) if baseline is None else baseline
    n_perts = len(pair.names)
    n_empty = int((pair.real_de.significant_pg.sum(axis=1) == 0).sum()) if pair.real_de is not None else None
    if n_empty:
        treated = "have no overlap and are left out of its mean" if rules.null_empty else "count as an overlap of 0"
        warnings.append(f"{n_empty} of {n_perts} perturbations have no true DE gene; they {treated}")
    components: dict[str, Component] = {}
    for column in table.columns:
        info = METRICS.get(column)
        if info is None or column in COUNT_COLUMNS or info.best is None:
            continue
        top = truth.ceiling.values.get(column) if truth.ceiling is not None else None
        components[column] = Component.make(
            column, table.values(column), aggregate[column], base.get(column), top, info.best, options.bootstrap
        )
        n_nan = int(np.isnan([v for v in table.columns[column] if v is not None]).sum())
        if n_nan and rules.null_empty:
            warnings.append(f"{column}: {n_nan} of {n_perts} perturbations are undefined (NaN) and left out")
    return Result(
        compat=rules.name,
        source=rules.source,
        profile=options.profile,
        table=table,
        aggregate=aggregate,
        components=components,
        skip_undefined=rules.null_empty,
        n_without_de=n_empty,
        pair=pair,
        pred=pred,
        real=truth.side,
        ceiling=truth.ceiling,
        control=options.control,
        truth=truth,
        order_by="appearance" if rules.global_bh else "order",
        from_pack=truth.from_pack,
        settings={
            "pert_col": options.pert_col,
            "control": options.control,
            "epsilon": options.epsilon,
            "cpm_filter": options.cpm_filter,
            "allow_discrete": options.allow_discrete,
            "to_cp10k": options.to_cp10k,
            "skip_metrics": list(options.skip),
            "ceiling_seed": options.ceiling_seed if options.ceiling else None,
            "baseline": str(options.baseline) if options.baseline else "mean",
        },
        warnings=warnings,
    )
