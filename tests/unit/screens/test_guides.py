"""Guide assignment: by hand, on every layout and container, and compared with a simulated truth and Papalexi et al."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.conftest import DATA, run_cli
from tests.make import as_layout, get_mudata
from vcelltools.errors import DataError, UsageError
from vcelltools.screens.assignment import compare_assignments, match_cells

NAMES = ["TP53g1", "TP53g2", "MYCg1", "NTg1"]
PAPALEXI = DATA / "papalexi_h5mu" / "papalexi_7108_gene_guide.h5mu"


def make_screen(path, layout="csr", n=400, seed=0):
    """Write genes and guides as h5mu, and return the (n, 4) truth. Cell 0 has no guide, cells 1 and 2 have two."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((n, 4), bool)
    truth[np.arange(1, n), rng.integers(0, 4, n - 1)] = True
    truth[1], truth[2] = [True, True, False, False], [True, False, True, False]
    counts = rng.poisson(0.15, (n, 4)) + truth * (20 + rng.negative_binomial(3, 0.03, (n, 4)))
    names = [f"c{i}" for i in range(n)]
    guide = ad.AnnData(as_layout(counts, layout), pd.DataFrame(index=names), pd.DataFrame(index=NAMES))
    genes = ad.AnnData(
        as_layout(rng.poisson(1.0, (n, 6)), "csr"), pd.DataFrame({"lane": ["a"] * n}, index=names),
        pd.DataFrame(index=["TP53", "MYC", "A", "B", "C", "D"]),
    )  # fmt: skip
    genes.layers["twice"] = genes.X * 2
    get_mudata().MuData({"rna": genes, "guide": guide}).write(path)
    return truth


def to_dense(result):
    ones = np.ones(len(result.indices), bool)
    return sp.csr_matrix((ones, result.indices, result.indptr), (len(result.cells), len(result.guides))).toarray()


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("method", ["mixture", "negative-binomial"])
def test_a_clear_signal_is_found_in_every_layout(tmp_path, layout, method):
    truth = make_screen(tmp_path / "s.h5mu", layout)
    result = vc.guides(tmp_path / "s.h5mu", method=method)
    np.testing.assert_array_equal(to_dense(result), truth)
    frame = result.to_frame()
    assert frame.iloc[0][["guide_status", "n_guides", "single_target"]].tolist() == ["unassigned", 0, False]
    assert pd.isna(frame["target_gene"].iloc[0]) and pd.isna(frame["guides"].iloc[0])
    assert frame.iloc[1][["guides", "target_gene", "n_guides", "n_targets", "single_target", "guide_status"]].tolist() \
        == ["TP53g1|TP53g2", "TP53", 2, 1, True, "several guides"]  # fmt: skip
    assert frame.iloc[2][["target_gene", "n_targets", "single_target"]].tolist() == ["MYC|TP53", 2, False]
    with_nt = frame.index[truth[:, 3]]
    assert (frame.loc[with_nt, "target_gene"] == "non-targeting").all()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_fixed_threshold_is_applied_as_it_is(tmp_path, threads):
    make_screen(tmp_path / "s.h5mu")
    counts = get_mudata().read_h5mu(tmp_path / "s.h5mu")["guide"].X.toarray()
    result = vc.guides(tmp_path / "s.h5mu", method="threshold", threshold=2, threads=threads)
    np.testing.assert_array_equal(to_dense(result), counts >= 2)
    np.testing.assert_array_equal(result.counts_n, counts.sum(axis=1))


def test_the_order_of_cells_and_threads_changes_nothing(tmp_path):
    make_screen(tmp_path / "s.h5mu")
    one = vc.guides(tmp_path / "s.h5mu", threads=1)
    guide = get_mudata().read_h5mu(tmp_path / "s.h5mu")["guide"]
    order = np.random.default_rng(5).permutation(guide.n_obs)
    guide = guide[order].copy()
    guide.var["feature_types"] = "CRISPR Guide Capture"
    other = vc.guides(guide, threads=4)
    np.testing.assert_array_equal(to_dense(other), to_dense(one)[order])
    np.testing.assert_array_equal(other.fits.params_gk, one.fits.params_gk)


def make_combined(path):
    """Write one h5ad file of genes and guides with feature types."""
    truth = make_screen(path.with_suffix(".h5mu"))
    m = get_mudata().read_h5mu(path.with_suffix(".h5mu"))
    adata = ad.concat([m["rna"], m["guide"]], axis=1)
    adata.var["feature_types"] = ["Gene Expression"] * 6 + ["CRISPR Guide Capture"] * 4
    adata.write_h5ad(path)
    return truth


def test_guides_among_the_features_of_an_h5ad_are_found_and_left_out_of_the_genes(tmp_path):
    truth = make_combined(tmp_path / "s.h5ad")
    result = vc.guides(tmp_path / "s.h5ad")
    np.testing.assert_array_equal(to_dense(result), truth)
    result.write_labelled(tmp_path / "s.h5ad", tmp_path / "new.h5ad")
    new = ad.read_h5ad(tmp_path / "new.h5ad")
    assert new.var_names.tolist() == ["TP53", "MYC", "A", "B", "C", "D"]


def test_guides_of_a_10x_file_are_found(tmp_path):
    import h5py

    truth = make_screen(tmp_path / "s.h5mu")
    m = get_mudata().read_h5mu(tmp_path / "s.h5mu")
    X = sp.hstack([m["rna"].X, m["guide"].X]).tocsr().astype(np.int32)
    names = [*m["rna"].var_names, *m["guide"].var_names]
    with h5py.File(tmp_path / "s.h5", "w") as f:
        g = f.create_group("matrix")
        for key, value in (("data", X.data), ("indices", X.indices), ("indptr", X.indptr), ("shape", X.shape[::-1])):
            g[key] = value
        g["barcodes"] = m["rna"].obs_names.to_numpy().astype("S")
        features = g.create_group("features")
        features["id"] = features["name"] = np.array(names, "S")
        features["feature_type"] = np.array(["Gene Expression"] * 6 + ["CRISPR Guide Capture"] * 4, "S")
    result = vc.guides(tmp_path / "s.h5")
    np.testing.assert_array_equal(to_dense(result), truth)


def test_the_new_file_has_the_labels_and_the_old_one_is_as_it_was(tmp_path):
    truth = make_screen(tmp_path / "s.h5mu")
    before = (tmp_path / "s.h5mu").read_bytes()
    done = run_cli("guides", "s.h5mu", "--write", "new.h5ad", "--out", "t.csv", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert done.json["unassigned"] == 1 and done.json["several_guides"] == 2 and done.json["targets_from"]
    assert (tmp_path / "s.h5mu").read_bytes() == before
    new = ad.read_h5ad(tmp_path / "new.h5ad")
    old = get_mudata().read_h5mu(tmp_path / "s.h5mu")["rna"]
    assert (new.X != old.X).nnz == 0 and (new.layers["twice"] != old.layers["twice"]).nnz == 0
    assert new.obs["lane"].tolist() == ["a"] * len(truth)
    assert new.obs["n_guides"].tolist() == truth.sum(axis=1).tolist() and pd.isna(new.obs["target_gene"].iloc[0])
    table = pd.read_csv(tmp_path / "t.csv")
    assert list(table.columns[:4]) == ["cell", "guides", "n_guides", "target"]
    assert table["target"].fillna("-").tolist() == new.obs["target_gene"].astype(object).fillna("-").tolist()
    page = (tmp_path / "t.html").read_text()
    assert page.count("<figure>") == 4 and "1 </b>" not in page and "TP53g1" in page


def test_the_labels_are_fit_for_de_and_stores(tmp_path):
    make_screen(tmp_path / "s.h5mu")
    done = run_cli("guides", "s.h5mu", "--write", "new.h5ad", "--single", "-q", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert ad.read_h5ad(tmp_path / "new.h5ad").n_obs == 398, "the cell without a guide and the one of two targets left"
    assert set(vc.de(tmp_path / "new.h5ad").perturbations) == {"TP53", "MYC"}
    store = vc.build_store(
        tmp_path / "new.h5ad", basis=["TP53", "MYC", "A"], out=tmp_path, name="s", pert_col="target_gene",
        control="non-targeting",
    )  # fmt: skip
    assert store.n_cells == 398


def test_cells_are_matched_by_name():
    names, known = np.array(["b", "x", "a"], object), np.array(["a", "b"], object)
    assert match_cells(names, known, "f").tolist() == [1, -1, 0]
    with pytest.raises(DataError, match="none of its cells"):
        match_cells(np.array(["x"], object), known, "f")
    with pytest.raises(DataError, match="names of the cells are not unique"):
        match_cells(np.array(["a", "a"], object), known, "f")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"method": "zz"}, "method 'zz' is not known"), ({"method": "threshold"}, "threshold needs"),
     ({"threshold": 3}, "threshold can only be used with"), ({"method": "threshold", "threshold": 0}, "at least 1")],
)  # fmt: skip
def test_wrong_options_are_refused(tmp_path, change, says):
    make_screen(tmp_path / "s.h5mu", n=40)
    with pytest.raises(UsageError, match=says):
        vc.guides(tmp_path / "s.h5mu", **change)


def test_a_file_without_guides_says_so(tmp_path):
    ad.AnnData(np.ones((4, 3), np.float32)).write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(DataError, match="no modality of guides"):
        vc.guides(tmp_path / "x.h5ad")
    done = run_cli("guides", "x.h5ad", cwd=tmp_path)
    assert done.code == 3 and "--modality" in done.stderr


def test_guides_without_any_signal_are_no_guess(tmp_path):
    make_screen(tmp_path / "s.h5mu")
    m = get_mudata().read_h5mu(tmp_path / "s.h5mu")
    guide = m["guide"].copy()
    guide.X = sp.csr_matrix(np.random.default_rng(0).binomial(1, 0.05, guide.shape).astype(np.float32))
    guide.var["feature_types"] = "CRISPR Guide Capture"
    with pytest.raises(DataError, match="no signal above a background"):
        vc.guides(guide)


def test_values_that_are_no_counts_are_refused(tmp_path):
    make_screen(tmp_path / "s.h5mu", n=40)
    guide = get_mudata().read_h5mu(tmp_path / "s.h5mu")["guide"].copy()
    guide.var["feature_types"] = "CRISPR Guide Capture"
    guide.X.data[0] = 0.5
    with pytest.raises(DataError, match="whole"):
        vc.guides(guide)


def test_simulated_guides_are_found_again(tmp_path):
    vc.simulate(
        tmp_path / "s.h5mu", cells=600, genes=120, perturbations=8, guides=True, multiplets=0.1, unassigned=0.05
    )
    cells = pd.read_parquet(next(tmp_path.glob("*cells*.parquet")))
    truth = cells[["guide_1", "guide_2"]].notna().sum(axis=1).to_numpy()
    found = vc.guides(tmp_path / "s.h5mu")
    assert (found.n_guides == truth).mean() > 0.99


@pytest.mark.skipif(not PAPALEXI.exists(), reason="the THP-1 screen is not here")
@pytest.mark.parametrize(("method", "least"), [("mixture", 0.952), ("negative-binomial", 0.953)])
def test_the_assignment_agrees_with_papalexis_own(method, least):
    """The file assigns the guide with the most counts to every cell; a mixture also finds cells with none or two."""
    result = vc.guides(PAPALEXI, method=method)
    a = compare_assignments(result, PAPALEXI, "guide_assignment")
    assert a.n_cells == 7108 and a.same / a.n_cells > least
    assert a.same_single / a.both_single > 0.9995
    assert a.found / a.pairs > 0.98
