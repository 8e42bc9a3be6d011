"""The streaming writer: what anndata and mudata read back, and every way in which writing can fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vcelltools.errors import DataError, EnvironmentFault, UsageError
from vcelltools.io import H5adWriter, open_dataset

N, G = 301, 47


def make_counts(seed: int = 0, n: int = N, g: int = G) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.poisson(0.6, (n, g)) * rng.integers(1, 9, (n, g))).astype(np.int64))


def make_obs(n: int = N) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "pert": pd.Categorical(rng.choice(["A|B", "A", "non-targeting"], n)),
            "dose": pd.Categorical(rng.choice(["lo", "hi"], n), categories=["lo", "hi"], ordered=True),
            "hole": pd.Categorical([None if i % 3 else "x" for i in range(n)]),
            "n": rng.integers(0, 9, n),
            "f": rng.normal(size=n),
            "flag": rng.random(n) < 0.5,
            "text": [f"t{i}" for i in range(n)],
            "gap": [None if i % 5 == 0 else f"t{i % 7}" for i in range(n)],
            "nint": pd.array([None if i % 4 == 0 else i for i in range(n)], dtype="Int64"),
            "nbool": pd.array([None if i % 4 == 0 else i % 2 == 0 for i in range(n)], dtype="boolean"),
        },
        index=[f"cell{i}é" for i in range(n)],
    )


def make_var(g: int = G) -> pd.DataFrame:
    return pd.DataFrame({"gene_ids": [f"ENSG{i:011d}" for i in range(g)]}, index=[f"G{i}" for i in range(g)])


def write(path, X, *, layout="csr", block=37, **settings):
    settings.setdefault("dtype", "int32")
    with H5adWriter(
        path, n_genes=X.shape[1], obs=make_obs(X.shape[0]), var=make_var(X.shape[1]), layout=layout, **settings
    ) as w:
        if layout == "csc":
            C = X.tocsc()
            for a in range(0, X.shape[1], block):
                part = C[:, a : a + block]
                w.append_csc(part.indptr, part.indices, part.data)
        else:
            for a in range(0, X.shape[0], block):
                part = X[a : a + block]
                w.append_csr(part.indptr, part.indices, part.data)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("compression", ["none", "gzip", "lzf", "zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_anndata_reads_back(tmp_path, layout, compression, dtype):
    X = make_counts()
    write(
        tmp_path / "x.h5ad",
        X,
        layout=layout,
        compression=compression,
        dtype=dtype,
        chunk_len=100,
        threads=2,
        verify="full",
    )
    a = anndata.read_h5ad(tmp_path / "x.h5ad")
    got = a.X if layout == "dense" else a.X.toarray()
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, X.toarray())
    obs = make_obs()
    for name in set(obs.columns) - {"gap"}:
        pd.testing.assert_series_equal(a.obs[name], obs[name])
    assert [None if pd.isna(v) else v for v in a.obs["gap"]] == [None if pd.isna(v) else v for v in obs["gap"]]
    assert list(a.obs.columns) == list(obs.columns)
    pd.testing.assert_frame_equal(a.var, make_var())


def test_encodings_are_anndatas(tmp_path):
    """Group for group and attribute for attribute what anndata writes for the same object.

    anndata 0.13 writes the strings of pandas 3 as nullable arrays; without gaps ours are plain, as they were before.
    """
    X = make_counts().astype(np.float32)
    obs = make_obs().drop(columns="gap")
    anndata.AnnData(X, obs=obs, var=make_var(), obsm={"e": np.zeros((N, 2))}, uns={"k": {"a": 1, "s": "t"}}).write_h5ad(
        tmp_path / "a.h5ad", convert_strings_to_categoricals=False
    )
    with H5adWriter(
        tmp_path / "b.h5ad",
        n_genes=G,
        obs=obs,
        var=make_var(),
        obsm={"e": np.zeros((N, 2))},
        uns={"k": {"a": 1, "s": "t"}},
    ) as w:
        w.append_csr(X.indptr, X.indices, X.data)

    def describe(path):
        out = {}

        def visit(name, node):
            attrs = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in node.attrs.items()}
            kind = (node.shape, node.dtype.str) if isinstance(node, h5py.Dataset) else "group"
            out[name] = (kind, attrs)

        with h5py.File(path) as f:
            f.visititems(visit)
            out["/"] = dict(f.attrs)
        nullable = [
            k for k, (_, attrs) in list(out.items())[:-1] if attrs.get("encoding-type") == "nullable-string-array"
        ]
        for key in nullable:
            values, mask = out.pop(f"{key}/values"), out.pop(f"{key}/mask")
            assert values[0][0] == mask[0][0]
            out[key] = values
        return out

    assert describe(tmp_path / "b.h5ad") == describe(tmp_path / "a.h5ad")


def test_mudata_reads_back(tmp_path):
    import mudata

    X = make_counts()
    guides = sparse.random(N, 5, 0.3, format="csr", random_state=0, dtype=np.float32)
    with H5adWriter(
        tmp_path / "x.h5mu", n_genes=G, obs=make_obs(), var=make_var(), modality="rna", dtype="uint16"
    ) as w:
        g = w.add_modality(
            "guide", n_genes=5, obs=make_obs()[["n"]], var=pd.DataFrame(index=[f"g{i}" for i in range(5)])
        )
        w.append_csr(X.indptr, X.indices, X.data)
        g.X.append_csr(guides.indptr, guides.indices, guides.data)
    with warnings.catch_warnings():
        # mudata's own announcement of its next version, whoever wrote the file
        warnings.filterwarnings("ignore", "From 0.4", FutureWarning)
        m = mudata.read_h5mu(tmp_path / "x.h5mu")
    assert list(m.mod) == ["rna", "guide"]
    np.testing.assert_array_equal(m["rna"].X.toarray(), X.toarray())
    np.testing.assert_array_equal(m["guide"].X.toarray(), guides.toarray())
    assert m.shape == (N, G + 5)
    assert list(m["rna"].obs.columns) == list(make_obs().columns)
    with open_dataset(tmp_path / "x.h5mu") as ds:
        assert (ds.modality, ds.n_genes, ds.matrix.dtype) == ("rna", G, np.uint16)
        assert ds.matrix._data._raw is not None  # the user block does not send the reader through h5py
        np.testing.assert_array_equal(ds.matrix.read(ds.matrix.plan()[0]).data, X.data)


def test_layers_and_late_obs(tmp_path):
    X = make_counts()
    keep = np.array([5, 2, 9])
    with H5adWriter(tmp_path / "x.h5ad", n_genes=G, var=make_var(), dtype="int32") as w:
        layer = w.add_layer("norm", dtype="float32", layout="dense")
        for i in keep:
            w.append_csr(X[i].indptr, X[i].indices, X[i].data)
            layer.append_csr(X[i].indptr, X[i].indices, X[i].data / 2)
        w.finish(obs=make_obs(), obs_rows=keep)
    a = anndata.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(a.layers["norm"] * 2, X[keep].toarray())
    assert list(a.obs_names) == list(make_obs().index[keep])


@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_dense_blocks(tmp_path, layout):
    X = make_counts().toarray()
    with H5adWriter(
        tmp_path / "x.h5ad", n_genes=G, obs=make_obs(), var=make_var(), layout=layout, contiguous=layout == "dense"
    ) as w:
        for a in range(0, N, 50):
            w.append_dense(X[a : a + 50])
    got = anndata.read_h5ad(tmp_path / "x.h5ad").X
    np.testing.assert_array_equal(got if layout == "dense" else got.toarray(), X)
    if layout == "dense":
        with h5py.File(tmp_path / "x.h5ad") as f:
            assert f["X"].chunks is None


def test_values_a_chunk_in_every_layout(tmp_path):
    for layout, chunks in (("csr", (2 * G,)), ("csc", (2 * G,)), ("dense", (2, G))):
        path = tmp_path / f"{layout}.h5ad"
        write(path, make_counts(), layout=layout, chunk_len=2 * G)
        with h5py.File(path) as f:
            assert (f["X"] if layout == "dense" else f["X/data"]).chunks == chunks


def test_chunked_tiles(tmp_path):
    X = make_counts()
    write(tmp_path / "x.h5ad", X, layout="dense", chunk_shape=(64, 10), compression="gzip", verify="full")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "x.h5ad").X, X.toarray())


def test_contiguous_sparse_and_int64(tmp_path):
    X = make_counts()
    write(tmp_path / "x.h5ad", X, contiguous=True, nnz=X.nnz, index_dtype="int64")
    with h5py.File(tmp_path / "x.h5ad") as f:
        assert f["X/data"].chunks is None
        assert f["X/indptr"].dtype == f["X/indices"].dtype == np.int64
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "x.h5ad").X.toarray(), X.toarray())


def test_indptr_widens_beyond_two_billion(tmp_path):
    """From 2**31 non-zeros on indptr is int64, whatever the indices are (the count is set, not stored)."""
    with (
        pytest.raises(DataError, match=r"differs? from what was written"),
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(2), var=make_var(), verify="full") as w,
    ):
        X = make_counts(n=1)
        w.append_csr(X.indptr, X.indices, X.data)
        w.X.nnz = 2**31
        w.append_csr(X.indptr, X.indices, X.data)
        w.X.finish(2)
        assert w.X.group["indptr"].dtype == np.int64
        assert int(w.X.group["indptr"][-1]) == 2**31 + X.nnz
        del w.X.group["indptr"], w.X.group.attrs["shape"]
        w.X._indptr = [np.zeros(3, np.int64)]
    assert not (tmp_path / "x.h5ad").exists()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([300], "uint8"), ([-1], "uint16"), ([1.5], "int32"), ([2**24 + 1], "float32"), ([np.nan], "int32")],
)
def test_values_that_do_not_fit(tmp_path, values, dtype):
    with (
        pytest.raises(DataError, match="does not fit"),
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(1), var=make_var(), dtype=dtype) as w,
    ):
        w.append_csr(np.array([0, 1]), np.array([3]), np.array(values))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [([0, 2], [1], "indptr"), ([0, 1], [G], "index outside"), ([0, 1], [-1], "index outside"), ([1, 1], [1], "indptr")],
)
def test_blocks_that_do_not_fit(tmp_path, indptr, indices, message):
    with (
        pytest.raises(DataError, match=message),
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(1), var=make_var()) as w,
    ):
        w.append_csr(np.array(indptr), np.array(indices), np.ones(1, np.float32))


def test_rows_must_add_up(tmp_path):
    X = make_counts()
    with (
        pytest.raises(DataError, match="300 cells were written instead of 301"),
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(), var=make_var()) as w,
    ):
        w.append_csr(X[:300].indptr, X[:300].indices, X[:300].data)
    assert os.listdir(tmp_path) == []


def test_existing_output_is_refused(tmp_path):
    path = tmp_path / "x.h5ad"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        write(path, make_counts())
    assert path.read_bytes() == b"mine"
    write(path, make_counts(), force=True)
    assert anndata.read_h5ad(path).shape == (N, G)
    assert os.listdir(tmp_path) == ["x.h5ad"]


def test_a_killed_writers_rest_goes_and_anothers_stays(tmp_path):
    """Only temporary files of this very target are removed: x.h5ad.txt may be in the making."""
    (tmp_path / ".x.h5ad.123.0123abcd.tmp").write_bytes(b"rest")
    (tmp_path / ".x.h5ad.txt.123.0123abcd.tmp").write_bytes(b"busy")
    (tmp_path / ".x.123.0123abcd.tmp").write_bytes(b"busy")
    write(tmp_path / "x.h5ad", make_counts())
    assert sorted(os.listdir(tmp_path)) == [".x.123.0123abcd.tmp", ".x.h5ad.txt.123.0123abcd.tmp", "x.h5ad"]


def test_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.h5ad"
    path.write_bytes(b"mine")
    with pytest.raises(ZeroDivisionError), H5adWriter(path, n_genes=G, obs=make_obs(), var=make_var(), force=True):
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["x.h5ad"]


def test_two_writers(tmp_path):
    path = tmp_path / "x.h5ad"
    X = make_counts()
    with H5adWriter(path, n_genes=G, obs=make_obs(), var=make_var()) as w:
        with pytest.raises(EnvironmentFault, match="another process"):
            write(path, X, force=True)
        w.append_csr(X.indptr, X.indices, X.data)
    assert anndata.read_h5ad(path).shape == (N, G)


def test_target_open_in_a_reader(tmp_path):
    path = tmp_path / "x.h5ad"
    X, Y = make_counts(), make_counts(7)
    write(path, X)
    with open_dataset(path) as ds:
        write(path, Y, force=True)
        chunk = ds.matrix.read(ds.matrix.plan()[0])
        np.testing.assert_array_equal(chunk.data, X.data)
    np.testing.assert_array_equal(anndata.read_h5ad(path).X.toarray(), Y.toarray())


def test_read_only_folder_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)  # root may write anywhere
    with pytest.raises(EnvironmentFault, match="read-only"):
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(), var=make_var())


def test_space_is_checked_first(tmp_path):
    with pytest.raises(EnvironmentFault, match="are needed"):
        H5adWriter(tmp_path / "x.h5ad", n_genes=G, obs=make_obs(), var=make_var(), need_bytes=1 << 60)


def test_damage_before_the_rename_is_found(tmp_path, monkeypatch):
    """A flipped byte in the temporary file stops the rename."""
    path = tmp_path / "x.h5ad"
    X = make_counts()
    from vcelltools.io.write import atomic

    def flip(p):
        p = str(p)
        if p.endswith(".tmp"):
            with h5py.File(p) as f:
                offset = f["X/data"].id.get_chunk_info(0).byte_offset
            with open(p, "r+b") as raw:
                raw.seek(offset + 8)
                raw.write(b"\x7f")

    monkeypatch.setattr(atomic, "fsync_path", flip)
    with pytest.raises(DataError, match=r"differs? from what was written"):
        write(path, X)
    assert os.listdir(tmp_path) == []


CHILD = """
import os, resource, sys, numpy as np, pandas as pd
sys.path.insert(0, {root!r})
from tests.unit.io.test_write import make_obs, make_var
from vcelltools.io import H5adWriter
from vcelltools.errors import VcellError
import vcelltools.io.write.sink as sink
{setup}
try:
    with H5adWriter({path!r}, n_genes=47, obs=make_obs(40000), var=make_var(), force=True, chunk_len=4096) as w:
        for i in range(400):
            w.append_csr(np.arange(0, 4701, 47), np.tile(np.arange(47), 100), np.ones(4700, np.float32))
            print(i, flush=True)
except VcellError as e:
    print(type(e).__name__, e)
    sys.exit(e.exit_code)
"""


def start_child(path, setup=""):
    from tests.conftest import ROOT

    code = CHILD.format(root=str(ROOT), path=str(path), setup=textwrap.dedent(setup))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_in_the_middle_of_an_overwrite(tmp_path):
    path = tmp_path / "x.h5ad"
    X = make_counts()
    write(path, X)
    before = path.read_bytes()
    child = start_child(path)
    for line in child.stdout:
        if line.strip() == "100":
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    write(path, X, force=True)  # starts clean: the dead writer's lock and temporary file are gone
    assert os.listdir(tmp_path) == ["x.h5ad"]


@pytest.mark.parametrize("watched", [True, False])
def test_disk_full(tmp_path, watched):
    """A limit on the file's size: found by the watch, or (without it) by HDF5 in the middle of a chunk."""
    path = tmp_path / "x.h5ad"
    path.write_bytes(b"mine")
    setup = "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000_000, 9_000_000))\n"
    if not watched:
        setup += "sink.Space.spend = sink.Space.check = lambda self, n: None\n"
    child = start_child(path, setup)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 4, (out[-500:], err)
    assert "the disk is full" in out
    assert path.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["x.h5ad"]


def test_memory_is_bounded(tmp_path):
    """40,000 rows in pieces of 100 raise the peak by far less than the file's size."""
    code = """
    import resource, numpy as np, sys
    """
    path = tmp_path / "x.h5ad"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    g = 2000
    var = make_var(g)
    block = np.tile(np.arange(g), 100).astype(np.int32)
    with H5adWriter(path, n_genes=g, var=var, dtype="float32") as w:
        for _ in range(100):
            w.append_csr(np.arange(0, 100 * g + 1, g), block, np.ones(100 * g, np.float32))
        w.finish(obs=pd.DataFrame(index=[str(i) for i in range(10_000)]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert path.stat().st_size > 150e6
    assert grown < 60_000, code


@pytest.mark.parametrize("compression", ["gzip", "zstd", "lzf", "none"])
@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_a_file_has_the_same_bytes_with_any_number_of_threads(tmp_path, compression, layout):
    from tests.make import as_layout, make_adata, make_counts
    from vcelltools import convert

    if compression == "zstd":
        pytest.importorskip("hdf5plugin")
    make_adata(as_layout(make_counts(400, 60), layout)).write_h5ad(tmp_path / "x.h5ad")
    out = []
    for threads in (1, 2, 5):
        path = tmp_path / f"{threads}.h5ad"
        convert(tmp_path / "x.h5ad", path, layout=layout, compression=compression, chunk_len=256, threads=threads)
        out.append(path.read_bytes())
    assert out[0] == out[1] == out[2]


@pytest.mark.parametrize("mark", ["X.f16", "vocabulary.json", "over_gene.npy", ".zgroup", "zarr.json"])
def test_an_output_becomes_no_part_of_a_folder_that_is_one_thing(tmp_path, mark):
    """Though the command reads nothing of it: ``--force`` would replace a table of a store by another table."""
    from vcelltools.io.write.guard import Target, guard_outputs

    whole = tmp_path / "whole"
    (whole / "below").mkdir(parents=True)
    (whole / mark).write_bytes(b"mine")
    (tmp_path / "link").symlink_to(whole)
    for out in (whole / "genes.parquet", whole / "below" / "t.csv", tmp_path / "link" / "x.h5ad"):
        with pytest.raises(UsageError, match=r"lies inside the .* .*whole"):
            guard_outputs([Target(out, "parquet")], force=True)
    guard_outputs(
        [Target(tmp_path / "beside.parquet", "parquet"), Target(whole, "store", owns=lambda _: True)], force=True
    )


@pytest.mark.parametrize("name", [".", "..", "/", "folder"])
def test_a_second_output_beside_a_folder_is_refused(tmp_path, monkeypatch, name):
    from vcelltools.io.write.atomic import put_beside

    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a folder"):
        put_beside(name, ".json")
    assert put_beside("new/b.txt", ".json").as_posix() == "new/b.json"
