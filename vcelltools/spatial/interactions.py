"""``spatial interactions``: coefficients by cell type, with one row per interaction, target and cell type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.spatial.fitted import find_rows

if TYPE_CHECKING:
    from vcelltools.spatial._opened import FittedRun

HOWS = ("mean", "min", "max", "sum")
KIND_NAMES = ("tf", "ligand-receptor", "ligand-tf")
_SUMMARIES: dict[str, Any] = {"mean": np.mean, "min": np.min, "max": np.max, "sum": np.sum}


def list_interactions(
    run: FittedRun, *, by: str | None, how: str, cell: str | None, neighbors: int | None
) -> dict[str, Any]:
    """Return the columns ``interaction, interaction_type, gene, cell_type, beta``, sorted in this order."""
    if how not in HOWS:
        raise UsageError(f"how {how!r} is not known", hint=f"one of: {', '.join(HOWS)}")
    tissue = run.tissue
    if by is None:
        types = np.array([tissue.labels[int(c)] for c in tissue.clusters], dtype=object)
    else:
        types = tissue.column(by).labels()
        types = types if tissue.rows is None else types[tissue.rows]
        if any(t is None for t in types):
            raise DataError(f"{tissue.where}: obs/{by} has cells without a value")
    rows = _find_neighbourhood(run, cell, neighbors)
    types = types[rows]
    names = sorted(set(types.tolist()))
    out: list[tuple[str, str, str, str, float]] = []
    for gene in run.genes:
        betas = run.betas(gene)
        of_cell = find_rows(betas, tissue)[rows]
        m = betas.modulators
        kinds = [KIND_NAMES[0]] * len(m.tf) + [KIND_NAMES[1]] * len(m.lr) + [KIND_NAMES[2]] * len(m.tfl)
        for name in names:
            values = _SUMMARIES[how](betas.ordered[of_cell[types == name]], axis=0)
            out += [
                (interaction, kinds[i], gene, name, float(values[i]))
                for i, interaction in enumerate(m.names)
                if values[i] != 0
            ]
    heads = ("interaction", "interaction_type", "gene", "cell_type")
    columns: dict[str, Any] = {h: [row[i] for row in out] for i, h in enumerate(heads)}
    return columns | {"beta": np.array([row[4] for row in out], np.float64)}


def _find_neighbourhood(run: FittedRun, cell: str | None, neighbors: int | None) -> np.ndarray:
    """Return the rows of a cell and its nearest neighbours, or all rows if no cell is given."""
    tissue = run.tissue
    if cell is None:
        if neighbors is not None:
            raise UsageError("neighbors needs a cell", hint="pass the name of the cell")
        return np.arange(tissue.n_cells)
    found = run.find_cells([cell])
    assert found is not None
    k = neighbors or 0
    if not 0 <= k < tissue.n_cells:
        raise UsageError(f"neighbors is {k}, but there are {tissue.n_cells:,} cells")
    distance = ((tissue.xy - tissue.xy[found[0]]) ** 2).sum(1)
    distance[found[0]] = -1.0
    return np.sort(np.argsort(distance, kind="stable")[: k + 1])
