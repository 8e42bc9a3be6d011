"""Stream h5ad and h5mu files to disk, row by row (or column by column), in bounded memory.

The files follow anndata's current encodings. A partial file never appears: a temporary file grows beside the
target, is closed, flushed, read back, compared and only then renamed.

    with H5adWriter("out.h5ad", n_genes=g, var=var, layout="csr") as out:
        for indptr, indices, data in blocks:
            out.append_csr(indptr, indices, data)
        out.finish(obs=obs)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from vcelltools.errors import DataError, EnvironmentFault, UsageError
from vcelltools.io.chunks import compress_rows
from vcelltools.io.table import Table
from vcelltools.io.write.atomic import atomic_file, check_output, translate_os_errors
from vcelltools.io.write.encode import set_encoding, write_array, write_dict, write_table, write_value
from vcelltools.io.write.sink import Codec, Sink, Space, cast_exact
from vcelltools.version import __version__

if TYPE_CHECKING:
    import pandas as pd

LAYOUTS = ("csr", "csc", "dense")
# A chunk of 2**18 four-byte values is small enough to spread over threads and large enough to read at disk speed.
_CHUNK_LEN = 1 << 18
_MU_BLOCK = 512
_MU_VERSION = "0.1.0"


class MatrixWriter:
    """One matrix (X or a layer) of a growing file."""

    def __init__(
        self,
        part: AnnDataPart,
        key: str,
        *,
        layout: str,
        dtype: str | np.dtype,
        index_dtype: str,
        chunk_len: int | None,
        chunk_shape: tuple[int, int] | None,
        nnz: int | None,
        contiguous: bool,
    ) -> None:
        if layout not in LAYOUTS:
            raise UsageError(f"layout {layout!r} is not known", hint=f"one of: {', '.join(LAYOUTS)}")
        if index_dtype not in ("int32", "int64"):
            raise UsageError(f"index dtype {index_dtype!r} is not known", hint="int32 or int64")
        self.dtype = get_value_dtype(dtype)
        self.part, self.key, self.layout = part, key, layout
        self.index_dtype = np.dtype(index_dtype)
        self.n_rows = 0  # number of rows (csr, dense) or columns (csc) so far
        self.nnz = 0
        self._indptr: list[np.ndarray] = [np.zeros(1, np.int64)]
        root, space, codec = part.group, part.owner.space, part.owner.codec
        if layout == "dense":
            if contiguous and part.n_cells is None:
                raise UsageError("a contiguous dense matrix needs the number of cells in advance")
            rows = max(1, (chunk_len or _CHUNK_LEN) // max(part.n_genes, 1))
            chunk = chunk_shape or (rows, max(part.n_genes, 1))
            self._values = Sink(
                root,
                key,
                dtype=self.dtype,
                codec=codec,
                space=space,
                chunk=(chunk[0], max(1, min(chunk[1], part.n_genes))),
                row=(part.n_genes,),
                length=part.n_cells,
                contiguous=contiguous,
            )
            set_encoding(self._values.dset, "array", "0.2.0")
            self.sinks = [self._values]
            return
        self.group = root.create_group(key)
        set_encoding(self.group, f"{layout}_matrix", "0.1.0")
        chunk_1d = (chunk_len or _CHUNK_LEN,)
        shared: dict[str, Any] = {"codec": codec, "space": space, "chunk": chunk_1d}
        shared |= {"length": nnz, "contiguous": contiguous and nnz is not None}
        self._values = Sink(self.group, "data", dtype=self.dtype, **shared)
        self._indices = Sink(self.group, "indices", dtype=self.index_dtype, **shared)
        self.sinks = [self._values, self._indices]

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return f"{self.part.owner.path}: {self.key}"

    def append_csr(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Append rows given as CSR (``indptr`` of (b + 1,), relative to this block); dense files densify them."""
        if self.layout == "csc":
            raise UsageError(f"{self.where}: rows cannot be appended to a CSC matrix; append columns")
        self._check_block(indptr, indices, data, self.part.n_genes)
        if self.layout == "dense":
            block = np.zeros((len(indptr) - 1, self.part.n_genes), self.dtype)
            rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
            np.add.at(block, (rows, indices), cast_exact(data, self.dtype, self.where))
            self._append_block(block)
        else:
            self._append_sparse(indptr, indices, data)

    def append_csc(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Append columns given as CSC (``indptr`` of (w + 1,), relative to this block)."""
        if self.layout != "csc":
            raise UsageError(f"{self.where}: columns can only be appended to a CSC matrix")
        n = self.part.n_cells
        if n is None:
            raise UsageError(f"{self.where}: a CSC matrix needs the number of cells in advance")
        self._check_block(indptr, indices, data, n)
        self._append_sparse(indptr, indices, data)

    def append_dense(self, block: np.ndarray) -> None:
        """Append rows given as a dense (b, g) block; sparse files keep its non-zeros."""
        if block.ndim != 2 or block.shape[1] != self.part.n_genes:
            raise DataError(
                f"{self.where}: a block has the shape {block.shape}, but there are {self.part.n_genes:,} genes"
            )
        if self.layout == "dense":
            self._append_block(cast_exact(block, self.dtype, self.where))
            return
        if self.layout == "csc":
            raise UsageError(f"{self.where}: rows cannot be appended to a CSC matrix; append columns")
        self._append_sparse(*compress_rows(block))

    def _check_block(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_minor: int) -> None:
        nnz = len(data)
        ok = len(indptr) > 0 and indptr[0] == 0 and indptr[-1] == nnz == len(indices) and (np.diff(indptr) >= 0).all()
        if not ok:
            raise DataError(f"{self.where}: the indptr of a block does not match its {nnz:,} values")
        if nnz and (int(indices.min()) < 0 or int(indices.max()) >= n_minor):
            raise DataError(f"{self.where}: a block has an index outside 0 … {n_minor - 1:,}")

    def _append_sparse(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        with translate_os_errors(self.part.owner.path):
            self._values.write(cast_exact(data, self.dtype, self.where))
            self._indices.write(indices.astype(self.index_dtype, copy=False))
        self._indptr.append(np.asarray(indptr[1:], np.int64) + self.nnz)
        self.nnz += len(data)
        self.n_rows += len(indptr) - 1

    def _append_block(self, block: np.ndarray) -> None:
        with translate_os_errors(self.part.owner.path):
            self._values.write(block)
        self.n_rows += len(block)

    def finish(self, n_cells: int) -> None:
        """Write the rest of the values, ``indptr`` and the shape."""
        want = self.part.n_genes if self.layout == "csc" else n_cells
        if self.n_rows != want:
            what = "genes" if self.layout == "csc" else "cells"
            raise DataError(f"{self.where}: {self.n_rows:,} {what} were written instead of {want:,}")
        for sink in self.sinks:
            sink.finish()
        if self.layout == "dense":
            return
        self.group.attrs["shape"] = np.array([n_cells, self.part.n_genes], np.int64)
        wide = self.index_dtype == np.int64 or self.nnz > np.iinfo(np.int32).max
        indptr = np.concatenate(self._indptr)
        self._indptr = []
        chunks = (min(len(indptr), _CHUNK_LEN),)
        self.group.create_dataset("indptr", data=indptr.astype(np.int64 if wide else np.int32), chunks=chunks)

    def check(self, file: h5py.File, every: bool) -> None:
        """Compare the closed file with the data that was written."""
        for sink in self.sinks:
            sink.check(file, every)
        if self.layout != "dense":
            indptr = file[f"{self.sinks[0].path.rsplit('/', 1)[0]}/indptr"]
            if len(indptr) != self.n_rows + 1 or int(indptr[-1]) != self.nnz:
                raise DataError(f"{self.where}/indptr differs from what was written")


class AnnDataPart:
    """An AnnData inside a growing file: a whole h5ad, or one modality of an h5mu."""

    def __init__(
        self,
        owner: H5adWriter,
        group: h5py.Group,
        *,
        n_genes: int,
        n_cells: int | None = None,
        obs: Table | pd.DataFrame | None = None,
        var: Table | pd.DataFrame,
        layout: str = "csr",
        dtype: str | np.dtype = "float32",
        index_dtype: str = "int32",
        chunk_len: int | None = None,
        chunk_shape: tuple[int, int] | None = None,
        nnz: int | None = None,
        contiguous: bool = False,
        uns: dict[str, Any] | None = None,
        obsm: dict[str, Any] | None = None,
        varm: dict[str, Any] | None = None,
    ) -> None:
        self.owner, self.group = owner, group
        self.obs, self.var = obs, var
        self.obs_rows: np.ndarray | None = None
        self.n_genes = n_genes
        self.n_cells = _get_length(obs) if n_cells is None and obs is not None else n_cells
        self.uns, self.obsm, self.varm = uns or {}, obsm or {}, varm or {}
        if _get_length(var) != n_genes:
            raise DataError(f"{owner.path}: var has {_get_length(var):,} rows for {n_genes:,} genes")
        self.later: list[Callable[[h5py.Group], None]] = []  # called with the finished group
        self.notes: list[str] = []  # notes on what could not be copied
        set_encoding(group, "anndata", "0.1.0")
        self._layers: dict[str, MatrixWriter] = {}
        self._settings: dict[str, Any] = {
            "layout": layout,
            "dtype": dtype,
            "index_dtype": index_dtype,
            "chunk_len": chunk_len,
            "chunk_shape": chunk_shape,
            "nnz": nnz,
            "contiguous": contiguous,
        }
        self.X = MatrixWriter(self, "X", **self._settings)

    def add_layer(self, name: str, **settings: Any) -> MatrixWriter:
        """Begin a layer, stored like X unless ``settings`` (layout, dtype, nnz, …) differ."""
        if not self._layers:
            set_encoding(self.group.create_group("layers"), "dict", "0.1.0")
        self._layers[name] = MatrixWriter(self, f"layers/{name}", **{**self._settings, "nnz": None, **settings})
        return self._layers[name]

    @property
    def matrices(self) -> list[MatrixWriter]:
        """X and the layers."""
        return [self.X, *self._layers.values()]

    def finish(self) -> None:
        """Write the rest of the matrices and every other element."""
        if self.obs is None:
            raise DataError(f"{self.owner.path}: no obs was given", hint="call finish(obs=...)")
        rows = _get_length(self.obs) if self.obs_rows is None else len(self.obs_rows)
        for m in self.matrices:
            m.finish(rows)
        write_table(self.group, "obs", self.obs, self.obs_rows, notes=self.notes)
        write_table(self.group, "var", self.var, notes=self.notes)
        if not self._layers:
            write_dict(self.group, "layers")
        for name, values in (("obsm", self.obsm), ("varm", self.varm), ("uns", self.uns)):
            write_dict(self.group, name, values)
        for name in ("obsp", "varp"):
            write_dict(self.group, name)
        for write in self.later:
            write(self.group)


class H5adWriter:
    """A growing h5ad (or, with ``modality``, h5mu) file; a context manager.

    At the end of the block, the file is closed, flushed, read back, compared and renamed to
    ``path``. On any exception, the temporary file is removed and an existing target stays.

    Parameters
    ----------
    path
        The target.
    n_genes
        Columns.
    var, obs
        A DataFrame or a table of a reader; ``obs`` may be passed to :meth:`finish` instead.
    n_cells
        Number of rows if known; CSC and contiguous matrices need it.
    layout
        ``"csr"``, ``"csc"`` or ``"dense"``.
    dtype, index_dtype
        Dtypes of the values and of ``indices``. ``indptr`` is int64 with int64 indices or with 2³¹ non-zeros or more.
    compression, level
        ``"none"``, ``"gzip"``, ``"lzf"`` or ``"zstd"``; chunks are compressed in ``threads``.
    chunk_len, chunk_shape
        Values per chunk (whole rows, at least one, in a dense matrix), or the chunk shape of a dense matrix.
    contiguous
        Whether to store the matrix without chunks (and compression); sparse layouts need ``nnz``.
    modality
        Write an h5mu with this modality; :meth:`add_modality` adds others.
    need_bytes
        An estimate of the file size, for an early error if the disk does not have enough space.
    verify
        ``"sample"`` reads back and compares a sample of the written data, ``"full"`` all of it.
    creator
        Name of the creator in the first bytes of an h5mu.

    Raises
    ------
    UsageError
        If the target exists and ``force`` is off.
    EnvironmentFault
        If space or permission is missing, or another process writes the same target.
    DataError
        If a block does not match, a value does not fit ``dtype``, or the number of rows is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        n_genes: int,
        var: Table | pd.DataFrame,
        obs: Table | pd.DataFrame | None = None,
        compression: str | None = None,
        level: int | None = None,
        modality: str | None = None,
        force: bool = False,
        need_bytes: int = 0,
        threads: int | None = None,
        verify: str = "sample",
        **settings: Any,
    ) -> None:
        from vcelltools.runtime.threads import get_threads

        self.path = Path(path)
        self.codec = Codec(compression, level, get_threads(threads))
        if settings.get("contiguous") and self.codec.name != "none":
            raise UsageError("a contiguous matrix cannot be compressed", hint="remove one of the two")
        if verify not in ("sample", "full"):
            raise UsageError(f"verify {verify!r} is not known", hint="sample or full")
        self._every = verify == "full"
        self._modality = modality
        check_output(self.path, force=force, need_bytes=need_bytes)
        self._stack = ExitStack()
        self._file: h5py.File | None = None
        self.parts: dict[str, AnnDataPart] = {}
        self.main: AnnDataPart
        try:
            self._open(force)
            assert self._file is not None
            root = self._file if modality is None else self._file.create_group(f"mod/{modality}")
            name = modality or ""
            self.parts[name] = AnnDataPart(self, root, n_genes=n_genes, var=var, obs=obs, **settings)
            self.main = self.parts[name]
        except BaseException as e:
            self._abort(e)
            raise

    def _open(self, force: bool) -> None:
        tmp = self._stack.enter_context(atomic_file(self.path, force=force, verify=self._verify))
        self.space = Space(tmp, self.path)
        self._tmp = tmp
        with translate_os_errors(self.path):
            block = _MU_BLOCK if self._modality is not None else 0
            self._file = h5py.File(tmp, "w", userblock_size=block)

    @property
    def X(self) -> MatrixWriter:
        """The main matrix."""
        return self.main.X

    def append_csr(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Append rows to X; see :meth:`MatrixWriter.append_csr`."""
        self.X.append_csr(indptr, indices, data)

    def append_csc(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Append columns to X; see :meth:`MatrixWriter.append_csc`."""
        self.X.append_csc(indptr, indices, data)

    def append_dense(self, block: np.ndarray) -> None:
        """Append rows to X; see :meth:`MatrixWriter.append_dense`."""
        self.X.append_dense(block)

    def add_layer(self, name: str, **settings: Any) -> MatrixWriter:
        """Begin a layer of the (first) AnnData."""
        return self.main.add_layer(name, **settings)

    def add_modality(self, name: str, **settings: Any) -> AnnDataPart:
        """Begin another modality of an h5mu, with the same cells; takes the settings of :class:`AnnDataPart`."""
        assert self._file is not None
        if self._modality is None:
            raise UsageError(f"{self.path}: an h5ad has no modalities", hint="give the first one a name")
        self.parts[name] = AnnDataPart(self, self._file.create_group(f"mod/{name}"), **settings)
        return self.parts[name]

    def finish(self, *, obs: Table | pd.DataFrame | None = None, obs_rows: np.ndarray | None = None) -> None:
        """Pass the table of the cells at the end; ``obs_rows`` selects and orders its rows."""
        if obs is not None:
            self.main.obs = obs
        self.main.obs_rows = obs_rows

    def abandon(self) -> None:
        """Remove what was written; an existing target stays."""
        self._abort(RuntimeError("abandoned"))

    def __enter__(self) -> H5adWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if value is not None:
            self._abort(value)
            return
        try:
            self._close()
        except BaseException as e:
            self._abort(e)
            raise
        self._stack.close()  # flush, verify, rename

    def _close(self) -> None:
        assert self._file is not None
        with translate_os_errors(self.path):
            for part in self.parts.values():
                part.finish()
            if self._modality is not None:
                _write_mudata(self._file, self.parts)
            self.codec.close()
            self.space.check(1 << 20)
            self._file.close()
        self._file = None
        if self._modality is not None:
            with open(self._tmp, "r+b") as raw:
                raw.write(_get_mu_header())

    def _abort(self, error: BaseException) -> None:
        """Remove the temporary file, and ignore errors of HDF5 while it closes."""
        self.codec.close()
        if self._file is not None:
            try:
                self._file.close()
            except (OSError, RuntimeError, ValueError):
                pass
            self._file = None
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _verify(self, tmp: Path) -> None:
        try:
            with h5py.File(tmp, "r", locking="best-effort") as file:
                for part in self.parts.values():
                    for m in part.matrices:
                        m.check(file, self._every)
        except OSError as e:
            raise EnvironmentFault(f"{self.path}: the written file cannot be read back: {e}") from e


def get_storable(dtype: np.dtype) -> np.dtype:
    """Return the dtype for writing values read as ``dtype``: native byte order, and float32 for float16."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def get_value_dtype(dtype: str | np.dtype) -> np.dtype:
    """Return the dtype of values to store, or raise a :class:`UsageError` if it is not numeric."""
    try:
        out = np.dtype(dtype)
    except TypeError:
        out = np.dtype(object)
    if out.kind not in "iuf" or out.itemsize not in (1, 2, 4, 8) or out == np.float16:
        raise UsageError(
            f"dtype {dtype!r} is not supported for values", hint="use int8 … int64, uint8 … uint64, float32 or float64"
        )
    return out


def _get_length(table: Table | pd.DataFrame) -> int:
    return table.n if hasattr(table, "column") else len(table)  # type: ignore[union-attr,arg-type]


def _get_index(part: AnnDataPart, axis: str) -> np.ndarray:
    table = part.obs if axis == "obs" else part.var
    index = table.index  # type: ignore[union-attr]
    out = np.asarray(index if isinstance(index, np.ndarray) else index.astype(str), dtype=object)
    return out[part.obs_rows] if axis == "obs" and part.obs_rows is not None else out


def _get_mu_header() -> bytes:
    from importlib.metadata import version

    text = f"MuData (format-version={_MU_VERSION};creator=vcelltools;creator-version={version('vcelltools')})"
    return text.encode().ljust(_MU_BLOCK, b"\0")


def _write_mudata(file: h5py.File, parts: dict[str, AnnDataPart]) -> None:
    """Write the top level of an h5mu: the joined obs and var names, and which modality has which."""
    import pandas as pd

    creator = {"encoder": "vcelltools", "encoder-version": __version__}
    for name in parts:
        file[f"mod/{name}"].attrs.update(creator)
    file.attrs.update({**creator, "encoding-type": "MuData", "encoding-version": _MU_VERSION, "axis": 0})
    names = list(parts)
    file["mod"].attrs.create("mod-order", np.array(names, dtype=object), dtype=h5py.string_dtype())
    cells = _get_index(parts[names[0]], "obs")
    for name in names[1:]:
        if not np.array_equal(cells, _get_index(parts[name], "obs")):
            raise DataError(f"{file.filename}: modalities {names[0]} and {name} have different cells")
    genes = [_get_index(parts[name], "var") for name in names]
    ends = np.cumsum([0, *map(len, genes)])
    n_var = int(ends[-1])
    write_table(file, "obs", pd.DataFrame(index=cells))
    write_table(file, "var", pd.DataFrame(index=np.concatenate(genes)))
    write_value(file, "uns", {})
    for group in ("obsm", "varm", "obsmap", "varmap", "obsp", "varp"):
        write_dict(file, group)
    for i, name in enumerate(names):
        at = np.zeros(n_var, np.uint32)
        at[ends[i] : ends[i + 1]] = np.arange(1, ends[i + 1] - ends[i] + 1)
        write_array(file["obsm"], name, np.ones((len(cells), 1), bool))
        write_array(file["obsmap"], name, np.arange(1, len(cells) + 1, dtype=np.uint32))
        write_array(file["varm"], name, (at > 0)[:, None])
        write_array(file["varmap"], name, at)
