"""The length of a training whose settings do not give it: it follows the number of training cells."""

from __future__ import annotations

import math

import msgspec

from vcelltools.errors import spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.settings import TrainSettings

PASSES = 10
"""How often each training cell is drawn, on average."""
SHORTEST, LONGEST = 500, 5000
"""Bounds on the chosen number of steps; it is also at least twice the warm-up, if that is below the upper bound."""
EVALUATIONS = 20
"""Number of evaluations in a training whose number of steps is chosen."""
EVAL_EVERY = 250
"""Steps between evaluations if the number of steps is given, but not this one."""


def choose_steps(n_cells: int, cells_per_step: int, *, warmup: int = 0) -> int:
    """Return a number of steps that draws each of ``n_cells`` training cells ``PASSES`` times on average.

    It is at least ``SHORTEST`` and twice the warm-up, and at most ``LONGEST``.

    Examples
    --------
    >>> choose_steps(200_000, 32 * 64), choose_steps(4_000, 32 * 64), choose_steps(10_000_000, 32 * 64)
    (977, 500, 5000)
    """
    return min(max(math.ceil(PASSES * n_cells / cells_per_step), SHORTEST, 2 * warmup), LONGEST)


def set_length(
    settings: TrainSettings, n_cells: int, cells_per_step: int, progress: Progress = SILENT
) -> TrainSettings:
    """Return settings with a number of steps and of steps between evaluations; those that are given stay.

    ``n_cells`` is the number of training cells, and ``cells_per_step`` the number that a step draws from them.
    """
    steps, every = settings.steps, settings.eval_every
    if steps is None:
        steps = choose_steps(n_cells, cells_per_step, warmup=settings.warmup)
        drawn = steps * cells_per_step / n_cells
        stops = " or fewer, if validation does not improve" if settings.patience else ""
        progress.note(
            f"training takes {steps:,} steps{stops}: each of the {n_cells:,} training cells is drawn {drawn:,.1f} "
            f"times on average ({spell('steps')} sets another number)"
        )
        every = every or math.ceil(steps / EVALUATIONS)
    return msgspec.structs.replace(settings, steps=steps, eval_every=every or EVAL_EVERY)
