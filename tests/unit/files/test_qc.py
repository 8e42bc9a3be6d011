"""Quality control: scanpy's metrics, flags by their rules, the report."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.atlases import make_experiment, make_ids
from tests.conftest import run_cli
from vcelltools.errors import DataError, UsageError
from vcelltools.files.qc import Limits, get_outliers, qc, write_flagged
from vcelltools.io import CsrMatrix


def make(seed=0, n=80, layout="csr", genes=150):
    adata = make_experiment(seed, n, make_ids(genes), layout=layout)
    symbols = [f"MT-{i}" if i < 10 else f"mt-{i}" if i < 12 else f"G{i}" for i in range(genes)]
    adata.var["gene_symbols"] = symbols
    return adata


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_metrics_are_scanpys(tmp_path, layout):
    import scanpy as sc

    adata = make(layout=layout)
    X = adata.X.toarray() if layout != "dense" else adata.X
    X[3] = 0
    X[4, 60:] = 0  # fewer than 50 genes
    adata = ad.AnnData(X if layout == "dense" else adata.X.__class__(X), adata.obs, adata.var)
    adata.write_h5ad(tmp_path / "x.h5ad")
    result = vc.qc(tmp_path / "x.h5ad")
    adata.var["mt"] = adata.var["gene_symbols"].str.startswith(("MT-", "mt-")).to_numpy()
    with np.errstate(all="ignore"):
        wanted = sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=[50], log1p=False)[0]
    for c in ("total_counts", "n_genes_by_counts", "pct_counts_mt"):
        np.testing.assert_allclose(
            result.columns[c][[i for i in range(80) if i != 3]], wanted[c].drop(wanted.index[3]), rtol=1e-5
        )
    got = result.columns["pct_counts_in_top_50_genes"]
    keep = [i for i in range(80) if i != 3]
    np.testing.assert_allclose(got[keep], wanted["pct_counts_in_top_50_genes"].iloc[keep], rtol=1e-5)
    assert np.isnan(got[3]) and np.isnan(result.columns["pct_counts_mt"][3]) and got[4] <= 100


def test_every_cell_is_read_once(tmp_path, monkeypatch):
    """A gene with two columns, a stored zero and cells of several batches in one read give the counts of numpy."""
    adata = make(n=90)
    adata.var_names = [f"g{i}" for i in range(150)]
    adata.var["gene_ids"] = [f"ENSG{i % 140:011d}" for i in range(150)]
    adata.obs["lane"] = [f"L{i % 3}" for i in range(90)]
    adata.X.data[4] = 0
    adata.write_h5ad(tmp_path / "x.h5ad")
    wanted = adata.X.toarray()
    wanted = np.hstack([wanted[:, :10] + wanted[:, 140:], wanted[:, 10:140]])
    seen = []
    read = CsrMatrix.read

    def note(self, span, buffers=None):
        seen.extend(range(span.start, span.stop))
        return read(self, span, buffers)

    monkeypatch.setattr(CsrMatrix, "read", note)
    r = qc(tmp_path / "x.h5ad", batch_key="lane")
    assert sorted(seen) == list(range(90))
    assert np.array_equal(r.columns["total_counts"], wanted.sum(1))
    assert np.array_equal(r.columns["n_genes_by_counts"], (wanted > 0).sum(1))
    top = np.sort(wanted, axis=1)[:, -50:].sum(1)
    np.testing.assert_allclose(r.columns["pct_counts_in_top_50_genes"], 100 * top / wanted.sum(1))
    for k, row in enumerate(r.report):
        mine = wanted[k::3]
        assert row["sparsity"] == 1 - (mine > 0).mean()
        assert row["leading_share"] == np.sort(mine.sum(0))[-20:].sum() / mine.sum()


def test_flags_follow_their_rules(tmp_path):
    adata = make(n=60)
    X = adata.X.toarray()
    X[0, 20:] = 0  # few genes, all but mitochondrial
    X[1] *= 500  # many counts
    X[2, :12] += 400  # mitochondrial
    adata.X = adata.X.__class__(X)
    adata.write_h5ad(tmp_path / "x.h5ad")
    limits = Limits(min_genes=40, max_counts=20_000, max_mt=50.0, mads=5.0)
    r = qc(tmp_path / "x.h5ad", limits=limits)
    c = r.columns
    assert np.array_equal(c["qc_empty"], (X > 0).sum(1) < 40) and c["qc_empty"][0]
    assert np.flatnonzero(c["qc_doublet"]).tolist() == [1] and c["qc_mt"][2]
    assert np.array_equal(c["qc_pass"], ~(c["qc_empty"] | c["qc_doublet"] | c["qc_mt"] | c["qc_outlier"]))
    logs = np.log1p(X.sum(1))
    off = np.abs(logs - np.median(logs))
    assert c["qc_outlier"][off > 5 * np.median(off)].all() and c["qc_outlier"][1]


def test_outliers_need_a_spread():
    assert not get_outliers(np.array([1.0, 1, 1, 1, 9]), 5.0).any(), "the median deviation is 0"
    assert get_outliers(np.array([0.0, 1, 2, 3, 4, 50]), 5.0).tolist() == [False] * 5 + [True]
    assert get_outliers(np.array([0.0, 1, 2, np.nan, 50]), 5.0).tolist() == [False, False, False, False, True]


def test_batches_are_told_apart_and_reported(tmp_path):
    adata = make(n=90)
    rng = np.random.default_rng(0)
    adata.obs["run"] = rng.permutation(["a", "b", "c"] * 30)
    adata.write_h5ad(tmp_path / "x.h5ad")
    whole = qc(tmp_path / "x.h5ad", batch_key="run")
    frame = whole.to_frame()
    for row in whole.report:
        mine = (adata.obs["run"] == row["batch"]).to_numpy()
        X = adata.X.toarray()[mine]
        assert row["cells"] == mine.sum() and row["pass"] == whole.columns["qc_pass"][mine].sum()
        assert row["median_total_counts"] == np.median(X.sum(1)) and row["sparsity"] == pytest.approx((X == 0).mean())
        top = np.argsort(-X.sum(0), kind="stable")[:20]
        assert row["leading_share"] == pytest.approx(X[:, top].sum() / X.sum())
        assert row["leading_cells"] == pytest.approx((X[:, top] > 0).mean())
    assert frame["batch"].astype(str).tolist() == adata.obs["run"].tolist()
    with pytest.raises(DataError, match="no column"):
        qc(tmp_path / "x.h5ad", batch_key="nope")


def test_an_experiment_that_is_far_off_is_named(tmp_path):
    paths = []
    for k in range(7):
        adata = make(k, n=40)
        if k == 5:
            adata.X = adata.X * 30
        adata.write_h5ad(tmp_path / f"{k}.h5ad")
        paths.append(tmp_path / f"{k}.h5ad")
    r = qc(paths)
    assert "median_total_counts" in {row["batch"]: row["odd"] for row in r.report}["5.h5ad"]
    assert any("5.h5ad" in w for w in r.warnings)
    with pytest.raises(UsageError, match="given twice"):
        qc([paths[0], paths[0]])


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_the_flagged_file_holds_the_same_counts(tmp_path, layout):
    adata = make(n=50, layout=layout)
    adata.obs["kind"] = pd.Categorical(["x", "y"] * 25)
    adata.write_h5ad(tmp_path / "x.h5ad")
    r = qc(tmp_path / "x.h5ad", limits=Limits(min_genes=70))
    assert 0 < r.n_pass < 50
    X = adata.X if layout == "dense" else adata.X.toarray()
    for drop in (False, True):
        back = ad.read_h5ad(write_flagged(r, tmp_path / "x.h5ad", tmp_path / f"{drop}.h5ad", drop=drop))
        keep = r.columns["qc_pass"] if drop else np.ones(50, bool)
        assert np.array_equal(back.X.toarray(), X[keep]) and back.var_names.tolist() == adata.var_names.tolist()
        assert back.obs_names.tolist() == adata.obs_names[keep].tolist()
        assert back.obs["qc_pass"].tolist() == r.columns["qc_pass"][keep].tolist()
        assert back.obs["kind"].tolist() == adata.obs["kind"][keep].tolist()


def test_the_command_line(tmp_path):
    make(n=50).write_h5ad(tmp_path / "x.h5ad")
    done = run_cli("qc", "x.h5ad", "--min-genes", 70, "--write", "y.h5ad", "--drop", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    body = json.loads(done.stdout)
    frame = pd.read_parquet(tmp_path / "qc.parquet")
    assert body["n_cells"] == len(frame) == 50 and body["n_pass"] == frame["qc_pass"].sum()
    assert ad.read_h5ad(tmp_path / "y.h5ad").n_obs == body["n_pass"] and body["batches"][0]["batch"] == "x.h5ad"
    for args in (("--drop",), ("--write", "x.h5ad"), ()):
        assert run_cli("qc", "x.h5ad", *args, cwd=tmp_path).code == 2
    (tmp_path / "basis.txt").write_text("\n".join(make_ids(20)) + "\n")
    (tmp_path / "vcelltools.toml").write_text(
        '[[datasets]]\nname = "s"\npath = "z.h5ad"\nunperturbed = true\nkeep = ["qc_pass"]\n'
    )
    assert run_cli("qc", "x.h5ad", "--min-genes", 70, "--write", "z.h5ad", "--force", cwd=tmp_path).code == 0
    assert run_cli("build-store", "--basis", "basis.txt", cwd=tmp_path).code == 0
    assert vc.open_store(tmp_path / "stores" / "s").n_cells == body["n_pass"]
