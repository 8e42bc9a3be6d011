"""Read effects from a prediction of cells by any tool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.differential.cell_labels import read_cells
from vcelltools.differential.expression import find_scale
from vcelltools.differential.reduce import ReadOptions, reduce_cells
from vcelltools.errors import DataError, spell
from vcelltools.genes.identity import make_basis, match_genes, read_genes
from vcelltools.io import open_dataset
from vcelltools.sampling.lines import match_lines, respell

if TYPE_CHECKING:
    from vcelltools.sampling.effects import Screen


def read_effects(
    path: str | os.PathLike, screen: Screen, *, pert_col: str, control: str | None, context_col: str
) -> np.ndarray:
    """Return the effects (k, g) in a prediction of cells for the groups of a screen; NaN for missing groups.

    An effect is the mean log1p CP10K of the cells minus that of the control cells of the same line in the file. Their
    label is ``control``, by default that of a store which occurs in the file.

    Raises
    ------
    DataError
        If columns, controls or genes of the screen are missing.
    """
    store = screen.stores[0]
    out = np.full(screen.effect_kg.shape, np.nan)
    with open_dataset(path) as data:
        table = store.gene_table
        known = {
            str(g): (i if isinstance(i, str) else None, s if isinstance(s, str) else None)
            for g, i, s in zip(table["gene"], table["id"], table["symbol"], strict=True)
        }
        found = match_genes(make_basis(known, known=known), read_genes(data.var), policy="first")
        if not found.present.all():
            lacking = [g for g, there in zip(known, found.present, strict=True) if not there]
            raise DataError(
                f"{path} lacks {len(lacking):,} of the {len(known):,} genes of the stores ({lacking[0]}, …)",
                hint="predict all genes of the basis",
            )
        first: dict[int, int] = {}
        for column, gene in enumerate(found.merged.of_column.tolist()):
            first.setdefault(gene, column)
        own = np.array([first[k] for k in found.gene_of.tolist()], np.int64)
        order = np.concatenate([own, np.setdiff1d(np.arange(data.n_genes), own)])
        cells = read_cells(data, pert_col, control)
        labels = [str(s.manifest["labels"]["control"]) for s in screen.stores] if control is None else [control]
        label = next((x for x in labels if x in cells.labels), labels[0])
        scale = find_scale(data, with_library=True)
        if context_col in data.obs.columns:
            codes, names = data.obs.column(context_col).factorize()
        else:
            codes, names = np.zeros(data.n_cells, np.int64), [""]
        for k, name in enumerate(names):
            lines = match_lines(screen.places, respell([name], screen.stores)[0])
            lines = screen.lines if not lines and len(screen.lines) == len(names) == 1 else lines
            if len(lines) != 1:
                what = f"{context_col} {name!r}" if name else f"without a column {context_col}, the file"
                raise DataError(
                    f"{path}: {what} matches {len(lines)} lines of the stores",
                    hint=f"set {spell('context_col', 'COLUMN')}",
                )
            some = cells.keep(codes == k)
            some.need_control(label, f"{path}: no cell of {name or 'the file'}")
            reduced = reduce_cells(
                data, some, label, scale, ReadOptions(test=False, cp10k=scale.kind == "counts"), gene_order=order
            )
            mean = reduced.sums.mean_kg[:, : len(own)]
            for row in np.flatnonzero(screen.groups["line"].to_numpy() == lines[0]):
                pert = screen.groups["perturbation"].iloc[row]
                if pert in reduced.labels:
                    out[row] = mean[reduced.labels.index(pert)] - mean[reduced.control]
    return out
