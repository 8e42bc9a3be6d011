"""Coefficients by cell: training starts at the given coefficients, and finds planted variation on held-out cells."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from vcelltools.errors import DataError
from vcelltools.model.local_betas import Cells, Config, Held, Runs, _convolve, _draw_map, train

N, CLUSTERS, COLUMNS = 240, 2, 4


def make_problem(*, slope: float, seed: int = 0) -> tuple[Cells, Runs, Held, np.ndarray]:
    """Return a problem with one fold of every other column of a chessboard, and the true factor of a coefficient."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-1, 1, (N, 2)).astype(np.float32)
    cluster = rng.integers(0, CLUSTERS, N).astype(np.int32)
    X = np.column_stack([np.ones(N), rng.normal(size=N), rng.normal(size=N), np.zeros(N)]).astype(np.float32)
    beta = np.array([[0.5, 1.0, -0.7, 0.0], [0.1, 0.8, 0.0, 0.0]], np.float32)
    factor = 1 + slope * place[:, 0]
    start = (X * beta[cluster]).sum(1)
    y = start + (factor - 1) * X[:, 1] * beta[cluster, 1] + 0.05 * rng.normal(size=N).astype(np.float32)
    out = (np.floor(place[:, 0] * 4) % 2 == 0) & (np.floor(place[:, 1] * 4) % 2 == 0)
    rows = np.flatnonzero(out).astype(np.int32)[None]
    weight = np.stack([~out, np.ones(N, bool)]).astype(np.float32)
    runs = Runs(np.stack([beta, beta]), np.stack([y - start] * 2).astype(np.float32), weight)
    used, low = np.ones(rows.shape, np.float32), np.full((1, CLUSTERS), -9, np.float32)
    held = Held(rows, used, start[rows].astype(np.float32), low, -low)
    return Cells(place, np.ones((N, CLUSTERS), np.float32), cluster, X), runs, held, factor


def make_config(encoder: str, rate: float) -> Config:
    return Config(encoder, 8, CLUSTERS, COLUMNS, 60, rate)


@pytest.mark.parametrize("encoder", ["position", "map"])
def test_training_starts_at_the_given_coefficients(encoder):
    cells, runs, held, _ = make_problem(slope=0.8)
    fit = train(make_config(encoder, 1e-30), cells, runs, held, epochs=1, seed=(0,), what="a gene")
    assert (fit.factor == 1.0).all()
    rows = held.rows[0]
    want = [(runs.residual[0, rows[cells.cluster[rows] == c]] ** 2).sum() for c in range(CLUSTERS)]
    np.testing.assert_allclose(fit.sse[0, 0], want, rtol=1e-5)
    np.testing.assert_allclose(fit.sse[1], fit.sse[0], rtol=1e-6)


@pytest.mark.parametrize("encoder", ["position", "map"])
def test_planted_variation_is_found_on_held_out_cells(encoder):
    cells, runs, held, factor = make_problem(slope=0.8)
    fit = train(make_config(encoder, 0.01), cells, runs, held, epochs=30, seed=(0,), what="a gene")
    assert (fit.best > 0).all()
    assert (fit.sse[fit.best, 0, [0, 1]] < 0.5 * fit.sse[0, 0]).all()
    assert np.corrcoef(fit.factor[:, 1], factor)[0, 1] > 0.9
    assert (fit.factor > 0).all() and (fit.factor < 2).all()
    again = train(make_config(encoder, 0.01), cells, runs, held, epochs=30, seed=(0,), what="a gene")
    np.testing.assert_array_equal(fit.factor, again.factor)
    np.testing.assert_array_equal(fit.sse, again.sse)


def test_training_stops_early_where_nothing_varies():
    cells, runs, held, _ = make_problem(slope=0.0)
    fit = train(make_config("position", 0.01), cells, runs, held, epochs=500, seed=(0,), what="a gene")
    assert len(fit.sse) < 100


def test_a_loss_that_is_not_finite_is_said():
    cells, runs, held, _ = make_problem(slope=0.5)
    bad = runs._replace(residual=np.full_like(runs.residual, np.nan))
    with pytest.raises(DataError, match="Gene1: the loss is not finite in epoch 1"):
        train(make_config("position", 0.01), cells, bad, held, epochs=3, seed=(0,), what="Gene1")


def test_the_map_and_its_convolution_by_definition():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 6, 4, 3)).astype("f4"), rng.normal(size=(27, 5)).astype("f4")
    want = jax.lax.conv_general_dilated(
        x, w.reshape(3, 3, 3, 5), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(_convolve(w, x), want, rtol=1e-4, atol=1e-4)
    seen = np.asarray(_draw_map(np.array([[0.3, -0.8]], "f4"), 8))[0, :, :, 0]
    for i in range(8):
        for j in range(8):
            x, y = (2 * j + 1) / 8 - 1, (2 * i + 1) / 8 - 1
            np.testing.assert_allclose(seen[i, j], 0.25 / np.hypot(0.3 - x, -0.8 - y), rtol=1e-4)
