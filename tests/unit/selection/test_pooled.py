"""Pooled dispersion: the values as naive numpy has them, and what batches hold of the variance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vcelltools as vc
from tests.atlases import make_experiment, make_ids
from tests.conftest import run_cli
from vcelltools.errors import DataError, UsageError
from vcelltools.selection.hvg_info import make_info, write_info
from vcelltools.selection.pooled import compute_pooled
from vcelltools.selection.ranking import get_least_cells


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("pooled")
    ids = make_ids(50)
    parts = {
        "a": make_experiment(1, 40, ids),
        "b": make_experiment(2, 30, ids[10:][::-1], layout="csc"),
        "c": make_experiment(3, 20, ids, layout="dense"),
    }
    X = np.zeros((90, 50))
    row = 0
    for name, adata in parts.items():
        adata.obs["kind"] = ["x", "y"] * (adata.n_obs // 2)
        adata.write_h5ad(d / f"{name}.h5ad")
        dense = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        at = [ids.index(g) for g in adata.var_names]
        X[row : row + adata.n_obs, at] = dense
        row += adata.n_obs
    return [d / f"{x}.h5ad" for x in parts], X, ids


def transform(X, values):
    library = X.sum(axis=1, keepdims=True)
    scaled = np.divide(1e4 * X, library, out=np.zeros_like(X), where=library > 0)
    return {"counts": X, "log1p": np.log1p(X), "cp10k": scaled, "log1p-cp10k": np.log1p(scaled)}[values]


@pytest.mark.parametrize("values", ["counts", "log1p", "cp10k", "log1p-cp10k"])
@pytest.mark.parametrize("column", [None, "kind"])
def test_moments_are_those_of_numpy(files, values, column):
    paths, X, ids = files
    r = compute_pooled(paths, top=12, values=values, min_share=0.1, batch_effect=column)
    V = transform(X, values)
    assert r.genes.tolist() == ids and r.n_cells == 90
    np.testing.assert_allclose(r.columns["means"], V.mean(0), rtol=1e-12)
    np.testing.assert_allclose(r.columns["variances"], V.var(0, ddof=1), rtol=1e-9)
    assert np.array_equal(r.columns["n_cells"], (X > 0).sum(0))
    batch = np.repeat([0, 1, 2], [40, 30, 20]) if column is None else np.arange(90) % 2
    total = ((V - V.mean(0)) ** 2).sum(0)
    between = sum((batch == k).sum() * (V[batch == k].mean(0) - V.mean(0)) ** 2 for k in np.unique(batch))
    share = np.divide(between, total, out=np.full(50, np.nan), where=total > 0)
    np.testing.assert_allclose(r.columns["between_share"], share, rtol=1e-6, atol=1e-12)
    ok = (X > 0).sum(0) >= 9
    score = np.divide(V.var(0, ddof=1), V.mean(0), out=np.full(50, -1.0), where=ok)
    assert r.selected == [ids[i] for i in np.argsort(-score, kind="stable")[:12]]


def test_counts_are_exact_and_free_of_threads(files, tmp_path):
    paths, _, _ = files
    one, many = (compute_pooled(paths, values="log1p-cp10k", threads=t) for t in (1, 4))
    assert all(np.array_equal(one.columns[c], many.columns[c], equal_nan=True) for c in one.columns)
    big = make_experiment(4, 6, make_ids(3), top=2**31, dtype="float64")
    big.write_h5ad(tmp_path / "big.h5ad")
    r = compute_pooled([tmp_path / "big.h5ad"])
    wanted = [int(v) for v in big.X.toarray()[:, 0]]
    n, s1, s2 = 6, sum(wanted), sum(v * v for v in wanted)
    assert r.columns["variances"][0] == pytest.approx((s2 - s1 * s1 / n) / (n - 1), rel=1e-13)


@settings(deadline=None)
@given(n=st.integers(1, 10**8), k=st.integers(0, 1000))
def test_the_least_number_of_cells_is_exact(n, k):
    assert get_least_cells(k / 1000, n) == -(-k * n // 1000)


def test_a_share_of_2_4_cells_means_3():
    assert get_least_cells(0.001, 2400) == 3 and get_least_cells(0.1, 30) == 3 and get_least_cells(0.0, 5) == 0


def test_batches_that_dominate_are_said(tmp_path):
    ids = make_ids(30)
    rng = np.random.default_rng(0)
    for k in range(3):
        adata = make_experiment(k, 50, ids)
        X = rng.poisson(2.0, (50, 30)).astype("float32")
        X[:, :5] += 40 * k
        adata.X = X
        adata.write_h5ad(tmp_path / f"{k}.h5ad")
    r = compute_pooled([tmp_path / f"{k}.h5ad" for k in range(3)], top=5)
    assert set(r.selected) == set(ids[:5]) and r.columns["between_share"][:5].min() > 0.9
    assert any("batch_key" in w and "reflects batches" in w for w in r.warnings)


def test_hvg_info_names_and_indices_agree(files, tmp_path):
    paths, _, ids = files
    r = compute_pooled(paths, top=7, compare=True)
    genes = [*ids[::-1], "other"]
    (tmp_path / "config.json").write_text(json.dumps({"gene_list": genes}))
    out, figure = write_info(r, tmp_path / "hvg_info.json", paths)
    body = json.loads(out.read_text())
    assert [genes[i] for i in body["hvg_indices"]] == body["hvg_names"] == r.selected
    assert body["gene_to_hvg_idx"] == {str(i): k for k, i in enumerate(body["hvg_indices"])}
    assert body["total_genes"] == 51 and body["statistics"]["n_hvgs"] == 7
    assert body["statistics"]["top_10_hvgs"] == r.selected and figure.read_bytes()[:4] == b"\x89PNG"
    info = vc.read_hvg_info(out)
    assert info.gene_to_hvg_idx[int(info.indices[3])] == 3 and info.names == r.selected
    with pytest.raises(UsageError, match="exists"):
        write_info(r, out, paths)
    with pytest.raises(DataError, match="not in the gene_list"):
        make_info(r, ids[:3])


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        '{"hvg_indices": [1, 1]}',
        '{"hvg_indices": [0, -1]}',
        '{"hvg_indices": [0, 9], "total_genes": 5}',
        '{"hvg_indices": [3, 4], "gene_to_hvg_idx": {"3": 1, "4": 0}}',
        '{"hvg_indices": [3], "hvg_names": ["a", "b"]}',
        '{"hvg_indices": "x"}',
    ],
)
def test_an_info_that_contradicts_itself_is_refused(tmp_path, body):
    (tmp_path / "i.json").write_text(body)
    with pytest.raises(DataError):
        vc.read_hvg_info(tmp_path / "i.json")


def test_an_old_info_has_whole_numbers_for_keys(tmp_path):
    (tmp_path / "i.json").write_text('{"hvg_indices": [4521, 7], "gene_to_hvg_idx": {"4521": 0, "7": 1}}')
    info = vc.read_hvg_info(tmp_path / "i.json")
    assert info.gene_to_hvg_idx == {4521: 0, 7: 1} and info.statistics == {}


def test_the_command_line(files, tmp_path):
    paths = files[0]
    done = run_cli("hvg", *paths, "--pooled", "--values", "log1p", "--top", 6, "--out", "h.txt", "--hvg-info", "i.json",
                   "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["n_selected"] == 6 and (tmp_path / "hvg_analysis.png").exists()
    assert vc.read_hvg_info(tmp_path / "i.json").names == (tmp_path / "h.txt").read_text().split()
    for args in (("--values", "log1p"), ("--hvg-info", "x.json"), ("--pooled", "--batch-key", "kind")):
        assert run_cli("hvg", paths[0], *args, "--out", "x.txt", cwd=tmp_path).code == 2
