"""``[train]`` of ``vcelltools.toml``: what a training run is asked to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vcelltools.errors import DataError, UsageError

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Weight = Annotated[float, Meta(ge=0)]

MODELS = ("control-mean", "perturbation-mean", "ridge", "transformer")
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
        The run's folder.
    stores
        Folders of the stores; by default all of ``[store] path``.
    split
        A TOML file (``[training] [zeroshot] [fewshot]``); by default some groups are held out.
    features
        A file of perturbation features; with it, perturbations without training cells can be predicted.
    model, size
        ``control-mean``, ``perturbation-mean``, ``ridge`` or ``transformer``, and the transformer's size.
    prior
        What the transformer starts from: ``additive`` (the mean elsewhere plus what perturbations share here),
        ``ridge``, ``perturbation-mean`` or ``none``.
    restore_spread
        Stretch what is a perturbation's own in a predicted effect to the size it has in the prior, where training
        without ``rank`` made it smaller: better discrimination for a larger error.
    identity, batch_embedding, nonnegative
        An embedding for each perturbation (default: only without prior and features: it remembers noise that the
        prior leaves out); for each line; outputs cut at zero.
    set_size, sets
        Cells in a set, sets in a global batch.
    steps, seed, learning_rate, warmup, schedule, weight_decay, clip, ema, accumulate
        The optimiser: see :class:`vcelltools.model.step.StepConfig`.
    energy, mse, sinkhorn, unbiased
        Weights of the losses between sets of cells; the U-statistic of the energy distance.
    delta, pearson, rank
        Weights of the losses of a set's mean effect against the effect measured on all cells of the group: squared
        error, correlation, and discrimination from other groups of the line. They carry less noise than those
        between sets, and are what held-out groups are judged by.
    precision
        ``auto`` (bfloat16 on accelerators), ``float32`` or ``bfloat16``.
    feed
        ``auto``, ``replicated``, ``sharded`` or ``host``: where the store's rows live.
    log_every, eval_every, patience
        Steps between lines of metrics and between evaluations; evaluations without progress before stopping (0:
        never).
    eval_sets
        Sets a group in an evaluation.
    checkpoint_minutes, minutes
        Time between checkpoints; time after which the run stops, resumable (0: none).
    tensorboard
        Also write TensorBoard files (needs ``vcelltools[tensorboard]``).
    """

    out: str = "runs/run"
    stores: list[str] = msgspec.field(default_factory=list)
    split: str | None = None
    features: str | None = None
    model: Literal["control-mean", "perturbation-mean", "ridge", "transformer"] = "transformer"
    size: Literal["tiny", "rn", "base", "large"] = "rn"
    prior: Literal["additive", "ridge", "perturbation-mean", "none"] = "additive"
    restore_spread: bool = False
    identity: bool | None = None
    batch_embedding: bool = False
    nonnegative: bool = False
    set_size: Positive = 64
    sets: Positive = 32
    steps: Positive = 5000
    seed: Count = 0
    learning_rate: Weight = 3e-4
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
    unbiased: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    feed: Literal["auto", "replicated", "sharded", "host"] = "auto"
    log_every: Positive = 50
    eval_every: Positive = 250
    patience: Count = 10
    eval_sets: Positive = 2
    checkpoint_minutes: Weight = 10.0
    minutes: Weight = 0.0
    tensorboard: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return msgspec.to_builtins(self)


# what may change between a run and its continuation
FREE = ("out", "stores", "minutes", "checkpoint_minutes", "log_every", "tensorboard", "feed")


def make_settings(table: dict[str, Any], options: dict[str, Any]) -> TrainSettings:
    """Return the settings of ``[train]`` with the options given on the command line (None: not given) on top."""
    from vcelltools.config import convert

    given = {k: v for k, v in options.items() if v is not None}
    convert(table, TrainSettings, where="[train]")
    try:
        settings = convert({**table, **given}, TrainSettings, where="train")
    except DataError as e:  # the file is sound: it is an option
        raise UsageError(e.message, hint=e.hint) from e
    if not any(getattr(settings, name) for name in LOSSES):
        raise UsageError("every loss has weight 0", hint=f"{', '.join(LOSSES)}: one above 0")
    return settings


def dump_toml(table: dict[str, Any], name: str) -> str:
    """Return a flat table of plain values as TOML; None is left out."""
    import json

    lines = [f"[{name}]"]
    for key, value in table.items():
        if value is not None:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
