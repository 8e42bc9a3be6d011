"""Scoring by the 2026 rules: six metrics between a mean-response baseline (0) and a replicate (1).

The definitions are those of cell-eval2's ``vcc2026`` preset (rule version 3). Both sides are compared with the
truth's controls; contexts are scored apart and averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import Dataset
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.gaming import Check, Evidence, check_gaming
from vcelltools.scoring.genemajor import GeneMajor, make_tables, read_part, take_census
from vcelltools.scoring.match26 import (
    check_groups,
    get_contexts,
    get_genes,
    get_labels,
    match_prediction,
    opened,
    resolve_targets,
)
from vcelltools.scoring.metrics26 import (
    EXPRESSION,
    LOWER_IS_BETTER,
    METRICS,
    NMAE,
    Values,
    align,
    compare,
    finite_mean,
    get_nmae,
    get_significant,
)
from vcelltools.scoring.rules import RULES_2026, Rules2026
from vcelltools.scoring.sides26 import TARGET_SUM, Side, make_side

if TYPE_CHECKING:
    import os

    import pandas as pd
    from anndata import AnnData

N_SPLITS = 5
NMAE_FLOOR = -6.0
N_BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class Component:
    """One metric of the score; fields as in ``score.json``."""

    value: float
    baseline: float
    ceiling: float
    score: float
    score_unclipped: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The truth of one context, ready to score predictions against.

    Attributes
    ----------
    context
        The context's name, "" where the data has none.
    genes, labels
        Gene names, and the perturbations in label order.
    target_p, name_rank_g
        Position of each perturbation's own gene (−1 none), rank of each gene's name.
    side
        Profiles and DE of the truth.
    controls
        The counts of the control cells.
    library
        Median counts of a perturbed cell.
    sum_kg
        (k, g) counts summed over the cells of each group.
    baseline
        The metrics of the mean response (the 0 end), or None where it was not asked for.
    ceiling
        Metric → value of the replicate (the 1 end).
    problem
        Why there is no baseline or ceiling, or "".
    warnings
        What the user should know of this truth.
    """

    context: str
    genes: np.ndarray
    labels: np.ndarray
    target_p: np.ndarray
    name_rank_g: np.ndarray
    side: Side
    controls: GeneMajor
    library: float
    sum_kg: np.ndarray
    baseline: dict[str, float]
    ceiling: dict[str, float]
    problem: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContextScore:
    """A prediction's score in one context, with what the report draws."""

    context: str
    labels: np.ndarray
    genes: np.ndarray
    values: Values
    components: dict[str, Component]
    avg_score: float
    real: Side
    pred: Side
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Score2026:
    """The result of :func:`score_vcc2026`.

    Attributes
    ----------
    components
        Metric → its value, both ends and score; means over the contexts.
    avg_score
        The plain mean of the six scores, averaged over contexts; NaN where ``problem`` says why.
    contexts
        The contexts, in name order.
    continuity
        Whether the rank test was corrected for continuity.
    problem
        Why there is no score although there are values, or "".
    warnings
        What the user should know.
    """

    components: dict[str, Component]
    avg_score: float
    contexts: tuple[ContextScore, ...]
    continuity: bool
    rules: Rules2026
    problem: str = ""
    warnings: tuple[str, ...] = ()

    def require(self) -> Score2026:
        """Return itself; raise a :class:`DataError` where there are values but no score."""
        if self.problem:
            raise DataError(self.problem)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return what ``score.json`` holds."""
        return {
            "compat": "vcc2026",
            "profile": "vcc",
            "rules": self.rules.version,
            "continuity": self.continuity,
            "components": {m: _component_json(c) for m, c in self.components.items()},
            "avg_score": self.avg_score,
            "contexts": {
                c.context: {
                    "avg_score": c.avg_score,
                    "components": {m: _component_json(k) for m, k in c.components.items()},
                }
                for c in self.contexts
                if c.context
            },
            "gaming": [
                asdict(k) | ({"context": c.context} if c.context else {}) for c in self.contexts for k in c.checks
            ],
            "problem": self.problem or None,
            "warnings": list(self.warnings),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return ``results.csv`` as a DataFrame indexed by perturbation."""
        import pandas as pd

        head, rows = self.to_rows()
        return pd.DataFrame(rows, columns=head).set_index("perturbation")

    def write(self, folder: str | os.PathLike, *, force: bool = False) -> dict[str, Any]:
        """Write the tables and ``score.json``; return their paths by name."""
        from vcelltools.scoring.run26 import write_result

        return write_result(self, folder, force=force)

    def to_rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the header and rows of ``results.csv``: a row a perturbation, a column a metric."""
        with_context = any(c.context for c in self.contexts)
        per = [m for m in METRICS if m != EXPRESSION]
        parts = ["expr_mse_unbiased_capped", "expr_distance_unbiased"]
        rows = [
            [label, *([c.context] if with_context else []), *[float(c.values.per[m][i]) for m in per],
             float(c.values.error_p[i]), float(c.values.distance_p[i])]
            for c in self.contexts
            for i, label in enumerate(c.labels)
        ]  # fmt: skip
        return ["perturbation", *(["context"] if with_context else []), *per, *parts], rows


def _component_json(c: Component) -> dict[str, Any]:
    return {
        "value": c.value,
        "baseline": c.baseline,
        "ceiling": c.ceiling,
        "score": c.score,
        "score_unclipped": c.score_unclipped,
        "ci95": list(c.ci95),
        "n": c.n,
    }


def score_vcc2026(
    pred: str | os.PathLike | AnnData | Dataset,
    truth: str | os.PathLike | AnnData | Dataset | list[Truth],
    *,
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    context_col: str = "context",
    layer: str | None = None,
    target_gene_map: Mapping[str, str | None] | None = None,
    continuity: bool = True,
    anchors: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Score2026:
    """Score a prediction by the 2026 rules.

    Parameters
    ----------
    pred
        Predicted counts. Its control cells, if any, are not read: the truth's serve both sides.
    truth
        Measured counts with controls, or what :func:`make_truth` returned for them.
    context_col
        Column of contexts; the data is one context where the truth lacks it.
    target_gene_map
        Perturbation → its own gene, or None where it has none; other labels are matched by name.
    continuity
        Whether the rank test takes the continuity correction.
    anchors
        Whether to compute the two ends; without them there are values and no scores.

    Raises
    ------
    DataError
        When the files disagree in genes, perturbations or contexts, a matrix does not hold counts, no perturbation
        resolves to a gene, or the truth shows no effect.
    """
    if isinstance(truth, list):
        truths = truth
    else:
        truths = make_truth(
            truth,
            pert_col=pert_col,
            control=control,
            context_col=context_col,
            layer=layer,
            target_gene_map=target_gene_map,
            continuity=continuity,
            anchors=anchors,
            threads=threads,
            progress=progress,
        )
    with opened(pred, layer) as data:
        parts = match_prediction(data, truths, pert_col, control, context_col)
        census = take_census(
            data,
            parts.part_n,
            len(truths),
            what="prediction",
            max_total=RULES_2026.max_counts_per_cell,
            threads=threads,
            progress=progress,
        )
        scores = []
        warnings = list(parts.warnings)
        for i, t in enumerate(truths):
            code = np.concatenate([parts.code_n[census.part_n == i], np.zeros(t.controls.n_cells, np.int32)])
            counts = read_part(
                data, census, i, gene_order=parts.gene_order, behind=t.controls, threads=threads, progress=progress
            )
            library = float(np.median(counts.library[: -t.controls.n_cells]))
            (tables,) = make_tables(
                counts, [(code, 1)], len(t.labels) + 1, target_sum=TARGET_SUM, threads=threads, progress=progress
            )
            del counts
            scores.append(_score_context(t, make_side(tables, continuity=continuity), library, warnings))
    problem = next((t.problem for t in truths if t.problem), "")
    warnings = [w for t in truths for w in t.warnings] + warnings
    avg = finite_mean(np.array([s.avg_score for s in scores])) if not problem else float("nan")
    return Score2026(
        components=_average(scores),
        avg_score=avg,
        contexts=tuple(scores),
        continuity=continuity,
        rules=RULES_2026,
        problem=problem,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def make_truth(
    truth: str | os.PathLike | AnnData | Dataset,
    *,
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    context_col: str = "context",
    layer: str | None = None,
    target_gene_map: Mapping[str, str | None] | None = None,
    continuity: bool = True,
    anchors: bool = True,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[Truth]:
    """Prepare the truth of every context: profiles, DE, and the two ends of the scale."""
    with opened(truth, layer) as data:
        labels_n = get_labels(data, pert_col, "truth")
        contexts, context_n = get_contexts(data, context_col)
        genes = get_genes(data, "truth")
        census = take_census(
            data,
            context_n,
            len(contexts),
            what="truth",
            max_total=RULES_2026.max_counts_per_cell,
            threads=threads,
            progress=progress,
        )
        out = []
        for i, context in enumerate(contexts):
            in_n = labels_n[context_n == i]
            labels = np.array(sorted(set(in_n) - {control}), dtype=object)
            where = f"{data.label}{f', context {context}' if context else ''}"
            check_groups(in_n, labels, control, where, pert_col)
            order = {label: k + 1 for k, label in enumerate(labels)} | {control: 0}
            code = np.array([order[label] for label in in_n], np.int32)
            target_p, warnings = resolve_targets(labels, genes, target_gene_map, where)
            read = partial(read_part, data, census, i, threads=threads, progress=progress)
            out.append(
                _make_context(
                    read, code, labels, control, genes, target_p, context, warnings,
                    continuity=continuity, anchors=anchors, threads=threads, progress=progress,
                )
            )  # fmt: skip
    return out


def _make_context(
    read, code, labels, control, genes, target_p, context, warnings, *, continuity, anchors, threads, progress
) -> Truth:
    n_groups = len(labels) + 1
    name_rank_g = get_name_ranks(genes)
    sizes = np.bincount(code, minlength=n_groups)
    thin = [str(label) for label, n in zip(labels, sizes[1:], strict=True) if n < 2]
    splits = []
    if anchors and not thin and sizes[0] >= 2:
        sorted_groups = np.argsort(np.array([control, *labels], dtype=str), kind="stable")
        splits = [split_halves(code, sorted_groups, seed) for seed in _get_seeds()]
    counts: GeneMajor = read()  # only here, so that it can go before the baseline is made
    library = float(np.median(counts.library[code > 0]))
    tables = make_tables(
        counts,
        [(code, 1), *[(s, 2) for s in splits]],
        n_groups,
        target_sum=TARGET_SUM,
        threads=threads,
        progress=progress,
    )
    full = next(tables)
    side = make_side(full, continuity=continuity)
    if (target_p >= 0).any() and not np.isin(target_p[target_p >= 0], side.de.genes).any():
        raise DataError(
            f"none of the {len(labels)} perturbations' genes passes the DE filter (controls' mean CPM above 5)",
            hint="the metrics leave each perturbation's own gene out, and can find none of them",
        )
    controls = counts.take(np.flatnonzero(code == 0))
    del counts
    baseline: dict[str, float] = {}
    ceiling: dict[str, float] = {}
    problem = ""
    if anchors:
        if thin or sizes[0] < 2:
            problem = (
                f"no replicate to scale by: {len(thin) or 1} groups have a single cell "
                f"({', '.join(thin[:5]) or control}), and cannot be split in halves"
            )
        else:
            try:
                ceiling = get_ceiling(tables, side, target_p, name_rank_g, continuity=continuity)
                tables.close()
                values = score_baseline(
                    full.sum_kg, full.size_k, controls, side, target_p, name_rank_g,
                    continuity=continuity, threads=threads, progress=progress,
                )  # fmt: skip
                baseline = values.means()
            except DataError as e:
                problem = f"no scale: {e.message}"
        if not problem:
            problem = find_problem(baseline, ceiling)
    return Truth(
        context=context,
        genes=genes,
        labels=labels,
        target_p=target_p,
        name_rank_g=name_rank_g,
        side=side,
        controls=controls,
        library=library,
        sum_kg=full.sum_kg,
        baseline=baseline,
        ceiling=ceiling,
        problem=problem,
        warnings=tuple(warnings),
    )


def get_name_ranks(genes: np.ndarray) -> np.ndarray:
    """Return (g,) the rank of each gene's name, which decides ties."""
    out = np.empty(len(genes), np.int64)
    out[np.argsort(genes.astype(str), kind="stable")] = np.arange(len(genes))
    return out


def _get_seeds() -> list[int]:
    return [int(s) for s in np.random.SeedSequence(0).generate_state(N_SPLITS)]


def split_halves(code: np.ndarray, sorted_groups: np.ndarray, seed: int) -> np.ndarray:
    """Return a labeling of two sets: two halves of every group, drawn in the order ``sorted_groups`` by one generator.

    The cell that an odd group has over is left out.
    """
    rng = np.random.default_rng(seed)
    out = np.full(len(code), -1, np.int32)
    order = np.argsort(code, kind="stable")
    bounds = np.searchsorted(code[order], np.arange(len(sorted_groups) + 1))
    for k in sorted_groups:
        mixed = rng.permutation(order[bounds[k] : bounds[k + 1]])
        half = len(mixed) // 2
        out[mixed[:half]] = k
        out[mixed[half : 2 * half]] = k + len(sorted_groups)
    return out


def get_ceiling(tables, full: Side, target_p: np.ndarray, name_rank_g: np.ndarray, *, continuity: bool) -> dict:
    """Return the replicate's value of each metric: half B as a prediction of half A, the mean of the splits.

    The fold-change error is gated and scaled by the full data, and compares the two halves.
    """
    per_split = []
    for _ in range(N_SPLITS):
        a, b = (make_side(next(tables), continuity=continuity) for _ in range(2))
        values = compare(a, b, target_p, name_rank_g)
        means = values.means()
        means[NMAE] = finite_mean(get_nmae(full.de, align(b.de, full.de), align(a.de, full.de), target_p))
        per_split.append(means)
    return {m: float(np.mean([s[m] for s in per_split])) for m in METRICS}


def score_baseline(
    sum_kg, size_k, controls: GeneMajor, real: Side, target_p, name_rank_g, *, continuity, threads, progress
) -> Values:
    """Score the mean response: control cells drawn with replacement, each gene scaled to the mean over perturbations.

    A gene's mean leaves out the perturbations that target it.
    """
    mean_kg = sum_kg / size_k[:, None]
    total, count = mean_kg[1:].sum(axis=0), np.full(mean_kg.shape[1], float(len(size_k) - 1))
    row = np.flatnonzero(target_p >= 0)
    np.subtract.at(total, target_p[row], mean_kg[1 + row, target_p[row]])
    np.subtract.at(count, target_p[row], 1.0)
    if (count <= 0).any():
        raise DataError(
            f"{int((count <= 0).sum())} genes are the target of every perturbation, so no mean response is left",
            hint="the baseline needs at least two perturbations with different targets",
        )
    scale_g = np.divide(total / count, mean_kg[0], out=np.zeros_like(total), where=mean_kg[0] > 0)
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.integers(0, controls.n_cells, size=int(n)) for n in size_k[1:]])
    cells = controls.draw(draws, scale_g)
    code = np.concatenate([np.repeat(np.arange(1, len(size_k)), size_k[1:].astype(np.int64)),
                           np.zeros(controls.n_cells)]).astype(np.int32)  # fmt: skip
    (tables,) = make_tables(cells, [(code, 1)], len(size_k), target_sum=TARGET_SUM, threads=threads, progress=progress)
    return compare(real, make_side(tables, continuity=continuity), target_p, name_rank_g)


def find_problem(baseline: dict[str, float], ceiling: dict[str, float]) -> str:
    """Return why the two ends cannot scale a score, or ""."""
    for m in METRICS:
        b, r = baseline[m], ceiling[m]
        if not (np.isfinite(b) and np.isfinite(r)):
            return f"{m} cannot be scaled: its baseline is {b:.6g} and its replicate {r:.6g}"
        if not (r < b if m in LOWER_IS_BETTER else r > b):
            return f"{m} cannot be scaled: the replicate ({r:.6g}) is no better than the mean response ({b:.6g})"
    return ""


def scale(metric: str, value: float, baseline: float, ceiling: float) -> tuple[float, float]:
    """Return (score, unclipped score) of a raw value between the two ends.

    A value that is not finite scores 0 in the expression metric, −6 in the fold-change error, and as a raw 0 else.
    """
    if not np.isfinite(value):
        if metric in LOWER_IS_BETTER:
            return (0.0 if metric == EXPRESSION else NMAE_FLOOR), float("nan")
        value = 0.0
    s = (value - baseline) / (ceiling - baseline)
    if metric == EXPRESSION:
        return min(max(s, 0.0), 1.0), s
    return (max(s, NMAE_FLOOR) if metric == NMAE else s), s


def _score_context(t: Truth, pred: Side, library: float, warnings: list[str]) -> ContextScore:
    values = compare(t.side, pred, t.target_p, t.name_rank_g)
    means, counts = values.means(), values.counts()
    nan = float("nan")
    components = {}
    for m in METRICS:
        b, r = t.baseline.get(m, nan), t.ceiling.get(m, nan)
        score, unclipped = scale(m, means[m], b, r) if t.baseline and not t.problem else (nan, nan)
        components[m] = Component(
            value=means[m], baseline=b, ceiling=r, score=score, score_unclipped=unclipped,
            ci95=get_interval(values, m), n=counts[m],
        )  # fmt: skip
    n = len(t.labels)
    for m in METRICS:
        if counts[m] < n:
            where = f" in context {t.context}" if t.context else ""
            warnings.append(f"{m} is undefined for {n - counts[m]} of {n} perturbations{where}, left out of its mean")
    avg = float(np.mean([components[m].score for m in METRICS]))
    return ContextScore(
        context=t.context, labels=t.labels, genes=t.genes, values=values, components=components,
        avg_score=avg, real=t.side, pred=pred, checks=tuple(_check(t, pred, library)),
    )  # fmt: skip


def _check(t: Truth, pred: Side, library: float) -> list[Check]:
    return check_gaming(
        Evidence(
            real_pg=t.side.profile_kg[1:],
            pred_pg=pred.profile_kg[1:],
            real_control_g=t.side.profile_kg[0],
            # a profile's variance falls with the cells in it
            real_spread_p=t.side.spread_k[1:] * t.side.size_k[1:],
            pred_spread_p=pred.spread_k[1:] * pred.size_k[1:],
            real_significant_p=get_significant(t.side.de, t.target_p).sum(axis=1),
            pred_significant_p=get_significant(pred.de, t.target_p).sum(axis=1),
            library_ratio=library / t.library if t.library > 0 else None,
        )
    )


def get_interval(values: Values, metric: str) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a metric's raw value over perturbations."""
    if metric == EXPRESSION:
        ok = np.isfinite(values.error_p) & np.isfinite(values.distance_p)
        above, below = values.error_p[ok], values.distance_p[ok]
    else:
        above = values.per[metric][np.isfinite(values.per[metric])]
        below = np.ones(len(above))
    if len(above) < 2:
        return float("nan"), float("nan")
    pick = np.random.default_rng(0).integers(0, len(above), (N_BOOTSTRAP, len(above)))
    under = below[pick].sum(axis=1)
    drawn = np.divide(above[pick].sum(axis=1), under, out=np.full(N_BOOTSTRAP, np.nan), where=under > 0)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < N_BOOTSTRAP // 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _average(scores: list[ContextScore]) -> dict[str, Component]:
    if len(scores) == 1:
        return scores[0].components
    out = {}
    for m in METRICS:
        parts = [s.components[m] for s in scores]
        mean = {k: float(np.mean([getattr(c, k) for c in parts])) for k in
                ("value", "baseline", "ceiling", "score", "score_unclipped")}  # fmt: skip
        # contexts are independent: the half-widths of their mean add in squares
        half = [np.sqrt(sum((c.value - c.ci95[0]) ** 2 for c in parts)) / len(parts),
                np.sqrt(sum((c.ci95[1] - c.value) ** 2 for c in parts)) / len(parts)]  # fmt: skip
        ci = (float(mean["value"] - half[0]), float(mean["value"] + half[1]))
        out[m] = Component(**mean, ci95=ci, n=sum(c.n for c in parts))
    return out
