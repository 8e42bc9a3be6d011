"""Files that the mudata package wrote: several modalities, cells that only some of them have, columns of the whole."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.make import as_layout, get_mudata, make_counts
from vcelltools.errors import DataError
from vcelltools.io import open_dataset

N, G = 300, 150


def make_mudata(layout: str, dtype: str):
    """Return a MuData: rna of 300 cells, prot of 250 of them in another order and 20 more, guides of all."""
    rng = np.random.default_rng(3)
    cells = [f"cell{i}" for i in range(N)]
    obs = pd.DataFrame({"lane": pd.Categorical(rng.choice(["l1", "l2", "l3"], N))}, index=cells)
    ids = [f"ENSG{i:011d}" for i in range(G)]
    var = pd.DataFrame({"gene_ids": ids}, index=[f"GENE{i}" for i in range(G)])
    rna = ad.AnnData(as_layout(make_counts(N, G, seed=4), layout, dtype), obs=obs, var=var)
    rna.layers["twice"] = rna.X * 2
    some = [*rng.permutation(cells)[:250], *[f"other{i}" for i in range(20)]]
    prot = ad.AnnData(rng.gamma(2.0, 1.0, (270, 8)).astype(np.float32), obs=pd.DataFrame(index=some))
    prot.var_names = [f"CD{i}" for i in range(8)]
    guides = ad.AnnData(as_layout(rng.poisson(0.4, (N, 5)), "csr"), obs=pd.DataFrame(index=cells))
    guides.var_names = [f"guide{i}" for i in range(5)]
    whole = get_mudata().MuData({"prot": prot, "rna": rna, "guides": guides})
    whole.obs["donor"] = pd.Categorical([f"d{i % 4}" for i in range(whole.n_obs)])
    return whole, rna


@pytest.fixture(params=[("csr", "float32"), ("csc", "int64"), ("dense", "float64")], ids=lambda p: p[0])
def written(request, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the package says of its own next version
        whole, rna = make_mudata(*request.param)
        whole.write(tmp_path / "m.h5mu")
    return tmp_path / "m.h5mu", whole, rna


def test_hvg_is_that_of_the_modality(written):
    path, _, rna = written
    for chosen in ("rna", None):  # None: rna is found among the three
        ours = vc.hvg(path, top=40, modality=chosen)
        pd.testing.assert_frame_equal(ours, vc.hvg(rna, top=40))
    pd.testing.assert_frame_equal(
        vc.hvg(path, top=40, modality="rna", layer="twice"), vc.hvg(rna, top=40, layer="twice")
    )


def test_columns_of_the_modality_and_of_the_whole(written):
    path, whole, rna = written
    with open_dataset(path, modality="rna") as ds:
        assert ds.obs.index.tolist() == rna.obs_names.tolist()
        for name, theirs in (("lane", rna.obs["lane"]), ("donor", whole.obs["donor"].loc[rna.obs_names])):
            codes, labels = ds.obs.column(name).factorize()
            assert [labels[c] for c in codes] == theirs.astype(str).tolist()
    batched = vc.hvg(path, top=40, modality="rna", batch_key="donor")
    with_column = rna.copy()
    with_column.obs["donor"] = whole.obs["donor"].loc[rna.obs_names].to_numpy()
    pd.testing.assert_frame_equal(batched, vc.hvg(with_column, top=40, batch_key="donor"))


def test_convert_and_normalize_write_the_modality(written, tmp_path):
    path, _, rna = written
    done = run_cli("convert", path, "--modality", "rna", "--layers", "all", "--out", tmp_path / "c.h5ad", "-q")
    assert done.code == 0, done.stderr
    back = ad.read_h5ad(tmp_path / "c.h5ad")
    assert (
        back.obs_names.tolist() == rna.obs_names.tolist()
        and back.var["gene_ids"].tolist() == rna.var["gene_ids"].tolist()
    )
    for theirs, ours in ((rna.X, back.X), (rna.layers["twice"], back.layers["twice"])):
        dense = [x.toarray() if hasattr(x, "toarray") else x for x in (theirs, ours)]
        np.testing.assert_array_equal(*dense)
    done = run_cli("normalize", path, "--modality", "rna", "--out", tmp_path / "n.h5ad", "-q")
    assert done.code == 0, done.stderr
    counts = rna.X.toarray() if hasattr(rna.X, "toarray") else rna.X
    size = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    ours = ad.read_h5ad(tmp_path / "n.h5ad").X
    ours = ours.toarray() if hasattr(ours, "toarray") else ours
    np.testing.assert_allclose(ours, np.log1p(counts * (1e4 / np.maximum(size, 1))), rtol=1e-6)


def test_inspect_lists_the_modalities_and_a_wrong_one_is_named(written):
    path, _, _ = written
    report = run_cli("inspect", path, "--json").json
    assert {m["modality"] for m in report["matrices"]} == {"prot", "rna", "guides"}
    assert report["opened"] == {"modality": "rna", "layer": "X"}
    with pytest.raises(DataError, match="no modality 'gex'"):
        open_dataset(path, modality="gex")
    with pytest.raises(DataError, match=r"not.*counts"):
        vc.hvg(path, top=4, modality="prot")
