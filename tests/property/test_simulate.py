"""simulate: the same file whatever the layout, blocks and threads; the truth beside it is the truth."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from vcelltools.errors import UsageError
from vcelltools.simulation import simulate as module
from vcelltools.simulation.simulate import simulate

SMALL = {"cells": 300, "genes": 400, "perturbations": 12, "batches": 2, "cell_lines": 2, "multiplets": 0.2}


def read(path) -> np.ndarray:
    if path.suffix == ".h5mu":
        import mudata

        X = mudata.read_h5ad(path, "rna").X
    else:
        X = anndata.read_h5ad(path).X
    return X.toarray() if sparse.issparse(X) else np.asarray(X)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("ref") / "a.h5ad"
    simulate(path, **SMALL, threads=1)
    return read(path)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize(("name", "compression"), [("x.h5ad", "none"), ("x.h5mu", "gzip"), ("x.h5ad", "lzf")])
def test_every_layout_holds_the_same_counts(tmp_path, reference, layout, name, compression):
    r = simulate(tmp_path / name, **SMALL, layout=layout, compression=compression, dtype="uint16", threads=2)
    got = read(tmp_path / name)
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, reference)
    assert r.nnz == np.count_nonzero(reference)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.integers(1, 40_000), threads=st.integers(1, 5), layout=st.sampled_from(["csr", "csc"]))
def test_blocks_and_threads_change_no_byte(tmp_path, monkeypatch, reference, values, threads, layout):
    monkeypatch.setattr(module, "_BLOCK_VALUES", values)
    simulate(tmp_path / "x.h5ad", **SMALL, layout=layout, threads=threads, force=True)
    a = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert a.X.has_sorted_indices
    np.testing.assert_array_equal(a.X.toarray(), reference)


def test_spilled_columns(tmp_path, monkeypatch, reference):
    """Many buckets, each in several column ranges, give the same file."""
    from vcelltools.io.write import transpose

    monkeypatch.setattr(transpose, "_BUCKET_VALUES", 700)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 2_000)
    simulate(tmp_path / "x.h5ad", **SMALL, layout="csc")
    np.testing.assert_array_equal(read(tmp_path / "x.h5ad"), reference)


def test_seeds(tmp_path):
    a, b = (simulate(tmp_path / f"{i}.h5ad", **SMALL, seed=1) for i in "ab")
    c = simulate(tmp_path / "c.h5ad", **SMALL, seed=2)
    np.testing.assert_array_equal(read(a.out), read(b.out))
    assert (a.out.read_bytes(), a.truth.read_bytes()) == (b.out.read_bytes(), b.truth.read_bytes())
    assert not np.array_equal(read(a.out), read(c.out))


def test_effects_are_the_truth(tmp_path):
    """Pseudobulk fold changes follow the truth; inert perturbations change nothing but their target."""
    r = simulate(tmp_path / "x.h5ad", cells=6000, genes=300, perturbations=6, batches=1, inert=0.34, seed=4)
    a = anndata.read_h5ad(r.out)
    truth = anndata.read_h5ad(r.truth)
    labels = a.obs["target_gene"].to_numpy().astype(str)
    X = a.X.toarray()

    def get_cp10k(rows):
        total = X[rows].sum(axis=0)
        return total / total.sum() * 1e4

    control = get_cp10k(labels == "non-targeting")
    base = truth.varm["cp10k"][:, 0]
    seen = base > 5
    assert np.corrcoef(np.log(control[seen]), np.log(base[seen]))[0, 1] > 0.97  # batch shifts are part of it
    inert = 0
    for i, name in enumerate(truth.obs["perturbation"].astype(str)):
        rows = labels == name
        assert rows.sum() == truth.obs["n_cells"].iloc[i]
        want = truth.X[i].toarray().ravel() - truth.obs["log2_total"].iloc[i]
        got = np.log2((get_cp10k(rows) + 0.1) / (control + 0.1))
        target = list(truth.var_names).index(name)
        assert want[target] < -1
        assert got[target] < 0.5 * want[target]
        others = seen & (np.arange(300) != target)
        noise = np.sqrt(2 / rows.sum() / 0.05)
        if truth.obs["strength"].iloc[i] == 0:
            inert += 1
            assert truth.X[i].nnz == 1
            assert np.median(np.abs(got[others])) < noise
        else:
            error = np.median(np.abs(got - want)[others])
            assert error < noise
            big = others & (np.abs(want) > 0.5)
            if big.sum() > 10:
                assert np.corrcoef(got[big], want[big])[0, 1] > 0.8
    assert 0 < inert < 6


def test_kolf_names(tmp_path):
    import mudata

    r = simulate(tmp_path / "k.h5mu", cells=2000, genes=200, perturbations=8, like="kolf", guides=True)
    a = mudata.read_h5ad(r.out, "rna")
    g = mudata.read_h5ad(r.out, "guide")
    assert list(a.obs.columns) == ["feature_call", "num_features", "batch"]
    calls = a.obs["feature_call"]
    assert (r.pert_col, r.control) == ("feature_call", "Non-Targeting")
    assert "Non-Targeting" in set(calls.dropna())
    assert a.var["gene_ids"].str.match(r"^ENSG\d{11}$").all()
    n = calls.map(lambda v: 0 if v is None or pd.isna(v) else v.count("|") + 1, na_action=None).astype(int)
    np.testing.assert_array_equal(n, a.obs["num_features"])
    share = np.bincount(n, minlength=3) / len(n)
    assert 0.05 < share[2] < 0.15
    assert 0.005 < share[0] < 0.04
    both = calls[n == 2].astype(str).str.split("|")
    assert all(x != y for x, y in both)
    strong = (g.X.toarray() > 10).sum(axis=1)
    np.testing.assert_array_equal(strong, a.obs["num_features"])
    for cell in np.flatnonzero(n == 2)[:20]:
        mine = {v.removeprefix("guide_") for v in g.var_names[g.X[cell].toarray().ravel() > 10]}
        assert mine == set(calls.iloc[cell].split("|"))


def test_two_labs_share_their_biology(tmp_path):
    shared = {"cells": 200, "genes": 500, "perturbations": 10, "perturbation_universe": 15, "effect_seed": 9}
    a = simulate(tmp_path / "a.h5ad", **shared, seed=1, genes_drop=0.1)
    b = simulate(tmp_path / "b.h5ad", **shared, seed=2, genes_drop=0.2, cell_lines=2)
    ta, tb = anndata.read_h5ad(a.truth), anndata.read_h5ad(b.truth)
    assert (ta.n_vars, tb.n_vars) == (450, 400)
    genes = [g for g in ta.var_names if g in set(tb.var_names)]
    assert len(genes) > 340
    pd.testing.assert_series_equal(ta.var.loc[genes, "gene_ids"], tb.var.loc[genes, "gene_ids"])
    groups = [p for p in ta.obs_names if p in set(tb.obs_names)]
    assert len(groups) >= 5
    np.testing.assert_array_equal(ta[groups, genes].X.toarray(), tb[groups, genes].X.toarray())
    pa, pb = set(ta.obs["perturbation"]), set(tb.obs["perturbation"])
    assert len(pa) == len(pb) == 10
    assert pa != pb
    assert pa <= set(ta.var_names)  # a dropped gene is never a target
    fa, fb = pd.read_parquet(a.features), pd.read_parquet(b.features)
    pd.testing.assert_frame_equal(fa.loc[genes], fb.loc[genes])
    assert not np.array_equal(read(a.out)[:, :50], read(b.out)[:, :50])


def test_features_foretell_effects(tmp_path):
    """A ridge from the targets' embeddings to the effects beats the mean effect on held-out perturbations."""
    r = simulate(tmp_path / "x.h5ad", cells=10, genes=1000, perturbations=300, shared=1.0, inert=0.0)
    t = anndata.read_h5ad(r.truth)
    features = pd.read_parquet(r.features).loc[t.obs["perturbation"].astype(str)].to_numpy()
    Y = t.X.toarray()
    F = np.c_[features, np.ones(len(features))]
    W = np.linalg.solve(F[:240].T @ F[:240] + 3 * np.eye(F.shape[1]), F[:240].T @ Y[:240])
    ridge = np.mean((F[240:] @ W - Y[240:]) ** 2)
    mean = np.mean((Y[:240].mean(axis=0) - Y[240:]) ** 2)
    assert ridge < 0.95 * mean
    # a few programmes carry most of what happens
    s = np.linalg.svd(Y - Y.mean(axis=0), compute_uv=False) ** 2
    assert s[:24].sum() / s.sum() > 0.5


def test_escapers_do_not_respond(tmp_path):
    r = simulate(tmp_path / "x.h5ad", cells=3000, genes=300, perturbations=2, escape=0.5, control_share=0.3, seed=1)
    cells = pd.read_parquet(r.truth_cells)
    a = anndata.read_h5ad(r.out)
    assert list(cells.index) == list(a.obs_names)
    np.testing.assert_array_equal(cells["guide_1"].astype(str), a.obs["target_gene"].astype(str))
    name = cells["guide_1"].cat.categories[0]
    own = a[:, name].X.toarray().ravel() / np.asarray(a.X.sum(axis=1)).ravel()
    mine = (cells["guide_1"] == name).to_numpy()
    hit, spared = mine & cells["responds"].to_numpy(), mine & ~cells["responds"].to_numpy()
    control = (cells["guide_1"] == "non-targeting").to_numpy()
    assert own[hit].mean() < 0.5 * own[control].mean()
    assert own[spared].mean() > 0.7 * own[control].mean()


@pytest.mark.parametrize("density", [0.02, 0.0685, 0.3])
def test_density_is_met(tmp_path, density):
    r = simulate(tmp_path / "x.h5ad", cells=1500, genes=2000, perturbations=5, density=density, batches=3)
    assert abs(r.density / density - 1) < 0.05


def test_looks_like_the_pbmc(tmp_path, pbmc):
    """Ranked gene means and depths stay near a real transcriptome's."""
    import mudata

    m = mudata.read_h5ad(pbmc, "rna").X
    r = simulate(tmp_path / "x.h5ad", cells=1000, genes=36_601, perturbations=10, batches=1)
    s = anndata.read_h5ad(r.out).X

    def get_ranked(X):
        size = np.asarray(X.sum(axis=1)).ravel()
        return np.sort(np.asarray(X.multiply(1e4 / size[:, None]).mean(axis=0)).ravel())[::-1]

    at = np.array([30, 100, 300, 1000, 3000, 5000, 8000, 12_000])
    ratio = get_ranked(s)[at - 1] / get_ranked(m)[at - 1]
    assert ratio.max() < 1.6
    assert ratio.min() > 0.6
    assert abs(r.median_depth / 6819 - 1) < 0.1
    assert 0.8 < r.density / (m.nnz / np.prod(m.shape)) < 1.25


@pytest.mark.parametrize(
    "bad",
    [
        {"cells": 0},
        {"perturbations": 500},
        {"multiplets": 1.5},
        {"depth": 100.0, "density": 0.1},
        {"density": 0.99},
        {"like": "nothing"},
        {"perturbation_universe": 3},
        {"contiguous": True},
        {"dtype": "float7"},
        {"compression": "zip"},
        {"layout": "coo"},
        {"guides": True},
        {"seed": -1},
    ],
)
def test_what_cannot_be(tmp_path, bad):
    with pytest.raises(UsageError):
        simulate(tmp_path / "x.h5ad", **{**SMALL, **bad})
    with pytest.raises(TypeError, match="nonsense"):
        simulate(tmp_path / "x.h5ad", nonsense=1)
    assert list(tmp_path.iterdir()) == []


def test_controls_alone(tmp_path):
    r = simulate(tmp_path / "x.h5ad", cells=50, genes=30, perturbations=0)
    assert set(anndata.read_h5ad(r.out).obs["target_gene"]) == {"non-targeting"}
    assert anndata.read_h5ad(r.truth).n_obs == 0


def test_command(tmp_path, cli):
    out = tmp_path / "s.h5mu"
    arguments = ("simulate", "--out", out, "--cells", 200, "--genes", 100, "--perturbations", 5)
    r = cli(*arguments, "--like", "kolf", "--json")
    assert r.code == 0, r.stderr
    assert (r.json["n_cells"], r.json["n_genes"], r.json["pert_col"]) == (200, 100, "feature_call")
    assert json.loads(anndata.read_h5ad(r.json["truth"]).uns["settings"])["cells"] == 200
    before = out.read_bytes()
    assert cli(*arguments).code == 2
    assert out.read_bytes() == before
    assert cli(*arguments, "--seed", 3, "--force").code == 0
    assert out.read_bytes() != before
    assert cli("simulate", "--out", tmp_path / "s.txt").code == 2


def test_lines_of_a_lineage_share_expression_effects_and_silent_targets(tmp_path):
    options = {"cells": 400, "genes": 400, "perturbations": 20, "cell_lines": 4, "inert": 0.0, "seed": 3}
    truth = {
        n: anndata.read_h5ad(simulate(tmp_path / f"{n}.h5ad", lineages=n, **options).truth) for n in (0, 2)
    }  # fmt: skip
    level = np.log(truth[2].varm["cp10k"] + 1e-9)
    near, far = (np.abs(level[:, a] - level[:, b]).mean() for a, b in ((0, 2), (0, 1)))
    assert near < 0.8 * far  # lines 1 and 3 are of one lineage
    effects = truth[2].X.toarray().reshape(20, 4, -1)
    np.testing.assert_array_equal(effects[:, 0], effects[:, 2])
    assert (effects[:, 0] != effects[:, 1]).any()
    silent = (np.abs(effects) > 0.01).sum(axis=2) == 1  # only the relative change of what is not there
    assert 0.05 < silent.mean() < 0.5
    assert not ((np.abs(truth[0].X.toarray().reshape(20, 4, -1)) > 0.01).sum(axis=2) == 1).any()


def test_activated_lines_go_the_other_way(tmp_path):
    options = {"cells": 300, "genes": 200, "perturbations": 10, "cell_lines": 2, "inert": 0.0, "shared": 1.0, "seed": 3}
    made = simulate(tmp_path / "a.h5ad", activated=1, **options)
    effects = anndata.read_h5ad(made.truth).X.toarray().reshape(10, 2, -1)
    assert np.corrcoef(effects[:, 0].ravel(), effects[:, 1].ravel())[0, 1] < -0.5
    obs = anndata.read_h5ad(made.out).obs
    found = dict(obs.groupby("cell_line", observed=True)["direction"].first())
    assert found == {
        "line1": "crispri",
        "line2": "crispra",
    }
    with pytest.raises(UsageError, match="activated is 3, but must be at most 2"):
        simulate(tmp_path / "b.h5ad", activated=3, **options)
