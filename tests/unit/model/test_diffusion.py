"""The masked diffusion model: shapes, schedules, masking, sampling, and which parameters are trained."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.model import diffusion as d
from vcelltools.model.network import count_params

G = 12


@pytest.fixture(scope="module")
def tiny():
    config = d.make_diffusion_config("tiny", genes=G, perturbations=3, contexts=2)
    return config, d.init_diffusion(config, jax.random.key(0))


def make_batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return {"tokens": jnp.asarray(rng.integers(0, 64, (n, G)), jnp.int32), "log_library": jnp.full((n,), 8.0),
            "pert": jnp.asarray(rng.integers(0, 3, n), jnp.int32), "context": jnp.zeros((n,), jnp.int32)}  # fmt: skip


def test_published_sizes_have_their_parameters():
    def shapes(config):
        return jax.eval_shape(lambda: d.init_diffusion(config, jax.random.key(0)))

    assert count_params(shapes(d.make_diffusion_config("mini", genes=2000))) == 20_531_265
    config = d.make_diffusion_config("moe-17b", genes=1)
    params = shapes(config)
    assert count_params(params) - count_params(params["gene"]) == 17_684_196_928
    assert d.count_active(config, params) / 1e9 == pytest.approx(4.53, abs=0.005)


def test_mini_takes_a_step():
    """Use the published width and depth on few genes, because attention over 2,000 genes is slow on a CPU."""
    config = d.make_diffusion_config("mini", genes=32)
    optimizer = d.make_diffusion_optimizer(
        steps=10, learning_rate=3e-4, warmup=0, schedule="constant", weight_decay=0.01, clip=1.0
    )
    state = d.init_diffusion_state(config, optimizer, 0, ema=0.0)
    assert count_params(state.params) == 20_531_265 - (2000 - 32) * 512
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 32)), jnp.int32)
    step = d.make_diffusion_step(config, optimizer, seed=0, ema=0.0)
    losses = []
    for _ in range(2):
        state, metrics = step(state, {"tokens": tokens, "log_library": jnp.full((2,), 8.0)})
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 2 and losses[0] == pytest.approx(np.log(64), rel=0.2) and np.isfinite(losses[1])


def test_the_table_under_an_adapter_is_not_trained():
    config = d.DiffusionConfig(genes=6, dim=16, heads=2, layers=1, perturbations=3, adapter_rank=2)
    optimizer = d.make_diffusion_optimizer(
        steps=10, learning_rate=1e-2, warmup=0, schedule="constant", weight_decay=0.01, clip=1.0
    )
    state = d.init_diffusion_state(config, optimizer, 0, ema=0.0)
    before = jax.device_get(state.params)
    assert not any(np.shape(x) == (3, 16) for x in jax.tree.leaves(state.opt)), "no moments either"
    step = d.make_diffusion_step(config, optimizer, seed=0, ema=0.0)
    for k in range(3):
        batch = {"tokens": jnp.full((4, 6), k, jnp.int32), "log_library": jnp.ones(4), "pert": jnp.arange(4) % 3}
        state, _ = step(state, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    still = [jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(moved) if not v]
    assert still == ["['perturbation']"]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_mask_shares_rise_from_none_to_all(schedule):
    m = d.get_mask_shares(schedule)
    assert m[0] == 0 and (np.diff(m) > 0).all() and 0.99 < m[-1] <= 1
    if schedule == "linear":
        assert m[1] == pytest.approx(1 - np.sqrt(1 - 1e-4))


def test_every_parameter_is_optimised_once_and_matrices_alone_decay(tiny):
    _, params = tiny
    mask = d.get_decay_mask(params)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(mask)}
    assert all(("'w'" in k) == v for k, v in flat.items()), flat
    assert not flat["['gene']"] and not flat["['token']"] and not flat["['perturbation']"]
    optimizer = d.make_diffusion_optimizer(
        steps=10, learning_rate=1e-2, warmup=0, schedule="constant", weight_decay=0.0, clip=1.0
    )
    state = d.init_diffusion_state(tiny[0], optimizer, 0, ema=0.0)
    before = jax.device_get(state.params)
    step = d.make_diffusion_step(tiny[0], optimizer, seed=0, ema=0.0)
    for k in range(3):
        state, _ = step(state, make_batch(seed=k) | {"context": jnp.arange(8, dtype=jnp.int32) % 2})
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, jax.device_get(state.params))
    still = [jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(moved) if not v]
    assert not still, still


def test_the_mask_is_no_output_and_attention_runs_over_genes(tiny):
    config, params = tiny
    batch = make_batch() | {"time": jnp.full((8,), 500, jnp.int32)}
    logits, _ = d.run_diffusion(params, config, batch)
    assert logits.shape == (8, G, 64) and logits.dtype == jnp.float32
    other = batch | {"tokens": batch["tokens"].at[:, 3].set(config.mask)}
    changed = jnp.abs(d.run_diffusion(params, config, other)[0] - logits).max(axis=(0, 2))
    assert (np.asarray(changed) > 0).all(), "every gene sees the gene that was hidden"
    alone, _ = d.run_diffusion(params, config, jax.tree.map(lambda a: a[:1], batch))
    np.testing.assert_allclose(alone[0], logits[0], atol=1e-5, err_msg="cells do not see each other")


def test_the_loss_is_that_of_hidden_genes_and_0_without_any(tiny):
    config, params = tiny
    batch = make_batch()
    tokens, hidden, time = d.hide(config, batch["tokens"], jax.random.key(1))
    assert np.array_equal(np.asarray(tokens == config.mask), np.asarray(hidden)) and len(set(time.tolist())) == 8
    logits, _ = d.run_diffusion(params, config, batch | {"tokens": tokens, "time": time})
    entropy = np.asarray(d.masked_cross_entropy(logits, batch["tokens"], hidden))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    wanted = -np.take_along_axis(log_p, np.asarray(batch["tokens"])[..., None], 2)[..., 0] * np.asarray(hidden)
    np.testing.assert_allclose(entropy, wanted, rtol=1e-5)
    loss, metrics = d.diffusion_loss(params, config, batch, jax.random.key(1))
    assert loss == pytest.approx(wanted.sum() / np.asarray(hidden).sum(), rel=1e-5)
    nothing = d.masked_cross_entropy(logits, batch["tokens"], jnp.zeros_like(hidden))
    assert float(nothing.sum()) == 0.0 and np.isfinite(metrics["loss"])


def test_sampling_reveals_step_by_step_and_never_draws_the_mask(tiny):
    config, params = tiny
    out = np.asarray(d.sample_cells(params, config, make_batch(), jax.random.key(3), steps=20))
    assert out.shape == (8, G) and out.min() >= 0 and out.max() < config.mask
    m = d.get_mask_shares()
    times = np.linspace(0, 1000, 21).astype(int)[::-1]
    left = np.cumprod([1 - (m[t] - m[s]) / m[t] for t, s in pairwise(times.tolist())])
    np.testing.assert_allclose(left, m[times[1:]] / m[1000], atol=1e-12)


def test_conditions_change_what_is_said(tiny):
    config, params = tiny
    batch = make_batch() | {"time": jnp.full((8,), 500, jnp.int32)}
    base = d.run_diffusion(params, config, batch)[0]
    for key, value in (("pert", (batch["pert"] + 1) % 3), ("context", batch["context"] + 1),
                       ("log_library", batch["log_library"] + 1), ("time", batch["time"] + 100)):  # fmt: skip
        assert float(jnp.abs(d.run_diffusion(params, config, batch | {key: value})[0] - base).max()) > 0, key


def test_experts_have_a_real_capacity_and_count_what_they_drop():
    config = d.DiffusionConfig(genes=G, dim=16, heads=2, layers=1, pairs=1, experts=4, top=2)
    params = d.init_diffusion(config, jax.random.key(0))
    p = jax.tree.map(lambda a: a[0], params["pairs"])
    x = jax.random.normal(jax.random.key(1), (3, G, 16))
    _, dropped = d.mix_experts(p, x, config)
    p["router"] = p["router"].at[:].set(0.0).at[:, 0].set(1.0)  # the shift of the norm sends all genes to one expert
    p["norm_moe"] = {"scale": jnp.zeros(16), "shift": jnp.ones(16)}
    _, crowded = d.mix_experts(p, x, config)
    room = int(np.ceil(1.25 * 2 * G / 4))
    assert int(crowded) == 3 * 2 * (G - room) and int(dropped) < int(crowded)
    wide = d.DiffusionConfig(genes=G, dim=16, heads=2, layers=1, pairs=1, experts=4, top=2, capacity=4.0)
    y, none = d.mix_experts(p, x, wide)
    h = d._layer_norm(x, p["norm_moe"])
    odds = jax.nn.softmax(h @ p["router"])
    weight, chosen = jax.lax.top_k(odds, 2)
    weight = weight / weight.sum(-1, keepdims=True)
    naive = np.asarray(x).copy()
    for b in range(3):
        for g in range(G):
            for k in range(2):
                e = int(chosen[b, g, k])
                up = jax.nn.gelu(h[b, g] @ p["expert_up"]["w"][e] + p["expert_up"]["b"][e])
                naive[b, g] += weight[b, g, k] * (up @ p["expert_down"]["w"][e] + p["expert_down"]["b"][e])
    np.testing.assert_allclose(y, naive, atol=1e-4)
    assert int(none) == 0
