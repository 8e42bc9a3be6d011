"""``[train]`` of ``vcelltools.toml``: the settings of a training run."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.model.registry import MODELS as EFFECT_MODELS
from vcelltools.names import escape_json

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Weight = Annotated[float, Meta(ge=0)]

MODELS = (*EFFECT_MODELS, "transformer", "diffusion")
DIFFUSION_SIZES = ("tiny", "mini", "moe-17b")
# defaults of a diffusion model
DIFFUSION = {"size": "tiny", "sets": 64, "warmup": 1000, "weight_decay": 0.01}
_WITHOUT_DECAY = ("adam", "sgd")
_RATE_SETS, _RATE_FACTOR = 128, 4.0  # of the scaled learning rate: sets at which it is as given, and its bound
LOSSES = ("energy", "mse", "sinkhorn", "delta", "pearson", "rank")
SANITY = (
    "overfit-batch",
    "controls-same",
    "controls-resampled",
    "random-perturbations",
    "random-genes",
    "permutation",
)


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a run.

    Attributes
    ----------
    out
        The run folder.
    stores
        Folders of the stores; by default all stores in ``[store] path``.
    weights
        For each name of a store, a factor on how often its groups are drawn; by default ``weight`` of ``[[datasets]]``.
    split
        A TOML file (``[training] [zeroshot] [fewshot]``); by default a random choice of groups is held out.
    features
        A file of perturbation features, from which perturbations without training cells can be predicted.
    network
        Edge lists of genes (CSV or TSV: two symbols, optionally a weight), for ``neighbours``.
    from_run
        A finished run of the same model (``transformer`` or ``diffusion``), whose weights the training starts from.
    objective
        The score that the last, fitted step of a model optimises: ``discrimination``, ``error`` or ``balanced``. This
        step chooses the scales of the shared and the perturbation-specific effects, on groups held out of the training
        groups. The default is ``balanced`` for ``neighbours``, ``kernel-ridge`` and ``transfer``. ``ridge`` and
        ``perturbation-mean`` have this step only if an objective is given, and other models never have it.
    model, size
        A model of effects (``control-mean``, ``perturbation-mean``, ``ridge``, ``neighbours``, ``kernel-ridge``,
        ``transfer``), ``transformer`` (``tiny``, ``rn``, ``base``, ``large``) or
        ``diffusion`` on single cells (``tiny``, ``mini``; ``moe-17b`` can only be planned). For a diffusion model,
        ``sets`` is the number of cells per batch (64), ``warmup`` is 1,000 and ``weight_decay`` is 0.01 by default.
    prior
        The prior effects of the transformer: ``additive`` (the perturbation-specific mean over other lines plus the
        shared effect in this line), ``ridge``, ``perturbation-mean`` or ``none``.
    restore_spread
        Stretch the perturbation-specific part of a predicted effect to its size in the prior if training without
        ``rank`` made it smaller. This improves discrimination and increases the error.
    identity, batch_embedding, nonnegative
        Whether to use an embedding for each perturbation (by default only without prior and features, because it can
        overfit noise), to use an embedding for each line, and to replace negative outputs by zero.
    set_size, sets
        Number of cells per set, and of sets per global batch.
    steps
        Number of optimiser steps. By default each training cell is drawn 10 times on average, in 500 to 5,000 steps
        (and at least twice ``warmup``).
    optimizer, seed, learning_rate, warmup, schedule, weight_decay, clip, ema, accumulate
        The optimiser: see :class:`vcelltools.model.step.StepConfig`. ``adam`` and ``sgd`` have no weight decay.
    scale_rate
        Multiply the learning rate by ``sets`` / 128, at most by 4.
    energy, mse, sinkhorn, unbiased
        Weights of the losses between sets of cells; whether to use the U-statistic of the energy distance.
    delta, pearson, rank
        Weights of the losses of the mean effect of a set relative to the effect over all cells of the group: squared
        error, correlation, and discrimination from other groups of the line. They are less noisy than the losses
        between sets, and held-out groups are scored by the same quantities.
    losses
        Weights of further losses, by their name in ``vcelltools.model.loss_registry.LOSSES``.
    precision
        ``auto`` (bfloat16 on accelerators), ``float32`` or ``bfloat16``.
    feed
        ``auto``, ``replicated``, ``sharded`` or ``host``: placement of the store's rows.
    log_every, eval_every, patience
        Steps between lines of metrics, steps between evaluations (by default 250, or a twentieth of the steps if
        ``steps`` is not given), and the number of evaluations without improvement before training stops (0: never).
    stability
        Stop once the predicted effects of the validation groups change by less than this share of their size in two
        evaluations in a row after the warm-up (0: never).
    eval_sets
        Number of sets per group in an evaluation.
    checkpoint_minutes, minutes
        Time between checkpoints, and time after which the run stops and can be resumed (0: no limit).
    tensorboard
        Also write TensorBoard files (needs ``vcelltools[tensorboard]``).
    wandb
        Also write an offline run of Weights & Biases into ``wandb`` of the run folder, which ``wandb sync`` uploads
        (needs ``vcelltools[wandb]``).
    """

    out: str = "runs/run"
    stores: list[str] = msgspec.field(default_factory=list)
    weights: dict[str, Weight] = msgspec.field(default_factory=dict)
    split: str | None = None
    features: str | None = None
    network: list[str] = msgspec.field(default_factory=list)
    from_run: str | None = None
    model: str = "transformer"
    objective: Literal["discrimination", "error", "balanced"] | None = None
    size: Literal["tiny", "rn", "base", "large", "mini", "moe-17b"] = "rn"
    prior: Literal["additive", "ridge", "perturbation-mean", "none"] = "additive"
    restore_spread: bool = False
    identity: bool | None = None
    batch_embedding: bool = False
    nonnegative: bool = False
    set_size: Positive = 64
    sets: Positive = 32
    steps: Positive | None = None
    seed: Count = 0
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    learning_rate: Weight = 3e-4
    scale_rate: bool = False
    warmup: Count = 100
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Weight = 10.0
    clip: Weight = 1.0
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    accumulate: Count = 0
    energy: Weight = 0.1
    mse: Weight = 0.0
    sinkhorn: Weight = 0.0
    delta: Weight = 0.3
    pearson: Weight = 2.0
    rank: Weight = 0.4
    losses: dict[str, Weight] = msgspec.field(default_factory=dict)
    unbiased: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    feed: Literal["auto", "replicated", "sharded", "host"] = "auto"
    log_every: Positive = 50
    eval_every: Positive | None = None
    patience: Count = 10
    stability: Weight = 0.0
    eval_sets: Positive = 2
    checkpoint_minutes: Weight = 10.0
    minutes: Weight = 0.0
    tensorboard: bool = False
    wandb: bool = False

    @property
    def length(self) -> tuple[int, int]:
        """The numbers of steps and of steps between evaluations, which must be given or chosen."""
        assert self.steps is not None and self.eval_every is not None
        return self.steps, self.eval_every

    @property
    def peak_rate(self) -> float:
        """The peak learning rate, scaled with the batch if ``scale_rate`` is set."""
        return self.learning_rate * min(self.sets / _RATE_SETS, _RATE_FACTOR) if self.scale_rate else self.learning_rate

    def to_json(self) -> dict[str, Any]:
        """Return the settings that the model reads, as plain values."""
        every = msgspec.to_builtins(self)
        idle = ("weight_decay",) if self.optimizer in _WITHOUT_DECAY else ()
        return {k: every[k] for k in _READ.get(self.model, _READ_BY_EFFECTS) if k not in idle}


# settings that each model reads; models of effects share the first list
_READ_BY_EFFECTS = ("out", "stores", "split", "features", "network", "model", "objective", "seed")
_READ = {
    "transformer": tuple(k for k in TrainSettings.__struct_fields__ if k != "objective"),
    "diffusion": (
        "out", "stores", "features", "from_run", "model", "size", "sets", "steps", "seed", "learning_rate",
        "scale_rate", "warmup", "schedule", "weight_decay", "clip", "ema", "precision", "log_every", "eval_every",
        "patience", "checkpoint_minutes", "minutes",
    ),
}  # fmt: skip

# settings that may change when a run is resumed
FREE = ("out", "stores", "minutes", "checkpoint_minutes", "log_every", "tensorboard", "wandb", "feed")


def make_settings(table: dict[str, Any], options: dict[str, Any]) -> TrainSettings:
    """Return the settings of ``[train]``, overridden by the options of the command line (None: not given)."""
    from vcelltools.config import convert

    given = {k: v for k, v in options.items() if v is not None}
    convert(table, TrainSettings, where="[train]")
    if {**table, **given}.get("model") == "diffusion":
        given = {**{k: v for k, v in DIFFUSION.items() if k not in table}, **given}
    try:
        settings = convert({**table, **given}, TrainSettings, where="train")
    except DataError as e:  # the file was checked before, so an option is invalid
        raise UsageError(e.message, hint=e.hint) from e
    if settings.model not in MODELS:
        raise UsageError(f"model {settings.model!r} is not known", hint=f"one of: {', '.join(MODELS)}", field="model")
    if settings.objective is not None and settings.model in ("control-mean", "transformer", "diffusion"):
        raise UsageError(
            f"{spell('objective')}: {settings.model} has no objective", hint="remove it", field="objective"
        )
    if settings.from_run is not None:
        if settings.model not in ("transformer", "diffusion"):
            raise UsageError(
                f"{spell('from_run')} applies to a transformer or a diffusion model, not to {settings.model}"
            )
        settings = msgspec.structs.replace(settings, from_run=os.path.abspath(settings.from_run))
    if settings.model == "diffusion" and settings.optimizer != "adamw":
        raise UsageError(f"{spell('optimizer')}: a diffusion model is trained by adamw", hint="remove it")
    own = ("tiny", "rn", "base", "large") if settings.model != "diffusion" else DIFFUSION_SIZES
    if settings.size not in own:
        raise UsageError(
            f"{spell('size', settings.size)} is not a size of {settings.model}", hint=f"one of: {', '.join(own)}"
        )
    if settings.losses:
        from vcelltools.model import loss_registry  # jax takes a second, so only where names are to be checked

        further = [name for name in loss_registry.LOSSES if name not in LOSSES]
        if unknown := [name for name in settings.losses if name not in further]:
            hint = f"further losses: {', '.join(further) or 'none'}; these have a setting: {', '.join(LOSSES)}"
            raise UsageError(f"losses: {unknown[0]!r} is not the name of a further loss", hint=hint, field="losses")
    if not any((*(getattr(settings, name) for name in LOSSES), *settings.losses.values())):
        raise UsageError("every loss has weight 0", hint=f"set one of {', '.join(LOSSES)} above 0")
    return settings


def dump_toml(table: dict[str, Any], name: str) -> str:
    """Return a flat table of plain values as TOML, without keys whose value is None."""
    import json

    def dump(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{dump(k)} = {dump(v)}" for k, v in value.items()) + "}"
        return escape_json(json.dumps(value, ensure_ascii=False))

    lines = [f"[{name}]", *(f"{key} = {dump(value)}" for key, value in table.items() if value is not None)]
    return "\n".join(lines) + "\n"
