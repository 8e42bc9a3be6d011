"""Shifting control cells: means, sparsity and bounds."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.prediction.shifted_cells import make_stats, move_cells


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    x = np.log1p(rng.poisson(np.linspace(0.05, 4, 40), (4000, 40)) * 5.0)
    x[:, 0] = 0.0
    return x


def move(cells, effect):
    stats = make_stats(cells.sum(axis=0), (cells > 0).sum(axis=0), len(cells), 1.8)
    return move_cells(cells, effect, stats, np.random.default_rng(1))


def test_no_effect_changes_nothing(cells):
    np.testing.assert_array_equal(move(cells, np.zeros(40)), cells)


@pytest.mark.parametrize("size", [-0.3, -0.02, 0.02, 0.3, 1.0])
def test_the_mean_moves_by_the_effect(cells, size):
    effect = np.full(40, size)
    out = move(cells, effect)
    wanted = np.maximum(cells.mean(axis=0) + effect, 0)
    error = 4 * out.std(axis=0) / np.sqrt(len(cells)) + 1e-9
    assert (np.abs(out.mean(axis=0) - wanted) <= error).all()
    assert out.min() >= 0
    assert out.max() <= np.log1p(1e4)


def test_down_is_exact_and_expresses_no_new_cell(cells):
    out = move(cells, np.full(40, -0.1))
    np.testing.assert_allclose(out.mean(axis=0), np.maximum(cells.mean(axis=0) - 0.1, 0), atol=1e-12)
    assert not (out[cells == 0] > 0).any()


def test_up_keeps_a_rare_gene_rare(cells):
    effect = np.zeros(40)
    effect[1] = 0.1
    out = move(cells, effect)
    assert (out[:, 1] > 0).mean() < 0.5  # a shift of all cells would give 1
    np.testing.assert_array_equal(out[:, 2:], cells[:, 2:])


def test_rounding_never_makes_all_cells_express_a_gene():
    """What remains once new cells express a gene is zero, but about 1e-18 in floats."""
    rng = np.random.default_rng(3)
    rare = (rng.random((2000, 200)) < np.geomspace(0.001, 0.3, 200)) * rng.uniform(0.5, 2.0, 200)
    stats = make_stats(rare.sum(axis=0), (rare > 0).sum(axis=0), len(rare), 1.8)
    out = move_cells(rare, 0.5 * stats.mean_m, stats, rng)
    assert ((out > 0).mean(axis=0) < 0.5).all()
    assert out.mean() == pytest.approx(1.5 * rare.mean(), rel=0.02)


def test_a_gene_that_no_control_expresses_can_rise(cells):
    effect = np.zeros(40)
    effect[0] = 0.18
    out = move(cells, effect)
    assert out[:, 0].mean() == pytest.approx(0.18, rel=0.2)
    assert set(np.unique(out[:, 0])) == {0.0, 1.8}


def test_impossible_effects_are_bounded(cells):
    assert move(cells, np.full(40, -50.0)).max() == 0
    assert np.isfinite(move(cells, np.full(40, 50.0))).all()
