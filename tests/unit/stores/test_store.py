"""Building and opening stores: values, order, tables, invariance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vcelltools as vc
from tests.screens import BUILD, CONTROL, make_screen, normalise, write
from vcelltools.errors import DataError, NotCountsError, UsageError

BASIS = [f"GENE{i}" for i in range(59, 0, -3)]  # 20 genes, not in the file's order


def hashes(path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "float64"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "dense-columns"])
def test_values_counts_and_sums(tmp_path, layout, dtype):
    adata = make_screen(deep=dtype not in ("uint8", "float32", "int32"))
    adata.X.data[:] = np.minimum(
        adata.X.data, np.iinfo(dtype).max if dtype.endswith(("8", "32")) and dtype[0] != "f" else 2**32
    )
    path = write(adata, tmp_path / "s.h5ad", layout, dtype)
    vc.build_store(path, basis=BASIS, out=tmp_path, name="s", sums="all", **BUILD)
    store = vc.open_store(tmp_path / "s")
    source = adata[store.obs.index]
    counts = source[:, BASIS].X.toarray()
    libsize = np.asarray(source.X.sum(axis=1)).ravel()
    assert np.array_equal(store.library_size, libsize)
    assert np.array_equal(store.counts().toarray(), counts)
    exact = np.float64 if dtype == "float64" else np.float32
    assert np.array_equal(store.X, normalise(counts, libsize, dtype=exact))
    assert not store.padded[:, store.n_genes :].any() and store.padded.shape[1] % 128 == 0
    full = np.log1p(source.X.toarray() * (1e4 / np.maximum(libsize, 1))[:, None])
    group = np.repeat(store.runs["sums_row"], store.runs["length"])
    expected = pd.DataFrame(full).groupby(group.to_numpy()).sum().to_numpy()
    np.testing.assert_allclose(store.sums, expected, atol=1e-5)
    assert list(store.measured["symbol"]) == list(adata.var_names)
    assert vc.verify_store(tmp_path / "s").ok


def test_runs_are_a_groupby_and_obs_round_trips(tmp_path):
    adata = make_screen()
    vc.build_store(write(adata, tmp_path / "s.h5ad"), basis=BASIS, out=tmp_path, name="s", **BUILD)
    adata = ad.read_h5ad(tmp_path / "s.h5ad")
    store = vc.open_store(tmp_path / "s")
    sizes = adata.obs.groupby(["line", "target", "batch"], observed=True).size()
    runs = store.runs.set_index(["cell_line", "perturbation", "context"])["length"]
    assert sorted(runs.items()) == sorted(sizes.items())
    obs = store.obs
    for r in store.runs.itertuples():
        part = obs.iloc[r.start : r.start + r.length]
        assert set(part["line"]) == {r.cell_line} and set(part["target"]) == {r.perturbation}
        assert set(part["batch"]) == {r.context} and r.is_control == (r.perturbation == CONTROL)
    pd.testing.assert_frame_equal(obs.drop(columns="source_row").loc[adata.obs_names], adata.obs)
    assert np.array_equal(adata.obs_names[obs["source_row"]], obs.index)
    # a perturbation's cells of a line are one run of rows, and so are a line's controls
    pooled = store.runs.groupby(["cell_line", "perturbation"]).agg({"start": "min", "length": "sum"})
    spans = store.runs.assign(end=store.runs["start"] + store.runs["length"])
    ends = spans.groupby(["cell_line", "perturbation"])["end"].max()
    assert (pooled["start"] + pooled["length"] == ends).all()


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_the_bytes_do_not_depend_on_how_it_was_read(tmp_path, layout):
    adata = make_screen(deep=True)
    path = write(adata, tmp_path / "s.h5ad", layout, "float64", compression="gzip")
    ways = [
        {},
        {"threads": 1, "chunk_values": 50},
        {"threads": 3, "chunk_values": 999, "checkpoint_seconds": 0.0},
        {"threads": 3, "chunk_values": 400},  # the last of several rounds has fewer chunks than threads
    ]
    found = []
    for i, way in enumerate(ways):
        vc.build_store(path, basis=BASIS, out=tmp_path / str(i), name="s", **BUILD, **way)
        found.append(hashes(tmp_path / str(i) / "s"))
    assert all(f == found[0] for f in found)


def test_bucket_size_changes_nothing_but_the_work(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad")
    for i, size in enumerate((1, 5000, 1 << 24)):
        vc.build_store(path, basis=BASIS, out=tmp_path / str(i), name="s", bucket_bytes=size, **BUILD)
    assert hashes(tmp_path / "0/s") == hashes(tmp_path / "1/s") == hashes(tmp_path / "2/s")


def test_the_order_of_the_source_changes_only_source_row(tmp_path):
    adata = make_screen()
    shuffled = adata[np.random.default_rng(1).permutation(adata.n_obs)].copy()
    for name, a in (("a", adata), ("b", shuffled)):
        vc.build_store(write(a, tmp_path / f"{name}.h5ad"), basis=BASIS, out=tmp_path, name=name, **BUILD)
    a, b = vc.open_store(tmp_path / "a"), vc.open_store(tmp_path / "b")
    assert list(a.obs.index) == list(b.obs.index)
    assert np.array_equal(a.X, b.X) and np.array_equal(a.sums, b.sums)


def test_another_seed_shuffles_within_runs_only(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad")
    for seed in (0, 1):
        vc.build_store(path, basis=BASIS, out=tmp_path / str(seed), name="s", seed=seed, **BUILD)
    a, b = vc.open_store(tmp_path / "0/s"), vc.open_store(tmp_path / "1/s")
    pd.testing.assert_frame_equal(a.runs, b.runs)
    assert list(a.obs.index) != list(b.obs.index)
    r = a.runs.iloc[3]
    rows = slice(r["start"], r["start"] + r["length"])
    assert set(a.obs.index[rows]) == set(b.obs.index[rows])


def test_counts_of_some_rows_in_any_order(tmp_path):
    vc.build_store(
        write(make_screen(deep=True), tmp_path / "s.h5ad", dtype="float64"),
        basis=BASIS,
        out=tmp_path,
        name="s",
        **BUILD,
    )
    store = vc.open_store(tmp_path / "s")
    whole = store.counts().toarray()
    rows = np.array([300, 2, 2, 17, 16, 15, 399])
    assert np.array_equal(store.counts(rows).toarray(), whole[rows])
    assert np.array_equal(store.counts(slice(33, 40)).toarray(), whole[33:40])
    assert np.array_equal(store.counts(slice(40, 33, -1)).toarray(), whole[40:33:-1])
    assert store.counts([]).shape == (0, 20)
    mask = np.zeros(400, bool)
    mask[[5, 9]] = True
    assert np.array_equal(store.counts(mask).toarray(), whole[[5, 9]])
    with pytest.raises(IndexError):
        store.counts([400])


def test_anndata_opens_it(tmp_path):
    adata = make_screen()
    vc.build_store(write(adata, tmp_path / "s.h5ad"), basis=BASIS, out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")
    back = store.to_anndata()
    assert list(back.var_names) == BASIS
    assert np.array_equal(back.X.toarray(), store.X.astype(np.float32))
    assert (back.layers["counts"] != adata[back.obs_names, BASIS].X).nnz == 0
    back.write_h5ad(tmp_path / "back.h5ad")
    assert ad.read_h5ad(tmp_path / "back.h5ad").shape == back.shape
    del adata.var["gene_ids"]  # and without ids
    vc.build_store(adata, basis=BASIS, out=tmp_path, name="t", **BUILD)
    vc.open_store(tmp_path / "t").to_anndata().write_h5ad(tmp_path / "t.h5ad")
    part = store.to_anndata(np.array([7, 3]), counts=False)
    assert list(part.obs_names) == [store.obs.index[7], store.obs.index[3]] and "counts" not in part.layers


def test_duplicate_columns_are_summed_and_missing_genes_marked(tmp_path):
    adata = make_screen()
    adata.var["gene_ids"] = adata.var["gene_ids"].to_numpy().copy()
    ids = adata.var["gene_ids"].tolist()
    ids[58] = ids[56]  # two columns of one gene
    adata.var["gene_ids"] = ids
    basis = [ids[56].split(".")[0], "ENSG00000000001", "ENSG99999999999"]
    for layout in ("csr", "csc"):
        path = write(adata, tmp_path / f"{layout}.h5ad", layout)
        for policy, columns in (("sum", [56, 58]), ("first", [56])):
            name = f"{layout}-{policy}"
            result = vc.build_store(path, basis=basis, out=tmp_path, name=name, duplicates=policy, sums="all", **BUILD)
            store = vc.open_store(tmp_path / name)
            source = adata[store.obs.index].X
            assert np.array_equal(
                store.counts()[:, 0].toarray().ravel(), np.asarray(source[:, columns].sum(axis=1)).ravel()
            )
            assert store.present.tolist() == [True, True, False]
            assert not store.X[:, 2].any()
            assert result.genes["missing"] == 1 and result.genes["duplicate_genes"] == 1
            lib = np.asarray(source.sum(axis=1)).ravel()
            value = np.log1p(np.asarray(source[:, columns].sum(axis=1)).ravel() * 1e4 / np.maximum(lib, 1))
            k = int(np.flatnonzero(store.measured["id"] == basis[0])[0])
            group = np.repeat(store.runs["sums_row"], store.runs["length"]).to_numpy()
            np.testing.assert_allclose(store.sums[:, k], np.bincount(group, weights=value), atol=1e-5)


def test_duplicate_and_unsorted_entries_of_a_cell_are_summed(tmp_path):
    adata = make_screen(n=40)
    X = adata.X.tocsr()
    indptr = X.indptr * 2
    messy = sparse.csr_matrix((np.repeat(X.data, 2), np.repeat(X.indices, 2), indptr), shape=X.shape)
    for i in range(40):
        messy.indices[indptr[i] : indptr[i + 1]] = messy.indices[indptr[i] : indptr[i + 1]][::-1].copy()
        messy.data[indptr[i] : indptr[i + 1]] = messy.data[indptr[i] : indptr[i + 1]][::-1].copy()
    messy.has_canonical_format = True  # or scipy would tidy it up on writing
    dirty = ad.AnnData(X=messy, obs=adata.obs, var=adata.var)
    result = vc.build_store(dirty, basis=BASIS, out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")
    source = adata[store.obs.index]
    assert np.array_equal(store.counts().toarray(), 2 * source[:, BASIS].X.toarray())
    assert store.manifest["duplicate_entries"] == X.nnz and any("duplicate" in w for w in result.warnings)
    lib = 2 * np.asarray(source.X.sum(axis=1)).ravel()
    full = np.log1p(2 * source.X.toarray() * (1e4 / np.maximum(lib, 1))[:, None])
    group = np.repeat(store.runs["sums_row"], store.runs["length"]).to_numpy()
    np.testing.assert_allclose(store.sums, pd.DataFrame(full).groupby(group).sum(), atol=1e-5)


def test_library_sizes_from_statistics_or_obs(tmp_path):
    adata = make_screen()
    lib = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["total"] = lib.astype(float) + 7
    adata.obs["low"] = np.maximum(lib - 1, 0)
    path = write(adata, tmp_path / "s.h5ad", "csc")
    from vcelltools.selection.hvg import compute_hvg

    compute_hvg(path, top=20, stats_dpath=tmp_path / "st")
    kw = {"basis": BASIS, "out": tmp_path, **BUILD}
    vc.build_store(path, name="pass", **kw)
    vc.build_store(path, name="stats", stats=str(tmp_path / "st"), **kw)
    vc.build_store(path, name="obs", library_size="total", **kw)
    a, b, c = (vc.open_store(tmp_path / n) for n in ("pass", "stats", "obs"))
    assert np.array_equal(a.X, b.X) and np.array_equal(a.library_size, b.library_size)
    assert b.manifest["library_size"]["from"] == "saved statistics"
    assert np.array_equal(c.library_size, a.library_size + 7)
    assert np.array_equal(c.X, normalise(a.counts().toarray(), a.library_size + 7))
    assert a.manifest["sums"] == {"genes": "basis", "n": 20}
    with pytest.raises(DataError, match="library size"):
        vc.build_store(write(adata, tmp_path / "r.h5ad"), name="low", library_size="low", **kw)
    with pytest.raises(DataError, match="not a total of counts"):
        vc.build_store(path, name="bad", library_size="score", **kw)
    other = write(make_screen(n=300), tmp_path / "other.h5ad", "csc")
    with pytest.raises(DataError, match="another file"):
        vc.build_store(other, name="x", stats=str(tmp_path / "st"), **kw)
    cells = write(make_screen(n=300), tmp_path / "cells.h5ad")  # their sizes are summed anyway, but not of another file
    with pytest.raises(DataError, match="another file"):
        vc.build_store(cells, name="y", stats=str(tmp_path / "st"), **kw)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "dense-columns"])
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1.0, DataError, "negative"),
        (0.5, NotCountsError, "0.5"),
        (np.nan, DataError, "nan"),
        (np.inf, DataError, "inf"),
        (3e30, DataError, "largest count"),
    ],
)
def test_what_is_not_a_count_is_refused(tmp_path, layout, value, error, text):
    adata = make_screen(n=50)
    adata.X = adata.X.astype(np.float64)
    gene = int(adata.var_names.get_loc(BASIS[3]))
    row = int(adata.X[:, gene].nonzero()[0][0])
    adata.X[row, gene] = value
    path = write(adata, tmp_path / "s.h5ad", layout, "float64")
    with pytest.raises(error, match=text) as e:
        vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    assert f"cell {row}" in str(e.value) and f"gene {gene}" in str(e.value)
    assert not (tmp_path / "s").exists()


def test_labels(tmp_path):
    adata = make_screen()
    path = write(adata, tmp_path / "s.h5ad")

    def build(**kw):
        return vc.build_store(path, basis=BASIS, out=tmp_path, force=True, name="s", **{**BUILD, **kw})

    with pytest.raises(
        DataError, match=r"no cell has the control label 'non-targetting'.*did you mean 'non-targeting'.*P1 \d+"
    ):
        build(control="non-targetting")
    with pytest.raises(UsageError, match="perturbation"):
        build(pert_col=None)
    with pytest.raises(UsageError, match="control"):
        build(control=None)
    with pytest.raises(DataError, match="no column 'batches'"):
        build(group_by=["batches"])
    with pytest.raises(DataError, match="none of the 1 basis genes"):
        vc.build_store(path, basis=["TP53"], out=tmp_path, name="t", **BUILD)
    sizes = adata.obs.groupby(["line", "target"], observed=True).size()
    cut = int(sizes.min()) + 1
    result = build(min_cells=cut)
    small = {(line, p, n) for (line, p), n in sizes.items() if n < cut and p != CONTROL}
    assert set(result.small_groups) == small and small
    assert result.n_cells == 400 - sum(n for *_, n in small)
    assert build(keep=["ok"]).n_cells == int(adata.obs["ok"].sum())
    two = build(control=[CONTROL, "P0"])
    assert two.n_perturbations == 4
    runs = vc.open_store(tmp_path / "s").runs
    assert runs[runs["is_control"]]["length"].sum() == adata.obs["target"].isin([CONTROL, "P0"]).sum()


def test_guides_and_missing_labels(tmp_path):
    adata = make_screen(n=60)
    labels = np.array(["A", "B", "A|B", "B|A", "A|A", CONTROL] * 10, dtype=object)
    labels[0] = None
    adata.obs["guide"] = pd.Series(labels, index=adata.obs_names).astype("category")
    adata.obs["n"] = [1, 1, 2, 2, 2, 1] * 10
    path = write(adata, tmp_path / "s.h5ad")

    def counts(guides, **kw):
        options = {**BUILD, "pert_col": "guide", "guides": guides, **kw}
        vc.build_store(path, basis=BASIS, out=tmp_path, force=True, name="s", **options)
        return vc.open_store(tmp_path / "s").runs.groupby("perturbation")["length"].sum().to_dict()

    assert counts(None) == {"A": 9, "B": 10, "A|B": 10, "B|A": 10, "A|A": 10, CONTROL: 10}
    assert counts({"policy": "single"}) == {"A": 19, "B": 10, CONTROL: 10}
    assert counts({"policy": "single", "n_col": "n"}) == {"A": 9, "B": 10, CONTROL: 10}
    assert counts({"policy": "combination"}) == {"A": 19, "B": 10, "A|B": 20, CONTROL: 10}
    assert counts({"policy": "first"}) == {"A": 29, "B": 20, CONTROL: 10}
    assert counts(None, control_is_missing=True)[CONTROL] == 11
    assert counts({"policy": "single"}, control=None, control_is_missing=True) == {
        "control": 1,
        "A": 19,
        "B": 10,
        CONTROL: 10,
    }


def test_no_controls_is_an_error_never_a_substitute(tmp_path):
    adata = make_screen(n=60)
    adata.obs["target"] = "P1"
    with pytest.raises(DataError, match="control label"):
        vc.build_store(adata, basis=BASIS, out=tmp_path, name="s", **BUILD)
    adata.obs["target"] = CONTROL  # a place for predictions, which is said
    built = vc.build_store(adata, basis=BASIS, out=tmp_path, name="s", **BUILD)
    assert (built.n_cells, built.n_perturbations) == (60, 0) and vc.verify_store(built.path).ok
    assert any("every cell is a control" in w for w in built.warnings)


def test_an_existing_store_stays_without_force(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad")
    vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    before = hashes(tmp_path / "s")
    with pytest.raises(UsageError, match="exists"):
        vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    assert hashes(tmp_path / "s") == before
    vc.build_store(path, basis=BASIS[:5], out=tmp_path, name="s", force=True, **BUILD)
    assert vc.open_store(tmp_path / "s").n_genes == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "s.h5ad"]


def test_a_table_that_lets_go_of_its_names_reads_them_again(tmp_path):
    from vcelltools.io import open_dataset
    from vcelltools.io.hdf5.table import EmptyTable

    with open_dataset(write(make_screen(n=30), tmp_path / "s.h5ad")) as ds:
        before = ds.obs.index.copy()
        ds.obs.forget()
        assert ds.obs._index is None and np.array_equal(ds.obs.index, before)
    only = EmptyTable(before, where="10x")  # its names are in memory alone
    only.forget()
    assert np.array_equal(only.index, before)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are read from /proc")
def test_released_pages_leave_this_process_and_come_back(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad", "csr", "float32")
    vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")

    def resident() -> int:
        kb, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                inside = line.endswith(str(store.path / "X.f16"))
            elif inside and line.startswith("Rss:"):
                kb += int(line.split()[1])
        return kb

    before = store.X.sum(dtype=np.float64)
    assert resident() > 0
    store.release()
    assert resident() == 0
    assert store.X.sum(dtype=np.float64) == before
