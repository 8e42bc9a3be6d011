"""The mixtures against EM on expanded counts with scipy's densities, and against data whose parameters are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import gammaln

from vcelltools.kernels.mixture import (
    BACKGROUND,
    BACKGROUND_SPREAD,
    N_PARAMS,
    SHARE,
    SIGNAL,
    SIGNAL_SPREAD,
    fit_mixtures,
)


def run(*samples, gaussian):
    parts = [np.unique(s, return_counts=True) for s in samples]
    starts = np.concatenate([[0], np.cumsum([len(v) for v, _ in parts])]).astype(np.int64)
    params, threshold = np.empty((len(samples), N_PARAMS)), np.zeros(len(samples), np.int64)
    values = np.concatenate([v for v, _ in parts]).astype(float)
    fit_mixtures(starts, values, np.concatenate([w for _, w in parts]).astype(float), gaussian, params, threshold)
    return params, threshold


def draw(rng, n_low=800, n_high=200, mean=150.0, size=3.0):
    low = 1 + rng.poisson(0.3, n_low)
    return np.r_[low, 1 + rng.negative_binomial(size, size / (size + mean), n_high)]


def log_densities(x, p):
    poisson = x * np.log(p[BACKGROUND]) - p[BACKGROUND] - gammaln(x + 1)
    return np.log(1 - p[SHARE]) + poisson, np.log(p[SHARE]) + stats.norm.logpdf(x, p[SIGNAL], p[SIGNAL_SPREAD])


def test_a_poisson_gaussian_fit_is_a_fixed_point_of_em_on_the_cells():
    counts = draw(np.random.default_rng(0))
    (p,), (threshold,) = run(counts, gaussian=True)
    x = np.log2(counts)
    a, b = log_densities(x, p)
    r = np.exp(b - np.logaddexp(a, b))
    assert p[SHARE] == pytest.approx(r.mean(), rel=1e-3)
    assert p[BACKGROUND] == pytest.approx(((1 - r) * x).sum() / (1 - r).sum(), rel=1e-3)
    assert p[SIGNAL] == pytest.approx((r * x).sum() / r.sum(), rel=1e-3)
    assert p[SIGNAL_SPREAD] == pytest.approx(np.sqrt((r * (x - p[SIGNAL]) ** 2).sum() / r.sum()), rel=1e-3)
    a, b = log_densities(np.log2([threshold - 1, threshold]), p)
    assert b[0] <= a[0] and b[1] > a[1], "the threshold is the first count that is more likely signal"


def test_two_negative_binomials_are_found_again():
    counts = draw(np.random.default_rng(1), 8_000, 2_000)
    (p,), (threshold,) = run(counts, gaussian=False)
    assert p[SHARE] == pytest.approx(0.2, abs=0.01)
    assert p[BACKGROUND] == pytest.approx(0.3, rel=0.1) and p[SIGNAL] == pytest.approx(150, rel=0.05)
    assert p[SIGNAL_SPREAD] == pytest.approx(3.0, rel=0.15)
    assert 4 <= threshold <= 12

    def loglik(q):
        nb = [stats.nbinom.logpmf(counts - 1, q[s], q[s] / (q[s] + q[m])) for m, s in
              ((BACKGROUND, BACKGROUND_SPREAD), (SIGNAL, SIGNAL_SPREAD))]  # fmt: skip
        return np.logaddexp(np.log(1 - q[SHARE]) + nb[0], np.log(q[SHARE]) + nb[1]).sum()

    for k in range(N_PARAMS):
        for factor in (0.9, 1.1):
            other = p.copy()
            other[k] *= factor
            assert loglik(other) <= loglik(p) + 1e-2, "no neighbour is likelier"


@pytest.mark.parametrize("gaussian", [True, False])
def test_each_guide_is_fitted_by_itself(gaussian):
    rng = np.random.default_rng(2)
    samples = [draw(rng), np.zeros(0, int), draw(rng, mean=20.0), np.ones(50, int)]
    params, threshold = run(*samples, gaussian=gaussian)
    for k in (0, 2):
        alone, t = run(samples[k], gaussian=gaussian)
        np.testing.assert_array_equal(params[k], alone[0])
        assert threshold[k] == t[0] > 1
    assert threshold[1] == 0 and np.isnan(params[1]).all(), "no counts, no fit"
    assert threshold[3] == 0, "background alone has no threshold"
