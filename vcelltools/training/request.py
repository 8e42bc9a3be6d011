"""A ``train`` command: its settings from the file and the options, and its devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import EnvironmentFault, UsageError, checked, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.settings import TrainSettings, make_settings

if TYPE_CHECKING:
    from vcelltools.model.topology import Plan
    from vcelltools.stores.store import Store
    from vcelltools.training.outcome import TrainResult
    from vcelltools.training.sanity import SanityResult


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked command with its platform."""

    settings: TrainSettings
    topology: str | None
    extend: bool = False

    def plan(self) -> Plan:
        """Compile the step for the topology; see :func:`vcelltools.training.dry_run.plan`."""
        from vcelltools.training.dry_run import plan

        assert self.topology is not None
        return plan(self.settings, self.topology)

    def check(self, mode: str, progress: Progress = SILENT) -> SanityResult:
        """Run a sanity mode."""
        from vcelltools.training.sanity import check_sanity

        return check_sanity(mode, self.settings, progress=progress)

    def train(self, *, resume: bool, force: bool, progress: Progress = SILENT) -> TrainResult:
        """Train, or fit a baseline."""
        from vcelltools.training.train import train

        return train(self.settings, resume=resume, force=force, extend=self.extend, progress=progress)


@checked
def train(
    out: str | os.PathLike = "runs/run",
    *,
    stores: Sequence[str | os.PathLike | Store] = (),
    weights: Mapping[str, float] | None = None,
    split: str | os.PathLike | None = None,
    features: str | os.PathLike | None = None,
    network: Sequence[str | os.PathLike] = (),
    from_run: str | os.PathLike | None = None,
    extend: str | os.PathLike | None = None,
    model: str = "transformer",
    objective: str | None = None,
    size: str = "rn",
    prior: str = "additive",
    restore_spread: bool = False,
    identity: bool | None = None,
    batch_embedding: bool = False,
    nonnegative: bool = False,
    set_size: int = 64,
    sets: int = 32,
    steps: int | None = None,
    seed: int = 0,
    optimizer: str = "adamw",
    learning_rate: float = 3e-4,
    scale_rate: bool = False,
    warmup: int = 100,
    schedule: str = "cosine",
    weight_decay: float = 10.0,
    clip: float = 1.0,
    ema: float = 0.99,
    accumulate: int = 0,
    energy: float = 0.1,
    mse: float = 0.0,
    sinkhorn: float = 0.0,
    delta: float = 0.3,
    pearson: float = 2.0,
    rank: float = 0.4,
    losses: Mapping[str, float] | None = None,
    unbiased: bool = False,
    precision: str = "auto",
    feed: str = "auto",
    log_every: int = 50,
    eval_every: int | None = None,
    patience: int = 10,
    stability: float = 0.0,
    eval_sets: int = 2,
    checkpoint_minutes: float = 10.0,
    minutes: float = 0.0,
    tensorboard: bool = False,
    wandb: bool = False,
    resume: bool = True,
    force: bool = False,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a model on stores, or fit a baseline, and score it and the baselines on held-out groups.

    Parameters
    ----------
    out
        The run folder.
    stores
        Stores or their folders; by default all stores in the configured folder.
    extend
        A finished run to train to more ``steps``. Its own settings apply, except ``steps``, ``minutes``,
        ``checkpoint_minutes``, ``log_every``, ``tensorboard``, ``wandb`` and ``feed``.
    weights, split, features, network, from_run, model, objective, size, prior, restore_spread, identity,
    batch_embedding, nonnegative, set_size, sets
        See :class:`vcelltools.training.settings.TrainSettings`, also for the settings below.
    resume, force
        Continue the run in ``out``, or start it again.

    Raises
    ------
    UsageError
        If the folder holds a finished run, or settings contradict each other.
    DataError
        If stores, split, features or an earlier run do not match, or if the loss is not finite.
    InterruptedRun
        After SIGTERM or the time limit, once a checkpoint is written.

    Examples
    --------
    >>> import vcelltools as vc
    >>> run = vc.train("runs/new", stores=["stores/atlas"], split="split.toml", model="perturbation-mean")
    >>> run.out.as_posix(), "perturbation-mean" in run.summary["baselines"]
    ('runs/new', True)
    """
    from vcelltools.stores.store import Store, open_store
    from vcelltools.training.extend import read_extension
    from vcelltools.training.train import train as run

    if extend is not None:
        changes = {"minutes": minutes, "checkpoint_minutes": checkpoint_minutes, "log_every": log_every,
                   "tensorboard": tensorboard, "wandb": wandb, "feed": feed}  # fmt: skip
        return run(read_extension(Path(extend), steps, changes), extend=True, progress=progress)
    opened = [s if isinstance(s, Store) else open_store(s) for s in stores]
    given = {
        "out": os.fspath(out), "stores": [str(s.path) for s in opened],
        "weights": dict(weights or {}), "split": split and os.fspath(split),
        "features": features and os.fspath(features), "network": [os.fspath(n) for n in network],
        "from_run": from_run and os.fspath(from_run),
        "model": model, "objective": objective, "size": size, "prior": prior,
        "restore_spread": restore_spread, "identity": identity, "batch_embedding": batch_embedding,
        "nonnegative": nonnegative, "set_size": set_size, "sets": sets, "steps": steps, "seed": seed,
        "optimizer": optimizer, "learning_rate": learning_rate, "scale_rate": scale_rate,
        "warmup": warmup, "schedule": schedule, "weight_decay": weight_decay,
        "clip": clip, "ema": ema, "accumulate": accumulate, "energy": energy, "mse": mse, "sinkhorn": sinkhorn,
        "delta": delta, "pearson": pearson, "rank": rank, "losses": dict(losses or {}),
        "unbiased": unbiased, "precision": precision, "feed": feed,
        "log_every": log_every, "eval_every": eval_every, "patience": patience, "stability": stability,
        "eval_sets": eval_sets,
        "checkpoint_minutes": checkpoint_minutes, "minutes": minutes, "tensorboard": tensorboard,
        "wandb": wandb,
    }  # fmt: skip
    settings = make_settings({}, given)
    return run(settings, stores=opened or None, resume=resume, force=force, progress=progress)


def prepare(
    options: dict[str, Any],
    *,
    tpu: bool,
    topology: str | None,
    dry_run: bool,
    distributed: str | None,
    extend: Path | None = None,
) -> Job:
    """Read ``vcelltools.toml``, apply the options, and choose the platform.

    Raises
    ------
    UsageError
        If options contradict each other.
    EnvironmentFault
        If ``tpu`` is true and there is no TPU, or if it has another topology.
    """
    if dry_run and topology is None:
        raise UsageError(f"{spell('dry_run', True)} needs a topology", hint=spell("topology", "v5e-16"))
    if topology is not None and not (dry_run or tpu):
        raise UsageError(
            f"{spell('topology')} is only used with {spell('dry_run', True)} or {spell('tpu', True)}",
            hint=f"add {spell('dry_run', True)} or {spell('tpu', True)}",
        )
    settings = read_settings(options) if extend is None else _read_extension(extend, options)
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
    return Job(settings=settings, topology=topology, extend=extend is not None)


def read_settings(options: dict[str, Any]) -> TrainSettings:
    """Read ``[train]`` of ``vcelltools.toml`` and apply the options."""
    from vcelltools.config import load_config

    given = {k: _plain(v) for k, v in options.items()}
    for key in ("stores", "network"):
        given[key] = given.get(key) or None
    config, base = load_config()
    weights = {d.name: d.weight for d in config.datasets if d.weight != 1}
    return make_settings({**({"weights": weights} if weights else {}), **_resolve(config.train, base)}, given)


def _read_extension(run: Path, options: dict[str, Any]) -> TrainSettings:
    """Read the settings of a run to extend; the options may set the number of steps and the time limit."""
    from vcelltools.training.extend import OPTIONS, read_extension

    given = {k: v for k, v in options.items() if v not in (None, [])}
    for key in given:
        if key not in OPTIONS:
            raise UsageError(f"{spell(key)} cannot be changed with {spell('extend')}: the run has its own")
    return read_extension(run, given.pop("steps", None), given)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _resolve(table: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return ``[train]`` with its paths relative to the folder of the file."""
    out = dict(table)
    for key in ("out", "split", "features", "from_run"):
        if isinstance(out.get(key), str):
            out[key] = str(base / out[key])
    for key in ("stores", "network"):
        if isinstance(out.get(key), list):
            out[key] = [str(base / s) if isinstance(s, str) else s for s in out[key]]
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
            f"{spell('topology')} {topology} has {chips} chips, but this run sees {jax.device_count()}",
            hint=f"on a pod, start the same command on every worker with {spell('distributed', 'auto')}",
        )


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache between runs."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) or jax.default_backend() == "cpu":
        return  # code compiled for a CPU runs only on that machine
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcelltools" / "jax"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(base))
