"""Mean CP10K of all groups of a screen, for models of ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.lines import name_line

if TYPE_CHECKING:
    from vcelltools.model.baselines import Pseudobulk
    from vcelltools.sampling.effects import Screen
    from vcelltools.stores.store import Store

_BLOCK_ROWS = 2048


def measure_pseudobulk(screen: Screen, *, progress: Progress = SILENT) -> Pseudobulk:
    """Read the stores of a screen once more, verified, and return the mean CP10K of its groups and controls."""
    from vcelltools.model.baselines import Pseudobulk

    shape = screen.effect_kg.shape
    cp10k, base = np.zeros(shape), np.zeros(shape)
    control, share = np.zeros((2, *screen.control_cg.shape))
    line_id = {name: i for i, name in enumerate(screen.lines)}
    row = {key: k for k, key in enumerate(zip(screen.groups["line"], screen.groups["perturbation"], strict=True))}
    progress.start("measure pseudobulks", sum(s.n_cells for s in screen.stores), "cells")
    for store in screen.stores:
        runs = store.runs
        sums: dict[tuple[str, str | None], tuple[np.ndarray, np.ndarray, int]] = {}
        nothing = np.zeros(store.n_genes)
        for r in runs[runs["is_control"]].itertuples():
            total, expressing = _sum(store, r.start, r.length)
            for key in ((r.cell_line, r.context), (r.cell_line, None)):
                old = sums.get(key, (nothing, nothing, 0))
                sums[key] = old[0] + total, old[1] + expressing, old[2] + r.length
            progress.advance(r.length)
        for (line, context), (total, expressing, n) in sums.items():
            if context is None:
                control[line_id[name_line(store.name, line)]] = total / n
                share[line_id[name_line(store.name, line)]] = expressing / n
        for r in runs[~runs["is_control"]].itertuples():
            k = row.get((name_line(store.name, r.cell_line), r.perturbation))
            if k is not None:
                total, _, n = sums.get((r.cell_line, r.context), sums[r.cell_line, None])
                weight = r.length / int(screen.groups["cells"].iloc[k])
                base[k] += weight * total / n
                cp10k[k] += weight * _sum(store, r.start, r.length)[0] / r.length
            progress.advance(r.length)
        store.release()
    progress.finish()
    return Pseudobulk(cp10k_kg=cp10k, base_kg=base, control_cg=control, share_cg=share)


def _sum(store: Store, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of CP10K (g,) and the numbers of expressing cells (g,) of neighbouring rows."""
    total, expressing = np.zeros((2, store.n_genes))
    for a in range(start, start + length, _BLOCK_ROWS):
        rows = np.arange(a, min(a + _BLOCK_ROWS, start + length))
        if not store.is_checked(rows):
            store.check_rows(rows)
        block = store.X[rows[0] : rows[-1] + 1].astype(np.float32)
        total += np.expm1(block).sum(axis=0, dtype=np.float64)
        expressing += np.count_nonzero(block, axis=0)
    return total, expressing
