"""``train --extend RUN --steps N``: continue a finished run to a larger number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.textfile import parse_json, read_text
from vcelltools.runtime.progress import Progress
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import TrainSettings

OPTIONS = ("steps", "minutes", "checkpoint_minutes", "log_every", "tensorboard", "wandb", "feed")
"""Settings that an extension may change."""


def read_extension(run: Path, steps: int | None, changes: dict[str, Any] | None = None) -> TrainSettings:
    """Return the settings of a run with more steps, and with the changes, whose keys are in ``OPTIONS``.

    The run must be finished. If an extension to the same number of steps was interrupted, it is continued.

    Raises
    ------
    UsageError
        If the number of steps is missing or not larger, or the run is not finished or has no steps.
    DataError
        If the folder holds no run, or is damaged.
    """
    folder = RunFolder(run)
    old = folder.read_settings()
    if old.model not in ("transformer", "diffusion"):
        raise UsageError(f"{run} is a run of {old.model}, which is fitted at once and has no steps to add")
    if steps is None:
        raise UsageError(f"{spell('extend')} needs the number of steps to train to", hint=spell("steps", 10_000))
    if folder.summary_fpath.exists():
        if steps <= (done := _read_steps(folder)):
            raise UsageError(
                f"{run} has {done:,} steps already, so it cannot be extended to {steps:,}",
                hint=f"{spell('steps')} is the number that the run has afterwards",
            )
    elif steps != old.steps:
        raise UsageError(f"{run} is not finished, so it cannot be extended", hint="run its command again to resume it")
    return msgspec.structs.replace(old, out=str(run), steps=steps, **(changes or {}))


def _read_steps(folder: RunFolder) -> int:
    """Return the number of steps that a finished run took."""
    try:
        return int(parse_json(read_text(folder.summary_fpath, what="the summary of a run"))["steps"])
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{folder.summary_fpath} is damaged: {e}") from e


def describe_schedule(settings: TrainSettings, was: int, step: int, progress: Progress) -> None:
    """Report how the learning rate changes at ``step`` if the schedule is extended from ``was`` steps."""
    from vcelltools.model.step import StepConfig, make_schedule

    s = settings
    if s.schedule == "constant":
        return
    before, now = (
        float(make_schedule(StepConfig(steps=n, learning_rate=s.peak_rate, warmup=s.warmup, schedule=s.schedule))(step))
        for n in (was, s.length[0])
    )
    progress.note(
        f"the {s.schedule} schedule now ends at step {s.length[0]:,}: at step {step:,} the learning rate "
        f"changes from {before:.3g} to {now:.3g}"
    )
