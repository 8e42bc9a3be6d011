"""The energy distance against plain loops and scipy, and its permutation test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vcelltools.differential.energy import energy_of, pair_distances, test_energy
from vcelltools.errors import UsageError


def naive(a, b):
    return 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()


@pytest.mark.parametrize(("n", "m", "g"), [(1, 1, 1), (5, 3, 2), (40, 70, 30)])
def test_the_distance_is_that_of_the_definition(n, m, g):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0, 1, (n, g)), rng.normal(0.5, 2, (m, g)) + 100
    assert test_energy(a, b, permutations=0)[0] == pytest.approx(naive(a, b), rel=1e-9)
    np.testing.assert_allclose(pair_distances(np.r_[a, b]), cdist(np.r_[a, b], np.r_[a, b]), atol=1e-6)


def test_every_labeling_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (20, 4))
    first = rng.permuted(np.tile(np.arange(20) < 7, (9, 1)), axis=1)
    found = energy_of(pair_distances(x), first)
    np.testing.assert_allclose(found, [naive(x[f], x[~f]) for f in first], rtol=1e-9)


def test_equal_groups_have_even_p_values_and_different_ones_the_smallest():
    p = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, (15, 3)), rng.normal(0, 1, (25, 3))
        p.append(test_energy(a, b, permutations=99, seed=seed)[1])
    assert 0.35 < np.mean(p) < 0.65 and np.mean(np.array(p) <= 0.05) < 0.15
    assert test_energy(a, b + 3, permutations=199)[1] == 1 / 200
    assert test_energy(np.ones((5, 2)), np.ones((6, 2)), permutations=19)[1] == 1.0, "equal cells"


def test_the_seed_decides():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (30, 3)), rng.normal(0.3, 1, (30, 3))
    one = [test_energy(a, b, permutations=199, seed=s) for s in (1, 1, 2)]
    assert one[0] == one[1] and one[0][0] == one[2][0] and np.isnan(test_energy(a, b, permutations=0)[1])
    with pytest.raises(UsageError, match="both groups"):
        test_energy(a[:0], b)
