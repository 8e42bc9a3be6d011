"""The energy distance between two groups of cells, with a permutation test, and of every perturbation in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import read_parts
from vcelltools.differential.screen import Screen, check_limits
from vcelltools.errors import UsageError, checked
from vcelltools.io import open_dataset
from vcelltools.io.frame import arrow_numbers, arrow_texts, write_frame
from vcelltools.io.results import Shown
from vcelltools.io.write.atomic import check_output
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_AT_ONCE = 128
_TIE = 1e-12
"""Relative tolerance of the statistic: labelings that differ only by rounding count as equal."""


def pair_distances(x_ng: np.ndarray) -> np.ndarray:
    """Return the (n, n) float64 Euclidean distances between the rows of ``x_ng``."""
    x = np.asarray(x_ng, np.float64)
    x = x - x.mean(axis=0)
    square = np.einsum("ij,ij->i", x, x)
    out = x @ x.T
    out *= -2.0
    out += square[:, None]
    out += square
    np.maximum(out, 0.0, out=out)
    np.fill_diagonal(out, 0.0)
    return np.sqrt(out, out=out)


def energy_of(distance_nn: np.ndarray, first_bn: np.ndarray) -> np.ndarray:
    """Return the energy distance of every labeling, 2·E|a−b| − E|a−a'| − E|b−b'|, each mean over all pairs.

    Parameters
    ----------
    distance_nn
        (n, n) distances between the pooled cells.
    first_bn
        (b, n) bool: cells of the first group; the group sizes are the same in every row.

    Notes
    -----
    Székely and Rizzo 2013. As in ``score``, the pairs include each cell with itself.
    """
    s = first_bn.astype(np.float64)
    n1 = s.sum(axis=1)
    n2 = distance_nn.shape[0] - n1
    row = distance_nn.sum(axis=1)
    total = row.sum()
    own = np.einsum("ij,ij->i", s @ distance_nn, s)
    touching = s @ row
    cross = touching - own
    rest = total - 2.0 * touching + own
    return 2.0 * cross / (n1 * n2) - own / (n1 * n1) - rest / (n2 * n2)


def test_energy(
    a_ng: np.ndarray, b_ng: np.ndarray, *, permutations: int = 999, seed: int | list[int] = 0
) -> tuple[float, float]:
    """Return the energy distance between two groups of cells and its permutation p-value.

    Parameters
    ----------
    a_ng, b_ng
        Cells × genes of the two groups.
    permutations
        Number of permutations; 0 gives a p of NaN. p = (1 + permutations with at least this distance) / (1 + all).
    seed
        Random seed of the permutations.

    Raises
    ------
    UsageError
        If a group has no cells.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> e, p = test_energy(rng.normal(0, 1, (50, 3)), rng.normal(2, 1, (60, 3)), permutations=99)
    >>> e > 1, p
    (True, 0.01)
    """
    if not len(a_ng) or not len(b_ng):
        raise UsageError("the energy distance needs cells in both groups")
    distance = pair_distances(np.concatenate([a_ng, b_ng]))
    n = len(distance)
    first = np.arange(n) < len(a_ng)
    observed = float(energy_of(distance, first[None])[0])
    if not permutations:
        return observed, float("nan")
    rng, reached = np.random.default_rng(seed), 0
    for start in range(0, permutations, _AT_ONCE):
        labelings = np.tile(first, (min(_AT_ONCE, permutations - start), 1))
        drawn = energy_of(distance, rng.permuted(labelings, axis=1))
        reached += int(np.count_nonzero(drawn >= observed - _TIE * abs(observed)))
    return observed, (1 + reached) / (1 + permutations)


test_energy.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it because of its name


class ControlEnergy:
    """Energy distances of perturbations to the same controls, on at most ``max_tested`` cells of each group.

    Parameters
    ----------
    control_ng
        (n, g) control cells.
    max_tested, permutations, seed
        See :func:`energy`. The draws of a perturbation depend on the seed and its number alone.
    """

    def __init__(self, control_ng: np.ndarray, *, max_tested: int, permutations: int, seed: int) -> None:
        self.max_tested, self.permutations, self.seed = max_tested, permutations, seed
        self.control_ng = self._draw(control_ng, 1)

    def _draw(self, x_ng: np.ndarray, *key: int) -> np.ndarray:
        n = len(x_ng)
        if n <= self.max_tested:
            return x_ng
        return x_ng[np.sort(np.random.default_rng([self.seed, *key]).choice(n, self.max_tested, replace=False))]

    def test(self, x_ng: np.ndarray, number: int) -> tuple[float, float]:
        """Return the energy distance of (n, g) cells of the perturbation ``number``, and its permutation p-value."""
        drawn, seed = self._draw(x_ng, 2, number), [self.seed, 3, number]
        return test_energy(drawn, self.control_ng, permutations=self.permutations, seed=seed)


@dataclass(frozen=True, kw_only=True)
class EnergyResult(Shown):
    """The energy distance of every perturbation to the controls.

    Attributes
    ----------
    perturbations, contexts
        Names, and the context of each row, or None if all cells were pooled.
    n_cells_p, n_controls_p
        Numbers of cells of each perturbation, and of the controls of its context.
    distance_p, p_p, fdr_p
        (p,) energy distances, permutation p-values, and their Benjamini-Hochberg adjustment over the perturbations of a
        context.
    settings, notes
        The settings of the computation, and notes for the user.
    """

    perturbations: list[str]
    contexts: list[str] | None
    n_cells_p: np.ndarray
    n_controls_p: np.ndarray
    distance_p: np.ndarray
    p_p: np.ndarray
    fdr_p: np.ndarray
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def _columns(self) -> dict[str, Any]:
        return {
            **({} if self.contexts is None else {"context": self.contexts}),
            "perturbation": self.perturbations, "n_cells": self.n_cells_p, "n_controls": self.n_controls_p,
            "e_distance": self.distance_p, "p_value": self.p_p, "fdr": self.fdr_p,
        }  # fmt: skip

    def get_rows(self) -> list[list[Any]]:
        """Return the rows of the table, with the largest distance first."""
        columns = [v if isinstance(v, list) else v.tolist() for v in self._columns().values()]
        return sorted(map(list, zip(*columns, strict=True)), key=lambda row: -row[-3])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per perturbation."""
        import pandas as pd

        return pd.DataFrame(self._columns())

    def to_json(self) -> dict[str, Any]:
        """Return the settings, and one object per perturbation."""
        names = list(self._columns())
        return {
            "n_perturbations": len(self.perturbations),
            "perturbations": [dict(zip(names, row, strict=True)) for row in self.get_rows()],
            "settings": self.settings, "notes": self.notes,
        }  # fmt: skip

    def write(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write one row per perturbation, as Parquet or CSV according to the file name."""
        p = check_output(path, force=force)
        arrays = {k: arrow_texts(v) if isinstance(v, list) else arrow_numbers(v) for k, v in self._columns().items()}
        return write_frame(p, arrays, force=force)


@checked
def energy(
    source: str | os.PathLike | AnnData,
    *,
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    context_col: str | None = None,
    keep: str | None = None,
    max_genes: int = 2000,
    max_controls: int = 3000,
    max_tested: int = 400,
    permutations: int = 999,
    seed: int = 0,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    library_size: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> EnergyResult:
    """Test whether each perturbation changes the cells at all, by its energy distance to the controls.

    Parameters
    ----------
    source
        A file or an AnnData of counts, or of log1p values. Distances are Euclidean, in log1p CP10K.
    context_col
        obs column of contexts, such as cell lines, each of which is compared with its own controls.
    keep
        Boolean obs column that selects the cells to use.
    library_size
        obs column with the library sizes of the whole transcriptome, by which counts are divided instead of their sum
        if the file holds only some of the genes.
    max_genes
        Number of most variable genes to use, in addition to the targets.
    max_controls, max_tested
        Maximum number of control cells to read, and of cells per group in a distance, drawn at random.
    permutations
        Permutations for each p-value (:func:`test_energy`).
    seed
        Random seed of all draws.

    Raises
    ------
    DataError
        If a column or the control is missing, or there are fewer than ten controls.
    UsageError
        If a number is out of range.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.energy("atlas.h5ad", permutations=99)
    >>> len(result.perturbations)
    4
    """
    check_limits(
        max_genes=max_genes, max_controls=max_controls, max_tested=max_tested, permutations=permutations, seed=seed
    )
    rows: list[tuple[str, str, int, int, float, float]] = []
    fdr: list[np.ndarray] = []
    with open_dataset(
        source, modality=modality, layer=layer, feature_type=feature_type, genome=genome, library_size=library_size
    ) as dataset:
        notes: list[str] = []
        cells, parts = read_parts(dataset, pert_col, control, keep, context_col, notes)
        for name, part in parts.items():
            screen = Screen(dataset, part, control, max_genes, max_controls, seed, threads, progress)
            notes += screen.scale.notes
            test = ControlEnergy(screen.controls, max_tested=max_tested, permutations=permutations, seed=seed)

            def work(k: int, _: np.ndarray, x: np.ndarray, test: ControlEnergy = test) -> tuple[float, float]:
                return test.test(x, k)

            size, found = part.size_k, screen.compare(work)
            rows += [
                (name, part.labels[k], int(size[k]), len(screen.controls), *found[k]) for k in screen.perturbations
            ]
            fdr.append(adjust_bh(np.array([found[k][1] for k in screen.perturbations])))
    if cells.n_missing:
        notes.append(f"{cells.n_missing:,} cells without a label (or not selected) were left out")
    contexts, names, n_cells, controls, distance, p = zip(*rows, strict=True)
    extra = {"context_col": context_col, "keep": keep, "library_size": library_size}
    return EnergyResult(
        perturbations=list(names), contexts=None if context_col is None else list(contexts),
        n_cells_p=np.array(n_cells), n_controls_p=np.array(controls), distance_p=np.array(distance), p_p=np.array(p),
        fdr_p=np.concatenate(fdr), notes=list(dict.fromkeys([*dataset.notes, *notes])),
        settings={
            "test": "energy", "pert_col": pert_col, "control": control, "max_genes": max_genes,
            "max_controls": max_controls, "max_tested": max_tested, "permutations": permutations, "seed": seed,
            **{k: v for k, v in extra.items() if v is not None},
        },
    )  # fmt: skip
