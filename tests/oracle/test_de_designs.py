"""``de`` with another reference, strata, covariates and replicates, against scipy, statsmodels and brute force."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats as ss

import vcelltools as vc
from tests.unit.io.test_staged import file_size_limit
from vcelltools.differential.glm import compare_samples, estimate_alpha, score_group
from vcelltools.errors import DataError, EnvironmentFault, UsageError

CONTROL = "non-targeting"


def make_screen(seed: int, n_cells=(40, 25, 33, 80), n_genes=40, shift=0.0, n_batches=3) -> ad.AnnData:
    """Return counts of three perturbations and controls in batches, which differ by ``shift`` on the log scale."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["A", "B", "C", CONTROL], n_cells)
    batch = rng.integers(0, n_batches, len(labels))
    effect = {"A": rng.normal(0, 0.8, n_genes), "B": np.zeros(n_genes), "C": np.zeros(n_genes), CONTROL: 0}
    base = rng.gamma(0.7, 1.5, n_genes) * np.exp(shift * rng.normal(0, 1, (n_batches, n_genes)))[batch]
    mean = rng.lognormal(0, 0.4, len(labels))[:, None] * base * np.exp([effect[v] + np.zeros(n_genes) for v in labels])
    obs = pd.DataFrame(
        {"target_gene": labels, "batch": [f"b{b}" for b in batch], "donor": rng.choice(["x", "y"], len(labels))},
        index=[f"c{i}" for i in range(len(labels))],
    )
    return ad.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.int32)), obs=obs)


def log_cp10k(data: ad.AnnData) -> np.ndarray:
    counts = data.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("continuity", [True, False])
def test_reference_rest_is_scipys(layout, continuity):
    data = make_screen(0)
    X, label = log_cp10k(data), data.obs.target_gene.to_numpy()
    data.X = layout(data.X.toarray())
    got = vc.de(data, reference="rest", continuity=continuity, threads=2)
    for i, name in enumerate(got.perturbations):
        others = (label != name) & (label != CONTROL)
        want = ss.mannwhitneyu(X[label == name], X[others], method="asymptotic", use_continuity=continuity)
        np.testing.assert_array_equal(got.statistic_pg[i], want.statistic)
        np.testing.assert_allclose(got.p_pg[i], np.nan_to_num(want.pvalue, nan=1.0), rtol=1e-10)
        assert got.n_controls_p[i] == others.sum()
        np.testing.assert_allclose(got.control_mean_pg[i], np.expm1(X[others]).mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(got.mean_pg[i], np.expm1(X[label == name]).mean(axis=0), rtol=1e-9)


def van_elteren(X, is_a, is_b, strata) -> np.ndarray:
    """Return the two-sided p of the sum of rank sums weighted by 1/(n + 1), by its definition."""
    shift, var = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    for s in np.unique(strata):
        a, b = X[is_a & (strata == s)], X[is_b & (strata == s)]
        n1, n2 = len(a), len(b)
        if n1 == 0 or n2 == 0:
            continue
        ranks = ss.rankdata(np.vstack([a, b]), axis=0)
        w = 1 / (n1 + n2 + 1)
        shift += w * (ranks[:n1].sum(axis=0) - n1 * (n1 + n2 + 1) / 2)
        # of a sample of n1 ranks without replacement
        var += w**2 * n1 * n2 / (n1 + n2) * ranks.var(axis=0, ddof=1)
    z = np.divide(shift, np.sqrt(var), out=np.zeros_like(shift), where=var > 0)
    return 2 * ss.norm.sf(np.abs(z)), z


@pytest.mark.parametrize("reference", ["control", "rest"])
def test_strata_are_van_elterens(reference):
    data = make_screen(1, shift=0.7)
    X, label, batch = log_cp10k(data), data.obs.target_gene.to_numpy(), data.obs.batch.to_numpy()
    got = vc.de(data, reference=reference, stratify="batch")
    for i, name in enumerate(got.perturbations):
        other = label == CONTROL if reference == "control" else (label != CONTROL) & (label != name)
        p, z = van_elteren(X, label == name, other, batch)
        np.testing.assert_allclose(got.p_pg[i], p, rtol=1e-9)
        np.testing.assert_allclose(got.statistic_pg[i], z, rtol=1e-9, atol=1e-12)


def test_one_stratum_is_the_plain_test():
    data = make_screen(2, n_batches=1)
    plain, strata = vc.de(data), vc.de(data, stratify="batch")
    np.testing.assert_array_equal(strata.statistic_pg, plain.statistic_pg)
    np.testing.assert_allclose(strata.p_pg, plain.p_pg, rtol=1e-12)
    np.testing.assert_allclose(strata.log2fc_pg, plain.log2fc_pg, rtol=1e-12, atol=1e-12)


def test_a_perturbation_of_one_stratum_is_tested_within_it():
    data = make_screen(3)
    label = data.obs.target_gene.to_numpy()
    data.obs.loc[label == "A", "batch"] = "b0"
    inside = data[data.obs.batch == "b0"].copy()
    want, got = vc.de(inside), vc.de(data, stratify="batch")
    np.testing.assert_allclose(
        got.p_pg[got.perturbations.index("A")], want.p_pg[want.perturbations.index("A")], rtol=1e-10
    )


def test_strata_that_hold_one_side_alone_give_no_p():
    data = make_screen(4)
    data.obs.loc[data.obs.target_gene == "B", "batch"] = "alone"
    got = vc.de(data, stratify="batch")
    assert got.perturbations == ["A", "C"]
    assert any("share no stratum with their reference" in n and "(B)" in n for n in got.notes)


def test_strata_take_out_what_batches_make():
    rng = np.random.default_rng(5)
    n, g = 400, 300
    batch = rng.integers(0, 2, n)
    perturbed = rng.random(n) < np.where(batch == 0, 0.2, 0.8)  # confounded with the batch
    X = np.abs(rng.normal(3, 1, (n, g)) + 1.5 * batch[:, None])
    obs = pd.DataFrame({"target_gene": np.where(perturbed, "P", CONTROL), "batch": [f"b{b}" for b in batch]},
                       index=map(str, range(n)))  # fmt: skip
    data = ad.AnnData(X, obs=obs)
    assert vc.de(data).significant()["P"] == g
    assert vc.de(data, stratify="batch").significant()["P"] <= 3
    assert vc.de(data, covariates=["batch"], test="welch").significant()["P"] <= 3


def test_groups_are_compared_within_each_line():
    data = make_screen(6)
    apart = vc.de(data, context_col="donor")
    alone = vc.de(data[data.obs.donor == "y"].copy())
    rows = [i for i, c in enumerate(apart.contexts) if c == "y"]
    np.testing.assert_array_equal(apart.p_pg[rows], alone.p_pg)


# ---- means and covariates ----


def test_welch_without_covariates_is_scipys():
    data = make_screen(7)
    X, label = log_cp10k(data), data.obs.target_gene.to_numpy()
    got = vc.de(data, test="welch")
    for i, name in enumerate(got.perturbations):
        want = ss.ttest_ind(X[label == name], X[label == CONTROL], equal_var=False)
        np.testing.assert_allclose(got.statistic_pg[i], want.statistic, rtol=1e-7)
        np.testing.assert_allclose(got.p_pg[i], want.pvalue, rtol=1e-7)
        effect = X[label == name].mean(axis=0) - X[label == CONTROL].mean(axis=0)
        np.testing.assert_allclose(got.effect_pg[i], effect, atol=1e-9)


def test_effects_are_mean_residuals_of_a_fit_to_the_controls():
    import statsmodels.api as sm

    data = make_screen(8, shift=0.5)
    X, label = log_cp10k(data), data.obs.target_gene.to_numpy()
    design = pd.get_dummies(data.obs[["batch", "donor"]], drop_first=True).astype(float)
    design = sm.add_constant(design).to_numpy()
    control = label == CONTROL
    got = vc.de(data, test="welch", covariates=["batch", "donor"])
    for g in np.flatnonzero(X[control].var(axis=0) > 0):
        fit = sm.OLS(X[control, g], design[control]).fit()
        residual = X[:, g] - design @ fit.params
        for i, name in enumerate(got.perturbations):
            rows = label == name
            assert got.effect_pg[i, g] == pytest.approx(residual[rows].mean(), abs=1e-8)
            z = design[rows].mean(axis=0)
            var = residual[rows].var(ddof=1) / rows.sum() + z @ fit.cov_params() @ z
            assert got.statistic_pg[i, g] == pytest.approx(residual[rows].mean() / np.sqrt(var), rel=1e-6, abs=1e-7)


def test_a_level_without_controls_is_named():
    data = make_screen(9)
    data.obs.loc[data.obs_names[:3], "batch"] = "new"
    with pytest.raises(DataError, match="no control cell has batch=new"):
        vc.de(data, covariates=["batch"], test="welch")
    data.obs["batch"] = [f"c{i}" for i in range(data.n_obs - 1)] + ["c0"]
    data = ad.concat([data] * 2, index_unique="-")
    data.obs["batch"] = [f"c{i}" for i in range(data.n_obs)]
    with pytest.raises(DataError, match="different values, but a column of groups has at most 200"):
        vc.de(data, covariates=["batch"], test="welch")


# ---- replicates ----


def make_replicates(seed: int, n_replicates=4, per=12, n_genes=400, between=0.3) -> ad.AnnData:
    """Return cells of perturbations without any effect, in replicates that differ."""
    rng = np.random.default_rng(seed)
    groups = ["A", "B", "C", "D", "E", CONTROL]
    samples = [(p, f"r{r}") for p in groups for r in range(n_replicates)]
    factor = np.exp(rng.normal(0, between, (len(samples), n_genes)))
    base = rng.gamma(1.0, 2.0, n_genes)
    X = np.vstack([rng.poisson(base * factor[i], (per, n_genes)) for i in range(len(samples))])
    obs = pd.DataFrame([s for s in samples for _ in range(per)], columns=["target_gene", "replicate"])
    return ad.AnnData(sp.csr_matrix(X.astype(np.int32)), obs=obs.set_index(obs.index.map(str)))


def test_replicates_keep_the_level_that_cells_do_not():
    data = make_replicates(0)
    by_cell, by_sample = (vc.de(data, test="nb", replicate_col=c) for c in (None, "replicate"))
    assert (by_cell.p_pg < 0.05).mean() > 0.15
    assert 0.02 < (by_sample.p_pg < 0.05).mean() < 0.08
    assert sum(by_sample.significant().values()) <= 2
    assert any("24 samples by obs/replicate are the unit" in n for n in by_sample.notes)


def test_the_regression_is_statsmodels():
    import statsmodels.api as sm

    rng = np.random.default_rng(1)
    n, g = 24, 12
    group = np.repeat([0, 1, 2], 8)
    size = rng.uniform(800, 3000, n)
    x = np.column_stack([np.ones(n), np.tile([0, 1], 12)])
    mu = size[:, None] * rng.gamma(1, 0.01, g) * np.exp(0.5 * x[:, 1:])
    y = rng.poisson(mu * rng.gamma(5, 1 / 5, (n, g))).astype(float)
    alpha = estimate_alpha(y, size, group, x, 0)
    assert (alpha > 0.02).all()
    assert (alpha < 1).all()
    rows = group < 2
    z = score_group(y[rows], size[rows], group[rows] == 1, x[rows], alpha)
    for i in range(g):
        family = sm.families.NegativeBinomial(alpha=alpha[i])
        model = sm.GLM(y[rows, i], x[rows], family=family, offset=np.log(size[rows]))
        fit = model.fit(tol=1e-12, maxiter=200)
        _, p, _ = model.score_test(fit.params, exog_extra=(group[rows] == 1).astype(float), observed=False)
        assert 2 * ss.norm.sf(abs(z[i])) == pytest.approx(float(np.squeeze(p)), rel=1e-5)
    found = compare_samples(y, size, group, x, 0, 3)
    np.testing.assert_allclose(found["statistic_kg"][1], z)
    assert np.isnan(found["p_kg"][0]).all()


def test_a_covariate_of_the_samples_is_taken_out():
    data = make_replicates(2, n_replicates=6, between=0.1)
    rng = np.random.default_rng(3)
    lane = (data.obs.replicate.str[1:].astype(int) + (data.obs.target_gene == "A")) % 2  # A: the lanes exchanged
    data.obs["lane"] = [f"l{v}" for v in lane]
    shift = np.exp(rng.normal(0, 1, data.n_vars))
    X = data.X.toarray()
    data.X = sp.csr_matrix(np.where(lane.to_numpy()[:, None] == 1, rng.poisson(X * shift), X).astype(np.int32))
    got = vc.de(data, test="nb", replicate_col="replicate", covariates=["lane"])
    assert sum(got.significant().values()) <= 6
    assert (got.p_pg < 0.05).mean() < 0.09


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reference": "others"}, "reference 'others' is not known"),
        ({"test": "nb", "stratify": "batch"}, "stratify cannot be used with test='nb'"),
        ({"replicate_col": "batch"}, "replicate_col cannot be used with test='wilcoxon'"),
        ({"test": "welch", "reference": "rest"}, "reference cannot be used with test='welch'"),
        ({"test": "nb", "covariates": ["batch"]}, "needs replicates"),
        ({"stratify": "batch", "exact": True}, "exact cannot be used with stratify"),
    ],
)
def test_options_that_do_not_go_together(options, text):
    with pytest.raises(UsageError, match=text):
        vc.de(make_screen(0), **options)


def test_one_perturbation_has_no_rest():
    data = make_screen(10)
    data = data[data.obs.target_gene.isin(["A", CONTROL])].copy()
    for test in ("wilcoxon", "nb"):
        with pytest.raises(DataError, match="only one perturbation, so there are no others"):
            vc.de(data, reference="rest", test=test)


def test_one_sample_of_controls_says_nothing_of_replicates():
    data = make_replicates(4, n_replicates=1)
    with pytest.raises(DataError, match="the controls are one sample"):
        vc.de(data, test="nb", replicate_col="replicate")


@pytest.mark.parametrize("reference", ["control", "rest"])
@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_a_temporary_file_for_the_values_changes_no_result(layout, reference, monkeypatch):
    data = make_screen(2)
    data.X = layout(data.X.toarray())
    whole = vc.de(data, reference=reference)
    monkeypatch.setattr("vcelltools.differential.reduce.SPILL_BYTES", 0)
    pd.testing.assert_frame_equal(vc.de(data, reference=reference, threads=2).to_frame(), whole.to_frame(), rtol=0)


def test_a_folder_that_cannot_hold_the_temporary_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("vcelltools.differential.reduce.SPILL_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with file_size_limit(100), pytest.raises(EnvironmentFault, match=rf"^{tmp_path}: the disk is full"):
        vc.de(make_screen(2))
