"""Masked discrete diffusion over the genes of a cell, in plain pytrees.

A cell has one token per gene (:class:`vcelltools.sampling.tokens.Tokenizer`). At time t every gene is hidden with
probability ``m_t = 1 − √ᾱ_t``, with ᾱ of the cosine schedule (Nichol & Dhariwal 2021, s = 0.008) or of a linear β
(1e-4 … 0.02; Ho et al. 2020) over T = 1,000 steps. A transformer that attends over the genes reads the visible tokens
and predicts the hidden ones. The loss is their cross-entropy. The mask token is only an input and never an output.

Sampling starts with all genes hidden. Between the times t and s < t, a hidden gene is revealed with probability
``(m_t − m_s) / m_t``.

Sizes: ``tiny`` and ``mini`` are plain pre-norm transformers. ``moe-17b`` alternates dense layers with mixtures of
experts (two of sixteen). Experts have a limited capacity; genes that do not fit are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vcelltools.model.network import Params, count_params
from vcelltools.model.step import StepConfig, make_schedule

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "heads": 4, "layers": 2},
    "mini": {"dim": 512, "heads": 8, "layers": 6},
    "moe-17b": {
        "dim": 3072, "heads": 24, "layers": 12, "pairs": 12, "experts": 16, "perturbations": 150_000,
        "adapter_rank": 32, "time_features": 32, "mask_output": False,
    },
}  # fmt: skip
VOCAB = 64
STEPS = 1000
_OFFSET = 0.008
_BETAS = (1e-4, 0.02)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The shape of the network."""

    genes: int
    """Number of genes, in the input and the output."""
    vocab: int = VOCAB
    """Number of tokens, without the mask."""
    dim: int = 512
    """Width d."""
    heads: int = 8
    """Attention heads."""
    layers: int = 6
    """Number of dense layers after the pairs."""
    pairs: int = 0
    """Number of pairs of a dense layer and a mixture of experts."""
    experts: int = 0
    """Number of experts in a mixture."""
    top: int = 2
    """Number of experts that each gene is sent to."""
    capacity: float = 1.25
    """Capacity of an expert, as a multiple of an even load."""
    ff: int = 4
    """Width of the feed-forward layers, as a multiple of the model width d."""
    perturbations: int = 0
    """Number of perturbations with an embedding; 0 for no embedding."""
    contexts: int = 0
    """Number of contexts with an embedding; 0 for no embedding."""
    features: int = 0
    """Number of features per perturbation; 0 for no features."""
    adapter_rank: int = 0
    """Rank of the trained adapter of the embedding, which is then a fixed random code; 0 for no adapter."""
    time_features: int = 0
    """Number of sines and cosines of time, read by one dense layer; 0: d of them, read by two layers."""
    mask_output: bool = True
    """Whether the output layer has a column for the mask, as in the published model; it is never used."""
    schedule: str = "cosine"
    """``cosine`` or ``linear``."""
    unroll: bool = False
    """Unroll the layers instead of looping over them."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) is not a multiple of heads ({self.heads})")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule {self.schedule!r} is neither cosine nor linear")

    @property
    def mask(self) -> int:
        """The token of a hidden gene."""
        return self.vocab

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def make_diffusion_config(size: str, **fields: Any) -> DiffusionConfig:
    """Return the configuration of a named size (``tiny``, ``mini``, ``moe-17b``)."""
    return DiffusionConfig(**{**SIZES[size], **fields})


def get_mask_shares(schedule: str = "cosine", steps: int = STEPS) -> np.ndarray:
    """Return (steps + 1,) float64: the share of genes that are hidden at each time, rising from 0 at time 0."""
    if schedule == "cosine":
        at = np.arange(steps + 1) / steps
        signal = np.cos((at + _OFFSET) / (1 + _OFFSET) * np.pi / 2) ** 2
        signal = signal / signal[0]
    else:
        signal = np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(*_BETAS, steps))])
    return 1.0 - np.sqrt(np.clip(signal, 0.0, 1.0))


def init_diffusion(config: DiffusionConfig, key: jax.Array) -> Params:
    """Return float32 parameters; layers of one kind are stacked along a leading axis."""
    d, f, rank = config.dim, config.ff * config.dim, config.adapter_rank
    keys = iter(jax.random.split(key, 32))

    def dense(n_in: int, n_out: int, *lead: int, scale: float = 1.0) -> Params:
        w = jax.random.truncated_normal(next(keys), -2.0, 2.0, (*lead, n_in, n_out), jnp.float32)
        return {"w": w * np.float32(scale / np.sqrt(n_in)), "b": jnp.zeros((*lead, n_out), jnp.float32)}

    def norm(*lead: int) -> Params:
        return {"scale": jnp.ones((*lead, d), jnp.float32), "shift": jnp.zeros((*lead, d), jnp.float32)}

    def table(n: int, width: int = d) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), (n, width), jnp.float32)

    depth = max(config.layers + config.pairs, 1)
    damp = float(1.0 / np.sqrt(2 * depth))

    def layers(n: int) -> Params:
        return {
            "norm_attn": norm(n),
            "qkv": dense(d, 3 * d, n),
            "out": dense(d, d, n, scale=damp),
            "norm_ff": norm(n),
            "up": dense(d, f, n),
            "down": dense(f, d, n, scale=damp),
        }

    params: Params = {
        "gene": table(config.genes),
        "token": table(config.vocab + 1),
        "norm": norm(),
        "head": dense(d, config.vocab + config.mask_output),
    }
    if config.time_features:
        params["time"] = [dense(config.time_features, d)]
    else:
        params["time"] = [dense(d, d), dense(d, d)]
    if config.layers:
        params["layers"] = layers(config.layers)
    if config.pairs:
        n, e = config.pairs, config.experts
        params["pairs"] = {
            **layers(n),
            "norm_moe": norm(n),
            "router": dense(d, e, n)["w"],
            "expert_up": dense(d, f, n, e),
            "expert_down": dense(f, d, n, e, scale=damp),
        }
    if config.perturbations:
        params["perturbation"] = table(config.perturbations)
    if rank:
        params["adapter"] = {"own": table(config.perturbations, rank), "shared": jnp.zeros((rank, d), jnp.float32)}
    if config.contexts:
        params["context"] = table(config.contexts)
    if config.features:
        params["features"] = dense(config.features, d)
    return params


def count_active(config: DiffusionConfig, params: Params) -> int:
    """Return the number of parameters that one gene uses: only the experts that it is sent to, and no tables."""
    total = count_params(params)
    for name in ("perturbation", "gene", "context"):
        if name in params:
            total -= count_params(params[name])
    if "adapter" in params:
        total -= count_params(params["adapter"]["own"])
    if config.experts:
        experts = sum(count_params(params["pairs"][k]) for k in ("expert_up", "expert_down"))
        total -= experts * (config.experts - config.top) // config.experts
    return total


def get_decay_mask(params: Params) -> Params:
    """Return which leaves have weight decay: the matrices of dense layers and experts, not tables, biases or norms."""

    def decays(path: tuple, leaf: Any) -> bool:
        name = str(getattr(path[-1], "key", ""))
        return name in ("w", "router", "shared")

    return jax.tree_util.tree_map_with_path(decays, params)


def get_training_mask(params: Params) -> Params:
    """Return which leaves are trained: all except the table below an adapter.

    If the full-rank table were trained, the low-rank adapter would add nothing.
    """

    def is_trained(path: tuple, leaf: Any) -> bool:
        return "adapter" not in params or getattr(path[0], "key", "") != "perturbation"

    return jax.tree_util.tree_map_with_path(is_trained, params)


def _layer_norm(x: jax.Array, p: Params) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    spread = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(spread + 1e-5) * p["scale"] + p["shift"]).astype(x.dtype)


def _linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["w"].astype(x.dtype) + p["b"].astype(x.dtype)


def _attend(p: Params, x: jax.Array, heads: int) -> jax.Array:
    """Bidirectional attention over the genes. ``x``: (b, g, d)."""
    b, g, d = x.shape
    qkv = _linear(p["qkv"], x).reshape(b, g, 3, heads, d // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * np.float32((d // heads) ** -0.5), axis=-1).astype(x.dtype)
    return _linear(p["out"], jnp.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, g, d))


def _dense_layer(p: Params, x: jax.Array, heads: int) -> jax.Array:
    x = x + _attend(p, _layer_norm(x, p["norm_attn"]), heads)
    h = jax.nn.gelu(_linear(p["up"], _layer_norm(x, p["norm_ff"])))
    return x + _linear(p["down"], h)


def mix_experts(p: Params, x: jax.Array, config: DiffusionConfig) -> tuple[jax.Array, jax.Array]:
    """Return (x + the output of each gene's experts, number of genes × experts dropped for lack of capacity).

    Groups are cells: every cell sends each of its genes to ``top`` experts, in order, up to their capacity.
    """
    b, g, _ = x.shape
    e = config.experts
    room = max(1, int(np.ceil(config.capacity * config.top * g / e)))
    h = _layer_norm(x, p["norm_moe"])
    odds = jax.nn.softmax((h.astype(jnp.float32) @ p["router"]), axis=-1)  # (b, g, e)
    weight, chosen = jax.lax.top_k(odds, config.top)  # (b, g, k)
    weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
    sent = jax.nn.one_hot(chosen, e, dtype=jnp.int32)  # (b, g, k, e)
    flat = sent.transpose(0, 2, 1, 3).reshape(b, config.top * g, e)  # first choices come before second ones
    place = (jnp.cumsum(flat, axis=1) - flat).reshape(b, config.top, g, e).transpose(0, 2, 1, 3)
    place = jnp.sum(place * sent, axis=-1)  # (b, g, k)
    fits = place < room
    slot = jax.nn.one_hot(jnp.where(fits, place, room), room, dtype=x.dtype)  # (b, g, k, c), zero beyond the capacity
    dispatch = jnp.einsum("bgke,bgkc->bgec", sent.astype(x.dtype), slot)
    combine = jnp.einsum("bgke,bgkc,bgk->bgec", sent.astype(x.dtype), slot, weight.astype(x.dtype))
    inside = jnp.einsum("bgec,bgd->becd", dispatch, h)
    up, down = p["expert_up"], p["expert_down"]
    inside = jax.nn.gelu(
        jnp.einsum("becd,edf->becf", inside, up["w"].astype(x.dtype)) + up["b"].astype(x.dtype)[:, None]
    )
    inside = jnp.einsum("becf,efd->becd", inside, down["w"].astype(x.dtype)) + down["b"].astype(x.dtype)[:, None]
    return x + jnp.einsum("bgec,becd->bgd", combine, inside), jnp.sum(~fits)


def _sines(values: jax.Array, n: int) -> jax.Array:
    """Return (b, n) sines and cosines of n / 2 frequencies."""
    rate = jnp.exp(-np.log(10_000.0) * jnp.arange(n // 2) / max(n // 2, 1)).astype(jnp.float32)
    angle = values[:, None].astype(jnp.float32) * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def encode_conditions(params: Params, config: DiffusionConfig, batch: dict[str, jax.Array]) -> jax.Array:
    """Return (b, d) float32: the code of time, log library size and, if given, perturbation, features and context."""
    n = config.time_features or config.dim
    code = _sines(batch["time"], n) + _sines(100.0 * batch["log_library"], n)
    for i, p in enumerate(params["time"]):
        code = _linear(p, code if i == 0 else jax.nn.silu(code))
    if "perturbation" in params:
        table = params["perturbation"]
        code = code + (jax.lax.stop_gradient(table) if "adapter" in params else table)[batch["pert"]]
    if "adapter" in params:
        code = code + params["adapter"]["own"][batch["pert"]] @ params["adapter"]["shared"]
    if "features" in params:
        code = code + _linear(params["features"], batch["features"])
    if "context" in params:
        code = code + params["context"][batch["context"]]
    return code


def run_diffusion(
    params: Params,
    config: DiffusionConfig,
    batch: dict[str, jax.Array],
    *,
    dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return (logits (b, g, vocab) float32, dropped).

    Parameters
    ----------
    batch
        ``tokens`` (b, g) int32, ``config.mask`` for hidden genes; ``time`` (b,) int32; ``log_library`` (b,) float32;
        ``pert``, ``context`` (b,) int32 and ``features`` (b, f) if the model has them.
    remat
        Recompute the activations of a layer in the backward pass instead of storing them.
    """
    code = encode_conditions(params, config, batch)
    x = params["gene"][None] + params["token"][batch["tokens"]] + code[:, None]
    x = x.astype(dtype)

    def dense(x: jax.Array, p: Params) -> tuple[jax.Array, jax.Array]:
        return _dense_layer(p, x, config.heads), jnp.zeros((), jnp.int32)

    def pair(x: jax.Array, p: Params) -> tuple[jax.Array, jax.Array]:
        return mix_experts(p, _dense_layer(p, x, config.heads), config)

    dropped = jnp.zeros((), jnp.int32)
    for kind, body in (("pairs", pair), ("layers", dense)):
        if kind in params:
            x, lost = jax.lax.scan(jax.checkpoint(body) if remat else body, x, params[kind], unroll=config.unroll)
            dropped = dropped + jnp.sum(lost)
    x = _layer_norm(x, params["norm"])
    head = params["head"]
    w, b = head["w"][:, : config.vocab], head["b"][: config.vocab]  # the mask is not an output
    logits = jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32) + b
    return logits, dropped


def hide(config: DiffusionConfig, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (tokens with some hidden, mask of the hidden ones, time of each cell); times are spread evenly."""
    b, g = tokens.shape
    shares = jnp.asarray(get_mask_shares(config.schedule), jnp.float32)
    when, what = jax.random.split(key)
    at = (jnp.arange(b) + jax.random.uniform(when)) / b  # stratified over the batch, from one draw
    time = 1 + jnp.floor(at * STEPS).astype(jnp.int32)
    time = jnp.clip(time, 1, STEPS)
    hidden = jax.random.uniform(what, (b, g)) < shares[time][:, None]
    return jnp.where(hidden, config.mask, tokens), hidden, time


def masked_cross_entropy(logits: jax.Array, tokens: jax.Array, hidden: jax.Array) -> jax.Array:
    """Return (b, g) float32: the cross-entropy of hidden tokens in nats, 0 elsewhere."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(hidden, -own, 0.0)


def diffusion_loss(
    params: Params, config: DiffusionConfig, batch: dict[str, jax.Array], key: jax.Array, *, dtype: Any = jnp.float32,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Return (mean cross-entropy of the hidden tokens of a batch, metrics); 0 if none is hidden."""
    tokens, hidden, time = hide(config, batch["tokens"], key)
    logits, dropped = run_diffusion(params, config, {**batch, "tokens": tokens, "time": time}, dtype=dtype, remat=remat)
    entropy = masked_cross_entropy(logits, batch["tokens"], hidden)
    n = jnp.sum(hidden)
    loss = jnp.sum(entropy) / jnp.maximum(n, 1)
    return loss, {"loss": loss, "hidden": n / hidden.size, "dropped": dropped.astype(jnp.float32)}


def sample_cells(
    params: Params, config: DiffusionConfig, batch: dict[str, jax.Array], key: jax.Array, *, steps: int = 50
) -> jax.Array:
    """Return sampled tokens (b, g), starting with all genes hidden, in ``steps`` steps.

    In the step from time t to s, a hidden gene is revealed with probability ``(m_t − m_s) / m_t``, and its token is
    drawn from the distribution that the network predicts.

    Parameters
    ----------
    batch
        ``log_library`` and the conditions of the cells; ``tokens`` gives the shape.
    """
    times = np.unique(np.round(np.linspace(0, STEPS, steps + 1)).astype(int))[::-1]
    shares = get_mask_shares(config.schedule)
    tokens = jnp.full(batch["tokens"].shape, config.mask, jnp.int32)

    def step(tokens: jax.Array, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        time, reveal, key = at
        which, what = jax.random.split(key)
        now = jnp.full((tokens.shape[0],), time, jnp.int32)
        logits, _ = run_diffusion(params, config, {**batch, "tokens": tokens, "time": now})
        drawn = jax.random.categorical(what, logits, axis=-1)
        shown = (tokens == config.mask) & (jax.random.uniform(which, tokens.shape) < reveal)
        return jnp.where(shown, drawn, tokens), None

    reveal = [(shares[t] - shares[s]) / shares[t] for t, s in pairwise(times.tolist())]
    keys = jax.random.split(key, len(reveal))
    at = (jnp.asarray(times[:-1], jnp.int32), jnp.asarray(reveal, jnp.float32), keys)
    tokens, _ = jax.lax.scan(step, tokens, at)
    return tokens


class DiffusionState(NamedTuple):
    """The state that a checkpoint holds."""

    step: jax.Array
    params: Params
    ema: Params
    opt: Any


def make_diffusion_optimizer(
    *, steps: int, learning_rate: float, warmup: int, schedule: str, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """Return AdamW (β 0.9 and 0.95) over all trained parameters; only matrices have weight decay."""
    rate = make_schedule(StepConfig(steps=steps, learning_rate=learning_rate, warmup=warmup, schedule=schedule))
    adam = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=get_decay_mask)
    trained = optax.masked(adam, get_training_mask)  # parameters that are not trained have no moments
    return optax.chain(optax.clip_by_global_norm(clip), trained) if clip else trained


def init_diffusion_state(
    config: DiffusionConfig, optimizer: optax.GradientTransformation, seed: int, *, ema: float
) -> DiffusionState:
    """Return the state before the first step."""
    return begin_diffusion(init_diffusion(config, jax.random.key(seed)), optimizer, ema=ema)


def begin_diffusion(params: Params, optimizer: optax.GradientTransformation, *, ema: float) -> DiffusionState:
    """Return the state before the first step of a training that begins with some parameters."""
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return DiffusionState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def make_diffusion_step(
    config: DiffusionConfig,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: float,
    bfloat16: bool = False,
    remat: bool = False,
) -> Callable:
    """Return the compiled ``step(state, batch) -> (state, metrics)``; ``state`` is donated.

    The hidden genes depend only on the seed and the step, so a resumed run hides the same ones.
    """
    dtype = jnp.bfloat16 if bfloat16 else jnp.float32

    def step(state: DiffusionState, batch: dict[str, jax.Array]) -> tuple[DiffusionState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradient = jax.grad(diffusion_loss, has_aux=True)
        grads, metrics = gradient(state.params, config, batch, key, dtype=dtype, remat=remat)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if ema:  # a short warm-up, so that the initial values do not dominate the first averages
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step)).astype(jnp.float32)
            average = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), average, params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return DiffusionState(state.step + 1, params, average, opt), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(config: DiffusionConfig) -> Callable:
    """Return the compiled ``entropies(params, batch, marginals, number) -> (3, b)``.

    The rows are, per cell, the cross-entropy of its hidden tokens under the model, that under the log-probabilities
    ``marginals`` (g, vocab), and the number of hidden tokens. The hidden genes depend only on ``number``.
    """

    @jax.jit
    def entropies(params: Params, batch: dict, marginals: jax.Array, number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(7), number)
        tokens, hidden, time = hide(config, batch["tokens"], key)
        logits, _ = run_diffusion(params, config, {**batch, "tokens": tokens, "time": time})
        model = masked_cross_entropy(logits, batch["tokens"], hidden)
        own = jnp.take_along_axis(marginals[None], batch["tokens"][..., None], axis=-1)[..., 0]
        return jnp.stack([model.sum(1), jnp.where(hidden, -own, 0.0).sum(1), hidden.sum(1).astype(jnp.float32)])

    return entropies
