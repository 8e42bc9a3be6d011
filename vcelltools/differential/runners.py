"""Run each test of ``de`` on the cells of one context, and return means and p-values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vcelltools.differential.cell_labels import Cells
from vcelltools.differential.expression import find_scale, make_transform
from vcelltools.differential.glm import compare_samples, widen
from vcelltools.differential.groupsums import sum_groups
from vcelltools.differential.negative_binomial import compare_counts, get_moments, pool_samples
from vcelltools.differential.ranks import MAX_GROUPS, GeneBuckets, StrataRanks
from vcelltools.differential.reduce import ReadOptions, check_log1p, rank_sources, reduce_cells
from vcelltools.differential.residuals import compare_residuals, make_design
from vcelltools.errors import DataError, NotCountsError, UsageError, spell
from vcelltools.io import Dataset
from vcelltools.io.table import Column
from vcelltools.runtime.progress import SILENT, Progress

MAX_LEVELS = 200
"""Maximum number of levels of a covariate; a column with more holds numbers or names and not groups."""
_SAME_TARGET = 1e-4
"""Relative tolerance for the totals of cells that were scaled to the same target, for rounding to float32."""

Found = dict[str, Any]
"""``mean_kg``, ``statistic_kg``, ``p_kg`` and ``notes``. If the reference differs by group, also ``reference_mean_kg``
and ``reference_n_k``. Some tests add ``dispersion_g`` or ``effect_kg``."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The cells of one context, and the comparison to make.

    Attributes
    ----------
    rest
        Compare each group with all other perturbed cells instead of the controls.
    strata
        Column within whose groups cells are compared, or None.
    covariates
        Columns to correct for.
    replicates
        Column of the replicates, which are the unit of the test, or None.
    """

    dataset: Dataset
    cells: Cells
    control: str
    where: str
    rest: bool = False
    continuity: bool = True
    exact: bool = False
    strata: str | None = None
    covariates: tuple[str, ...] = ()
    replicates: str | None = None
    threads: int | None = None
    progress: Progress = field(default=SILENT)

    @property
    def position(self) -> int:
        """Position of the control among the labels."""
        return self.cells.labels.index(self.control)

    def read_groups(self, column: str) -> tuple[np.ndarray, list[str]]:
        """Return (n,) codes (-1: missing) and the labels of a column of groups of cells."""
        found: Column = self.dataset.obs.column(column)
        codes, levels = found.factorize()
        if len(levels) > MAX_LEVELS:
            raise DataError(
                f"{self.dataset.label}: obs/{column} has {len(levels):,} different values, but a column of groups has "
                f"at most {MAX_LEVELS}",
                hint="choose a column of labels (such as donor or lane), or bin the numbers",
            )
        return codes.astype(np.int64), levels

    def need_rest(self) -> None:
        """Raise a :class:`DataError` if there is no other perturbation to compare with."""
        if len(self.cells.labels) < 3:
            raise DataError(
                f"{self.where}: there is only one perturbation, so there are no others to compare it with",
                hint=f"{spell('reference', 'control')} compares it with the controls",
            )


def run_wilcoxon(task: Task) -> Found:
    """Rank every group against its reference, within strata if requested."""
    scale = find_scale(task.dataset, threads=task.threads, progress=task.progress)
    options = ReadOptions(
        continuity=task.continuity, exact=task.exact, moment="expm1", cp10k=scale.kind == "counts",
        threads=task.threads, wide=scale.kind == "counts", spread=False, spill=True,
    )  # fmt: skip
    if task.rest or task.strata is not None:
        found = _run_strata(task, scale, options)
    else:
        side = reduce_cells(task.dataset, task.cells, task.control, scale, options, progress=task.progress)
        sums = side.sums
        assert sums.moment_kg is not None
        mean_kg = sums.moment_kg / np.maximum(sums.size_k, 1)[:, None]
        found = {"mean_kg": mean_kg, "statistic_kg": sums.u_kg, "p_kg": sums.p_kg, "notes": list(side.notes)}
    if scale.kind == "log1p":
        size = task.cells.size_k
        found["mean_kg"] = _to_cp10k(found["mean_kg"], size > 0, task.dataset.label, found["notes"])
    return found | (_others(found["mean_kg"], task) if task.rest else {})


def _others(mean_kg: np.ndarray, task: Task) -> Found:
    """Return the means and numbers of the other perturbed cells, if each group is compared with these."""
    size_k = task.cells.size_k.astype(np.float64)
    size_k[task.position] = 0
    total_g = (mean_kg * size_k[:, None]).sum(axis=0)
    rest = np.maximum(size_k.sum() - size_k, 1)
    mean = (total_g - mean_kg * size_k[:, None]) / rest[:, None]
    return {"reference_mean_kg": np.maximum(mean, 0), "reference_n_k": (size_k.sum() - size_k).astype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class RankStrata:
    """Rank every gene of sorted values within strata; see :meth:`GeneBuckets.rank_strata`."""

    group_c: np.ndarray
    stratum_c: np.ndarray
    control: int | None
    n_groups: int
    continuity: bool

    def __call__(self, buckets: GeneBuckets, *, threads: int, advance: Callable[[float], None]) -> StrataRanks:
        """Return the results of all genes in the buckets."""
        return buckets.rank_strata(
            self.group_c, self.stratum_c, self.control, n_groups=self.n_groups, continuity=self.continuity,
            threads=threads, advance=advance,
        )  # fmt: skip


def _run_strata(task: Task, scale: Any, options: ReadOptions) -> Found:
    cells, n_k, notes = task.cells, len(task.cells.labels), list(scale.notes)
    stratum_n, levels = np.zeros(len(cells.codes), np.int64), [""]
    if task.strata is not None:
        stratum_n, levels = task.read_groups(task.strata)
        lost = int(np.count_nonzero((stratum_n < 0) & (cells.codes >= 0)))
        if lost:
            notes.append(f"{task.where}: {lost:,} cells without a value in obs/{task.strata} were left out")
    if task.rest:
        task.need_rest()
    n_s = len(levels)
    pair_n = np.where((cells.codes >= 0) & (stratum_n >= 0), cells.codes.astype(np.int64) * n_s + stratum_n, -1)
    if task.rest:
        pair_n[cells.codes == task.position] = -1
    pairs, code_n = np.unique(pair_n[pair_n >= 0], return_inverse=True)
    if len(pairs) > MAX_GROUPS:
        raise UsageError(
            f"{len(pairs):,} combinations of a perturbation and a stratum exceed the limit of {MAX_GROUPS:,}"
        )
    codes = np.full(len(pair_n), -1, np.int32)
    codes[pair_n >= 0] = code_n
    how = RankStrata(
        group_c=pairs // n_s, stratum_c=pairs % n_s, control=None if task.rest else task.position, n_groups=n_k,
        continuity=task.continuity,
    )  # fmt: skip
    ranks: StrataRanks = rank_sources(
        [(task.dataset, codes, scale)], max(len(pairs), 1), how, options, notes, progress=task.progress
    ).result
    check_log1p(task.dataset.label, scale, ranks.max_value)
    size_k = np.bincount(cells.codes[codes >= 0], minlength=n_k)
    p = ranks.p_kg.copy()
    empty = [i for i in range(n_k) if i != task.position and np.isnan(p[i]).all()]
    if empty:
        names = ", ".join(cells.labels[i] for i in empty[:5])
        notes.append(
            f"{task.where}: {len(empty)} perturbations that share no stratum with their reference were left out "
            f"({names}{', …' if len(empty) > 5 else ''})"
        )
    mean = ranks.moment_kg / np.maximum(size_k, 1)[:, None]
    return {"mean_kg": mean, "statistic_kg": ranks.statistic_kg, "p_kg": p, "notes": notes}


def _to_cp10k(mean_kg: np.ndarray, some_k: np.ndarray, label: str, notes: list[str]) -> np.ndarray:
    """Return means in counts per ten thousand if all cells sum to the same target, otherwise unchanged."""
    total_k = mean_kg[some_k].sum(axis=1)
    total_k = total_k[total_k > 0] if (total_k > 0).any() else total_k
    target = float(np.median(total_k))
    if not target > 0 or float(np.ptp(total_k)) > _SAME_TARGET * target:
        notes.append(
            f"{label}: the cells do not sum to the same target, so means and epsilon are in the units of the file"
        )
        return mean_kg
    if abs(target / 1e4 - 1) <= _SAME_TARGET:
        return mean_kg
    notes.append(
        f"{label}: the cells were scaled to {target:,.6g} counts; the means are converted to counts per ten thousand"
    )
    return mean_kg * (1e4 / target)


def _make_samples(task: Task, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) the sample of every cell (-1: none), and (s, 1 + columns) the group and codes of each sample."""
    stack = np.column_stack([task.cells.codes.astype(np.int64), *(task.read_groups(c)[0] for c in columns)])
    used = (stack >= 0).all(axis=1)
    found, at = np.unique(stack[used], axis=0, return_inverse=True)
    codes = np.full(len(stack), -1, np.int32)
    codes[used] = at.reshape(-1)
    return codes, found


def run_nb(task: Task) -> Found:
    """Test counts by a negative binomial, with cells or replicates as the unit."""
    scale = find_scale(task.dataset, threads=task.threads, progress=task.progress)
    if scale.kind != "counts":
        raise NotCountsError(
            f"{task.dataset.label}: {task.dataset.layer} holds values with fractional parts, but {spell('test', 'nb')} "
            "needs counts",
            hint=f"set {spell('layer', 'counts')}, or {spell('test', 'wilcoxon')}",
        )
    assert scale.library_n is not None
    if task.rest:
        task.need_rest()
    codes, samples = task.cells.codes, np.arange(len(task.cells.labels))[:, None]
    if task.replicates is not None:
        codes, samples = _make_samples(task, (task.replicates, *task.covariates))
    m = get_moments(
        task.dataset, codes, len(samples), scale.library_n, threads=task.threads, progress=task.progress
    )  # fmt: skip
    group_s, k = samples[:, 0], task.position
    notes = list(scale.notes)
    pooled = m
    if task.replicates is not None:
        pooled = pool_samples(m, group_s, len(task.cells.labels))
        few = int(pooled.n_k[k]) if not task.rest else int(np.delete(pooled.n_k, k).sum())
        if few < 2:
            raise DataError(
                f"{task.where}: the controls are one sample by obs/{task.replicates}, so the variation between "
                "replicates cannot be estimated",
                hint=f"choose another {spell('replicate_col')}, or remove it to use cells as the unit",
            )
        notes.append(
            f"{task.where}: {len(group_s):,} samples by obs/{task.replicates} are the unit of the test; "
            f"{int(pooled.n_k[k])} are controls"
        )
    if not pooled.size_k[k] > 0:
        raise DataError(
            f"{task.dataset.label}: the {int((codes >= 0)[task.cells.codes == k].sum()):,} control cells have no "
            "counts",
            hint=f"{spell('test', 'nb')} predicts the counts of each group from those of the controls; choose another "
            f"matrix with {spell('layer')}",
        )
    if task.covariates:
        levels = {c: (samples[:, 2 + i], task.read_groups(c)[1]) for i, c in enumerate(task.covariates)}
        design = make_design(levels, len(samples))
        found: Found = dict(
            compare_samples(m.sum_kg, m.size_k, group_s, design.x_cq[design.combination_n], k, len(task.cells.labels))
        )
    else:
        found = dict(compare_counts(pooled, k, rest=task.rest))
        if task.replicates is not None:
            found["p_kg"] = widen(found["p_kg"], float(np.maximum(pooled.n_k - 1, 0).sum()))
    size = pooled.size_k[:, None]
    found["mean_kg"] = np.divide(pooled.sum_kg * 1e4, size, out=np.zeros_like(pooled.sum_kg), where=size > 0)
    found["notes"] = notes
    if task.rest:
        used = np.arange(len(pooled.size_k)) != k
        rest = pooled.size_k[used].sum() - pooled.size_k
        total = pooled.sum_kg[used].sum(axis=0) - pooled.sum_kg
        found["reference_mean_kg"] = np.maximum(total, 0) * 1e4 / np.maximum(rest, 1)[:, None]
        found["reference_n_k"] = _others(found["mean_kg"], task)["reference_n_k"]
    return found


def run_welch(task: Task) -> Found:
    """Test mean residuals of log1p values, with covariates fitted on the controls."""
    scale = find_scale(task.dataset, threads=task.threads, progress=task.progress)
    transform = make_transform(task.dataset.matrix, scale, cp10k=scale.kind == "counts", wide=scale.kind == "counts")
    levels = {c: task.read_groups(c) for c in task.covariates}
    design = make_design(levels, len(task.cells.codes))
    n_k, n_c = len(task.cells.labels), len(design.x_cq)
    pair_n = np.where(design.combination_n >= 0, task.cells.codes.astype(np.int64) * n_c + design.combination_n, -1)
    pair_n[task.cells.codes < 0] = -1
    pairs, at = np.unique(pair_n[pair_n >= 0], return_inverse=True)
    codes = np.full(len(pair_n), -1, np.int32)
    codes[pair_n >= 0] = at
    sums = sum_groups(
        task.dataset, codes, len(pairs), transform, squares=True, threads=task.threads, progress=task.progress
    )  # fmt: skip
    check_log1p(task.dataset.label, scale, sums.max_value)
    notes = list(scale.notes)
    lost = int(np.count_nonzero((design.combination_n < 0) & (task.cells.codes >= 0)))
    if lost:
        notes.append(f"{task.where}: {lost:,} cells without a value in a covariate were left out")
    found = compare_residuals(sums, pairs // n_c, pairs % n_c, design, task.position, n_k, task.where)
    expected = np.expm1(found.expected_kg)
    notes.append("means are geometric: expm1 of the mean of log1p values")
    return {
        "mean_kg": np.maximum(np.expm1(found.expected_kg + found.effect_kg), 0.0), "statistic_kg": found.t_kg,
        "p_kg": found.p_kg, "notes": notes, "reference_mean_kg": np.maximum(expected, 0.0),
        "reference_n_k": np.full(n_k, task.cells.size_k[task.position]), "effect_kg": found.effect_kg,
    }  # fmt: skip


RUNNERS: dict[str, Callable[[Task], Found]] = {"wilcoxon": run_wilcoxon, "nb": run_nb, "welch": run_welch}
