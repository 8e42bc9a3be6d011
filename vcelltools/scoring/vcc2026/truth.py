"""The truth of one context under the 2026 rules: profiles, differential expression, and both ends of the scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, split_halves
from vcelltools.errors import DataError
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.vcc2026.anchors import find_problem, get_ceiling, get_seeds, score_baseline
from vcelltools.scoring.vcc2026.counts import GeneMajor, make_tables
from vcelltools.scoring.vcc2026.profiles import TARGET_SUM, Profiles, make_profiles

PERT_COL = "target_gene"
CONTROL = "non-targeting"
CONTEXT_COL = "context"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options for reading predictions and truth, and for the computation.

    Attributes
    ----------
    pert_col, control
        The obs column of the perturbation, and the label of the controls in it.
    context_col
        obs column of the context; if the truth lacks it, the data is one context.
    layer
        The layer to read instead of X.
    target_gene_map
        Perturbation → its own gene, or None; other labels are matched by name.
    continuity
        Whether the rank test uses the continuity correction.
    anchors
        Whether to compute the two ends; without them, there are values but no scores.
    threads
        Worker threads (default: the usable cores).
    """

    pert_col: str = PERT_COL
    control: str = CONTROL
    context_col: str = CONTEXT_COL
    layer: str | None = None
    target_gene_map: Mapping[str, str | None] | None = None
    continuity: bool = True
    anchors: bool = True
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The truth of one context, ready to score predictions against.

    Attributes
    ----------
    context
        The name of the context, or "".
    genes, labels
        Gene names, and the perturbations in label order.
    target_p, name_rank_g
        Position of the own gene of each perturbation (−1 for none), and rank of the name of each gene.
    side
        Profiles and DE of the truth.
    controls
        The counts of the control cells.
    library
        Median counts of a perturbed cell.
    sum_kg
        (k, g) counts summed over the cells of each group.
    baseline
        The metrics of the mean response (the end at 0), or None if not requested.
    ceiling
        Metric → value of the replicate (the end at 1).
    problem
        The reason why there is no baseline or ceiling, or "".
    warnings
        Messages for the user about this truth.
    copied_share
        Fraction of the perturbed cells that are copies of another cell with the same label.
    from_pack
        Whether it came from a pack, which keeps no p-values of genes that are not significant.
    """

    context: str
    genes: np.ndarray
    labels: np.ndarray
    target_p: np.ndarray
    name_rank_g: np.ndarray
    side: Profiles
    controls: GeneMajor
    library: float
    sum_kg: np.ndarray
    baseline: dict[str, float]
    ceiling: dict[str, float]
    problem: str = ""
    warnings: tuple[str, ...] = ()
    copied_share: float = 0.0
    from_pack: bool = False


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The cells of one context by group: the controls are group 0, then the perturbations in name order.

    Attributes
    ----------
    labels
        (p,) perturbations.
    code_n
        (n,) int32 group of each cell of the context.
    order
        Groups in the order of the categories of the column, in which the halves are drawn.
    """

    labels: np.ndarray
    code_n: np.ndarray
    order: np.ndarray

    @staticmethod
    def of(cells: Cells, control: str) -> Groups:
        """Return the groups of the cells that have a label."""
        labels = np.array([v for v in cells.labels if v != control], dtype=object)
        group = {label: k + 1 for k, label in enumerate(labels)} | {control: 0}
        lookup = np.array([group[v] for v in cells.labels], np.int32)
        used = cells.codes[cells.codes >= 0]
        return Groups(labels=labels, code_n=lookup[used], order=np.array([group[v] for v in cells.order]))


def make_truth(
    read: Callable[[], GeneMajor],
    groups: Groups,
    genes: np.ndarray,
    target_p: np.ndarray,
    options: Options,
    *,
    progress: Progress = SILENT,
    **known: Any,
) -> Truth:
    """Return the truth of one context; ``read`` reads its counts, and ``known`` are fields of :class:`Truth`.

    Raises
    ------
    DataError
        If the own gene of no perturbation passes the filter of the DE table.
    """
    o, code, n_groups = options, groups.code_n, len(groups.labels) + 1
    name_rank_g = get_name_ranks(genes)
    sizes = np.bincount(code, minlength=n_groups)
    thin = [str(label) for label, n in zip(groups.labels, sizes[1:], strict=True) if n < 2]
    can_split = not thin and sizes[0] >= 2
    splits = []
    if o.anchors and can_split:
        splits = [split_halves(code, groups.order, n_groups, seed) for seed in get_seeds()]
    counts = read()  # kept local, so that it can be freed before the baseline is made
    library = float(np.median(counts.library[code > 0]))
    labelings = [(code, 1), *[(s, 2) for s in splits]]
    tables = make_tables(counts, labelings, n_groups, target_sum=TARGET_SUM, threads=o.threads, progress=progress)
    full = next(tables)
    side = make_profiles(full, continuity=o.continuity)
    if (target_p >= 0).any() and not np.isin(target_p[target_p >= 0], side.de.genes).any():
        raise DataError(
            f"none of the genes of the {len(groups.labels)} perturbations passes the DE filter (mean CPM of the "
            "controls above 5)",
            hint="the metrics exclude the own gene of each perturbation, and cannot find any of them",
        )
    controls = counts.take(np.flatnonzero(code == 0), get_threads(o.threads))
    del counts
    baseline: dict[str, float] = {}
    ceiling: dict[str, float] = {}
    problem = ""
    if o.anchors and not can_split:
        problem = (
            f"there is no replicate to scale by: {len(thin) or 1} groups have a single cell "
            f"({', '.join(thin[:5]) or o.control}), and cannot be split into halves"
        )
    elif o.anchors:
        try:
            ceiling = get_ceiling(tables, side, target_p, name_rank_g, continuity=o.continuity)
            tables.close()
            values = score_baseline(
                full.sum_kg, full.size_k, controls, side, target_p, name_rank_g,
                continuity=o.continuity, threads=o.threads, progress=progress,
            )  # fmt: skip
            baseline = values.means()
            problem = find_problem(baseline, ceiling)
        except DataError as e:
            problem = f"scores cannot be scaled: {e.message}"
    return Truth(
        genes=genes,
        labels=groups.labels,
        target_p=target_p,
        name_rank_g=name_rank_g,
        side=side,
        controls=controls,
        library=library,
        sum_kg=full.sum_kg,
        baseline=baseline,
        ceiling=ceiling,
        problem=problem,
        **known,
    )


def get_name_ranks(genes: np.ndarray) -> np.ndarray:
    """Return (g,) the rank of the name of each gene, which breaks ties."""
    out = np.empty(len(genes), np.int64)
    out[np.argsort(genes.astype(str), kind="stable")] = np.arange(len(genes))
    return out
