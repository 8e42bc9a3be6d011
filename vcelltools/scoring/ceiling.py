"""The split-half ceiling: how well one half of the real cells predicts the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.compat import METRICS, Rules
from vcelltools.scoring.effects import make_effects
from vcelltools.scoring.result import Ceiling
from vcelltools.scoring.sides import Cells, reduce_side

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Opened, Options


def split_halves(cells: Cells, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the codes of two disjoint halves, and the number of groups too small to split.

    One random stream permutes the cells of each group in the order of the file's categories; the first ⌊n/2⌋ are
    one half, the next ⌊n/2⌋ the other (as cell-eval draws them).
    """
    rng = np.random.default_rng(seed)
    a, b = np.full(len(cells.codes), -1, np.int32), np.full(len(cells.codes), -1, np.int32)
    position = {v: i for i, v in enumerate(cells.labels)}
    dropped = 0
    for name in cells.order:
        code = position[name]
        rows = rng.permutation(np.flatnonzero(cells.codes == code))
        half = len(rows) // 2
        dropped += half < 1
        a[rows[:half]] = code
        b[rows[half : 2 * half]] = code
    return a, b, dropped


def spearman_brown(r: float | None) -> float:
    """Return 2r/(1 + r), the reliability at twice the depth; NaN where r is not positive."""
    return 2 * r / (1 + r) if r is not None and r > 0 else float("nan")


def split_half_ceiling(
    opened: Opened, options: Options, rules: Rules, names: list[str], *, progress: Progress = SILENT
) -> Ceiling:
    """Score one half of the truth against the other and bring the means to full depth."""
    from vcelltools.scoring.evaluate import compute_all, make_pair
    from vcelltools.stream import get_threads

    cells = opened.cells
    a, b, dropped = split_halves(cells, options.ceiling_seed)
    left = [i for i in range(len(cells.labels)) if (a == i).any()]
    if cells.labels.index(options.control) not in left:
        raise DataError(f"{opened.dataset.label}: the control has fewer than two cells; no ceiling can be had")
    if len(left) < 2:
        raise DataError(f"{opened.dataset.label}: no perturbation has two cells; no ceiling can be had")
    lookup = np.full(len(cells.labels) + 1, -1, np.int32)
    lookup[left] = np.arange(len(left), dtype=np.int32)
    labels = tuple(cells.labels[i] for i in left)
    kept = Cells(
        labels=labels,
        codes=cells.codes,
        order=tuple(v for v in cells.order if v in labels),
        appearance=cells.appearance,
        n_missing=cells.n_missing,
    )
    test = any(METRICS[m].kind in ("de", "extended") for m in names)
    read = options.read_options(rules, test=test)
    sides = [
        reduce_side(
            opened.dataset, kept, options.control, opened.scale, read, codes=lookup[half], progress=progress,
            phase=f"half {n} of the truth",
        )
        for n, half in enumerate((a, b), 1)
    ]  # fmt: skip
    real, pred = sides
    tables = [
        make_effects(s, rules, epsilon=options.epsilon, cpm_filter=options.cpm_filter, discrete=options.allow_discrete)
        if test
        else None
        for s in sides
    ]
    energy = None
    if "pearson_edistance" in names:
        from dataclasses import replace

        from vcelltools.scoring.edistance import energy_distances

        def energy() -> tuple[np.ndarray, np.ndarray]:
            halves = [
                energy_distances(
                    opened.dataset, replace(kept, codes=lookup[half]), opened.scale, options.control,
                    raw=options.allow_discrete, cp10k=options.to_cp10k, threads=options.threads,
                )
                for half in (b, a)
            ]  # fmt: skip
            return halves[0], halves[1]

    pair = make_pair(pred, real, tables[1], tables[0], rules, get_threads(options.threads), energy)
    table = compute_all(pair, names)
    means = {k: v["mean"] for k, v in table.aggregate(skip_nan=rules.null_empty).items()}
    values = {
        k: spearman_brown(m) if k in METRICS and METRICS[k].reliability else float("nan") for k, m in means.items()
    }
    return Ceiling(table=table, values=values, n_dropped=dropped)
