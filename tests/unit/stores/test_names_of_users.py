"""A user's columns, contexts and gene names share no name space with the store's own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vcelltools as vc
from tests.screens import BUILD, make_screen, write
from vcelltools.prediction.genes_outside import make_panel, open_source, read_cells
from vcelltools.sampling.sampler import Sampler


@pytest.mark.parametrize("name", ["source_row", "_index", "__source_row", "perturbation", "context", "start"])
def test_a_column_of_an_internal_name_stays_the_users(tmp_path, name):
    adata = make_screen()
    theirs = np.random.default_rng(1).integers(0, 10_000, adata.n_obs)
    if name == "_index":  # anndata itself refuses to write one
        adata.obs["theirs"] = theirs
        path = write(adata, tmp_path / "x.h5ad")
        import h5py

        with h5py.File(path, "r+") as f:
            f["obs"].move("theirs", "_index ")
            f["obs"].attrs["column-order"] = [c if c != "theirs" else "_index " for c in f["obs"].attrs["column-order"]]
    else:
        adata.obs[name] = theirs
        path = write(adata, tmp_path / "x.h5ad")
    vc.build_store(path, basis=[f"GENE{i}" for i in range(20)], out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")
    assert vc.verify_store(store.path).ok
    rows = store.source_rows
    assert sorted(rows.tolist()) == list(range(adata.n_obs))
    np.testing.assert_array_equal(store.counts(np.arange(50)).toarray(), adata.X[rows[:50], :20].toarray())
    if name != "_index":
        np.testing.assert_array_equal(pd.to_numeric(store.obs[name]).to_numpy(), theirs[rows])


def test_contexts_whose_joined_names_would_be_one_are_two(tmp_path):
    adata = make_screen(lines=1)
    first = np.arange(adata.n_obs) % 2 == 0
    adata.obs["x"], adata.obs["y"] = np.where(first, "a | b", "a"), np.where(first, "c", "b | c")
    path = write(adata, tmp_path / "x.h5ad")
    vc.build_store(
        path, basis=[f"GENE{i}" for i in range(20)], out=tmp_path, name="s", **{**BUILD, "group_by": ["x", "y"]}
    )
    store = vc.open_store(tmp_path / "s")
    assert vc.verify_store(store.path).ok
    assert store.runs["context"].nunique() == 2
    sampler = Sampler(store, set_size=4, sets_per_batch=4, level="context")
    groups = sampler.groups
    assert groups["control_start"].nunique() == 2
    controls = store.runs[store.runs["is_control"]].set_index("start")["context"]
    for g in groups.itertuples():
        at = store.runs[store.runs["start"] <= g.start].iloc[-1] if hasattr(g, "start") else None
        if at is not None:
            assert controls[g.control_start] == at["context"]


def test_gene_names_with_a_bar_keep_their_place(tmp_path):
    adata = make_screen()
    adata.var_names = [f"{n}|{7000 + i}" for i, n in enumerate(adata.var_names)]
    adata.var = adata.var[[]]
    path = write(adata, tmp_path / "x.h5ad")
    vc.build_store(path, basis=list(adata.var_names[:20]), out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")
    assert list(store.genes) == list(adata.var_names[:20]) and store.present.all()
    with open_source(store, None) as source:
        panel = make_panel(store, source)
        rows = np.arange(30)
        got = read_cells(store, source, panel, rows)
    np.testing.assert_array_equal(panel.basis_m, [*range(20), *[-1] * 40])
    assert (panel.sums_m >= 0).all()
    assert (abs(got - sparse.csr_matrix(adata.X)[store.source_rows[rows]]) > 0).nnz == 0
