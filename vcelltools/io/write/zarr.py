"""Stream a sparse matrix to a zarr store in anndata's encodings, row by row, in bounded memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.write.atomic import check_output, locked, replace_folder, translate_os_errors
from vcelltools.io.write.sink import cast_exact

if TYPE_CHECKING:
    from vcelltools.io.table import Table

CHUNK_LEN = 1 << 18


def write_zarr(
    path: str | os.PathLike,
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    shape: tuple[int, int],
    nnz: int,
    dtype: np.dtype,
    obs: Table,
    var: Table,
    force: bool = False,
) -> Path:
    """Write CSR ``blocks`` (indptr, indices, data), in the order of the cells, as the X of a zarr store.

    A temporary folder grows beside ``path`` and is renamed once it is complete.

    Raises
    ------
    UsageError
        If the target exists and ``force`` is off.
    EnvironmentFault
        If zarr, space or permission is missing.
    DataError
        If the blocks do not match ``shape`` and ``nnz``.
    """
    try:
        import zarr
    except ImportError as e:
        raise EnvironmentFault(
            "writing zarr needs zarr, which is not installed", hint='pip install "vcelltools[zarr]"'
        ) from e
    from anndata.io import write_elem

    target = check_output(path, force=force, folder=True)
    with translate_os_errors(target), locked(target):
        tmp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            root = zarr.open_group(store=str(tmp), mode="w", zarr_format=2)
            root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            group = root.create_group("X")
            group.attrs.update(
                {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [int(s) for s in shape]}
            )
            _write_matrix(group, blocks, shape, nnz, dtype, str(target))
            write_elem(root, "obs", obs.to_frame())
            write_elem(root, "var", var.to_frame())
            for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
                write_elem(root, name, {})
            replace_folder(tmp, target)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return target


class _Array:
    """A one-dimensional array that is filled from its start and passed to zarr in whole chunks."""

    def __init__(self, group: Any, name: str, length: int, dtype: np.dtype) -> None:
        self._out = group.create_array(name, shape=(length,), chunks=(min(CHUNK_LEN, max(length, 1)),), dtype=dtype)
        self._dtype, self._at, self._held = dtype, 0, np.empty(0, dtype)

    def write(self, values: np.ndarray, *, last: bool = False) -> None:
        held = np.concatenate([self._held, values.astype(self._dtype, copy=False)])
        n = len(held) if last else len(held) // CHUNK_LEN * CHUNK_LEN
        if n:
            self._out[self._at : self._at + n] = held[:n]
            self._at += n
        self._held = held[n:].copy()


def _write_matrix(group: Any, blocks: Iterable, shape: tuple[int, int], nnz: int, dtype: np.dtype, where: str) -> None:
    indices, data = _Array(group, "indices", nnz, np.dtype(np.int32)), _Array(group, "data", nnz, dtype)
    wide = np.int64 if nnz > np.iinfo(np.int32).max else np.int32
    indptr = np.zeros(shape[0] + 1, np.int64)
    n = 0
    for ptr, idx, values in blocks:
        b = len(ptr) - 1
        indptr[n + 1 : n + b + 1] = indptr[n] + ptr[1:]
        n += b
        indices.write(idx)
        data.write(cast_exact(values, dtype, where))
    if n != shape[0] or int(indptr[-1]) != nnz:
        raise DataError(
            f"{where}: {n:,} cells and {int(indptr[-1]):,} values were written instead of {shape[0]:,} and {nnz:,}"
        )
    for array in (indices, data):
        array.write(np.empty(0, dtype), last=True)
    group.create_array("indptr", data=indptr.astype(wide), chunks=(min(CHUNK_LEN, len(indptr)),))
