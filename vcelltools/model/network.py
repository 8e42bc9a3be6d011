"""A transformer over sets of cells: predicts perturbed cells from control cells and a perturbation.

It follows the state-transition model of Arc Institute's STATE (Adduri et al. 2025, bioRxiv 2025.06.26.661135), in plain
pytrees. A set is ``s`` control cells of one context. Every cell is encoded, the code of the perturbation is added, a
bidirectional transformer without positions lets the cells attend to each other (so permuting the cells permutes the
output), and a decoder predicts the change of each cell.

The starting point differs from STATE. The network receives, per set, the *prior*: the effect of the perturbation
measured in other contexts (see :mod:`vcelltools.model.baselines`). The output is
``control + judged * (1 + gate) + change``, where ``judged`` is the prior, weighted per gene by the evidence
(:mod:`vcelltools.model.evidence`). The judge, ``gate`` and ``change`` have no influence initially: an untrained network
returns its prior, and training learns what to shrink, amplify and add. If losses of effects train the judge, the share
of the remaining change in a prediction is chosen on validation groups.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vcelltools.model.evidence import Evidence, init_judge, judge_prior

Params = dict[str, Any]

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 32, "layers": 2, "heads": 4, "ff": 64, "depth": 1},
    "rn": {"hidden": 128, "layers": 4, "heads": 8, "ff": 512, "depth": 1},
    "base": {"hidden": 768, "layers": 8, "heads": 12, "ff": 3072, "depth": 2},
    "large": {"hidden": 1440, "layers": 4, "heads": 12, "ff": 5760, "depth": 4},
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the network."""

    genes: int
    """Number of genes, in the input and the output."""
    perturbations: int
    """Number of perturbations in the vocabulary."""
    contexts: int = 0
    """Number of contexts (batches, cell lines) with an embedding; 0 for no batch embedding."""
    features: int = 0
    """Number of features per perturbation; 0 for no features."""
    identity: bool = True
    """Whether each perturbation has its own embedding."""
    hidden: int = 128
    """Width h."""
    layers: int = 4
    """Number of transformer layers."""
    heads: int = 8
    """Number of attention heads."""
    ff: int = 512
    """Width of the gated feed-forward layer."""
    depth: int = 1
    """Number of hidden layers of each encoder and of the decoder."""
    effect_scale: float = 1.0
    """Typical size of an effect on a gene (root mean square, log1p CP10K), which is the unit of priors and changes."""
    nonnegative: bool = False
    """Replace negative outputs by zero."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) is not a multiple of heads ({self.heads})")
        if min(self.genes, self.perturbations, self.layers, self.depth) < 1:
            raise ValueError("genes, perturbations, layers and depth must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def make_config(size: str, **fields: Any) -> ModelConfig:
    """Return the configuration of a named size (``tiny``, ``rn``, ``base``, ``large``)."""
    return ModelConfig(**{**SIZES[size], **fields})


def _dense(key: jax.Array, n_in: int, n_out: int, scale: float = 1.0) -> Params:
    w = jax.random.truncated_normal(key, -2.0, 2.0, (n_in, n_out), jnp.float32) * (scale / np.sqrt(n_in))
    return {"w": w, "b": jnp.zeros((n_out,), jnp.float32)}


def _mlp(key: jax.Array, widths: list[int]) -> list[Params]:
    keys = jax.random.split(key, len(widths) - 1)
    return [_dense(k, i, o) for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Return float32 parameters; layers are stacked along a leading axis, for a scan.

    The decoder's last layer, the gate and the judge's output are zero: the initial output is ``control + prior``.
    """
    g, h, f, n_layers = config.genes, config.hidden, config.ff, config.layers
    keys = iter(jax.random.split(key, 16))
    hidden = [h] * config.depth

    def stack(n_in: int, n_out: int, scale: float = 1.0) -> jax.Array:
        shape = (n_layers, n_in, n_out)
        return jax.random.truncated_normal(next(keys), -2.0, 2.0, shape, jnp.float32) * (scale / np.sqrt(n_in))

    ones = jnp.ones((n_layers, h), jnp.float32)
    damp = 1.0 / np.sqrt(2 * n_layers)
    params: Params = {
        "cell": _mlp(next(keys), [g, *hidden, h]),
        "prior": _dense(next(keys), g, h)["w"],
        "layers": {
            "norm_attn": ones,
            "qkv": stack(h, 3 * h),
            "out": stack(h, h, damp),
            "norm_ff": ones,
            "gate_up": stack(h, 2 * f),
            "down": stack(f, h, damp),
        },
        "norm": jnp.ones((h,), jnp.float32),
        "decoder": [*_mlp(next(keys), [h, *hidden]), {"w": jnp.zeros((h, g)), "b": jnp.zeros((g,))}],
        "gate": jnp.zeros((h, 1)),
        "judge": init_judge(next(keys)),
    }
    if config.identity:
        params["identity"] = 0.02 * jax.random.normal(next(keys), (config.perturbations, h), jnp.float32)
    if config.features:
        params["features"] = _mlp(next(keys), [config.features, *hidden, h])
    if config.contexts:
        params["context"] = 0.02 * jax.random.normal(next(keys), (config.contexts, h), jnp.float32)
    return params


def count_params(params: Params) -> int:
    """Return the number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def check_ids(name: str, ids: np.ndarray, bound: int) -> None:
    """Raise an IndexError if an id lies outside ``[0, bound)``: a gather in JAX would clamp it silently."""
    ids = np.asarray(ids)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= bound):
        bad = ids[(ids < 0) | (ids >= bound)].ravel()[0]
        raise IndexError(f"{name} id {int(bad)} lies outside [0, {bound})")


def _linear(p: Params, x: jax.Array) -> jax.Array:
    y = x @ p["w"].astype(x.dtype)
    return y + jnp.broadcast_to(p["b"].astype(x.dtype), y.shape)


def _run_mlp(layers: list[Params], x: jax.Array) -> jax.Array:
    for p in layers[:-1]:
        x = jax.nn.gelu(_linear(p, x))
    return _linear(layers[-1], x)


def _rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32 for any ``x``."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (y * jnp.broadcast_to(weight, y.shape)).astype(x.dtype)


def _attend(p: Params, x: jax.Array, heads: int) -> jax.Array:
    """Bidirectional attention over the cells of a set, without positions. ``x``: (b, s, h)."""
    b, s, h = x.shape
    qkv = (x @ p["qkv"].astype(x.dtype)).reshape(b, s, 3, heads, h // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * np.float32((h // heads) ** -0.5), axis=-1).astype(x.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v).reshape(b, s, h) @ p["out"].astype(x.dtype)


def _feed_forward(p: Params, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ p["gate_up"].astype(x.dtype), 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ p["down"].astype(x.dtype)


def _block(p: Params, x: jax.Array, heads: int) -> jax.Array:
    x = x + _attend(p, _rms_norm(x, p["norm_attn"]), heads)
    return x + _feed_forward(p, _rms_norm(x, p["norm_ff"]))


def encode_perturbation(
    params: Params, config: ModelConfig, pert_b: jax.Array, features_bf: jax.Array | None, prior_bg: jax.Array
) -> jax.Array:
    """Return the code (b, h) of each set's perturbation: its identity, its features and its prior effect."""
    dtype = prior_bg.dtype
    code = prior_bg @ params["prior"].astype(dtype)
    if config.identity:
        code = code + params["identity"].astype(dtype)[pert_b]
    if config.features:
        assert features_bf is not None
        code = code + _run_mlp(params["features"], features_bf.astype(dtype))
    return code


def forward(
    params: Params,
    config: ModelConfig,
    control_bsg: jax.Array,
    evidence: Evidence,
    pert_b: jax.Array,
    context_b: jax.Array,
    features_bf: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    scan: bool = False,
    fixed_judge: bool = False,
) -> jax.Array:
    """Return the predicted cells (b, s, g), float32, log1p CP10K.

    Parameters
    ----------
    control_bsg
        Control cells, log1p CP10K, any float dtype.
    evidence
        The prior effects (zeros if there are none) and the evidence for them.
    pert_b, context_b
        int32 ids, already checked by :func:`check_ids`.
    features_bf
        float32 (b, f), with ``config.features`` columns.
    dtype
        Dtype of the matrix products; sums, norms and the output stay float32.
    scan
        Scan over the layers (shorter compilation, for TPUs) or unroll them (faster on a CPU).
    fixed_judge
        Stop gradients to the judge, which other losses train.
    """
    control32 = control_bsg.astype(jnp.float32)
    scaled_prior = (evidence.prior / config.effect_scale).astype(dtype)
    code_bh = encode_perturbation(params, config, pert_b, features_bf, scaled_prior)
    if config.contexts:
        code_bh = code_bh + params["context"].astype(dtype)[context_b]
    x = _run_mlp(params["cell"], control_bsg.astype(dtype))
    x = x + jnp.broadcast_to(code_bh[:, None, :], x.shape)

    if scan:
        x, _ = jax.lax.scan(lambda x, p: (_block(p, x, config.heads), None), x, params["layers"])
    else:
        for i in range(config.layers):
            x = _block(jax.tree.map(lambda w, i=i: w[i], params["layers"]), x, config.heads)

    x = _rms_norm(x, params["norm"])
    change = _decode(params["decoder"], x)
    gate = jnp.broadcast_to((x @ params["gate"].astype(dtype)).astype(jnp.float32), change.shape)
    judged = judge_prior(params["judge"], evidence, config.effect_scale)
    if fixed_judge:
        judged = jax.lax.stop_gradient(judged)
    out = control32 + jnp.broadcast_to(judged[:, None, :], change.shape) * (1.0 + gate) + change * config.effect_scale
    return jax.nn.relu(out) if config.nonnegative else out


def _decode(layers: list[Params], x: jax.Array) -> jax.Array:
    for p in layers[:-1]:
        x = jax.nn.gelu(_linear(p, x))
    p = layers[-1]
    y = jnp.matmul(x, p["w"].astype(x.dtype), preferred_element_type=jnp.float32)
    return y + jnp.broadcast_to(p["b"], y.shape)
