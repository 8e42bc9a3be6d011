"""Differential expression: the known results of the THP-1 screen, calibration under the null, other implementations."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats as ss

import vcelltools as vc
from vcelltools.errors import DataError, NotCountsError, UsageError

# genes with adjusted p < 0.05 against non-targeting; the others have at most one, or none
KNOWN = {"IFNGR1": 114, "JAK2": 107, "IFNGR2": 105, "STAT1": 96, "SMAD4": 72, "IRF1": 48, "BRD4": 15, "CUL3": 8,
         "STAT2": 3, "MYC": 1, "ATF2": 0, "CAV1": 0, "CD86": 0, "ETV7": 0, "IRF7": 0, "SPI1": 0}  # fmt: skip


def run_thp1(path, **options) -> vc.de:
    return vc.de(path, pert_col="perturbation", keep="confident_guide", **options)


def test_thp1_screen_has_its_known_effects(thp1):
    result = run_thp1(thp1)
    found = result.significant()
    assert {k: found[k] for k in KNOWN} == KNOWN
    assert result.n_controls == 1923
    frame = result.to_frame().set_index(["perturbation", "gene"])
    own = frame.loc[[("JAK2", "JAK2"), ("STAT1", "STAT1")], "log2_fold_change"]
    np.testing.assert_allclose(own, [-2.2, -2.3], atol=0.05)


def test_thp1_negative_binomial_agrees(thp1):
    rank, counts = run_thp1(thp1), run_thp1(thp1, test="nb")
    a, b = rank.significant(), counts.significant()
    assert ss.spearmanr(list(a.values()), list(b.values())).statistic > 0.85
    assert [k for k, v in b.items() if v > 40] == [k for k, v in a.items() if v > 40]
    shared = ((rank.fdr_pg < 0.05) & (counts.fdr_pg < 0.05)).sum()
    assert shared > 0.8 * (rank.fdr_pg < 0.05).sum()


@pytest.mark.parametrize("test", ["wilcoxon", "nb"])
def test_half_of_the_controls_against_the_other_half(thp1, test):
    data = ad.read_h5ad(thp1)
    data = data[(data.obs["perturbation"] == "non-targeting") & data.obs["confident_guide"]].copy()
    half = np.random.default_rng(0).permutation(data.n_obs) < data.n_obs // 2
    data.obs["group"] = np.where(half, "half", "non-targeting")
    assert vc.de(data, pert_col="group", test=test).significant() == {"half": 0}


def make_null(rng, n_cells=(300, 40, 8, 900), n_genes=400, dispersion=0.5) -> ad.AnnData:
    labels = np.repeat(["A", "B", "C", "non-targeting"], n_cells)
    size = rng.lognormal(0, 0.5, len(labels))[:, None]
    mean = size * rng.gamma(0.5, 2.0, n_genes)
    counts = rng.poisson(rng.gamma(1 / dispersion, mean * dispersion)).astype(np.int32)
    return ad.AnnData(
        sp.csr_matrix(counts), obs=pd.DataFrame({"target_gene": labels}, index=map(str, range(len(labels))))
    )


def test_negative_binomial_is_calibrated_under_the_null():
    rng = np.random.default_rng(1)
    results = [vc.de(make_null(rng), test="nb") for _ in range(4)]
    for i, name in enumerate(results[0].perturbations):
        p = np.concatenate([r.p_pg[i] for r in results])
        for level in (0.05, 0.01):
            assert (p < level).mean() < 1.6 * level, name
        assert (p < 0.05).mean() > 0.02, name
    assert sum(sum(r.significant().values()) for r in results) <= 3


def test_negative_binomial_finds_the_dispersion():
    rng = np.random.default_rng(2)
    for dispersion in (0.1, 0.5, 2.0):
        data = make_null(rng, n_genes=200, dispersion=dispersion)
        result = vc.de(data, test="nb")
        well = np.asarray(data.X.mean(axis=0)).ravel() > 1
        assert np.median(result.dispersion_g[well]) == pytest.approx(dispersion, rel=0.15)


def test_wilcoxon_equals_scipy_and_scanpy():
    import scanpy as sc

    data = make_null(np.random.default_rng(3), n_genes=60)
    got = vc.de(data, continuity=False)
    counts = data.X.toarray().astype(np.float64)
    X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    data.X = sp.csr_matrix(X)
    data.uns["log1p"] = {"base": None}
    logged = vc.de(data, continuity=False)
    np.testing.assert_array_equal(logged.p_pg, got.p_pg)
    np.testing.assert_allclose(logged.log2fc_pg, got.log2fc_pg, rtol=1e-9, atol=1e-9)
    label = data.obs["target_gene"].to_numpy()
    for i, name in enumerate(got.perturbations):
        want = ss.mannwhitneyu(X[label == name], X[label == "non-targeting"], method="asymptotic", use_continuity=False)
        np.testing.assert_array_equal(got.statistic_pg[i], want.statistic)
        p = np.nan_to_num(want.pvalue, nan=1.0)  # a gene without any value: 0 / 0
        np.testing.assert_allclose(got.p_pg[i], p, rtol=1e-10)
        np.testing.assert_allclose(got.fdr_pg[i], ss.false_discovery_control(p), rtol=1e-10)
    data.obs["target_gene"] = data.obs["target_gene"].astype("category")
    with np.errstate(invalid="ignore"):  # a gene without any value
        sc.tl.rank_genes_groups(data, "target_gene", reference="non-targeting", method="wilcoxon", tie_correct=True)
    theirs = sc.get.rank_genes_groups_df(data, "A").set_index("names")["pvals"].loc[data.var_names].fillna(1.0)
    np.testing.assert_allclose(got.p_pg[0], theirs, rtol=1e-6)


@pytest.mark.parametrize("test", ["wilcoxon", "nb"])
def test_layouts_agree(test):
    data = make_null(np.random.default_rng(4), n_genes=50)
    want = vc.de(data, test=test, threads=1)
    for X in (sp.csc_matrix(data.X), data.X.toarray(), data.X.astype(np.float64), data.X.toarray().astype(np.uint8)):
        other = ad.AnnData(X, obs=data.obs, var=data.var)
        got = vc.de(other, test=test, threads=2)
        np.testing.assert_array_equal(got.statistic_pg, want.statistic_pg)
        np.testing.assert_allclose(got.p_pg, want.p_pg, rtol=1e-12)


def test_writes_tidy_tables(tmp_path):
    result = vc.de(make_null(np.random.default_rng(5), n_genes=20), min_cpm=2000.0)
    assert np.isnan(result.fdr_pg).any()
    frame = result.to_frame()
    assert not frame["fdr"].isna().any()
    result.write(tmp_path / "de.parquet")
    result.write(tmp_path / "de.csv")
    for back in (pd.read_parquet(tmp_path / "de.parquet"), pd.read_csv(tmp_path / "de.csv")):
        pd.testing.assert_frame_equal(back.astype({"perturbation": str, "gene": str}),
                                      frame.astype({"perturbation": str, "gene": str}), check_dtype=False)  # fmt: skip
    with pytest.raises(UsageError, match="exists"):
        result.write(tmp_path / "de.csv")


def test_refusals():
    data = make_null(np.random.default_rng(6), n_genes=10)
    with pytest.raises(DataError, match=r"no cell of obs/target_gene is labelled 'NT'.*non-targeting \(900\)"):
        vc.de(data, control="NT")
    with pytest.raises(UsageError, match=r"test .* is not known"):
        vc.de(data, test="t")
    with pytest.raises(DataError, match="no column 'x'"):
        vc.de(data, keep="x")
    with pytest.raises(DataError, match="needs booleans"):
        vc.de(data, keep="target_gene")
    logged = data.copy()
    logged.X = data.X.astype(np.float32).log1p()
    with pytest.raises(NotCountsError, match="test='nb' needs counts"):
        vc.de(logged, test="nb")


def test_controls_without_counts_foretell_nothing():
    data = make_null(np.random.default_rng(0), n_cells=(20, 5, 8, 9), n_genes=30)
    data.X = data.X.multiply((data.obs["target_gene"] != "non-targeting").to_numpy()[:, None]).tocsr()
    with pytest.raises(DataError, match="the 9 control cells have no counts"):
        vc.de(data, test="nb")
    assert (vc.de(data).control_mean_g == 0).all()
