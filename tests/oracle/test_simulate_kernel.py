"""The simulator's counts against scipy's negative binomial, its random streams against Philox's known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from vcelltools.kernels.simulate import FULL, csr_simulate, philox

NONE = (np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def draw(profile_g, dispersion_g, depth, n, *, effects=NONE, first=None, second=None, states=NONE, seed=3, start=0):
    g = len(profile_g)
    indptr = np.empty(n + 1, np.int64)
    indices, data = np.empty((n + 1) * g, np.int32), np.empty((n + 1) * g, np.int32)
    none = np.full(n, -1, np.int32)
    nnz = csr_simulate(
        np.uint64(start),
        np.uint64(seed),
        np.full(n, float(depth)),
        np.zeros(n, np.int32),
        none if first is None else first,
        none if second is None else second,
        np.asarray(profile_g, np.float32)[None],
        np.asarray(dispersion_g, np.float32),
        *effects,
        *states,
        np.empty(g, np.float32),
        indptr,
        indices,
        data,
    )
    assert nnz == indptr[-1]
    return sparse.csr_matrix((data[:nnz], indices[:nnz], indptr), shape=(n, g)).toarray()


# means on both sides of the direct draw, of the two Poisson draws and of small and large dispersions
MEANS = np.array([0.001, 0.05, 0.4, 1.5, 2.9, 3.1, 8.0, 30.0, 150.0, 0.7, 5.0])
DISPERSIONS = np.array([1.0, 3.0, 0.4, 1e-4, 2.5, 0.1, 1.5, 0.05, 0.6, 0.01, 1e-3])


def test_counts_are_negative_binomial():
    n = 40_000
    depth = MEANS.sum()
    X = draw(MEANS / depth, DISPERSIONS, depth, n)
    for g, (mean, d) in enumerate(zip(MEANS, DISPERSIONS, strict=True)):
        law = stats.nbinom(1 / d, 1 / (1 + mean * d))
        # bins of at least 20 expected cells, and a chi-squared test at 1e-5: 11 of them, seeded
        edges = np.unique(law.ppf(np.linspace(0.0, 1.0, 40)[1:-1]))
        cdf = np.concatenate([[0.0], law.cdf(edges), [1.0]])
        expected = np.diff(cdf) * n
        seen = np.bincount(np.searchsorted(edges, X[:, g], side="left"), minlength=len(edges) + 1)
        keep = expected > 20
        if keep.sum() < 2:
            assert abs(X[:, g].mean() - mean) < 5 * np.sqrt(law.var() / n)
            continue
        expected, seen = expected[keep], seen[keep]
        assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-5, (g, mean, d)


def test_genes_are_independent():
    X = draw(np.array([0.3, 0.3, 0.2, 0.2]), np.array([0.2, 1.0, 0.5, 1e-4]), 12.0, 40_000)
    r = np.corrcoef(X.T)[np.triu_indices(4, 1)]
    assert np.abs(r).max() < 5 / np.sqrt(len(X))


def test_effects_keep_the_depth_and_change_the_shares():
    """Two guides' effects add; the expected library size stays."""
    profile = np.full(20, 0.05)
    effects = (
        np.array([0, 2, 3]),
        np.array([0, 1, 1], np.int32),
        np.log(np.array([4.0, 0.25, 0.5])).astype(np.float32),
    )
    n = 20_000
    first = np.zeros(n, np.int32)
    second = np.where(np.arange(n) < n // 2, 1, -1).astype(np.int32)
    X = draw(profile, np.full(20, 0.1), 40.0, n, effects=effects, first=first, second=second)
    assert abs(X.sum(axis=1).mean() / 40.0 - 1) < 0.01
    rest = X[:, 2:].mean(axis=1)
    for part, want in ((slice(0, n // 2), [4.0, 0.125]), (slice(n // 2, n), [4.0, 0.25])):
        ratio = X[part, :2].mean(axis=0) / rest[part].mean()
        np.testing.assert_allclose(ratio, want, rtol=0.05)


def test_states_spread_a_gene():
    """A programme with loading w makes its gene log-normal with variance w**2 on top of the counts."""
    w = 0.8
    states = (np.array([0, 1]), np.array([0], np.int32), np.array([w], np.float32))
    profile = np.array([0.001, 0.999])
    X = draw(profile, np.array([1e-4, 1e-4]), 20_000.0, 20_000, states=states)
    mean, var = X[:, 0].mean(), X[:, 0].var()
    want = 20 * np.exp(w * w / 2)
    assert abs(mean / want - 1) < 0.05
    assert abs((var - mean) / mean**2 / (np.exp(w * w) - 1) - 1) < 0.15


def test_a_cell_depends_on_its_number_alone():
    profile, spread = np.full(30, 1 / 30), np.full(30, 0.3)
    whole = draw(profile, spread, 50.0, 40)
    np.testing.assert_array_equal(draw(profile, spread, 50.0, 7, start=20), whole[20:27])
    assert not np.array_equal(draw(profile, spread, 50.0, 40, seed=4), whole)


def test_too_small_a_buffer_is_told():
    g = 4
    out = csr_simulate(
        np.uint64(0),
        np.uint64(1),
        np.full(5, 10.0),
        np.zeros(5, np.int32),
        np.full(5, -1, np.int32),
        np.full(5, -1, np.int32),
        np.full((1, g), 0.25, np.float32),
        np.full(g, 0.1, np.float32),
        *NONE,
        *NONE,
        np.empty(g, np.float32),
        np.empty(6, np.int64),
        np.empty(g + 2, np.int32),
        np.empty(g + 2, np.int32),
    )
    assert out == FULL


@pytest.mark.parametrize(
    ("seed", "cell", "lane", "want"),
    [
        (0, 0, 0, (0xE169C58D_6627E8D5, 0x9B00DBD8_BC57AC4C)),
        (0xFFFFFFFF_FFFFFFFF, 0xFFFFFFFF_FFFFFFFF, 0xFFFFFFFF_FFFFFFFF, (0x41C83B0E_408F276D, 0x6D5451FD_A20BC7C6)),
    ],
)
def test_philox_known_answers(seed, cell, lane, want):
    """The vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds."""
    assert philox(np.uint64(seed), np.uint64(cell), np.uint64(lane)) == want
