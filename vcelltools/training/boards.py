"""The metrics of a run for other viewers, beside ``metrics.jsonl``: TensorBoard files, and an offline run of W&B."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vcelltools.errors import EnvironmentFault
from vcelltools.training.settings import TrainSettings

Add = Callable[[int, dict[str, float]], None]


class Boards:
    """The viewers that the settings name; none before they are opened.

    Nothing is sent over the network: ``wandb sync`` uploads the run in ``wandb/`` of the run folder later.
    """

    def __init__(self) -> None:
        self._add: list[Add] = []
        self._close: list[Callable[[], Any]] = []

    def open(self, settings: TrainSettings, dpath: Path) -> None:
        """Open the viewers; raise an :class:`EnvironmentFault` if the package of one is not installed."""
        if settings.tensorboard:
            self._open_tensorboard(dpath)
        if settings.wandb:
            self._open_wandb(settings, dpath)

    def _open_tensorboard(self, dpath: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as e:
            raise EnvironmentFault("tensorboardX is not installed", hint="pip install 'vcelltools[tensorboard]'") from e
        writer = SummaryWriter(str(dpath / "tensorboard"))

        def add(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        self._add.append(add)
        self._close.append(writer.close)

    def _open_wandb(self, settings: TrainSettings, dpath: Path) -> None:
        try:
            import wandb
        except ImportError as e:
            raise EnvironmentFault("wandb is not installed", hint="pip install 'vcelltools[wandb]'") from e
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
            x_disable_machine_info=True,
        )  # fmt: skip
        run = wandb.init(
            mode="offline", dir=str(dpath), project="vcelltools", name=dpath.name, config=settings.to_json(),
            settings=quiet,
        )  # fmt: skip
        self._add.append(lambda step, values: run.log(values, step=step))
        self._close.append(run.finish)

    def add(self, step: int, values: dict[str, Any], prefix: str = "") -> None:
        """Add the numbers among some values."""
        numbers = {f"{prefix}{k}": float(v) for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        for add in self._add:
            add(step, numbers)

    def close(self) -> None:
        """Write what is pending; a viewer that fails here does not fail the run."""
        for close in self._close:
            with suppress(Exception):
                close()
        self._add, self._close = [], []
