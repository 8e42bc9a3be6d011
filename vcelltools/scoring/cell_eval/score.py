"""Score a prediction under the rules of cell-eval, of the 2025 challenge, or our own."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, find_pooled, read_contexts
from vcelltools.differential.reduce import Reduced
from vcelltools.errors import DataError, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.cell_eval.de_table import DeTable, get_columns
from vcelltools.scoring.cell_eval.metrics import Pair, compute_all, make_pair
from vcelltools.scoring.cell_eval.options import Opened, Options, check_scales, open_file
from vcelltools.scoring.cell_eval.pack import MAGIC, get_settings, pack_truth, unpack_truth
from vcelltools.scoring.cell_eval.rules import COUNT_COLUMNS, GLOBAL_METRICS, METRICS, get_metrics
from vcelltools.scoring.cell_eval.truth import Truth, reduce_truth
from vcelltools.scoring.gaming import Check, Evidence, check_gaming
from vcelltools.scoring.matching import match_contexts, match_genes, match_perturbations, name_context
from vcelltools.scoring.result import (
    Ceiling,
    Component,
    ContextScore,
    Result,
    average_contexts,
    average_scores,
    bootstrap_interval,
    get_unclipped,
)
from vcelltools.scoring.tables import Columns, Statistics, read_aggregate, stack_tables
from vcelltools.version import __version__

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, kw_only=True)
class CellEvalScore(ContextScore):
    """The score of a prediction in one context.

    Attributes
    ----------
    pair
        Pseudobulks, effects and tables of both sides, for the report.
    pred, real
        The reduced prediction and truth.
    n_without_de
        Number of perturbations without a true DE gene; None without differential expression.
    """

    pair: Pair
    pred: Reduced
    real: Reduced
    n_without_de: int | None
    options: Options

    @property
    def has_de(self) -> bool:
        """Whether there are tables of differential expression."""
        return self.pair.pred_de is not None

    def get_de(self, side: str) -> tuple[Columns, int, list[str]]:
        """Return the table of differential expression of ``"pred"`` or ``"real"``, its rows, and the texts in it."""
        reduced: Reduced = getattr(self, side)
        table: DeTable = getattr(self.pair, f"{side}_de")
        order = reduced.appearance if self.options.rules.global_bh else reduced.order
        return get_columns(table, reduced, order, self.options.control)


class CellEval:
    """The rule sets ``ours``, ``cell-eval`` and ``vcc2025``; see :class:`vcelltools.scoring.rule_set.RuleSet`."""

    magic = MAGIC

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self.settings = get_settings(self.options)
        self._given: dict[str, float] | None = None
        if self.options.baseline is not None:  # read before the long computation
            self._given = read_aggregate(self.options.baseline)

    def read_truth(self, source: str | os.PathLike | AnnData, progress: Progress = SILENT) -> list[Any]:
        """Read and reduce the truth of every context."""
        opened = open_file(source, self.options, name="truth")
        try:
            return [self._reduce_truth(part, name, progress) for name, part in self._split(opened).items()]
        except BaseException:
            opened.dataset.close()
            raise

    def _reduce_truth(self, opened: Opened, context: str, progress: Progress) -> Any:
        return reduce_truth(opened, context, progress=progress)

    def _split(self, truth: Opened) -> dict[str, Opened]:
        column = self.options.context_col
        if column is None:
            return {"": truth}
        names, context_n = read_contexts(truth.dataset, column)
        parts = {}
        for i, name in enumerate(names):
            cells = truth.cells.keep(context_n == i)
            where = name_context(truth.dataset.label, name)
            cells.need_control(self.options.control, f"{where}: no cell of obs/{self.options.pert_col}")
            parts[name] = replace(truth, cells=cells)
        return parts

    def score(
        self,
        pred: str | os.PathLike | AnnData,
        truths: Sequence[Any],
        truth: str | os.PathLike | AnnData | None = None,
        progress: Progress = SILENT,
    ) -> Result:
        """Score a prediction; ``truth`` is the file behind the truths of a pack, if available."""
        o = self.options
        opened: Opened | None = None
        try:
            opened = open_file(pred, o, name="prediction", need_control=not o.rules.force_controls)
            data, names = opened.dataset, [t.context for t in truths]
            warnings = [w for t in truths for w in t.notes]
            if o.context_col is None:
                warnings += [
                    w for f in (truths[0].opened, opened) if f and (w := find_pooled(f.dataset, f.cells, o.control))
                ]
            if opened.cells.n_missing:
                warnings.append(f"{data.label}: {opened.cells.n_missing:,} cells without a label were excluded")
            if truth is not None:
                for t in truths:
                    t.reopen = lambda name=t.context: self._split(open_file(truth, o, name="truth"))[name]
            scores = []
            for t, wanted in zip(truths, match_contexts(data, names, o.context_col).values(), strict=True):
                part = opened if o.context_col is None else replace(opened, cells=opened.cells.keep(wanted))
                scores.append(self._score_context(part, t, warnings, progress))
        finally:
            if opened is not None:
                opened.dataset.close()
            for t in truths:
                t.close()
        return self._assemble(scores, truths, data.label, warnings)

    def _score_context(self, opened: Opened, truth: Any, warnings: list[str], progress: Progress) -> Any:
        o, real, data = self.options, truth.reduced, opened.dataset
        where = name_context(data.label, truth.context)
        match_perturbations(opened.cells.labels, real.labels, o.control, where)
        order = match_genes(data.var.index, real.genes, where)
        if not truth.from_pack:
            assert truth.opened is not None
            warnings += check_scales(opened, truth.opened)
        elif opened.scale.kind != real.scale.kind and not (o.to_cp10k or opened.scale.empty):
            raise DataError(f"{data.label} holds {opened.scale.kind}, but the truth pack holds {real.scale.kind}")
        pred = self._reduce_pred(opened, truth, order, warnings, progress)
        warnings += pred.notes
        pred_de = o.make_de_table(pred) if o.needs_de else None

        def get_energies() -> tuple[np.ndarray, np.ndarray]:
            borrowed = self._borrows_controls(opened, pred, truth)
            how: dict[str, Any] = {"control_from": truth.opened, "gene_order": order} if borrowed else {}
            return opened.get_energy(progress=progress, **how), truth.get_energy()

        real_de = truth.effects if o.needs_de else None
        pair = make_pair(pred, real, pred_de, real_de, o.rules, get_threads(o.threads), get_energies)
        return self._judge(pair, pred, truth, warnings)

    def _borrows_controls(self, opened: Opened, pred: Reduced, truth: Truth) -> bool:
        o, real = self.options, truth.reduced
        if not o.rules.force_controls or truth.opened is None:
            return False
        own = o.control in opened.cells.labels
        same = own and int(opened.cells.size_k[opened.cells.labels.index(o.control)]) == int(
            real.sums.size_k[real.control]
        )
        return not same or controls_differ(pred, real)

    def _reduce_pred(
        self, opened: Opened, truth: Truth, order: np.ndarray | None, warnings: list[str], progress: Progress
    ) -> Reduced:
        """Reduce the prediction, with the controls of the truth if the rules require them and they differ."""
        o, real, cells, label = self.options, truth.reduced, opened.cells, opened.dataset.label
        how: dict[str, Any] = {"test": o.needs_de, "gene_order": order, "progress": progress}
        if o.control in cells.labels:
            pred = opened.reduce(phase="prediction", **how)
            if not o.rules.force_controls or not controls_differ(pred, real):
                return pred
            warnings.append(
                f"{label}: its controls differ from those of the truth, which were used instead; "
                f"{spell('compat', 'cell-eval')} uses its own controls"
            )
        else:
            warnings.append(f"{label} holds no controls, so those of the truth were used")
        source = truth.get_opened()
        if source is None:
            raise DataError(
                f"{label}: its controls differ from those of the truth, which a truth pack does not keep",
                hint=f"give {spell('truth')}, or use {spell('compat', 'cell-eval')} with the controls of the "
                "prediction",
            )
        # the labels of the truth, without the controls of the prediction
        position = {v: i for i, v in enumerate(real.labels) if v != o.control}
        lookup = np.array([position.get(v, -1) for v in cells.labels] + [-1], np.int32)
        relabelled = Cells(
            labels=real.labels,
            codes=lookup[cells.codes],
            order=tuple(v for v in cells.order if v != o.control),
            appearance=tuple(v for v in cells.appearance if v != o.control),
            n_missing=cells.n_missing,
        )
        control = source.cells.labels.index(o.control)
        part = np.where(source.cells.codes == control, np.int32(real.control), np.int32(-1))
        return opened.reduce(
            cells=relabelled, borrowed=(source.dataset, part, source.scale),
            phase="prediction with the truth's controls", **how,
        )  # fmt: skip

    def _judge(self, pair: Pair, pred: Reduced, truth: Truth, warnings: list[str]) -> CellEvalScore:
        """Compute the metrics, with the baseline and the ceiling of their means."""
        o, rules = self.options, self.options.rules
        table = compute_all(pair, o.names)
        aggregate = table.aggregate(skip_nan=rules.null_empty)
        base = truth.score_baseline() if self._given is None else self._given
        n_perts, n_empty = len(pair.names), None
        if pair.real_de is not None:
            n_empty = int((pair.real_de.significant_pg.sum(axis=1) == 0).sum())
        if n_empty:
            treated = (
                "have no overlap and are excluded from its mean" if rules.null_empty else "count as an overlap of 0"
            )
            warnings.append(f"{n_empty} of {n_perts} perturbations have no true DE gene; they {treated}")
        components: dict[str, Component] = {}
        for column in table.columns:
            info = METRICS.get(column)
            if info is None or column in COUNT_COLUMNS or info.best is None:
                continue
            top = truth.ceiling.values.get(column) if truth.ceiling is not None else None
            components[column] = make_component(
                column, table.values(column), aggregate[column], base.get(column), top, info.best, o.bootstrap
            )
            n_nan = int(np.isnan([v for v in table.columns[column] if v is not None]).sum())
            if n_nan and rules.null_empty:
                warnings.append(f"{column}: {n_nan} of {n_perts} perturbations are undefined (NaN) and were excluded")
        if n_perts == 1:
            warnings.append(
                f"{name_context(pred.label, truth.context)}: there is only one perturbation, so a discrimination "
                "score of 1 "
                "has no meaning, and correlations over perturbations are undefined"
            )
        for m, c in components.items():
            if c.value is None or math.isnan(c.value):
                warnings.append(f"{m}: it is undefined for every perturbation, so it has no score")
            elif c.score_unclipped is None or not math.isfinite(c.score_unclipped):
                warnings.append(f"{m}: the baseline has the value {c.baseline}, so the metric cannot be scaled")
        # the official rules average whatever there is
        problem = find_problem(n_perts, components) if rules.null_empty else ""
        return CellEvalScore(
            context=truth.context,
            components=components,
            avg_score=None if problem else average_components(components, rules.null_empty),
            problem=problem,
            table=table,
            checks=check_pair(pair, pred, truth.reduced),
            pair=pair,
            pred=pred,
            real=truth.reduced,
            n_without_de=n_empty,
            options=o,
        )

    def _assemble(self, scores: list[Any], truths: Sequence[Any], pred_label: str, warnings: list[str]) -> Result:
        o, rules = self.options, self.options.rules
        table = stack_tables({s.context: s.table for s in scores})
        n_without = [s.n_without_de for s in scores if s.n_without_de is not None]
        details: dict[str, Any] = {
            "n_perturbations": len(table.names),
            "n_without_de": sum(n_without) if n_without else None,
            "source": rules.source,
            "settings": {
                **{k: v for k, v in get_settings(o).items() if k not in ("profile", "compat", "context_col")},
                "allow_discrete": o.allow_discrete and any(t.reduced.scale.kind == "counts" for t in truths),
                "skip_metrics": [m for m in o.skip if m in get_metrics(o.profile)],
                "ceiling_seed": o.ceiling_seed if o.ceiling else None,
                "baseline": str(o.baseline) if o.baseline else "mean",
            },
            "files": {"pred": pred_label, "truth": truths[0].label},
            "version": __version__,
        }  # fmt: skip
        if o.context_col is not None:
            details["settings"]["context_col"] = o.context_col
        if rules.null_empty and details["n_without_de"]:
            with_empty = {
                k: float(np.nan_to_num(table.values(k)).mean())
                for k in table.columns
                if k.startswith(("overlap_at_", "precision_at_"))
            }
            details |= {"with_perturbations_without_de": with_empty} if with_empty else {}
        average, problems = average_scores(scores), [(s.context, s.problem) for s in scores if s.problem]
        warnings += [f"{name_context(pred_label, c)}: no average score: {text}" for c, text in problems]
        return Result(
            compat=rules.name,
            profile=o.profile,
            contexts=tuple(scores),
            components=average_contexts(scores),
            avg_score=average,
            problem=f"No average: {problems[0][1]}." if average is None and problems else "",
            table=table,
            aggregate=table.aggregate(skip_nan=rules.null_empty),
            details=details,
            from_pack=truths[0].from_pack,
            ceiling=stack_ceilings(truths),
            warnings=list(dict.fromkeys(warnings)),
        )

    def pack(self, truth: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the content of a truth pack for a truth."""
        truth.score_baseline()
        return pack_truth(truth)

    def unpack(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
        """Return a truth of a pack."""
        return unpack_truth(header, arrays, self.options)


def controls_differ(pred: Reduced, real: Reduced) -> bool:
    """Return whether the controls of the prediction and of the truth are different cells, according to their sums."""
    a, b = pred.sums, real.sums
    if a.size_k[pred.control] != b.size_k[real.control]:
        return True
    if not np.array_equal(a.nnz_kg[pred.control], b.nnz_kg[real.control]):
        return True
    return not np.allclose(a.sum_kg[pred.control], b.sum_kg[real.control], rtol=1e-6, atol=1e-6)


def make_component(
    name: str,
    values: np.ndarray,
    stats: Statistics,
    baseline: float | None,
    ceiling: float | None,
    best: float,
    n_bootstrap: int,
) -> Component:
    """Return a component from the column of a metric and its statistics.

    Its score is (u − b)/(1 − b) if the best value is one, and 1 − u/b if it is zero, clipped below at zero.
    """
    value, unclipped = stats["mean"], None
    if value is not None and baseline is not None:
        unclipped = float(get_unclipped(np.float64(value), baseline, best))
    some = values[~np.isnan(values)]
    return Component(
        name=name,
        value=value,
        baseline=baseline,
        ceiling=ceiling,
        score=None if unclipped is None else (0.0 if math.isnan(unclipped) else max(unclipped, 0.0)),
        score_unclipped=unclipped,
        ci95=bootstrap_interval(some, n_bootstrap) if name not in GLOBAL_METRICS else None,
        n=len(some),
        best=best,
    )


def find_problem(n_perturbations: int, components: dict[str, Component]) -> str:
    """Return why a context's metrics have no average that means something, or ""."""
    if n_perturbations == 1:
        return "a single perturbation cannot be told from others"
    undefined = [m for m, c in components.items() if c.value is None or math.isnan(c.value)]
    if undefined:
        return (
            f"{', '.join(undefined)} {'is' if len(undefined) == 1 else 'are'} undefined, and the mean of the others is "
            f"not that of the profile ({spell('skip')} leaves metrics out)"
        )
    return ""


def average_components(components: dict[str, Component], skip_undefined: bool) -> float | None:
    """Return the mean score; ``skip_undefined`` excludes metrics that are undefined for any prediction."""
    scores = [
        c.score
        for c in components.values()
        if c.score is not None
        and not (skip_undefined and (c.score_unclipped is None or not math.isfinite(c.score_unclipped)))
    ]
    return float(np.mean(scores)) if scores else None


def stack_ceilings(truths: Sequence[Truth]) -> Ceiling | None:
    """Return the ceiling of all contexts: their tables, and the means of their values."""
    if truths[0].ceiling is None or len(truths) == 1:
        return truths[0].ceiling
    ceilings = {t.context: t.ceiling for t in truths if t.ceiling is not None}
    names = dict.fromkeys(k for c in ceilings.values() for k in c.values)
    return Ceiling(
        table=stack_tables({name: c.table for name, c in ceilings.items()}),
        values={k: float(np.mean([c.values.get(k, math.nan) for c in ceilings.values()])) for k in names},
        n_dropped=sum(c.n_dropped for c in ceilings.values()),
    )


def check_pair(pair: Pair, pred: Reduced, real: Reduced) -> list[Check]:
    """Return the gaming panel, from the pseudobulks and tables of both sides."""
    real_de, pred_de = pair.real_de, pair.pred_de
    has_de = real_de is not None and pred_de is not None
    return check_gaming(
        Evidence(
            real_pg=np.asarray(pair.real_pg, float),
            pred_pg=np.asarray(pair.pred_pg, float),
            real_control_g=np.asarray(pair.real_control_g, float),
            pred_control_g=np.asarray(pair.pred_control_g, float),
            real_spread_p=None if real.spread_k is None else real.spread_k[real.perts],
            pred_spread_p=None if pred.spread_k is None else pred.spread_k[pred.perts],
            real_significant_p=real_de.significant_pg.sum(axis=1) if has_de else None,  # type: ignore[union-attr]
            pred_significant_p=pred_de.significant_pg.sum(axis=1) if has_de else None,  # type: ignore[union-attr]
            real_copied=real.copied_share,
            pred_copied=pred.copied_share,
        )
    )
