"""Genes that share a name: files are matched by id, and a list that hvg writes is one that build-store takes."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.make import as_layout, make_counts
from vcelltools.errors import DataError
from vcelltools.genes.identity import match_genes, read_basis, read_genes
from vcelltools.io import open_dataset
from vcelltools.selection.hvg import compute_hvg
from vcelltools.selection.statistics import load_statistics

COUNTS = make_counts(120, 40, seed=8)


def write(path, rows, *, names=None, ids=True, genes=slice(None)):
    names = names or ["TBCE" if i in (3, 9) else f"S{i}" for i in range(40)]
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}" for i in range(40)]} if ids else {}, index=names)
    adata = ad.AnnData(as_layout(COUNTS[rows][:, genes], "csr"), var=var.iloc[genes])
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.write_h5ad(path)
    return path


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_files_with_repeated_names_are_merged_by_id(tmp_path):
    a = write(tmp_path / "a.h5ad", slice(0, 60))
    b = write(tmp_path / "b.h5ad", slice(60, 120), genes=np.r_[9, 39, 0:9, 10:39])
    merged = compute_hvg([a, b], top=40, flavor="dispersion", min_share=0)
    np.testing.assert_allclose(merged.columns["means"], COUNTS.mean(axis=0))
    assert sorted(merged.labels) == sorted({*(f"S{i}" for i in range(40) if i not in (3, 9)), "ENSG00000000003",
                                              "ENSG00000000009"})  # fmt: skip
    assert any("matched by their Ensembl ids" in w for w in merged.warnings)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_files_with_symbols_and_with_ids_are_merged(tmp_path):
    symbols = write(tmp_path / "a.h5ad", slice(0, 60), names=[f"S{i}" for i in range(40)])
    ids = write(tmp_path / "b.h5ad", slice(60, 120), names=[f"ENSG{i:011d}.7" for i in range(40)], ids=False)
    merged = compute_hvg([symbols, ids], top=5, flavor="dispersion", min_share=0)
    np.testing.assert_allclose(merged.columns["means"], COUNTS.mean(axis=0))
    unknown = write(tmp_path / "c.h5ad", slice(60, 120), ids=False)
    with pytest.raises(DataError, match="not every file has distinct ids"):
        compute_hvg([symbols, unknown], top=5)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("ids", [True, False])
def test_a_list_with_repeated_names_is_a_basis(tmp_path, ids):
    path = write(tmp_path / "a.h5ad", slice(0, 120), ids=ids)
    compute_hvg(path, top=40).write(tmp_path / "h.txt")
    basis = read_basis(tmp_path / "h.txt")
    assert len(basis) == (40 if ids else 39)
    with open_dataset(path) as ds:
        match = match_genes(basis, read_genes(ds.var))
    assert match.present.all()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_saved_statistics_keep_the_ids(tmp_path):
    path = write(tmp_path / "a.h5ad", slice(0, 120))
    compute_hvg(path, top=5, stats_dpath=tmp_path / "s")
    assert load_statistics(tmp_path / "s").ids[9] == "ENSG00000000009"
    assert compute_hvg(tmp_path / "s", top=40).selected == compute_hvg(path, top=40).selected


@pytest.mark.parametrize("body", [[], 3, {"schema": 2}, {"sha256": []}, "[" * 100_000])
def test_a_manifest_of_a_wrong_type_is_refused(tmp_path, body):
    (tmp_path / "manifest.json").write_text(body if isinstance(body, str) else json.dumps(body))
    with pytest.raises(DataError):
        load_statistics(tmp_path)
