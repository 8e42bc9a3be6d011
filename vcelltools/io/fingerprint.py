"""Identify a source of any kind by a fingerprint of its content.

A path does not identify the content of a file. Therefore everything that is derived from a source (a store, saved
statistics, a run, a truth pack, a prediction) keeps the fingerprint of the source, and later commands compare it.

The fingerprint is the xxh3-128 of the stored bytes (of a file, or of all files of a zarr store or a 10x folder, with
their names) or, for an AnnData in memory, of the matrix, the gene names and the whole of obs; the modality, layer,
feature type and genome that were opened are part of it. For a source above 4 GiB, 8,192 evenly spaced pieces of 64 KiB
are hashed along with the sizes, unless the complete hash is requested; the fingerprint records which of the two it is.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import DenseChunk
from vcelltools.io.formats.tenx import find_mtx, list_files
from vcelltools.io.opened import Dataset
from vcelltools.io.table import RANGE, Column, Table, is_text

if TYPE_CHECKING:
    from xxhash import xxh3_128

WHOLE_BYTES = 4 << 30  # up to this size, every byte is hashed
PIECES, PIECE_BYTES = 1 << 13, 1 << 16  # pieces of a larger source
_BUFFER_BYTES = 1 << 20
_WHOLE, _PARTLY = "xxh3-128", "xxh3-128-pieces"


def get_fingerprint(ds: Dataset, *, whole: bool | None = None, over: threading.Event | None = None) -> str:
    """Return the fingerprint of an open source, as ``scheme:hexadecimal digits``.

    Parameters
    ----------
    whole
        Whether every byte of a file or folder is hashed; by default, only up to 4 GiB.
    over
        An event that stops the work early once it is set; the result is then meaningless.

    Raises
    ------
    DataError
        If the source cannot be read.
    """
    from xxhash import xxh3_128

    digest = xxh3_128(f"{ds.modality}\0{ds.layer}\0".encode())
    if ds.feature_type is not None or ds.genome is not None:
        digest.update(f"{ds.feature_type}\0{ds.genome}\0".encode())
    scheme = _WHOLE
    try:
        if ds.path is not None:
            files = list(_list_files(ds.path))
            total = sum(size for _, _, size in files)
            if not (total <= WHOLE_BYTES if whole is None else whole):
                scheme = _PARTLY
            for name, path, size in files:
                digest.update(f"{name}\0{size}\0".encode())
                if path is not None:
                    _hash_file(digest, path, size, PIECES * size // total if scheme == _PARTLY else None, over)
        if _is_memory(ds):
            _hash_memory(digest, ds)
    except OSError as e:
        raise DataError(f"{ds.label} cannot be read: {e.strerror or e}") from e
    return f"{scheme}:{digest.hexdigest()}"


def fingerprint_files(paths: Iterable[str | os.PathLike]) -> str:
    """Return the fingerprint of files that are no data sets (a network, tables), of their bytes alone, in order.

    Raises
    ------
    DataError
        When one cannot be read.
    """
    from xxhash import xxh3_128

    digest = xxh3_128()
    for path in map(Path, paths):
        try:
            size = path.stat().st_size
            digest.update(b"%d:" % size)
            _hash_file(digest, path, size, None, None)
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    return f"{_WHOLE}:{digest.hexdigest()}"


def fingerprint_matrix(ds: Dataset) -> str:
    """Return the fingerprint of a matrix and of the names of its cells and genes; the rest of obs may change."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    _hash_matrix(digest, ds)
    for table in (ds.var, ds.obs):
        _hash_table(digest, table, columns=False)
    return f"{_WHOLE}:{digest.hexdigest()}"


def describe_source(ds: Dataset) -> dict[str, Any]:
    """Return the location of a source and what was opened; :func:`get_fingerprint` identifies its content.

    Keys: ``path`` (absolute, or None), ``kind`` (``memory`` for an AnnData), ``modality``, ``layer``,
    ``feature_type``, ``genome``, ``layout``, ``bytes`` (or None), ``n_cells``, ``n_genes``.
    """
    return {
        "path": None if ds.path is None else os.path.abspath(ds.path),
        "kind": "memory" if _is_memory(ds) else ds.kind,
        **ds.part,
        "layout": ds.matrix.layout,
        "bytes": None if ds.path is None else sum(size for _, _, size in _list_files(ds.path)),
        "n_cells": ds.n_cells,
        "n_genes": ds.n_genes,
    }


@contextmanager
def fingerprinting(ds: Dataset, *, whole: bool | None = None) -> Iterator[Future[str]]:
    """Compute the fingerprint in a thread, in parallel with other work; an error in that work stops it early."""
    over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="vcelltools-hash") as pool:
        future = pool.submit(get_fingerprint, ds, whole=whole, over=over)
        try:
            yield future
        finally:
            if not future.done():
                over.set()


def identify(ds: Dataset) -> dict[str, Any]:
    """Return the result of :func:`describe_source` and the ``fingerprint``, which everything derived from it keeps."""
    return {**describe_source(ds), "fingerprint": get_fingerprint(ds)}


def find_difference(ds: Dataset, kept: Mapping[str, Any]) -> str | None:
    """Describe how an open source differs from the one that was used before; None if it is the same.

    ``kept`` is the earlier result of :func:`identify`.
    """
    now = describe_source(ds)
    for key in (*ds.part, "n_cells", "n_genes"):
        if kept.get(key) != now[key]:
            return f"{key} was {kept.get(key)!r} and is {now[key]!r}"
    fingerprint = str(kept.get("fingerprint"))
    if get_fingerprint(ds, whole=fingerprint.startswith(f"{_WHOLE}:")) != fingerprint:
        return "its content has changed"
    return None


def _is_memory(ds: Dataset) -> bool:
    return ds.source is not None and not isinstance(ds.source, str | os.PathLike)


def hash_text(lines: Iterable[str]) -> str:
    """Return the xxh3-128 of some texts, each preceded by its length."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    for line in lines:
        raw = line.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(raw))
        digest.update(raw)
    return digest.hexdigest()


def hash_names(table: Table, columns: Iterable[str]) -> str:
    """Return the xxh3-128 of a table's row names and of some of its columns, as they are stored."""
    from xxhash import xxh3_128

    digest = xxh3_128()

    def add(values: np.ndarray) -> None:
        if is_text(values):  # joined: much faster than one by one
            texts = values.tolist()
            digest.update(np.fromiter(map(len, texts), np.int64, len(texts)).data)
            digest.update("".join(texts).encode("utf-8", "surrogatepass"))
        else:
            _hash_values(digest, values)

    add(table.index)
    for name in columns:
        column = table.column(name)
        digest.update(f"{len(name)}:{name}:{column.kind}".encode())
        for part in (column.values, column.codes, column.categories, column.missing):
            if part is not None:
                add(part)
    return digest.hexdigest()


def _list_files(path: Path) -> Iterator[tuple[str, Path | None, int]]:
    """Yield (name, path, bytes) of the files of a source, in order of their names, following links."""
    if (mtx_fpath := find_mtx(path)) is not None:
        prefix = re.sub(r"matrix\.mtx(\.gz)?$", "", mtx_fpath.name)
        for p in sorted(list_files(mtx_fpath)):
            yield p.name.removeprefix(prefix), p, p.stat().st_size
    elif path.is_dir():
        for at, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                p = Path(at, name)
                inner = p.relative_to(path).as_posix()
                if p.is_symlink():
                    yield f"{inner} -> {os.readlink(p)}", None, 0
                elif p.is_file():
                    yield inner, p, p.stat().st_size
    else:
        yield "", path, path.stat().st_size


def _hash_file(digest: xxh3_128, path: Path, size: int, pieces: int | None, over: threading.Event | None) -> None:
    """Hash all bytes of a file, or a number of pieces (at least the first and the last)."""
    with open(path, "rb", buffering=0) as f:
        if pieces is None or size <= 2 * PIECE_BYTES:
            room = memoryview(bytearray(min(_BUFFER_BYTES, max(size, 1))))
            while (n := f.readinto(room)) and not (over is not None and over.is_set()):
                digest.update(room[:n])
            return
        for at in np.linspace(0, size - PIECE_BYTES, max(2, pieces)).astype(np.int64).tolist():
            if over is not None and over.is_set():
                return
            digest.update(os.pread(f.fileno(), PIECE_BYTES, at))


def _hash_memory(digest: xxh3_128, ds: Dataset) -> None:
    """Hash the content of an AnnData in memory: the matrix (unless a file backs it), obs and the gene names."""
    if ds.path is None:
        _hash_matrix(digest, ds)
    _hash_table(digest, ds.var, columns=False)
    _hash_table(digest, ds.obs, columns=True)


def _hash_matrix(digest: xxh3_128, ds: Dataset) -> None:
    digest.update(f"{ds.matrix.layout}\0{ds.matrix.shape}".encode())
    for span in ds.matrix.plan():
        chunk = ds.matrix.read(span)
        parts = (chunk.block,) if isinstance(chunk, DenseChunk) else (chunk.indptr, chunk.indices, chunk.data)
        for values in parts:
            _hash_values(digest, values)


def _hash_table(digest: xxh3_128, table: Table, *, columns: bool) -> None:
    for a in range(0, table.n, RANGE):
        digest.update(hash_text(str(x) for x in table.names(a, min(a + RANGE, table.n))).encode())
    for name in table.columns if columns else ():
        digest.update(hash_text([name]).encode())
        for _, column in table.ranges(name):
            _hash_column(digest, column)


def _hash_column(digest: xxh3_128, column: Column) -> None:
    digest.update(column.kind.encode())
    for part in (column.values, column.codes, column.categories, column.missing):
        if part is not None:
            _hash_values(digest, part)


def _hash_values(digest: xxh3_128, values: np.ndarray) -> None:
    if values.dtype == object:
        digest.update(hash_text("" if v is None else f"={v}" for v in values.tolist()).encode())
    else:
        digest.update(values.dtype.str.encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
