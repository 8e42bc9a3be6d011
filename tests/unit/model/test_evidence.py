"""The evidence for an effect, its weighting, and the losses of effects."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.model.effect_losses import MeanEffects
from vcelltools.model.evidence import (
    N_FACTS,
    Evidence,
    get_table_shapes,
    init_judge,
    judge_prior,
    make_tables,
    read_evidence,
)
from vcelltools.model.loss_registry import effect_loss

pytestmark = pytest.mark.usefixtures("strict")
B, G, SCALE = 3, 20, 0.1


@pytest.fixture
def tables(rng):
    return make_tables(
        rng.normal(size=(4, G)),
        shared_kg=rng.normal(size=(4, G)),
        cells_k=np.array([0, 100, 25, 0]),
        target_k=np.array([-1, 5, -1, 0]),
        control_cg=rng.gamma(1.0, 1.0, (2, G)),
        variance_g=np.full(G, 4.0),
        ratio_g=np.full(G, 1e9),
    )


def test_evidence_is_read_by_run_and_context(tables):
    e = read_evidence({k: jnp.asarray(v) for k, v in tables.items()}, jnp.array([1, 2, 3]), jnp.array([0, 1, 1]))
    np.testing.assert_array_equal(e.prior, tables["prior"][1:])
    np.testing.assert_array_equal(e.control, tables["control"][[0, 1, 1]])
    np.testing.assert_allclose(e.error[:, 0], [2 / 10, 2 / 5, 2.0])  # not measured: the error of one cell
    np.testing.assert_array_equal(np.argwhere(np.asarray(e.own_gene)), [[0, 5], [2, 0]])
    np.testing.assert_allclose(e.information[:, 0], [1e6, 2.5e5, 0.0])  # the ratio is clipped at 1e4


def test_tables_have_the_shapes_that_are_planned_for(tables):
    assert {k: (v.shape, v.dtype.type) for k, v in tables.items()} == get_table_shapes(4, 2, G)
    bare = make_tables(np.ones((4, G)))
    assert bare["target"].tolist() == [-1] * 4
    assert not bare["shared"].any()


def test_the_judge_begins_by_believing_everything_and_treats_genes_alike(rng, tables):
    e = read_evidence({k: jnp.asarray(v) for k, v in tables.items()}, jnp.array([1, 2, 3]), jnp.array([0, 1, 1]))
    params = init_judge(jax.random.key(0))
    assert params["w"].shape[0] == N_FACTS
    np.testing.assert_allclose(judge_prior(params, e, SCALE), e.prior, atol=1e-6)
    params = {k: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape) for k, v in params.items()}
    order = rng.permutation(G)
    moved = judge_prior(params, Evidence(*(a[:, order] for a in e)), SCALE)
    np.testing.assert_allclose(moved, judge_prior(params, e, SCALE)[:, order], atol=1e-5)


def get_loss(effect, measured, rivals, counts=None, rival_counts=None, **weights):
    counts = jnp.ones((B, G), jnp.float32) if counts is None else counts
    rival_counts = jnp.ones((B, rivals.shape[1]), jnp.float32) if rival_counts is None else rival_counts
    with jax.numpy_rank_promotion("allow"):
        return effect_loss(MeanEffects(effect, measured, counts, SCALE, rivals, rival_counts), weights)


@pytest.fixture
def effects(rng):
    measured = rng.normal(0, SCALE, (B, G)).astype(np.float32)
    rivals = rng.normal(0, SCALE, (B, 4, G)).astype(np.float32)
    return jnp.asarray(measured), jnp.asarray(rivals)


def test_each_loss_by_hand(rng, effects):
    measured, rivals = effects
    effect = measured + jnp.asarray(rng.normal(0, 0.05, (B, G)).astype(np.float32))
    delta = np.mean(np.square(effect - measured), axis=1) / SCALE**2
    np.testing.assert_allclose(get_loss(effect, measured, rivals, delta=2.0), 2 * delta, rtol=1e-5)
    r = [np.corrcoef(effect[i], measured[i])[0, 1] for i in range(B)]
    np.testing.assert_allclose(get_loss(effect, measured, rivals, pearson=1.0), 1 - np.array(r), atol=1e-4)
    mine = np.abs(effect - measured).sum(axis=1)[:, None]
    theirs = np.abs(np.asarray(effect)[:, None] - np.asarray(rivals)).sum(axis=2)
    want = np.log1p(np.exp((mine - theirs) / (0.02 * SCALE * G))).mean(axis=1)
    np.testing.assert_allclose(get_loss(effect, measured, rivals, rank=1.0), want, rtol=1e-4)


def test_a_run_is_no_rival_of_itself_and_its_own_gene_does_not_count(effects):
    measured, rivals = effects
    same = rivals.at[:, 0].set(measured)
    ignored = jnp.ones((B, 4), jnp.float32).at[:, 0].set(0.0)
    a = get_loss(measured, measured, same, rank=1.0, rival_counts=ignored)
    np.testing.assert_allclose(a, get_loss(measured, measured, rivals[:, 1:], rank=1.0), rtol=1e-6)
    counts = jnp.ones((B, G), jnp.float32).at[:, 3].set(0.0)
    far = measured.at[:, 3].add(100.0)
    np.testing.assert_allclose(
        get_loss(far, measured, rivals, counts=counts, rank=1.0),
        get_loss(measured, measured, rivals, counts=counts, rank=1.0),
        rtol=1e-5,
    )


def test_controls_have_finite_gradients(effects):
    measured, rivals = effects
    zero = jnp.zeros((B, G), jnp.float32)
    none = jnp.zeros((B, 4), jnp.float32)

    def total(effect):
        return get_loss(effect, zero, rivals, rival_counts=none, delta=1.0, pearson=1.0, rank=1.0).sum()

    assert np.isfinite(jax.grad(total)(zero)).all()
    assert np.isfinite(jax.grad(total)(measured)).all()
