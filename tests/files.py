"""Small files in every layout and encoding, written with h5py alone, so that tests control every byte of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

TEXT = h5py.string_dtype()


def make_counts(n: int = 40, g: int = 30, *, seed: int = 0, density: float = 0.3, top: int = 9) -> np.ndarray:
    """Return (n, g) int64 counts with an empty row and an empty column."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, top + 1, (n, g)) * (rng.random((n, g)) < density)
    x[n // 2] = 0
    x[:, g // 2] = 0
    return x.astype(np.int64)


def write_matrix(
    group: h5py.Group,
    name: str,
    counts: np.ndarray,
    *,
    layout: str = "csr",
    dtype: str = "float32",
    index_dtype: str = "int32",
    legacy: bool = False,
    **storage: Any,
) -> None:
    """Write ``counts`` below ``group`` as csr, csc or dense; ``storage`` goes to ``create_dataset``."""
    if layout == "dense":
        d = group.create_dataset(name, data=counts.astype(dtype), **storage)
        if not legacy:
            d.attrs["encoding-type"], d.attrs["encoding-version"] = "array", "0.2.0"
        return
    m = sparse.csr_matrix(counts) if layout == "csr" else sparse.csc_matrix(counts)
    write_sparse(
        group,
        name,
        indptr=m.indptr.astype(index_dtype),
        indices=m.indices.astype(index_dtype),
        data=m.data.astype(dtype),
        shape=counts.shape,
        layout=layout,
        legacy=legacy,
        **storage,
    )


def write_sparse(
    group: h5py.Group,
    name: str,
    *,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    shape: tuple[int, ...],
    layout: str = "csr",
    legacy: bool = False,
    **storage: Any,
) -> None:
    """Write the parts of a sparse matrix as they are, right or wrong."""
    s = group.create_group(name)
    if legacy:
        s.attrs["h5sparse_format"], s.attrs["h5sparse_shape"] = layout, shape
    else:
        s.attrs["encoding-type"], s.attrs["encoding-version"] = f"{layout}_matrix", "0.1.0"
        s.attrs["shape"] = shape
    for key, values in {"indptr": indptr, "indices": indices, "data": data}.items():
        options = dict(storage) if len(values) else {}
        if isinstance(options.get("chunks"), tuple):
            options["chunks"] = (min(options["chunks"][0], len(values)),)
        s.create_dataset(key, data=values, **options)


def write_table(group: h5py.Group, name: str, index: list[str], **columns: Any) -> h5py.Group:
    """Write a data frame: arrays, lists of str, or (codes, categories) pairs for categoricals."""
    t = group.create_group(name)
    t.attrs["encoding-type"], t.attrs["encoding-version"] = "dataframe", "0.2.0"
    t.attrs["_index"] = "_index"
    t.attrs.create("column-order", np.array(list(columns), dtype=object), dtype=TEXT, shape=(len(columns),))
    t.create_dataset("_index", data=np.array(index, dtype=object), dtype=TEXT)
    for key, values in columns.items():
        if isinstance(values, tuple):
            c = t.create_group(key)
            c.attrs["encoding-type"], c.attrs["encoding-version"], c.attrs["ordered"] = "categorical", "0.2.0", False
            c.create_dataset("codes", data=np.asarray(values[0], np.int8))
            c.create_dataset("categories", data=np.array(values[1], dtype=object), dtype=TEXT)
        elif isinstance(values, list):
            t.create_dataset(key, data=np.array(values, dtype=object), dtype=TEXT)
        else:
            t.create_dataset(key, data=values)
    return t


def write_frame_tables(group: h5py.Group, n: int, g: int) -> None:
    """Write obs (with a categorical and a number) and var."""
    write_table(
        group,
        "obs",
        [f"cell{i}" for i in range(n)],
        batch=([i % 3 for i in range(n)], ["b0", "b1", "b2"]),
        depth=np.arange(n, dtype=np.float64),
    )
    write_table(group, "var", [f"gene{j}" for j in range(g)], gene_ids=[f"ENSG{j:011d}" for j in range(g)])


def write_h5ad(path: Path, counts: np.ndarray | None = None, **options: Any) -> Path:
    """Write a small h5ad whose X is ``counts``; options as for :func:`write_matrix`."""
    counts = make_counts() if counts is None else counts
    with h5py.File(path, "w") as f:
        f.attrs["encoding-type"], f.attrs["encoding-version"] = "anndata", "0.1.0"
        write_matrix(f, "X", counts, **options)
        write_frame_tables(f, *counts.shape)
    return path


def write_h5mu(path: Path, modalities: dict[str, np.ndarray], **options: Any) -> Path:
    """Write a small h5mu whose modalities' X are the given arrays."""
    with h5py.File(path, "w") as f:
        f.attrs["encoding-type"], f.attrs["axis"] = "MuData", 0
        for name, counts in modalities.items():
            m = f.create_group(f"mod/{name}")
            write_matrix(m, "X", counts, **options)
            write_frame_tables(m, *counts.shape)
    return path


def read_all(matrix: Any, **plan: Any) -> np.ndarray:
    """Return a matrix of the readers as a dense float64 array, put together from all its spans."""
    from vcelltools.io import Buffers
    from vcelltools.io.chunks import CscChunk, CsrChunk

    out = np.zeros(matrix.shape)
    buffers = Buffers()
    for span in matrix.plan(**plan):
        c = matrix.read(span, buffers)
        if isinstance(c, CsrChunk):
            out[c.start : c.start + c.n_rows] += sparse.csr_matrix(
                (c.data, c.indices, c.indptr), shape=(c.n_rows, c.n_genes)
            ).toarray()
        elif isinstance(c, CscChunk):
            out[:, c.start : c.start + c.n_cols] += sparse.csc_matrix(
                (c.data, c.indices, c.indptr), shape=(c.n_cells, c.n_cols)
            ).toarray()
        else:
            h, w = c.block.shape
            out[c.row_start : c.row_start + h, c.col_start : c.col_start + w] += c.block
    return out
