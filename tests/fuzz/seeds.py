"""Small valid files of every kind; which one is decided by a random generator alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy import sparse

from tests.files import TEXT, write_frame_tables, write_matrix
from tests.fuzz.tenxfolder import write_folder

KINDS = ("h5ad", "h5ad", "h5ad", "legacy", "h5mu", "10x3", "10x2", "zarr", "zarr", "10x-folder")

DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64", ">i4", ">f4")


@dataclass(frozen=True)
class Seed:
    """A file, what it is, and the groups that hold its matrix and tables."""

    path: Path
    kind: str
    matrix: str
    var: str
    obs: str
    counts: np.ndarray


def write_seed(path: Path, rng: np.random.Generator) -> Seed:
    """Write a random valid HDF5 file at ``path``, which a ``zarr`` is to be made of, or a 10x folder in its place."""
    n, g = int(rng.integers(12, 40)), int(rng.integers(10, 30))
    mean = rng.gamma(0.8, 2.0, g)
    counts = rng.poisson(rng.gamma(2.0, 0.5, (n, g)) * mean).astype(np.int64)
    counts = np.minimum(counts, 100)
    kind = str(rng.choice(KINDS))
    layout = str(rng.choice(["csr", "csc", "dense"]))
    if kind.startswith("10x"):
        layout = "csr"
    if kind == "10x-folder":
        folder = path.with_suffix(".tenx")
        write_folder(folder, counts, rng)
        return Seed(folder, kind, "", "", "", counts)
    storage = _get_storage(rng, layout)
    dtype = str(rng.choice(DTYPES))
    index_dtype = str(rng.choice(["int32", "int32", "int64", "uint16", ">i4"]))
    options = {"layout": layout, "dtype": dtype, "index_dtype": index_dtype, **storage}
    libver = str(rng.choice(["earliest", "latest"]))
    with h5py.File(path, "w", libver=libver) as f:
        if kind == "h5mu" or (kind == "zarr" and rng.random() < 0.3):
            write_matrix(f.create_group("mod/rna"), "X", counts, **options)
            write_frame_tables(f["mod/rna"], n, g)
            write_matrix(f.create_group("mod/prot"), "X", counts[:, :4], layout="dense")
            write_frame_tables(f["mod/prot"], n, 4)
            write_frame_tables(f, n, g + 4)
            f["obsmap/rna"] = np.arange(1, n + 1, dtype=np.uint32)
            return Seed(path, kind, "mod/rna/X", "mod/rna/var", "mod/rna/obs", counts)
        if kind.startswith("10x"):
            return _write_tenx(f, path, kind, counts, dtype, index_dtype, storage)
        write_matrix(f, "X", counts, legacy=kind == "legacy", **options)
        if kind == "legacy":
            _write_records(f, n, g)
        else:
            write_frame_tables(f, n, g)
            if rng.random() < 0.3:
                write_matrix(f, "layers/other", counts + 1, layout="csr")
    return Seed(path, kind, "X", "var", "obs", counts)


def _get_storage(rng: np.random.Generator, layout: str) -> dict:
    chunks = (int(rng.integers(3, 20)), int(rng.integers(3, 12))) if layout == "dense" else (int(rng.integers(8, 90)),)
    if layout == "dense":
        chunks = (min(chunks[0], 12), min(chunks[1], 10))
    choices = [
        {},
        {"chunks": chunks},
        {"chunks": chunks, "compression": "gzip"},
        {"chunks": chunks, "compression": "gzip", "shuffle": True},
        {"chunks": chunks, "compression": "lzf"},
        {"chunks": chunks, "fletcher32": True},
    ]
    return choices[int(rng.integers(len(choices)))]


def _write_records(f: h5py.File, n: int, g: int) -> None:
    obs = np.zeros(n, dtype=[("index", "S8"), ("batch", "i1"), ("depth", "f4")])
    obs["index"], obs["batch"] = [b"c%d" % i for i in range(n)], np.arange(n) % 3
    var = np.zeros(g, dtype=[("index", TEXT), ("n", "i8")])
    var["index"] = [f"gene{j}" for j in range(g)]
    f["obs"], f["var"] = obs, var
    f["uns/batch_categories"] = np.array([b"b0", b"b1", b"b2"])


def _write_tenx(
    f: h5py.File, path: Path, kind: str, counts: np.ndarray, dtype: str, index_dtype: str, storage: dict
) -> Seed:
    n, g = counts.shape
    root = "matrix" if kind == "10x3" else "hg19"
    m = sparse.csr_matrix(counts)
    group = f.create_group(root)
    group["shape"] = np.array([g, n], np.int32)
    group["barcodes"] = np.array([b"AAAC%d-1" % i for i in range(n)])
    parts = {"indptr": (m.indptr, index_dtype), "indices": (m.indices, index_dtype), "data": (m.data, dtype)}
    for key, (values, kept) in parts.items():
        options = {**storage, "chunks": (min(storage["chunks"][0], len(values)),)} if "chunks" in storage else {}
        group.create_dataset(key, data=values.astype(kept), **options)
    names = np.array([b"gene%d" % j for j in range(g)])
    if kind == "10x3":
        group["features/name"], group["features/id"] = names, np.array([b"E%d" % j for j in range(g)])
        group["features/feature_type"] = np.array([b"Gene Expression"] * g)
        return Seed(path, kind, root, "matrix/features", root, counts)
    group["gene_names"], group["genes"] = names, np.array([b"E%d" % j for j in range(g)])
    return Seed(path, kind, root, root, root, counts)
