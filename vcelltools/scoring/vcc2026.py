"""Scoring by the 2026 rules: six metrics between a mean-response baseline (0) and a replicate (1).

The definitions are those of cell-eval2's ``vcc2026`` preset (rule version 3). Both sides are compared with the
truth's controls; contexts are scored apart and averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import Dataset
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.anchors26 import find_problem, get_ceiling, get_seeds, scale, score_baseline, split_halves
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
from vcelltools.scoring.metrics26 import METRICS, compare, finite_mean, get_significant
from vcelltools.scoring.options26 import Options2026
from vcelltools.scoring.result26 import Component, ContextScore, Score2026, average, get_interval
from vcelltools.scoring.rules import RULES_2026
from vcelltools.scoring.sides import read_cells
from vcelltools.scoring.sides26 import TARGET_SUM, Side, make_side
from vcelltools.stream import get_threads

if TYPE_CHECKING:
    import os

    from anndata import AnnData

COUNT_SLACK = 1e-6
"""How far from a whole number cell-eval2 lets a count be; it scores it as it is."""


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


def score_vcc2026(
    pred: str | os.PathLike | AnnData | Dataset,
    truth: str | os.PathLike | AnnData | Dataset | list[Truth],
    *,
    progress: Progress = SILENT,
    **options: Any,
) -> Score2026:
    """Score a prediction by the 2026 rules.

    Parameters
    ----------
    pred
        Predicted counts. Its control cells, if any, are not read: the truth's serve both sides.
    truth
        Measured counts with controls, or what :func:`make_truth` returned for them.
    **options
        See :class:`vcelltools.scoring.options26.Options2026`.

    Raises
    ------
    DataError
        When the files disagree in genes, perturbations or contexts, a matrix does not hold counts, no perturbation
        resolves to a gene, or the truth shows no effect.
    """
    o = Options2026(**options)
    truths = truth if isinstance(truth, list) else make_truth(truth, progress=progress, **options)
    with opened(pred, o.layer) as data:
        parts = match_prediction(data, truths, o.pert_col, o.control, o.context_col)
        census = take_census(
            data,
            parts.part_n,
            len(truths),
            what="prediction",
            max_total=RULES_2026.max_counts_per_cell,
            slack=COUNT_SLACK,
            threads=o.threads,
            progress=progress,
        )
        scores = []
        warnings = list(parts.warnings)
        for i, t in enumerate(truths):
            code = np.concatenate([parts.code_n[census.part_n == i], np.zeros(t.controls.n_cells, np.int32)])
            counts = read_part(
                data, census, i, gene_order=parts.gene_order, behind=t.controls, threads=o.threads, progress=progress
            )
            library = float(np.median(counts.library[: -t.controls.n_cells]))
            (tables,) = make_tables(
                counts, [(code, 1)], len(t.labels) + 1, target_sum=TARGET_SUM, threads=o.threads, progress=progress
            )
            del counts
            scores.append(_score_context(t, make_side(tables, continuity=o.continuity), library, warnings))
    problem = next((t.problem for t in truths if t.problem), "")
    warnings = [w for t in truths for w in t.warnings] + warnings
    avg = finite_mean(np.array([s.avg_score for s in scores])) if not problem else float("nan")
    return Score2026(
        components=average(scores),
        avg_score=avg,
        contexts=tuple(scores),
        continuity=o.continuity,
        rules=RULES_2026,
        problem=problem,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def make_truth(
    truth: str | os.PathLike | AnnData | Dataset, *, progress: Progress = SILENT, **options: Any
) -> list[Truth]:
    """Prepare the truth of every context: profiles, DE, and the two ends of the scale.

    ``options`` as in :func:`score_vcc2026`, which says what is raised.
    """
    o = Options2026(**options)
    with opened(truth, o.layer) as data:
        labels_n = get_labels(data, o.pert_col, "truth")
        contexts, context_n = get_contexts(data, o.context_col)
        genes = get_genes(data, "truth")
        in_order = read_cells(data, o.pert_col, None).order
        census = take_census(
            data,
            context_n,
            len(contexts),
            what="truth",
            max_total=RULES_2026.max_counts_per_cell,
            slack=COUNT_SLACK,
            threads=o.threads,
            progress=progress,
        )
        out = []
        for i, context in enumerate(contexts):
            in_n = labels_n[context_n == i]
            labels = np.array(sorted(set(in_n) - {o.control}), dtype=object)
            where = f"{data.label}{f', context {context}' if context else ''}"
            check_groups(in_n, labels, o.control, where, o.pert_col)
            order = {label: k + 1 for k, label in enumerate(labels)} | {o.control: 0}
            code = np.array([order[label] for label in in_n], np.int32)
            group_order = np.array([order[v] for v in in_order if v in order])
            target_p, warnings = resolve_targets(labels, genes, o.target_gene_map, where)
            read = partial(read_part, data, census, i, threads=o.threads, progress=progress)
            out.append(_make_context(read, code, group_order, labels, genes, target_p, context, warnings, o, progress))
    return out


def _make_context(
    read: Callable[[], GeneMajor],
    code: np.ndarray,
    group_order: np.ndarray,
    labels: np.ndarray,
    genes: np.ndarray,
    target_p: np.ndarray,
    context: str,
    warnings: list[str],
    o: Options2026,
    progress: Progress,
) -> Truth:
    n_groups = len(labels) + 1
    name_rank_g = get_name_ranks(genes)
    sizes = np.bincount(code, minlength=n_groups)
    thin = [str(label) for label, n in zip(labels, sizes[1:], strict=True) if n < 2]
    splits = []
    if o.anchors and not thin and sizes[0] >= 2:
        splits = [split_halves(code, group_order, seed) for seed in get_seeds()]
    counts = read()  # only here, so that it can go before the baseline is made
    library = float(np.median(counts.library[code > 0]))
    tables = make_tables(
        counts,
        [(code, 1), *[(s, 2) for s in splits]],
        n_groups,
        target_sum=TARGET_SUM,
        threads=o.threads,
        progress=progress,
    )
    full = next(tables)
    side = make_side(full, continuity=o.continuity)
    if (target_p >= 0).any() and not np.isin(target_p[target_p >= 0], side.de.genes).any():
        raise DataError(
            f"none of the {len(labels)} perturbations' genes passes the DE filter (controls' mean CPM above 5)",
            hint="the metrics leave each perturbation's own gene out, and can find none of them",
        )
    controls = counts.take(np.flatnonzero(code == 0), get_threads(o.threads))
    del counts
    baseline: dict[str, float] = {}
    ceiling: dict[str, float] = {}
    problem = ""
    if o.anchors:
        if thin or sizes[0] < 2:
            problem = (
                f"no replicate to scale by: {len(thin) or 1} groups have a single cell "
                f"({', '.join(thin[:5]) or o.control}), and cannot be split in halves"
            )
        else:
            try:
                ceiling = get_ceiling(tables, side, target_p, name_rank_g, continuity=o.continuity)
                tables.close()
                values = score_baseline(
                    full.sum_kg, full.size_k, controls, side, target_p, name_rank_g,
                    continuity=o.continuity, threads=o.threads, progress=progress,
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
