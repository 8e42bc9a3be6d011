"""A source is known by its content: whatever is derived from one refuses another, and a folder has one writer."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from vcelltools.errors import DataError, EnvironmentFault, UsageError
from vcelltools.io import fingerprint, open_dataset
from vcelltools.io.write.atomic import locked


def make_adata(seed: int = 0, n: int = 80, g: int = 12) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"gene": np.resize(["ctrl", "A", "B"], n)}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(2.0, (n, g)).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"G{i}" for i in range(g)]),
    )


def write(adata: ad.AnnData, path: Path, kind: str):
    """Write the cells as a source of a kind; return what is opened."""
    if kind == "memory":
        return adata
    if path.is_dir():
        shutil.rmtree(path)
    if kind == "h5ad":
        adata.write_h5ad(path)
    elif kind == "zarr":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the format that a later anndata writes
            adata.write_zarr(path)
    else:
        from scipy.io import mmwrite

        path.mkdir()
        mmwrite(path / "matrix.mtx", adata.X.T.tocoo().astype(int))
        (path / "barcodes.tsv").write_text("".join(f"{x}\n" for x in adata.obs_names))
        (path / "genes.tsv").write_text("".join(f"{x}\t{x}\n" for x in adata.var_names))
    return path


def get(source, **options) -> str:
    with open_dataset(source, **options) as ds:
        return fingerprint.get_fingerprint(ds)


KINDS = ("h5ad", "zarr", "10x", "memory")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_the_content_alone(tmp_path, kind):
    first = get(write(make_adata(), tmp_path / "a", kind))
    assert first == get(write(make_adata(), tmp_path / "a", kind)), "the same cells, written or made again"
    assert first == get(write(make_adata(), tmp_path / "another", kind)), "the same cells at another place"
    one = make_adata()
    one.X.data[5] += 1
    assert get(write(one, tmp_path / "a", kind)) != first
    two = make_adata()
    two.obs_names = [f"d{i}" for i in range(two.n_obs)]
    assert get(write(two, tmp_path / "a", kind)) != first
    assert get(write(make_adata()[::-1].copy(), tmp_path / "a", kind)) != first


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "memory"])
def test_labels_and_layer_are_part_of_it(tmp_path, kind):
    adata = make_adata()
    adata.layers["other"] = adata.X.copy()
    source = write(adata, tmp_path / "a", kind)
    first = get(source)
    assert get(source, layer="other") != first
    adata.obs["gene"] = np.roll(adata.obs["gene"].to_numpy(), 1)
    assert get(write(adata, tmp_path / "a", kind)) != first


def test_pieces_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 1 << 8)
    monkeypatch.setattr(fingerprint, "PIECES", 16)
    path = write(make_adata(), tmp_path / "a.h5ad", "h5ad")
    with open_dataset(path) as ds:
        kept = fingerprint.identify(ds)
        assert kept["fingerprint"].startswith("xxh3-128-pieces:")
        assert fingerprint.find_difference(ds, kept) is None
        whole = {**kept, "fingerprint": fingerprint.get_fingerprint(ds, whole=True)}
        assert whole["fingerprint"].startswith("xxh3-128:") and fingerprint.find_difference(ds, whole) is None
    write(make_adata(1), path, "h5ad")
    with open_dataset(path) as ds:
        assert fingerprint.find_difference(ds, kept) == "its content has changed"


STORE = {"pert_col": "gene", "control": "ctrl", "basis": [f"G{i}" for i in range(6)], "name": "s"}


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "memory"])
def test_a_store_of_other_content_or_labels_is_not_kept(tmp_path, kind):
    source = write(make_adata(), tmp_path / "a", kind)
    vc.build_store(source, out=tmp_path, **STORE)
    assert vc.build_store(source, out=tmp_path, keep_whole=True, **STORE).kept
    with pytest.raises(UsageError, match="different data or options"):
        vc.build_store(write(make_adata(1), tmp_path / "a", kind), out=tmp_path, keep_whole=True, **STORE)
    source = write(make_adata(), tmp_path / "a", kind)
    for other in ({"cell_line": "K562"}, {"control": ["A"]}, {"group_by": ["gene"]}):
        with pytest.raises(UsageError, match="different data or options"):
            vc.build_store(source, out=tmp_path, keep_whole=True, **{**STORE, **other})


@pytest.mark.parametrize("kind", KINDS)
def test_stale_statistics_are_computed_anew(tmp_path, kind):
    stats = tmp_path / "stats"
    vc.hvg(write(make_adata(), tmp_path / "a", kind), top=4, stats_dpath=stats)
    source = write(make_adata(7), tmp_path / "a", kind)
    now = vc.hvg(source, top=4, stats_dpath=stats).attrs["genes"]
    assert now == vc.hvg(source, top=4).attrs["genes"]
    if kind != "memory":
        with pytest.raises(UsageError, match="of another source"):
            vc.hvg(write(make_adata(3), tmp_path / "b", kind), top=4, stats_dpath=stats)


def test_library_sizes_of_other_statistics_are_refused(tmp_path):
    adata = make_adata()
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "a.h5ad")
    vc.hvg(tmp_path / "a.h5ad", top=4, stats_dpath=tmp_path / "stats")
    adata.X.data[3] += 1
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=r"another file than .*its content has changed"):
        vc.build_store(tmp_path / "a.h5ad", out=tmp_path, stats=str(tmp_path / "stats"), **STORE)


def make_log(seed: int) -> ad.AnnData:
    adata = make_adata(seed, n=300)
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    adata.obs = adata.obs.rename(columns={"gene": "target_gene"}).replace("ctrl", "non-targeting")
    return adata


def test_a_truth_pack_is_compared_with_the_truth_that_is_given(tmp_path):
    pred, a, b = make_log(1), make_log(2), make_log(3)
    pack = tmp_path / "t.pack"
    first = vc.score(pred, a, truth_pack=pack, compat="cell-eval").to_json()["components"]
    assert vc.score(pred, a, truth_pack=pack, compat="cell-eval").to_json()["components"] == first
    assert vc.score(pred, truth_pack=pack, compat="cell-eval").to_json()["components"] == first
    with pytest.raises(UsageError, match="made from another truth than AnnData"):
        vc.score(pred, b, truth_pack=pack, compat="cell-eval")


def test_one_writer_of_a_folder(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(EnvironmentFault, match="by another process"), locked(tmp_path / "run"):
            pass
        with pytest.raises(EnvironmentFault, match="is being written"):
            vc.hvg(make_adata(), top=4, stats_dpath=tmp_path / "run")
        with pytest.raises(EnvironmentFault, match="is being written"):
            vc.score(make_log(1), make_log(2), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
