"""The split-half ceiling: the score of one half of the true cells against the other."""

from __future__ import annotations

import numpy as np

from vcelltools.differential.cell_labels import split_halves
from vcelltools.errors import DataError
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.cell_eval.metrics import compute_all, make_pair
from vcelltools.scoring.cell_eval.options import Opened
from vcelltools.scoring.cell_eval.rules import METRICS
from vcelltools.scoring.result import Ceiling


def spearman_brown(r: float | None) -> float:
    """Return 2r/(1 + r), the reliability at twice the depth; NaN if r is not positive."""
    return 2 * r / (1 + r) if r is not None and r > 0 else float("nan")


def split_half_ceiling(opened: Opened, *, progress: Progress = SILENT) -> Ceiling:
    """Score one half of the truth against the other, and extrapolate the means to full depth."""
    options, cells = opened.options, opened.cells
    position = {v: i for i, v in enumerate(cells.labels)}
    n_k, names = len(cells.labels), options.names
    halves = split_halves(cells.codes, np.array([position[v] for v in cells.order]), n_k, options.ceiling_seed)
    kept = cells.keep(halves >= 0)
    where = opened.dataset.label
    if options.control not in kept.labels:
        raise DataError(f"{where}: the control has fewer than two cells, so there is no ceiling")
    if len(kept.labels) < 2:
        raise DataError(f"{where}: no perturbation has two cells, so there is no ceiling")
    parts = [np.where((halves >= 0) & (halves // n_k == h), kept.codes, np.int32(-1)) for h in (0, 1)]
    test = options.scores_de
    real, pred = (
        opened.reduce(test=test, cells=kept, codes=codes, progress=progress, phase=f"half {n} of the truth")
        for n, codes in enumerate(parts, 1)
    )
    real_de, pred_de = (options.make_de_table(s) if test else None for s in (real, pred))

    def get_energies() -> tuple[np.ndarray, np.ndarray]:
        first, second = (opened.get_energy(kept.keep(codes >= 0)) for codes in parts)
        return second, first

    pair = make_pair(pred, real, pred_de, real_de, options.rules, get_threads(options.threads), get_energies)
    table = compute_all(pair, names)
    means = {k: v["mean"] for k, v in table.aggregate(skip_nan=options.rules.null_empty).items()}
    values = {
        k: spearman_brown(m) if k in METRICS and METRICS[k].reliability else float("nan") for k, m in means.items()
    }
    return Ceiling(table=table, values=values, n_dropped=n_k - len(kept.labels))
