"""Measure the knock-down, energy distance and responding cells of every perturbation in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import find_pooled, read_cells
from vcelltools.differential.energy import ControlEnergy
from vcelltools.differential.screen import MIN_CELLS, Screen, check_limits
from vcelltools.errors import DataError, checked
from vcelltools.files.chosen_cells import ExtendedTable
from vcelltools.files.convert import ConvertResult, copy_cells
from vcelltools.io import Column, open_dataset
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Shown
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.screens.response import find_responding

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

RESPONSES = ("control", "responding", "escaping", "no signature", "not labelled")
CONTROL, RESPONDING, ESCAPING, NO_SIGNATURE, NOT_LABELLED = range(len(RESPONSES))


@dataclass(frozen=True, kw_only=True)
class PerturbationResponse:
    """The response to one perturbation.

    Attributes
    ----------
    perturbation, n_cells
        Label of the perturbation, and its number of cells.
    knockdown_log2fc
        log2 fold change of the target's mean counts per ten thousand; None if the target is not measured.
    n_genes
        Number of significant genes, which define its direction.
    e_distance, p_value
        The energy distance to the controls, and its permutation p-value.
    n_responding, responding_share
        Number of cells that responded, and their share.
    """

    perturbation: str
    n_cells: int
    knockdown_log2fc: float | None
    n_genes: int
    e_distance: float
    p_value: float
    n_responding: int
    responding_share: float


@dataclass(frozen=True, kw_only=True)
class RespondersResult(Shown):
    """The response of every cell, and to every perturbation.

    Attributes
    ----------
    source, pert_col, control
        The source, its perturbation column and the control label.
    cells
        (n,) names of the cells.
    codes, labels
        (n,) position of each cell's perturbation among ``labels``; -1 without one.
    response_n
        (n,) int8 positions in ``RESPONSES``.
    posterior_n, score_n
        (n,) probability that the cell responded, and its score: 0 is the mean of the controls, 1 that of the responding
        cells. NaN for controls and cells that were left out.
    perturbations
        One record per perturbation.
    n_controls
        Number of control cells in the comparison.
    notes
        Notes for the user.
    """

    source: str
    pert_col: str
    control: str
    cells: np.ndarray
    codes: np.ndarray
    labels: tuple[str, ...]
    response_n: np.ndarray
    posterior_n: np.ndarray
    score_n: np.ndarray
    perturbations: list[PerturbationResponse]
    n_controls: int
    notes: list[str] = field(default_factory=list)

    def get_columns(self) -> dict[str, Column]:
        """Return the columns of the cells: response, response_posterior, response_score, control_or_responding."""
        kept = (self.response_n == CONTROL) | (self.response_n == RESPONDING)
        names = np.array(RESPONSES, dtype=object)
        return {
            "response": Column(name="response", codes=self.response_n.astype(np.int32), categories=names),
            "response_posterior": Column(name="response_posterior", values=self.posterior_n),
            "response_score": Column(name="response_score", values=self.score_n),
            "control_or_responding": Column(name="control_or_responding", values=kept),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row per perturbation."""
        import pandas as pd

        return pd.DataFrame([vars(r) for r in self.perturbations]).set_index("perturbation")

    def to_json(self) -> dict[str, Any]:
        """Return the summary."""
        return {
            "source": self.source, "pert_col": self.pert_col, "control": self.control, "n_cells": len(self.cells),
            "n_controls": self.n_controls, "n_responding": int((self.response_n == RESPONDING).sum()),
            "n_escaping": int((self.response_n == ESCAPING).sum()),
            "perturbations": [dict(vars(r)) for r in self.perturbations], "notes": self.notes,
        }  # fmt: skip

    def write(self, out: str | os.PathLike, *, force: bool = False) -> Path:
        """Write one row per cell with its response and that of its perturbation (.parquet, .feather or .csv)."""
        import pyarrow as pa

        of = {r.perturbation: i for i, r in enumerate(self.perturbations)}
        at = np.array([*(of.get(v, -1) for v in self.labels), -1])[self.codes]
        columns: dict[str, Any] = {"cell": pa.array(self.cells.astype(str))}
        names = np.array([*self.labels, None], dtype=object)
        columns["perturbation"] = pa.array(names[self.codes], pa.string())
        columns["response"] = pa.array(np.array(RESPONSES, object)[self.response_n], pa.string())
        columns["posterior"], columns["score"] = pa.array(self.posterior_n), pa.array(self.score_n)
        for key in ("knockdown_log2fc", "e_distance", "p_value", "responding_share"):
            each = [getattr(r, key) for r in self.perturbations]
            values = np.array([*(np.nan if v is None else v for v in each), np.nan], np.float64)
            columns[key] = pa.array(values[at])
        return write_frame(out, columns, force=force)

    def write_labelled(
        self,
        source: str | os.PathLike | AnnData,
        out: str | os.PathLike,
        *,
        modality: str | None = None,
        layer: str | None = None,
        feature_type: str | None = None,
        genome: str | None = None,
        force: bool = False,
        threads: int | None = None,
        progress: Progress = SILENT,
    ) -> ConvertResult:
        """Write a new file with the response in obs; layers, obsm and uns are copied.

        Raises
        ------
        DataError
            If the cells of the file differ from those that were measured.
        """
        with open_dataset(source, modality=modality, layer=layer, feature_type=feature_type, genome=genome) as ds:
            if not np.array_equal(ds.obs.index, self.cells):
                raise DataError(f"the cells of {ds.label} differ from those whose response was measured")
            packing = {"compression": None, "level": None, "force": force}
            obs = ExtendedTable(ds.obs, self.get_columns())
            return copy_cells(ds, out, [source], None, ["all"], {}, packing, threads, progress, obs=obs)


@checked
def responders(
    source: str | os.PathLike | AnnData,
    *,
    pert_col: str = "target_gene",
    control: str = "non-targeting",
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
) -> RespondersResult:
    """Measure the response of every perturbation and of each of its cells.

    Parameters
    ----------
    source
        A file or an AnnData of counts, or of log1p values.
    max_genes
        Number of most variable genes (in log1p CP10K) to use, in addition to the targets.
    max_controls
        Maximum number of control cells, drawn at random.
    max_tested
        Maximum number of cells per group in an energy distance, drawn at random.
    permutations
        Permutations for the p-value of each energy distance (:func:`vcelltools.differential.energy.test_energy`).
    seed
        Random seed of all draws.
    library_size
        obs column with the library sizes of the whole transcriptome, by which counts are divided instead of their sum
        if the file holds only some of the genes.

    Raises
    ------
    DataError
        If the column or the control is missing, or there are fewer than ten controls.
    UsageError
        If a number is out of range.

    Notes
    -----
    Responding cells are found by :func:`vcelltools.screens.response.find_responding`. Perturbations are divided into
    batches whose cells fit in memory, and the file is read once per batch.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.responders("atlas.h5ad", permutations=99)
    >>> len(result.perturbations)
    4
    """
    check_limits(
        max_genes=max_genes, max_controls=max_controls, max_tested=max_tested, permutations=permutations, seed=seed
    )
    with open_dataset(
        source, modality=modality, layer=layer, feature_type=feature_type, genome=genome, library_size=library_size
    ) as ds:
        cells = read_cells(ds, pert_col, control)
        found = Screen(ds, cells, control, max_genes, max_controls, seed, threads, progress)
        notes = [*ds.notes, *found.scale.notes]
        if pooled := find_pooled(ds, cells, control):
            notes.append(pooled.partition(";")[0])
        if cells.n_missing:
            notes.append(f"{cells.n_missing:,} cells without a label were left out")
        n = ds.n_cells
        response = np.full(n, NOT_LABELLED, np.int8)
        response[cells.codes == cells.labels.index(control)] = CONTROL
        posterior, score = np.full(n, np.nan), np.full(n, np.nan)
        energy = ControlEnergy(found.controls, max_tested=max_tested, permutations=permutations, seed=seed)
        records = _measure(found, energy, response, posterior, score)
        few = [r.perturbation for r in records if r.n_cells < MIN_CELLS]
        if few:
            notes.append(f"{len(few):,} perturbations have fewer than {MIN_CELLS} cells and are not classified")
        return RespondersResult(
            source=ds.label, pert_col=pert_col, control=control, cells=ds.obs.index, codes=cells.codes,
            labels=cells.labels, response_n=response, posterior_n=posterior, score_n=score,
            perturbations=records, n_controls=len(found.controls),
            notes=list(dict.fromkeys(notes)),
        )  # fmt: skip


def _measure(
    screen: Screen, energy: ControlEnergy, response: np.ndarray, posterior: np.ndarray, score: np.ndarray
) -> list[PerturbationResponse]:
    """Measure every perturbation, and store the responses of its cells."""
    c = screen.controls

    def work(k: int, rows: np.ndarray, x: np.ndarray) -> PerturbationResponse:
        e, p = energy.test(x, k)
        n_genes, n_responding = 0, 0
        response[rows] = NO_SIGNATURE
        posterior[rows] = 0.0
        if len(rows) >= MIN_CELLS:
            found = find_responding(x, c)
            n_genes, n_responding = found.n_genes, int(found.responds_n.sum())
            posterior[rows], score[rows] = found.posterior_n, found.score_n
            if found.posterior_n.any():
                response[rows] = np.where(found.responds_n, RESPONDING, ESCAPING)
        return PerturbationResponse(
            perturbation=screen.cells.labels[k],
            n_cells=len(rows),
            knockdown_log2fc=_measure_knockdown(screen, x, screen.target_of[k]),
            n_genes=n_genes,
            e_distance=e,
            p_value=p,
            n_responding=n_responding,
            responding_share=n_responding / len(rows),
        )

    return sorted(screen.compare(work).values(), key=lambda r: r.perturbation)


def _measure_knockdown(screen: Screen, x: np.ndarray, gene: int) -> float | None:
    """Return the log2 ratio of the target's means; None if it is not measured or not expressed in controls."""
    at = screen.place.get(gene, -1)
    if at < 0 or not screen.control_mean_g[at] > 0:
        return None
    mean = float(np.expm1(x[:, at].astype(np.float64)).mean())
    return float(np.log2((mean + 1e-9) / (screen.control_mean_g[at] + 1e-9)))
