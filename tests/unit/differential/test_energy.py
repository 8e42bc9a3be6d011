"""The energy distance against plain loops and scipy, and its permutation test."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

import vcelltools as vc
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


def make_screen() -> ad.AnnData:
    """Return counts of a strong and an inert perturbation in two lines of different expression."""
    rng = np.random.default_rng(0)
    label = np.tile(np.repeat(["non-targeting", "inert", "strong"], [60, 30, 30]), 2)
    line = np.repeat(["a", "b"], 120)
    mean = rng.gamma(2, 2, (2, 40))[(line == "b").astype(int)]
    mean[label == "strong", :15] *= 3
    obs = pd.DataFrame({"target_gene": label, "line": line, "fine": label != "inert"}, index=np.arange(240).astype(str))
    return ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.int32)), obs=obs)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_every_perturbation_of_a_file_is_compared_with_the_controls(layout):
    data = make_screen()[:120].copy()
    x = data.X.toarray().astype(np.float64)
    x = np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4)
    data.X = layout(data.X.toarray())
    found = vc.energy(data, permutations=99)
    assert found.perturbations == ["inert", "strong"] and found.contexts is None
    of = [x[(data.obs.target_gene == name).to_numpy()] for name in ("non-targeting", *found.perturbations)]
    np.testing.assert_allclose(found.distance_p, [naive(v, of[0]) for v in of[1:]], rtol=1e-5)
    assert found.p_p[0] > 0.05 and found.p_p[1] == 0.01
    np.testing.assert_allclose(found.fdr_p, [found.p_p[0], 0.02])
    np.testing.assert_array_equal(found.p_p, [r.p_value for r in vc.responders(data, permutations=99).perturbations])
    assert vc.energy(data, permutations=99, threads=2).to_json() == found.to_json()


def test_contexts_and_chosen_cells_have_their_own_distances():
    data = make_screen()
    found = vc.energy(data, context_col="line", permutations=99)
    assert found.contexts == ["a", "a", "b", "b"] and found.n_controls_p.tolist() == [60] * 4
    assert (found.p_p[[1, 3]] == 0.01).all() and (found.p_p[[0, 2]] > 0.05).all()
    alone = vc.energy(data[data.obs.line == "a"].copy(), permutations=99)
    np.testing.assert_array_equal(alone.distance_p, found.distance_p[:2])
    assert vc.energy(data, keep="fine", context_col="line", permutations=9).perturbations == ["strong"] * 2
