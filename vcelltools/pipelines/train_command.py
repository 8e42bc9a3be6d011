"""What a command line of ``train`` asks for: settings from the file and the options, and the devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.pipelines.train_settings import TrainSettings, make_settings
from vcelltools.progress import SILENT, Progress

if TYPE_CHECKING:
    from vcelltools.model.topology import Plan
    from vcelltools.pipelines.predict import PredictResult
    from vcelltools.pipelines.sanity import SanityResult
    from vcelltools.pipelines.train import TrainResult


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request, its platform chosen."""

    settings: TrainSettings
    topology: str | None

    def plan(self) -> Plan:
        """Compile for the topology: see :func:`vcelltools.pipelines.plan.plan`."""
        from vcelltools.pipelines.plan import plan

        assert self.topology is not None
        return plan(self.settings, self.topology)

    def check(self, mode: str, progress: Progress = SILENT) -> SanityResult:
        """Run a sanity mode."""
        from vcelltools.pipelines.sanity import check_sanity

        return check_sanity(mode, self.settings, progress=progress)

    def train(self, *, resume: bool, force: bool, progress: Progress = SILENT) -> TrainResult:
        """Train, or fit a baseline."""
        from vcelltools.pipelines.train import train

        return train(self.settings, resume=resume, force=force, progress=progress)


def prepare(options: dict[str, Any], *, tpu: bool, topology: str | None, dry_run: bool, distributed: str | None) -> Job:
    """Read ``vcelltools.toml``, lay the options over it, and settle the platform.

    Raises
    ------
    UsageError
        For options that contradict each other.
    EnvironmentFault
        Where ``tpu`` asks for a TPU that is not there, or for another topology than there is.
    """
    if dry_run and topology is None:
        raise UsageError("--dry-run: no topology", hint="--topology v5e-16")
    if topology is not None and not (dry_run or tpu):
        raise UsageError("--topology says what to plan for, or what --tpu must find", hint="--dry-run or --tpu")
    settings = _read_settings(options)
    if dry_run:
        return Job(settings=settings, topology=topology)
    from vcelltools.model.mesh import choose_platform, start_processes

    if distributed is not None and not tpu:
        choose_platform(tpu=False)
    if distributed is not None:
        start_processes(distributed)
    choose_platform(tpu=tpu)
    _use_compilation_cache()
    if tpu and topology is not None:
        _check_topology(topology)
    return Job(settings=settings, topology=topology)


def _read_settings(options: dict[str, Any]) -> TrainSettings:
    from vcelltools.config import load_config

    given = {k: _plain(v) for k, v in options.items()}
    given["stores"] = given.pop("store") or None
    config, base = load_config()
    return make_settings(_resolve(config.train, base), given)


def prepare_baseline(kind: str, options: dict[str, Any]) -> Callable[..., PredictResult]:
    """Return what writes a baseline's prediction, its settings read as those of ``train``."""
    from vcelltools.pipelines.predict import predict_baseline

    return partial(predict_baseline, kind, settings=_read_settings(options))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _resolve(table: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return ``[train]`` with its paths relative to the folder of the file."""
    out = dict(table)
    for key in ("out", "split", "features"):
        if isinstance(out.get(key), str):
            out[key] = str(base / out[key])
    if isinstance(out.get("stores"), list):
        out["stores"] = [str(base / s) if isinstance(s, str) else s for s in out["stores"]]
    return out


def _check_topology(topology: str) -> None:
    import jax

    from vcelltools.model.topology import parse_topology

    _, shape = parse_topology(topology)
    chips = 1
    for n in shape.split("x"):
        chips *= int(n)
    if jax.device_count() != chips:
        raise EnvironmentFault(
            f"--topology {topology} has {chips} chips; this run sees {jax.device_count()}",
            hint="on a pod, start the same command on every worker with --distributed auto",
        )


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, in the user's cache."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) or jax.default_backend() == "cpu":
        return  # on a CPU compiled code is tied to the very machine
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcelltools" / "jax"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(base))
