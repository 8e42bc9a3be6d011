"""A prediction records its run and stores, and a change of these is reported."""

from __future__ import annotations

import shutil

import anndata as ad
import numpy as np
import pytest

import vcelltools as vc
from tests.smallstore import build_small_store
from vcelltools.errors import DataError
from vcelltools.io.origin import describe_origin, find_stale


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a store, a run on it, its prediction and the truth."""
    d = tmp_path_factory.mktemp("origin")
    store = build_small_store(d)
    train = {"stores": [str(store)], "model": "perturbation-mean"}
    vc.train(out=d / "run", **train)
    vc.predict(d / "run", d / "pred.h5ad", basis_only=True)
    vc.baseline(stores=[store], out=d / "learned.h5ad")
    return d, store


def test_a_fresh_prediction_is_not_stale(made):
    d, store = made
    assert find_stale(d / "pred.h5ad") == []
    kept = ad.read_h5ad(d / "pred.h5ad").uns["vcelltools"]
    assert kept["origin"].tolist() == [str(d / "run"), str(store)]
    assert find_stale(ad.read_h5ad(d / "pred.h5ad")) == []


def test_a_run_that_was_trained_again_is_named(made, tmp_path):
    d, store = made
    pred = ad.read_h5ad(d / "pred.h5ad")
    kept = (d / "run" / "config.toml").read_text()
    try:
        vc.train(out=d / "run", stores=[str(store)], model="perturbation-mean", seed=5, force=True)
        (said,) = find_stale(d / "pred.h5ad")
        assert str(d / "run") in said and "has changed since the prediction was made" in said
        assert find_stale(pred) == [said]
        truth = ad.read_h5ad(d / "pred.h5ad")
        truth.write_h5ad(tmp_path / "truth.h5ad")
        result = vc.score(d / "pred.h5ad", tmp_path / "truth.h5ad", profile="minimal")
        assert said in result.warnings
    finally:
        (d / "run" / "config.toml").write_text(kept)


def test_a_store_that_was_built_again_is_named_and_one_that_is_gone_is_not(made, tmp_path):
    _, store = made
    copy = tmp_path / store.name
    shutil.copytree(store, copy)
    adata = ad.AnnData(np.ones((3, 2), np.float32), uns={"vcelltools": describe_origin([copy, tmp_path / "never"])})
    assert find_stale(adata) == []
    (copy / "manifest.json").write_text("{}")
    assert len(find_stale(adata)) == 1
    shutil.rmtree(copy)
    assert find_stale(adata) == []


@pytest.mark.parametrize(
    "uns", [{}, {"vcelltools": 3}, {"vcelltools": {"origin": ["/x"]}}, {"vcelltools": {"origin": 5}}]
)
def test_other_programs_predictions_say_nothing(tmp_path, uns):
    adata = ad.AnnData(np.ones((3, 2), np.float32), uns=uns)
    assert find_stale(adata) == []
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert find_stale(tmp_path / "x.h5ad") == find_stale(tmp_path / "absent.h5ad") == []


def test_two_sources_in_memory_are_told_apart(made):
    d, _ = made
    pred = ad.read_h5ad(d / "pred.h5ad")
    truth = pred.copy()
    truth.X = np.expm1(truth.X.toarray()).round().astype(np.float32)
    with pytest.raises(DataError, match=r"AnnData \(prediction\) holds log1p and AnnData \(truth\) holds counts"):
        vc.score(pred, truth, compat="cell-eval")
    truth.X[3, 1] = -1
    with pytest.raises(DataError, match=r"AnnData \(truth\)"):
        vc.score(pred, truth, compat="cell-eval")
