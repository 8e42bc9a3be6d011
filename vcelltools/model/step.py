"""One training step: the losses of the sets, float32 gradients averaged over the devices, and one update.

The step uses ``shard_map`` with an explicit ``pmean``, because XLA would otherwise reduce bfloat16 gradients in
bfloat16. The state is donated, shapes never change, and only row numbers are sent to the devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vcelltools.model.effect_losses import MeanEffects
from vcelltools.model.evidence import judge_prior, make_tables, read_evidence
from vcelltools.model.loss_registry import LOSSES, effect_loss, have_effects, need_rivals, set_loss
from vcelltools.model.mesh import AXIS, row_reader
from vcelltools.model.network import ModelConfig, Params, forward, init_params
from vcelltools.model.optimizers import OPTIMIZERS, Rule

METRICS = ("loss", "energy", "excess", "floor", "mse", "effect_l1", "grad_norm", "update_norm", "param_norm")
NAMED = ("energy", "mse", "sinkhorn", "delta", "pearson", "rank")
"""Losses whose weight is a setting of its own."""
_JUDGE_RATE = 10.0
_CPU_CELLS = 256  # per microbatch: one float32 array over 2,000 genes takes 2 MB


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Settings of the optimiser, the losses and the precision."""

    steps: int = 10_000
    """Length of the learning-rate schedule."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    optimizer: str = "adamw"
    """``adamw``, ``adam``, ``sgd`` or ``muon``; see :mod:`vcelltools.model.optimizers`."""
    warmup: int = 100
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """``cosine`` (to a tenth), ``linear`` (to zero) or ``constant``."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW and Muon, only on matrices."""
    clip: float = 1.0
    """Maximum norm of the gradient; 0 disables clipping."""
    ema: float = 0.99
    """Decay of the moving average of the parameters, used for evaluation and prediction; 0 disables it."""
    accumulate: int = 0
    """Microbatches per step and device, whose gradients are averaged. 0 chooses the number: 1, or on a CPU so many that
    the arrays of a microbatch stay in the caches (:func:`choose_microbatches`)."""
    energy: float = 1.0
    """Weight of the energy distance."""
    mse: float = 0.0
    """Weight of the squared difference of the sets' means."""
    sinkhorn: float = 0.0
    """Weight of the Sinkhorn divergence."""
    delta: float = 0.0
    """Weight of the squared error of the mean effect relative to the effect over all cells of the run."""
    pearson: float = 0.0
    """Weight of one minus the correlation of these two effects."""
    rank: float = 0.0
    """Weight of the discrimination between runs of one context; batches then contain ``rivals``."""
    losses: dict[str, float] = field(default_factory=dict)
    """Weights of further losses of :data:`vcelltools.model.loss_registry.LOSSES`, by name."""
    unbiased: bool = False
    """Use the U-statistic of the energy distance instead of the V-statistic."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16 (parameters, sums and losses stay float32)."""
    scan: bool = False
    """Scan over the layers instead of unrolling them."""

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule {self.schedule!r} is not cosine, linear or constant")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, but must be at least 0 and below 1")
        for name in self.losses:
            if name not in LOSSES or name in NAMED:
                further = [k for k in LOSSES if k not in NAMED]
                raise ValueError(f"loss {name!r} is not one of the further losses: {', '.join(further) or 'none'}")
        if not any(self.weights.values()):
            raise ValueError("every loss has weight 0")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of all losses by name."""
        return {name: getattr(self, name) for name in NAMED} | self.losses

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class TrainState(NamedTuple):
    """The state that a checkpoint holds."""

    step: jax.Array
    params: Params
    ema: Params
    opt: Any


def make_schedule(config: StepConfig) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    peak, warmup = config.learning_rate, min(config.warmup, max(config.steps - 1, 0))
    rest = max(config.steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=0.1),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), after], [warmup])


def make_optimizer(config: StepConfig) -> optax.GradientTransformation:
    """Return the optimiser with the schedule, after clipping by the global norm.

    The judge has few parameters, which every gene trains. Its learning rate is ten times higher, and it has no decay.
    """

    def judges(params: Params, inside: Any, outside: Any) -> Any:
        return {k: jax.tree.map(lambda w, k=k: inside if k == "judge" else outside(w), v) for k, v in params.items()}

    rule = Rule(
        rate=make_schedule(config),
        b2=0.99,
        weight_decay=config.weight_decay,
        decays=lambda params: judges(params, False, lambda w: w.ndim >= 2),
    )
    faster = optax.masked(optax.scale(_JUDGE_RATE), lambda params: judges(params, True, lambda _: False))
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, OPTIMIZERS[config.optimizer](rule), faster)


def init_state(model: ModelConfig, config: StepConfig, seed: int) -> TrainState:
    """Return the state before the first step; it depends only on the configurations and the seed."""
    return begin(init_params(model, jax.random.key(seed)), config)


def begin(params: Params, config: StepConfig) -> TrainState:
    """Return the state before the first step of a training that begins with some parameters."""
    ema = jax.tree.map(jnp.copy, params) if config.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, make_optimizer(config).init(params))


def eval_params(state: TrainState) -> Params:
    """Return the parameters for evaluation and prediction: the moving average if there is one."""
    return state.ema or state.params


def make_data(
    prior_kg: np.ndarray,
    mask_dg: np.ndarray,
    features_pf: np.ndarray | None = None,
    *,
    effect_kg: np.ndarray | None = None,
    **evidence: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the tables that every step reads.

    They hold the priors by run and the evidence for them (``evidence``: see
    :func:`vcelltools.model.evidence.make_tables`), gene masks by data set, features by perturbation, and the measured
    effects by run, which are the targets of the losses of effects.
    """
    data = {**make_tables(prior_kg, **evidence), **make_masks(mask_dg, features_pf)}
    if effect_kg is not None:
        data["effect"] = np.asarray(effect_kg, np.float32)
    return data


def make_masks(mask_dg: np.ndarray, features_pf: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the tables by data set and by perturbation; there is no mask if every data set measures every gene."""
    data = {} if np.all(mask_dg == 1) else {"mask": np.asarray(mask_dg, np.float32)}
    if features_pf is not None:
        data["features"] = np.asarray(features_pf, np.float32)
    return data


def _run_forward(
    model: ModelConfig, config: StepConfig, params: Params, data: dict, batch: dict, control_bsg: jax.Array
) -> jax.Array:
    features = data["features"][batch["pert"]] if "features" in data else None
    return forward(
        params,
        model,
        control_bsg,
        read_evidence(data, batch["prior"], batch["context"]),
        batch["pert"],
        batch["context"],
        features,
        dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32,
        scan=config.scan,
        fixed_judge=have_effects(config.weights),
    )


def _judge(model: ModelConfig, params: Params, data: dict, batch: dict) -> jax.Array:
    """Return the judged priors (b, g). Only the losses of effects train the judge, and they train nothing else.

    There are only some hundreds of measured effects, so the transformer would overfit them, including their noise. The
    losses between sets of cells are insensitive to effects below the noise of a set. They would make the judge shrink
    all of these effects, at the cost of discrimination.
    """
    return judge_prior(params["judge"], read_evidence(data, batch["prior"], batch["context"]), model.effect_scale)


def _effect_loss(
    model: ModelConfig,
    weights: dict[str, float],
    data: dict,
    batch: dict,
    effect_bg: jax.Array,
    mask_bg: jax.Array,
) -> jax.Array:
    """Return the losses of the sets' mean effects over the genes that their data sets measure."""
    own = jax.lax.broadcasted_iota(jnp.int32, mask_bg.shape, 1) == data["target"][batch["prior"]][:, None]
    rivals = rival_counts = None
    if need_rivals(weights):
        rivals = data["effect"][batch["rivals"]] * mask_bg[:, None]
        rival_counts = (batch["rivals"] != batch["measured"][:, None]).astype(jnp.float32)
    measured = data["effect"][batch["measured"]] * mask_bg
    effects = MeanEffects(effect_bg, measured, mask_bg * (1.0 - own), model.effect_scale, rivals, rival_counts)
    return effect_loss(effects, weights)


def make_loss(model: ModelConfig, config: StepConfig, feed: str) -> Callable:
    """Return ``loss(params, data, batch) -> (mean loss, metrics)`` over the sets of one device."""
    read = row_reader(feed, model.genes)
    weights = config.weights
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32

    def loss(params: Params, data: dict, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        control = read(data.get("rows"), batch["control"]).astype(jnp.float32)
        target = read(data.get("rows"), batch["target"]).astype(jnp.float32)
        mask = data["mask"][batch["dataset"]] if "mask" in data else None
        if mask is not None:  # exclude genes that the data set of a set does not measure
            control, target = control * mask[:, None], target * mask[:, None]
        out = _run_forward(model, config, params, data, batch, control)
        if mask is not None:
            out = out * mask[:, None]
        per_set, energy = set_loss(out, target, weights, unbiased=config.unbiased, dtype=dtype)
        mean = jnp.mean(out, axis=1)
        shift, effect = mean - jnp.mean(target, axis=1), mean - jnp.mean(control, axis=1)
        if have_effects(weights):
            counts = jnp.ones_like(effect) if mask is None else mask
            judged = _judge(model, params, data, batch) * counts
            per_set = per_set + _effect_loss(model, weights, data, batch, judged, counts)
        metrics = {
            "loss": per_set,
            "energy": energy.biased,
            "excess": energy.biased - energy.floor,
            "floor": energy.floor,
            "mse": jnp.mean(jnp.square(shift), axis=-1),
            "effect_l1": jnp.mean(jnp.abs(effect), axis=-1),
        }
        return jnp.mean(per_set), {k: jnp.mean(v) for k, v in metrics.items()}

    return loss


def choose_microbatches(n_sets: int, set_size: int) -> int:
    """Return the number of microbatches for a CPU: each has at most 256 cells, or one set if sets are larger."""
    return next(
        d for d in range(1, n_sets + 1) if n_sets % d == 0 and (n_sets // d * set_size <= _CPU_CELLS or d == n_sets)
    )


def _accumulated(loss: Callable, accumulate: int, platform: str) -> Callable:
    """Return ``grad(params, data, batch) -> (grads, metrics)``, the mean over the microbatches."""
    one = jax.grad(loss, has_aux=True)

    def many(params: Params, data: dict, batch: dict):
        n_sets, set_size = batch["control"].shape[:2]
        parts = accumulate or (choose_microbatches(n_sets, set_size) if platform == "cpu" else 1)
        if parts == 1:
            return one(params, data, batch)
        split = jax.tree.map(lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, one(params, data, part)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, params, data, jax.tree.map(lambda a: a[0], split)))
        total, _ = jax.lax.scan(add, zeros, split)
        return jax.tree.map(lambda a: a / parts, total)

    return many


def make_step(model: ModelConfig, config: StepConfig, mesh: Mesh, feed: str) -> Callable:
    """Return the compiled ``step(state, data, batch) -> (state, metrics)``; ``state`` is donated.

    ``data`` holds the tables of :func:`make_data` and, unless the feed is ``host``, ``rows``. ``batch`` has the global
    sets as the first axis: ``control`` and ``target`` (row numbers, or cells), ``pert``, ``context``, ``prior`` and
    ``dataset`` (int32), and for the losses of effects also ``measured`` (rows of the table of effects) and ``rivals``
    (b, r) of the same context. ``metrics`` are float32 means over all sets, named as in :data:`METRICS`.
    """
    optimizer = make_optimizer(config)
    platform = mesh.devices.flat[0].platform
    gradient = _accumulated(make_loss(model, config, feed), config.accumulate, platform)

    def local_step(state: TrainState, data: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradient(state.params, data, batch)
        grads, metrics = jax.lax.pmean((grads, metrics), AXIS)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if config.ema:  # a short warm-up, so that the initial values do not dominate the first averages
            decay = jnp.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step)).astype(jnp.float32)
            ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["param_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, ema, opt), metrics

    def step(state: TrainState, data: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        in_specs = (P(), {k: P(AXIS) if k == "rows" and feed == "sharded" else P() for k in data}, P(AXIS))
        mapped = jax.shard_map(local_step, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
        return mapped(state, data, batch)

    return jax.jit(step, donate_argnums=0)


def make_predict(model: ModelConfig, config: StepConfig) -> Callable:
    """Return the compiled ``predict(params, data, batch) -> cells (b, s, g)``, which takes cells, not row numbers."""

    @jax.jit
    def predict(params: Params, data: dict, batch: dict) -> jax.Array:
        control = batch["control"][..., : model.genes].astype(jnp.float32)
        return _run_forward(model, config, params, data, batch, control)

    return predict


def make_effect(model: ModelConfig, config: StepConfig) -> Callable:
    """Return the compiled ``effect(params, data, batch) -> (mean change, judged)``, both (b, g), which takes cells."""

    @jax.jit
    def effect(params: Params, data: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        control = batch["control"][..., : model.genes].astype(jnp.float32)
        change = jnp.mean(_run_forward(model, config, params, data, batch, control) - control, axis=1)
        return change, _judge(model, params, data, batch)

    return effect
