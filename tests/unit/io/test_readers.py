"""Every layout, dtype, filter and encoding is read exactly; what cannot be read is refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import need_data
from tests.files import TEXT, make_counts, read_all, write_frame_tables, write_h5ad, write_h5mu, write_matrix
from vcelltools.errors import DataError
from vcelltools.io import open_dataset

COUNTS = make_counts()
INTS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64"]
STORAGE = {
    "contiguous": {},
    "chunked": {"chunks": True},
    "gzip": {"chunks": True, "compression": "gzip"},
    "gzip-shuffle": {"chunks": True, "compression": "gzip", "shuffle": True},
    "lzf": {"chunks": True, "compression": "lzf"},
    "fletcher32": {"chunks": True, "fletcher32": True},
    "shuffle-gzip-fletcher32": {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True},
    "scaleoffset": {"chunks": True, "scaleoffset": 0},
}


def chunked(options: dict, layout: str, size: int = 7) -> dict:
    """Give small chunks that do not divide the arrays."""
    if not options.get("chunks"):
        return options
    return {**options, "chunks": (size, size + 4) if layout == "dense" else (size,)}


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [*INTS, *FLOATS, ">i2", ">i4", ">i8", ">u4", ">f4", ">f8"])
def test_every_dtype_is_read_exactly(tmp_path, layout, dtype):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout=layout, dtype=dtype, index_dtype="int64")
    with open_dataset(path) as ds:
        assert ds.matrix.layout == layout
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=50), COUNTS)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("max_values", [1, 37, 1 << 20])
def test_every_storage_is_read_exactly(tmp_path, layout, storage, max_values):
    dtype = "int32" if storage == "scaleoffset" else "float32"
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout=layout, dtype=dtype, **chunked(STORAGE[storage], layout))
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=max_values), COUNTS)


@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("name", ["Zstd", "Blosc", "Blosc2", "LZ4", "Bitshuffle", "BZip2"])
def test_plug_in_filters_are_read_where_they_are_installed(tmp_path, layout, name):
    hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
    chunks = (7, 11) if layout == "dense" else (7,)
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout=layout, chunks=chunks, **dict(getattr(hdf5plugin, name)()))
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=60), COUNTS)


@pytest.mark.parametrize("index_dtype", ["int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">i8"])
def test_every_index_dtype_is_read_exactly(tmp_path, index_dtype):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, index_dtype=index_dtype)
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)


@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("storage", ["contiguous", "chunked", "gzip-shuffle", "lzf"])
def test_a_file_behind_a_user_block_is_read_raw(tmp_path, layout, storage, monkeypatch):
    """h5mu files begin with a block of MuData's own; offsets must count from the start of the file."""
    path = tmp_path / "f.h5mu"
    with h5py.File(path, "w", userblock_size=512) as f:
        m = f.create_group("mod/rna")
        write_matrix(m, "X", COUNTS, layout=layout, dtype=">f4", **chunked(STORAGE[storage], layout))
        write_frame_tables(m, *COUNTS.shape)
    with path.open("r+b") as f:
        f.write(b"MuData (format-version=0.1.0;creator=test)")
    with open_dataset(path) as ds:
        monkeypatch.delattr(h5py.Dataset, "__getitem__")  # nothing may go through h5py any more
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=60), COUNTS)


def test_uint64_beyond_int64_is_never_read_as_another_count(tmp_path):
    x = COUNTS.astype(np.uint64)
    x[0, 0] = 2**63 + 5
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", x, dtype="uint64")) as ds:
        assert read_all(ds.matrix)[0, 0] < 0  # refused as negative by every kernel


@pytest.mark.parametrize("dtype", ["complex64", "S3"])
@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_what_is_not_a_number_is_refused(tmp_path, dtype, layout):
    with pytest.raises(DataError, match="not real numbers"):
        open_dataset(write_h5ad(tmp_path / "f.h5ad", COUNTS, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_anndata_0_6_is_read(tmp_path, layout):
    path = tmp_path / "old.h5ad"
    n, g = COUNTS.shape
    with h5py.File(path, "w") as f:
        write_matrix(f, "X", COUNTS, layout=layout, legacy=True)
        obs = np.zeros(n, dtype=[("index", "S8"), ("batch", "i1"), ("depth", "f4")])
        obs["index"], obs["batch"] = [b"c%d" % i for i in range(n)], np.arange(n) % 2
        f["obs"] = obs
        var = np.zeros(g, dtype=[("index", TEXT), ("n", "i8")])
        var["index"] = [f"g{j}" for j in range(g)]
        f["var"] = var
        f["uns/batch_categories"] = np.array([b"one", b"two"])
        write_matrix(f, "raw.X", COUNTS, legacy=True)
        f["raw.var"] = var
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)
        assert list(ds.var.index[:2]) == ["g0", "g1"]
        assert list(ds.obs.index[:2]) == ["c0", "c1"]
        assert list(ds.obs.column("batch").labels()[:3]) == ["one", "two", "one"]
        assert ds.obs.column("depth").kind == "number"
    with open_dataset(path, layer="raw") as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)


def test_anndata_0_7_categories_are_read(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    n = len(COUNTS)
    with h5py.File(path, "a") as f:
        f["obs/__categories/line"] = np.array([b"A", b"B"])
        f["obs/__categories/line"].attrs["ordered"] = False
        codes = np.arange(n) % 3 - 1
        f["obs/line"] = codes.astype(np.int8)
        f["obs/line"].attrs["categories"] = f["obs/__categories/line"].ref
    with open_dataset(path) as ds:
        assert list(ds.obs.column("line").labels()[:3]) == [None, "A", "B"]
        assert "__categories" not in ds.obs.columns


def write_nullable(group: h5py.Group, name: str, values: np.ndarray, mask: np.ndarray, kind: str) -> None:
    c = group.create_group(name)
    c.attrs["encoding-type"] = kind
    c.create_dataset("values", data=values, dtype=TEXT if values.dtype == object else None)
    c["mask"] = mask


def test_nullable_columns_and_index_are_read(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    n, g = COUNTS.shape
    mask = np.arange(n) % 4 == 0
    with h5py.File(path, "a") as f:
        write_nullable(f["obs"], "n_int", np.arange(n), mask, "nullable-integer")
        write_nullable(f["obs"], "flag", np.arange(n) % 2 == 0, mask, "nullable-boolean")
        write_nullable(f["obs"], "text", np.array([f"t{i}" for i in range(n)], object), mask, "nullable-string-array")
        del f["var/_index"]
        names = np.array([f"gene{j}" for j in range(g)], object)
        write_nullable(f["var"], "_index", names, np.zeros(g, bool), "nullable-string-array")
    with open_dataset(path) as ds:
        assert list(ds.var.index) == [f"gene{j}" for j in range(g)]
        assert list(ds.obs.column("n_int").labels()[:2]) == [None, "1"]
        assert list(ds.obs.column("flag").labels()[:2]) == [None, "False"]
        assert list(ds.obs.column("text").labels()[:2]) == [None, "t1"]
        assert ds.obs.column("n_int").factorize()[0][0] == -1
        frame = ds.obs.to_frame()
        assert frame["n_int"].isna().sum() == mask.sum()


def test_layers_raw_and_their_own_var_are_opened(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    wide = make_counts(40, 50, seed=3)
    with h5py.File(path, "a") as f:
        write_matrix(f, "layers/spliced", COUNTS * 2, layout="csc")
        write_matrix(f, "raw/X", wide)
        write_frame_tables(f.create_group("tmp"), *wide.shape)
        f.move("tmp/var", "raw/var")
    with open_dataset(path, layer="spliced") as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS * 2)
    with open_dataset(path, layer="raw") as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), wide)
        assert len(ds.var.index) == 50
    with pytest.raises(DataError, match="matrices: X, spliced, raw"):
        open_dataset(path, layer="nope")


def test_an_outer_obs_column_of_a_mudata_file_is_found(tmp_path):
    path = write_h5mu(tmp_path / "f.h5mu", {"rna": COUNTS, "prot": COUNTS[:, :4]})
    n = len(COUNTS)
    with h5py.File(path, "a") as f:
        write_frame_tables(f, n + 2, 3)
        f["obs/lane"] = np.arange(n + 2)
        f["obsmap/rna"] = np.concatenate([[0], np.arange(n, 0, -1), [0]]).astype(np.uint32)
    with open_dataset(path) as ds:
        assert ds.obs.column("lane").values.tolist() == list(range(n, 0, -1))
        assert ds.obs.column("batch").labels()[0] == "b0"  # the modality's own comes first
    with pytest.raises(DataError, match="modalities: prot, rna"):
        open_dataset(path, modality="atac")


@pytest.mark.parametrize(
    "name", ["v0.1.2/mdata_axis0", *(f"{v}/mdata_axis{a}" for v in ("v0.2.4", "v0.3.10", "v0.4.1") for a in (0, 1))]
)
def test_mudata_of_every_version_is_read(name):
    path = need_data(f"reader_fixtures/mudata/{name}.h5mu")
    with h5py.File(path) as f:
        names = list(f["mod"])
        want = {m: f[f"mod/{m}/X"][()] for m in names}
    for m in names:
        with open_dataset(path, modality=m) as ds:
            np.testing.assert_array_equal(read_all(ds.matrix), want[m])
            for column in ds.obs.columns:
                assert len(ds.obs.column(column).labels()) == ds.n_cells
            assert len(ds.obs.to_frame()) == ds.n_cells
            assert len(ds.var.to_frame()) == ds.n_genes


def test_memory_equals_file(thp1):
    anndata = pytest.importorskip("anndata")
    adata = anndata.read_h5ad(thp1)
    with open_dataset(thp1) as a, open_dataset(adata) as b:
        np.testing.assert_array_equal(read_all(a.matrix), read_all(b.matrix))
        assert (a.var.index == b.var.index).all()
        assert (a.obs.column("perturbation").labels() == b.obs.column("perturbation").labels()).all()


def test_indices_beyond_two_to_the_31_are_reached(tmp_path):
    """The file has 2.2e9 non-zeros on paper; only its last rows are really there (holes take no disk)."""
    if sys.platform != "linux":
        pytest.skip("relies on sparse files")
    path = tmp_path / "huge.h5ad"
    nnz, tail = 2_200_000_000, 5
    with h5py.File(path, "w") as f:
        x = f.create_group("X")
        x.attrs["encoding-type"], x.attrs["shape"] = "csr_matrix", (4, 10)
        x["indptr"] = np.array([0, nnz - tail, nnz - 2, nnz - 2, nnz], np.int64)
        for name, dtype in (("indices", np.int32), ("data", np.uint8)):
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((nnz,))
            h5py.h5d.create(x.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plist)
            x[name][nnz - tail :] = np.array([1, 4, 9, 0, 5], dtype)
        write_frame_tables(f, 4, 10)
    assert path.stat().st_blocks * 512 < 1 << 20
    with open_dataset(path) as ds:
        assert ds.matrix.nnz == nnz
        assert sum(s.n_values for s in ds.matrix.plan()) == nnz
        chunk = ds.matrix.read(ds.matrix.plan(start=1)[0])
        assert chunk.start == 1
        assert chunk.indptr.tolist() == [0, 3, 3, 5]
        assert chunk.indices.tolist() == chunk.data.tolist() == [1, 4, 9, 0, 5]


# ------------------------------------------------------------------ 10x


TENX = "reader_fixtures/scanpy/10x_data"
VISIUM = "reader_fixtures/scanpy/visium_data"
TENX_H5 = [
    f"{TENX}/1.2.0/filtered_gene_bc_matrices_h5.h5",
    f"{TENX}/3.0.0/filtered_feature_bc_matrix.h5",
    f"{VISIUM}/1.0.0/filtered_feature_bc_matrix.h5",
    f"{VISIUM}/2.1.0/raw_probe_bc_matrix.h5",
    "pbmc1k_citeseq_10x/pbmc_1k_citeseq_filtered_feature_bc_matrix.h5",
]
TENX_MTX = [f"{TENX}/1.2.0/filtered_gene_bc_matrices/hg19_chr21", f"{TENX}/3.0.0/filtered_feature_bc_matrix"]


@pytest.mark.filterwarnings("ignore")  # scanpy's and anndata's own
@pytest.mark.parametrize("relative", [*TENX_H5, *TENX_MTX])
def test_tenx_equals_scanpy(relative):
    path = need_data(relative)
    scanpy = pytest.importorskip("scanpy")
    want = scanpy.read_10x_h5(path) if path.suffix == ".h5" else scanpy.read_10x_mtx(path)
    with open_dataset(path) as ds:
        assert list(ds.obs.index) == list(want.obs_names)
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=5000), want.X.toarray())
        names = want.var_names if path.suffix == ".h5" else scanpy.read_10x_mtx(path, make_unique=False).var_names
        assert list(ds.var.index) == list(names)
        assert list(ds.var.column("gene_ids").labels()) == list(want.var["gene_ids"])


def test_tenx_chooses_gene_expression_and_says_so():
    path = need_data(TENX_H5[-1])
    with open_dataset(path) as ds:
        assert ds.n_genes == 36_601
        assert "36,601 features of type Gene Expression" in ds.notes[0]
        assert set(ds.var.column("feature_types").labels()) == {"Gene Expression"}
        genes = read_all(ds.matrix)
    with open_dataset(path, modality="Antibody Capture") as ds:
        assert ds.n_genes == 10
        antibodies = read_all(ds.matrix)
    with open_dataset(path, modality="all") as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), np.hstack([genes, antibodies]))
    with pytest.raises(DataError, match="Antibody Capture, Gene Expression, GRCh38, all"):
        open_dataset(path, modality="CRISPR")
    with pytest.raises(DataError, match="no layers"):
        open_dataset(path, layer="counts")


def test_several_genomes_ask_for_a_choice():
    path = need_data(f"{TENX}/1.2.0/multiple_genomes.h5")
    with pytest.raises(DataError, match="another_genome, hg19_chr21"):
        open_dataset(path)
    with open_dataset(path, modality="hg19_chr21") as ds:
        assert ds.matrix.shape == (12, 343)


def test_mtx_by_folder_parent_and_file_and_integer_ids():
    parent = need_data(f"{TENX}/1.2.0/filtered_gene_bc_matrices")
    for path in (parent, parent / "hg19_chr21", parent / "hg19_chr21" / "matrix.mtx"):
        with open_dataset(path) as ds:
            assert ds.kind == "10x-mtx"
            assert ds.matrix.shape == (12, 343)
    with open_dataset(need_data(f"{TENX}/int-ids")) as ds:
        assert ds.var.column("gene_ids").labels()[0] == "574405"
        assert ds.var.index[0] == "Pwwp4b"


MTX = "%%MatrixMarket matrix coordinate integer general\n"


def copy_mtx(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/matrix.mtx").write_text(
        "%%MatrixMarket matrix coordinate integer general\n%\n3 2 3\n1 1 4\n3 2 7\n3 2 1\n"
    )
    (tmp_path / "m/barcodes.tsv").write_text("AA\nCC\n")
    (tmp_path / "m/features.tsv").write_text("E1\ta\tGene Expression\nE2\tb\tGene Expression\nE3\tc\tGene Expression\n")
    return tmp_path / "m"


def test_mtx_sums_repeated_entries_and_says_so(tmp_path):
    with open_dataset(copy_mtx(tmp_path)) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), [[4, 0, 0], [0, 0, 8]])
        assert "duplicate entries" in ds.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        (
            "matrix.mtx",
            f"{MTX}3 2 3\n1 1 4\n9 2 7\n",
            "cannot be read|header states|instead of three each",
        ),
        ("matrix.mtx", f"{MTX}3 2 1000000\n1 1 4\n", "header states"),
        ("matrix.mtx", f"{MTX}5 2 1\n1 1 4\n", "3 features"),
        ("matrix.mtx", "%%MatrixMarket matrix array real general\n3 2\n1\n1\n1\n1\n1\n1\n", "array matrix"),
        ("matrix.mtx", "hello", "cannot be read"),
        ("matrix.mtx", f"{MTX}3 2 2\n1 1 1e3\n2 2 4\n", "entries of integer values contain 'e'"),
        ("matrix.mtx", f"{MTX}3 2 2\n1 1 1 1\n2 2 4\n", "instead of three each"),
        ("barcodes.tsv", "AA\n", "1 barcodes"),
        ("features.tsv", "", "0 features"),
    ],
)
def test_damaged_mtx_folders_are_refused(tmp_path, name, text, match):
    folder = copy_mtx(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=match):
        open_dataset(folder)


def test_feature_types_that_cannot_be_read_are_not_passed_over(tmp_path):
    fixture = need_data("pbmc1k_citeseq_10x/pbmc_1k_citeseq_filtered_feature_bc_matrix.h5")
    path = tmp_path / "f.h5"
    path.write_bytes(fixture.read_bytes())
    with h5py.File(path, "a") as f:
        del f["matrix/features/feature_type"]
        f.create_group("matrix/features/feature_type")
    with pytest.raises(DataError, match="feature_type does not hold one entry"):
        open_dataset(path)


def test_an_mtx_folder_without_its_features_is_refused(tmp_path):
    folder = copy_mtx(tmp_path)
    (folder / "features.tsv").unlink()
    with pytest.raises(DataError, match=r"features\.tsv or genes\.tsv is missing"):
        open_dataset(folder)


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither a zarr store nor a 10x matrix"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------ zarr


def write_zarr(path: Path, layout: str, zarr_format: int, *, sharded: bool = False) -> Path:
    """Write a zarr store of anndata's layout with zarr alone."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    from scipy import sparse

    n, g = COUNTS.shape
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    root.attrs["encoding-type"] = "anndata"

    def put(group, name, values, chunk):
        values = np.asarray(values)
        options = {"chunks": (chunk,) * values.ndim}
        if sharded:
            options["shards"] = (chunk * 3,) * values.ndim
        a = group.create_array(name, shape=values.shape, dtype=values.dtype, **options)
        a[...] = values

    if layout == "dense":
        put(root, "X", COUNTS.astype(np.float32) + 0, 16)
    else:
        x = root.create_group("X")
        m = sparse.csr_matrix(COUNTS) if layout == "csr" else sparse.csc_matrix(COUNTS)
        x.attrs.update({"encoding-type": f"{layout}_matrix", "shape": [n, g]})
        put(x, "indptr", m.indptr, 1000)
        put(x, "indices", m.indices, 50)
        put(x, "data", m.data.astype(np.float32), 50)
    for name, size in (("obs", n), ("var", g)):
        t = root.create_group(name)
        t.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": ["k"]})
        text = np.array([f"{name}{i}" for i in range(size)], dtype=np.dtypes.StringDType())
        a = t.create_array("_index", shape=(size,), dtype=str, chunks=(size,))
        a[...] = text
        put(t, "k", np.arange(1, size + 1), size)
    return path


VERSIONS = [(2, False), (3, False), (3, True)]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("zarr_format", "sharded"), VERSIONS)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_zarr_of_every_format_is_read(tmp_path, layout, zarr_format, sharded):
    path = write_zarr(tmp_path / "f.zarr", layout, zarr_format, sharded=sharded)
    with open_dataset(path) as ds:
        assert ds.kind == "zarr"
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=70), COUNTS)
        assert ds.var.index[1] == "var1"
        assert ds.obs.column("k").values[2] == 3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("zarr_format", "sharded"), VERSIONS)
@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_an_absent_zarr_chunk_of_a_sparse_matrix_is_refused(tmp_path, part, zarr_format, sharded):
    path = write_zarr(tmp_path / "f.zarr", "csr", zarr_format, sharded=sharded)
    below = path / "X" / part
    victim = max(p for p in below.rglob("*") if p.is_file() and "zarr" not in p.name and not p.name.startswith(".z"))
    victim.unlink()
    with pytest.raises(DataError, match="absent"):
        open_dataset(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("zarr_format", "sharded"), VERSIONS)
def test_chunks_of_zeros_that_zarr_leaves_out_are_read(tmp_path, zarr_format, sharded):
    import zarr

    path = write_zarr(tmp_path / "f.zarr", "dense", zarr_format, sharded=sharded)
    root = zarr.open_group(str(path), mode="r+")
    root["X"][:] = 0  # zarr's default removes the chunks
    root["X"][-1, 0] = 7
    root["obs/k"][:] = 0
    assert not [p for p in (path / "obs/k").rglob("*") if p.is_file() and "zarr" not in p.name and p.name[:2] != ".z"]
    want = np.zeros_like(COUNTS)
    want[-1, 0] = 7
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix, max_values=70), want)
        assert not ds.obs.column("k").values.any()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_absent_chunk_inside_a_shard_is_refused(tmp_path):
    path = write_zarr(tmp_path / "f.zarr", "csr", 3, sharded=True)
    shard = path / "X/data/c/0"
    raw = bytearray(shard.read_bytes())
    n_index = 16 * 3 + 4
    raw[-n_index : -n_index + 16] = b"\xff" * 16
    import google_crc32c

    raw[-4:] = google_crc32c.value(bytes(raw[-n_index:-4])).to_bytes(4, "little")
    shard.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="absent"):
        open_dataset(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("zarr_format", "sharded"), VERSIONS)
def test_a_chunk_under_another_name_is_absent(tmp_path, zarr_format, sharded):
    path = write_zarr(tmp_path / "f.zarr", "csr", zarr_format, sharded=sharded)
    chunk = path / ("X/data/1" if zarr_format == 2 else "X/data/c/1")
    chunk.rename(chunk.with_name("99"))  # as many files as before
    with pytest.raises(DataError, match="1 chunks of /X/data are absent"):
        open_dataset(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("zarr_format", "sharded"), VERSIONS)
def test_a_cut_blosc_chunk_is_refused_not_read_beyond_its_end(tmp_path, zarr_format, sharded):
    zarr = pytest.importorskip("zarr")
    path = write_zarr(tmp_path / "f.zarr", "csr", zarr_format, sharded=sharded)
    values = np.asarray(zarr.open_array(str(path / "X/data"), mode="r")[...])
    options = {"shards": (150,)} if sharded else {}
    if zarr_format == 2:
        from numcodecs import Blosc

        options["compressors"] = Blosc(cname="lz4")
    else:
        options["compressors"] = zarr.codecs.BloscCodec(cname="lz4")
    root = zarr.open_group(str(path), mode="a")
    a = root.create_array("X/data", shape=values.shape, dtype=values.dtype, chunks=(50,), overwrite=True, **options)
    a[...] = values
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)
    chunk = path / ("X/data/0" if zarr_format == 2 else "X/data/c/0")
    raw = bytearray(chunk.read_bytes())
    if sharded:
        raw[12:16] = (10_000).to_bytes(4, "little")  # the first frame's length, in its header
    else:
        del raw[len(raw) // 2 :]
    chunk.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="damaged"):
        open_dataset(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_links_and_code_in_a_zarr_store_are_refused(tmp_path):
    path = write_zarr(tmp_path / "f.zarr", "csr", 2)
    meta = path / "X/data/.zarray"
    kept = meta.read_text()
    meta.write_text(kept.replace('"filters": null', '"filters": [{"id": "pickle"}]'))
    assert meta.read_text() != kept
    with pytest.raises(DataError, match="pickle"):
        open_dataset(path)
    meta.write_text(kept)
    chunk = path / "X/data/0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        open_dataset(path)


@pytest.mark.filterwarnings("ignore")  # anndata's own
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_written_by_anndata_is_read(tmp_path, zarr_format):
    anndata = pytest.importorskip("anndata")
    pytest.importorskip("zarr")
    import pandas as pd
    from scipy import sparse

    n = len(COUNTS)
    obs = pd.DataFrame({"line": pd.Categorical(["A", "B"] * (n // 2))}, index=[f"c{i}" for i in range(n)])
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS), obs=obs)
    with anndata.settings.override(zarr_write_format=zarr_format):
        adata.write_zarr(tmp_path / "a.zarr")
    with open_dataset(tmp_path / "a.zarr") as ds:
        np.testing.assert_array_equal(read_all(ds.matrix), COUNTS)
        assert list(ds.obs.column("line").labels()[:2]) == ["A", "B"]
        assert ds.obs.index[3] == "c3"
