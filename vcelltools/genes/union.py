"""Open several files as one matrix over the union of their genes, without copying.

Cells are in the order of the files. :func:`open_union` reads the genes of every file. A pass over all files counts
every cell (pass 1), alone or together with a first use of the cells. Then the matrix of the union streams like any
other; a read maps some rows of one file onto the union (pass 2). Files stored by column are converted to rows through a
temporary file when their first row is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.genes.identity import ID_COLUMNS, NAME_COLUMNS, Basis, Merged, is_ensembl, match_genes, read_genes
from vcelltools.io import Buffers, CscMatrix, CsrMatrix, Dataset, DenseMatrix, Span, open_dataset
from vcelltools.io.chunks import Chunk, CsrChunk
from vcelltools.io.faults import raise_fault_at
from vcelltools.io.hdf5.probe import start_probe
from vcelltools.io.matrix import DEFAULT_MAX_VALUES
from vcelltools.io.spill import Spill
from vcelltools.io.stream import get_threads, map_spans
from vcelltools.io.write.transpose import ColumnSpill
from vcelltools.runtime.progress import SILENT, Progress

R = TypeVar("R")
_OPEN_FILES = 24
_SPAN_VALUES = 1 << 18  # values per read and thread: little memory, but enough for a kernel
_DENSE_VALUES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a union.

    Attributes
    ----------
    name
        The name of the experiment.
    path, layer, modality, feature_type, genome
        The file to open, and what :func:`vcelltools.io.open_dataset` opens of it.
    """

    name: str
    path: Path
    layer: str | None = None
    modality: str | None = None
    feature_type: str | None = None
    genome: str | None = None


@dataclass(frozen=True, kw_only=True)
class UnionGenes:
    """The genes of a union.

    Attributes
    ----------
    keys, symbols
        (u,) identity and symbol of each gene, kept genes first, sorted by id or in the order of a list.
    n_kept
        Number of kept genes; the others only count towards the totals of a cell.
    n_files, n_cells
        (u,) number of files that measure the gene, and of their cells.
    columns
        Per file, (g,) int32: position of each stored column in the union.
    distinct
        Per file: whether its columns are all different genes of the union.
    duplicates
        Number of genes with several columns in a file, which were summed, over all files.
    """

    keys: list[str]
    symbols: list[str]
    n_kept: int
    n_files: np.ndarray
    n_cells: np.ndarray
    columns: list[np.ndarray]
    distinct: list[bool]
    duplicates: int

    @property
    def kept(self) -> list[str]:
        """The keys of the kept genes."""
        return self.keys[: self.n_kept]


@dataclass(kw_only=True)
class Survey:
    """The counts of pass 1, per cell of the union.

    Attributes
    ----------
    starts
        (files + 1,) first cell of each file.
    gene_count, umi_count
        (n,) number of genes with a count, and total count, over all genes of the file.
    kept_count
        (n,) total count of the kept genes.
    nnz
        (n,) non-zeros among the kept genes.
    maximum, at
        The largest count and its position: (file, cell of the file, gene).
    """

    starts: np.ndarray
    gene_count: np.ndarray
    umi_count: np.ndarray
    kept_count: np.ndarray
    nnz: np.ndarray
    maximum: int = 0
    at: tuple[int, int, int] = (0, 0, 0)

    def add(self, k: int, span: Span, nnz: np.ndarray, found: np.ndarray) -> None:
        """Note what was counted in the next cells, of file ``k``; the arrays are those of the kernel."""
        first = int(self.starts[k])
        part = slice(first + span.start, first + span.stop)
        self.gene_count[part], self.umi_count[part], self.kept_count[part] = found[:3]
        self.nnz[part] = nnz
        if span.stop > span.start and found[3].max() > self.maximum:
            i = int(np.argmax(found[3]))
            self.maximum, self.at = int(found[3, i]), (k, span.start + i, int(found[4, i]))


def make_survey(starts: np.ndarray) -> Survey:
    """Return a survey without counts, for files that begin at these cells."""
    n = int(starts[-1])
    return Survey(
        starts=starts,
        gene_count=np.empty(n, np.int32),
        umi_count=np.empty(n, np.int64),
        kept_count=np.empty(n, np.int64),
        nnz=np.empty(n, np.int32),
    )


class Draft(Protocol):
    """Takes the rows of the union while pass 1 counts them, as long as they are what pass 2 would read.

    Attributes
    ----------
    dtype
        Dtype of the values that it takes; rows with a larger count end it.
    is_live
        Whether it has begun and takes rows.
    """

    dtype: np.dtype

    @property
    def is_live(self) -> bool:
        """Whether it takes rows."""
        ...

    def begin(self, genes: UnionGenes, n_cells: int, nnz: int) -> None:
        """Start, with the numbers of cells and of stored values of all files."""

    def is_worth(self, largest: int) -> bool:
        """Return whether to go on after the first file, given its largest count."""

    def append(self, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray) -> None:
        """Take the next rows."""

    def drop(self) -> None:
        """Give up, and remove what was written."""


@dataclass
class _Opened:
    dataset: Dataset
    rows: _Rows
    users: int = 0


class _Files:
    """A pool of open members: a few at a time, never closed while a thread reads from them."""

    def __init__(self, members: Sequence[Member], most: int) -> None:
        self.members, self._most = members, most
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in members]
        self._open: dict[int, _Opened] = {}

    @contextmanager
    def use(self, k: int) -> Iterator[_Opened]:
        """Yield member ``k``, open."""
        with self._opening[k]:
            with self._lock:
                here = self._open.get(k)
                if here is not None:
                    here.users += 1
            if here is None:
                ds = open_member(self.members[k])
                here = _Opened(ds, _Rows(ds), users=1)
                with self._lock:
                    self._open[k] = here
                    self._drop_idle()
        try:
            yield here
        finally:
            with self._lock:
                here.users -= 1

    def _drop_idle(self) -> None:
        for k in [k for k, o in self._open.items() if not o.users][: max(0, len(self._open) - self._most)]:
            self._open.pop(k).rows.close()

    def close_one(self, k: int) -> None:
        """Close member ``k`` unless it is in use; HDF5 holds the texts that were read from an open file."""
        with self._opening[k], self._lock:
            here = self._open.get(k)
            if here is not None and not here.users:
                self._open.pop(k).rows.close()

    def close(self) -> None:
        for o in self._open.values():
            o.rows.close()
        self._open = {}


def open_member(m: Member) -> Dataset:
    """Open a member, and name it in errors."""
    return open_dataset(m.path, layer=m.layer, modality=m.modality, feature_type=m.feature_type, genome=m.genome)


class _Rows:
    """The rows of one open data set of any layout."""

    def __init__(self, ds: Dataset) -> None:
        self._ds = ds
        self._lock = threading.Lock()
        self._spill: Spill | None = None
        self._indptr: np.ndarray | None = None

    def close(self) -> None:
        """Close the data set and delete its temporary file."""
        self._ds.close()
        self.drop_spill()

    def drop_spill(self) -> None:
        """Delete only the temporary file."""
        self._spill = None

    def read(self, a: int, b: int, buffers: Buffers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (indptr, indices, data) of the cells ``a:b``, as they are stored."""
        matrix = self._ds.matrix
        if isinstance(matrix, CsrMatrix):
            chunk = matrix.read(Span(a, b, 0, 0), buffers)
            return chunk.indptr, chunk.indices, chunk.data
        if isinstance(matrix, DenseMatrix):
            return self._read_dense(matrix, a, b, buffers)
        with self._lock:
            if self._spill is None:
                self._turn(matrix)
        assert self._indptr is not None and self._spill is not None
        lo, hi = int(self._indptr[a]), int(self._indptr[b])
        indices = np.empty(hi - lo, np.int32)
        data = np.empty(hi - lo, matrix.chunk_dtype)
        self._spill.read(lo, indices, data)
        return self._indptr[a : b + 1] - lo, indices, data

    def _read_dense(self, matrix: DenseMatrix, a: int, b: int, buffers: Buffers):
        from vcelltools.kernels.union import compress_dense

        g = matrix.n_genes
        indptr = [np.zeros(1, np.int64)]
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for r in range(a, b, step := max(1, _DENSE_VALUES // g)):
            block = matrix.read_block(r, min(r + step, b), 0, g, buffers).block
            ends = np.empty(len(block) + 1, np.int64)
            indices, data = np.empty(block.size, np.int32), np.empty(block.size, block.dtype)
            n = compress_dense(block, ends, indices, data)
            parts.append((indices[:n].copy(), data[:n].copy()))
            indptr.append(ends[1:] + indptr[-1][-1])
        indices, data = (np.concatenate(p) for p in zip(*parts, strict=True))
        return np.concatenate(indptr), indices, data

    def _turn(self, matrix: CscMatrix) -> None:
        """Write the matrix row by row into a temporary file."""
        out = Spill(matrix.nnz, np.dtype(np.int32), matrix.chunk_dtype)
        buffers = Buffers()
        with ColumnSpill(out.folder, n_minor=matrix.n_cells, nnz=matrix.nnz) as spill:
            for span in matrix.plan():
                chunk = matrix.read(span, buffers)
                spill.append(chunk.indptr, chunk.indices, chunk.data)
            self._indptr = np.concatenate([[0], np.cumsum(spill.n_each)])
            at = 0
            for _, indices, data in spill.blocks():
                out.write(at, indices, data.astype(matrix.chunk_dtype, copy=False))
                at += len(data)
        self._spill = out


class UnionMatrix(CsrMatrix):
    """The cells of several files over the union of their genes, as CSR with sorted indices and summed duplicates."""

    def __init__(self, files: _Files, genes: UnionGenes, survey: Survey) -> None:
        self._files, self._genes, self._survey = files, genes, survey
        n = int(survey.starts[-1])
        self.shape = (n, genes.n_kept)
        self.where = f"the union of {len(files.members):,} files"
        self.indptr = np.zeros(n + 1, np.int64)
        np.cumsum(survey.nnz, out=self.indptr[1:])
        self.nnz = int(self.indptr[-1])
        self.chunk_dtype = np.dtype(np.int32 if survey.maximum <= np.iinfo(np.int32).max else np.int64)
        self.dtype = self.chunk_dtype
        self.index_dtype = np.dtype(np.int32)
        self.stored_bytes = self.nnz * 8
        self.filters = ()
        self._local = threading.local()

    def plan(self, *, max_values: int = DEFAULT_MAX_VALUES, start: int = 0, stop: int | None = None) -> list[Span]:
        """Divide the cells into spans of at most ``max_values`` values that do not cross files."""
        stop = self.shape[0] if stop is None else stop
        spans, a = [], start
        while a < stop:
            k = int(np.searchsorted(self._survey.starts, a, side="right")) - 1
            end = min(stop, int(self._survey.starts[k + 1]))
            b = int(np.searchsorted(self.indptr, self.indptr[a] + max_values, side="right")) - 1
            b = min(max(b, a + 1), end, a + max_values)
            n = int(self.indptr[b] - self.indptr[a])
            spans.append(Span(a, b, n, 8 * n))
            a = b
        return spans

    def read(self, span: Span, buffers: Buffers | None = None) -> CsrChunk:
        """Return the cells of ``span``, which may cross files."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        a = span.start
        while a < span.stop or not parts:
            k = int(np.searchsorted(self._survey.starts, a, side="right")) - 1
            b = min(span.stop, int(self._survey.starts[k + 1]))
            parts.append(self._read_part(k, a, b, buffers or Buffers()))
            a = b
        indptr, indices, data = parts[0] if len(parts) == 1 else _join(parts)
        return CsrChunk(start=span.start, indptr=indptr, indices=indices, data=data, n_genes=self.shape[1])

    def _read_part(self, k: int, a: int, b: int, buffers: Buffers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first = int(self._survey.starts[k])
        with self._files.use(k) as here:
            rows = here.rows.read(a - first, b - first, buffers)
            n = int(self.indptr[b] - self.indptr[a])
            out = np.empty(n, np.int32), np.empty(n, self.chunk_dtype)
            ends = _map(here.dataset, rows, a - first, self._genes, k, out, self._local)
        if ends[-1] != n:
            raise DataError(
                f"{self._files.members[k].path} changed while it was being read", hint="run the command again"
            )
        return ends, *out

    def read_values(self, start: int, stop: int) -> np.ndarray:
        """Return the values ``start:stop``."""
        if stop <= start:
            return np.empty(0, self.chunk_dtype)
        a = int(np.searchsorted(self.indptr, start, side="right")) - 1
        b = int(np.searchsorted(self.indptr, stop, side="left"))
        first = int(self.indptr[a])
        return self.read(Span(a, b, 0, 0)).data[start - first : stop - first]

    def forget(self) -> None:
        """Keep ``indptr``, which plans need."""


def _join(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shifts = np.cumsum([0, *(int(p[0][-1]) for p in parts)])
    indptr = np.concatenate([[0], *(p[0][1:] + s for p, s in zip(parts, shifts, strict=False))])
    return indptr, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])


_NOTHING = np.empty(0, np.int32)


def _get_scratch(local: Any, n_union: int) -> tuple[np.ndarray, np.ndarray]:
    """Return this thread's (bits, acc) for the kernels."""
    if getattr(local, "acc", _NOTHING).size != n_union:
        local.bits, local.acc = np.zeros(-(-n_union // 64), np.uint64), np.zeros(n_union, np.int64)
    return local.bits, local.acc


def _count(
    ds: Dataset, rows: tuple, first: int, genes: UnionGenes, k: int, local: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Count stored rows of file ``k``; return (kept genes, what was found) per cell."""
    from vcelltools.kernels import union as kernels

    indptr, indices, data = rows
    b = len(indptr) - 1
    nnz, found, where = np.empty(b, np.int64), np.empty((5, b), np.int64), np.zeros(2, np.int64)
    bits, acc = _get_scratch(local, len(genes.keys))
    of = genes.columns[k]
    status = kernels.count_rows(
        indptr, indices, data, of, genes.n_kept, genes.distinct[k], bits, acc, nnz, found, where
    )
    _raise_fault(status, where, first, rows, ds)
    return nnz, found


def _map(
    ds: Dataset, rows: tuple, first: int, genes: UnionGenes, k: int, out: tuple[np.ndarray, np.ndarray], local: Any
) -> np.ndarray:
    """Map stored rows of file ``k`` onto the union, into ``out`` (indices, data); return the indptr."""
    from vcelltools.kernels import union as kernels

    indptr, indices, data = rows
    ends, where = np.empty(len(indptr), np.int64), np.zeros(2, np.int64)
    indices_out, data_out = out
    n = len(indices_out)
    if n < len(data):  # rows are shorter without duplicates, zeros and genes that are not kept
        indices_out, data_out = np.empty(len(data), np.int32), np.empty(len(data), data_out.dtype)
    bits, acc = _get_scratch(local, len(genes.keys))
    status = kernels.map_rows(
        indptr, indices, data, genes.columns[k], genes.n_kept, genes.distinct[k], bits, acc, ends,
        indices_out, data_out, where,
    )  # fmt: skip
    _raise_fault(status, where, first, rows, ds)
    if indices_out is not out[0] and ends[-1] <= n:
        out[0][: ends[-1]], out[1][: ends[-1]] = indices_out[: ends[-1]], data_out[: ends[-1]]
    return ends


def _unite(
    ds: Dataset, rows: tuple, span: Span, first: int, genes: UnionGenes, k: int, nnz: np.ndarray, local: Any
) -> CsrChunk:
    """Return stored rows of file ``k``, whose first cell is ``first``, in the genes of the union, in any order."""
    indptr, indices, data = rows
    n = int(nnz.sum())
    if genes.distinct[k] and n == len(data):  # no duplicates, zeros or genes that are not kept
        indices = genes.columns[k][indices]
    else:
        out = np.empty(n, np.int32), np.empty(n, np.int64)
        indptr = _map(ds, rows, span.start, genes, k, out, local)
        indices, data = out
    return CsrChunk(start=first + span.start, indptr=indptr, indices=indices, data=data, n_genes=genes.n_kept)


def _raise_fault(status: int, where: np.ndarray, first: int, rows: tuple, ds: Dataset) -> None:
    if status:
        row, at = where.tolist()
        raise_fault_at(status, first + row, int(rows[1][at]), rows[2][at], ds)


def unite_genes(datasets: Iterator[Dataset], *, wanted: Basis | None = None) -> UnionGenes:
    """Merge the genes of several data sets, which are consumed one by one.

    A gene is identified by its Ensembl id without version, or by its symbol. A symbol with a single id in the other
    files is that gene. Without ``wanted``, all genes are kept, sorted by key.

    Raises
    ------
    UsageError
        If no file measures any gene of ``wanted``.
    """
    merged: list[Merged] = []  # one entry per distinct gene list: most files of an atlas share one
    matched: list[np.ndarray] = []
    known: dict[str, int] = {}
    list_of: list[int] = []
    sizes: list[int] = []
    for ds in datasets:
        key = _sign(ds)
        if key not in known:
            known[key] = len(merged)
            genes = read_genes(ds.var)
            merged.append(genes.merge("sum"))
            if wanted is not None:
                matched.append(match_genes(wanted, genes).gene_of)
        list_of.append(known[key])
        sizes.append(ds.n_cells)
    ids = {key for m in merged for key in m.first if is_ensembl(key)}
    has_symbols = any(key not in ids for m in merged for key in m.first)  # genes without an id
    ids_of: dict[str, set[str]] = {}
    symbol_of: dict[str, str] = {}
    for m in merged:
        for key, name in zip(m.first, m.names.tolist(), strict=True):
            if key in ids:
                if has_symbols:
                    ids_of.setdefault(name, set()).add(key)
                if name != key and not is_ensembl(name):
                    symbol_of.setdefault(key, name)
    unique = {name: next(iter(of)) for name, of in ids_of.items() if len(of) == 1 and name not in ids}

    def get_key(key: str) -> str:
        return unique.get(key, key)

    claimed: dict[tuple[int, int], int] = {}
    if wanted is None:
        keys = sorted({get_key(key) for m in merged for key in m.first})
        n_kept = len(keys)
    else:
        keys, n_kept, claimed = _put_first(wanted, merged, matched, get_key)
    at = {key: i for i, key in enumerate(keys) if wanted is None or i >= n_kept}
    n_files, n_measured = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    of_list = []
    for k, m in enumerate(merged):
        of_gene = np.empty(len(m.ids), np.int32)
        of_gene[list(m.first.values())] = [
            claimed[k, j] if claimed and (k, j) in claimed else at[get_key(key)] for key, j in m.first.items()
        ]
        of_list.append(of_gene[m.of_column])
        mine = [n for n, x in zip(sizes, list_of, strict=True) if x == k]
        here = np.unique(of_gene)
        n_files[here] += len(mine)
        n_measured[here] += sum(mine)
    columns = [of_list[k] for k in list_of]
    is_distinct = [len(np.unique(of)) == len(of) for of in of_list]
    duplicates = sum(len(merged[k].duplicates) for k in list_of)
    symbols = [symbol_of.get(key, key) for key in keys]
    if wanted is not None:
        symbols[:n_kept] = [s or symbol_of.get(x, x) for x, s in zip(keys[:n_kept], wanted.symbols, strict=True)]
        if not n_files[:n_kept].any():
            raise UsageError(
                "no file measures any of the requested genes", hint="check whether they are ids or symbols"
            )
    return UnionGenes(
        keys=keys,
        symbols=symbols,
        n_kept=n_kept,
        n_files=n_files,
        n_cells=n_measured,
        columns=columns,
        distinct=[is_distinct[k] for k in list_of],
        duplicates=duplicates,
    )


def _sign(ds: Dataset) -> str:
    """Return a hash of everything that determines the gene of each column."""
    from vcelltools.io.fingerprint import hash_names

    columns = [c for c in (*ID_COLUMNS, *NAME_COLUMNS) if c in ds.var.columns]
    return ds.var.hash_stored(columns) or hash_names(ds.var, columns)


def _put_first(
    wanted: Basis, merged: list[Merged], matched: list[np.ndarray], get_key: Any
) -> tuple[list[str], int, dict[tuple[int, int], int]]:
    """Return (keys, number of wanted genes, (file, gene) -> wanted gene), with the wanted genes first."""
    claimed = {(k, int(j)): i for k, of in enumerate(matched) for i, j in enumerate(of.tolist()) if j >= 0}
    left = {get_key(key) for k, m in enumerate(merged) for key, j in m.first.items() if (k, j) not in claimed}
    return [*wanted.labels, *sorted(left)], len(wanted), claimed


def survey_cells(
    files: _Files,
    genes: UnionGenes,
    sizes: Sequence[int],
    *,
    draft: Draft | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Survey:
    """Count every cell of the union once (pass 1), and pass its rows to ``draft`` as long as it takes them."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    n = int(starts[-1])
    out = make_survey(starts)
    local = threading.local()
    progress.start("counting" if draft is None else "counting and merging", n, "cells")
    for k in range(len(files.members)):
        with files.use(k) as here:
            view = _RowView(here, sizes[k])

            def visit(rows: tuple, span: Span, k=k, here=here) -> tuple[Span, np.ndarray, np.ndarray, Any]:
                nnz, found = _count(here.dataset, rows, span.start, genes, k, local)
                n_here = int(nnz.sum())
                if draft is None or not draft.is_live:
                    return span, nnz, found, None
                if n_here < len(rows[2]) or found[3].max(initial=0) > np.iinfo(draft.dtype).max:
                    return span, nnz, found, None
                room = np.empty(n_here, np.int32), np.empty(n_here, draft.dtype)
                return span, nnz, found, (_map(here.dataset, rows, span.start, genes, k, room, local), *room)

            for span, nnz, found, mapped in map_spans(view, view.plan(), visit, threads=threads):  # type: ignore[arg-type]
                out.add(k, span, nnz, found)
                if draft is not None and draft.is_live:
                    if mapped is None:
                        draft.drop()
                    else:
                        draft.append(*mapped)
        if draft is not None and k == 0 and not draft.is_worth(out.maximum):
            draft.drop()
        progress.advance(sizes[k])
    progress.finish()
    return out


class _RowView:
    """The rows of an open file, as :func:`map_spans` reads a matrix."""

    def __init__(self, here: _Opened, n: int) -> None:
        self._here, self._n, self.cold = here, n, here.dataset.matrix.cold

    def plan(self) -> list[Span]:
        m = self._here.dataset.matrix
        if isinstance(m, CsrMatrix):
            return m.plan(max_values=_SPAN_VALUES)
        per_cell = max(1, (m.n_genes if m.nnz is None else m.nnz // max(self._n, 1)))
        step = max(1, _SPAN_VALUES // per_cell)
        return [Span(a, min(a + step, self._n), 0, 0) for a in range(0, self._n, step)]

    def read(self, span: Span, buffers: Buffers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._here.rows.read(span.start, span.stop, buffers)


@dataclass(kw_only=True)
class Union:
    """Several files as one data set.

    Attributes
    ----------
    members, genes
        The files and their genes.
    starts
        (files + 1,) first cell of each file.
    warnings
        Messages for the user.
    """

    members: list[Member]
    genes: UnionGenes
    starts: np.ndarray
    files: _Files
    threads: int | None = None
    progress: Progress = SILENT
    warnings: list[str] = field(default_factory=list)
    _survey: Survey | None = None

    @property
    def survey(self) -> Survey:
        """The counts of pass 1, which is made here unless :meth:`map_cells` counted on the way."""
        if self._survey is None:
            self._survey = survey_cells(
                self.files, self.genes, np.diff(self.starts).tolist(), threads=self.threads, progress=self.progress
            )
        return self._survey

    @cached_property
    def matrix(self) -> UnionMatrix:
        """The cells of all files; needs pass 1."""
        return UnionMatrix(self.files, self.genes, self.survey)

    def map_cells(
        self, make: Callable[[CsrChunk], R], *, threads: int | None = None, progress: Progress = SILENT, phase: str
    ) -> Iterator[R]:
        """Yield ``make(chunk)`` for all cells in order; the first pass over the cells also makes the survey.

        A row of a chunk has every gene with a count once, in any order.
        """
        progress.start(phase, float(self.starts[-1]), "cells")
        if self._survey is not None:
            m = self.matrix

            def take(chunk: Chunk, span: Span) -> tuple[int, R]:
                assert isinstance(chunk, CsrChunk)
                return chunk.n_rows, make(chunk)

            for n, out in map_spans(m, m.plan(), take, threads=threads):
                progress.advance(n)
                yield out
        else:
            survey, local = make_survey(self.starts), threading.local()
            for k, first in enumerate(self.starts[:-1].tolist()):
                with self.files.use(k) as here:
                    view = _RowView(here, int(self.starts[k + 1]) - first)

                    def visit(rows: Any, span: Span, k=k, first=first, here=here):
                        nnz, found = _count(here.dataset, rows, span.start, self.genes, k, local)
                        chunk = _unite(here.dataset, rows, span, first, self.genes, k, nnz, local)
                        return span, nnz, found, make(chunk)

                    found_of = map_spans(view, view.plan(), visit, threads=threads)  # type: ignore[arg-type]
                    for span, nnz, found, out in found_of:
                        survey.add(k, span, nnz, found)
                        progress.advance(span.stop - span.start)
                        yield out
            self._survey = survey
        progress.finish()

    def close(self) -> None:
        """Close the files."""
        self.files.close()

    def __enter__(self) -> Union:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_union(
    members: Sequence[Member],
    *,
    wanted: Basis | None = None,
    most_open: int = _OPEN_FILES,
    draft: Draft | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Union:
    """Open several files as one matrix over the union of their genes.

    Parameters
    ----------
    members
        The files, in the order of their cells.
    wanted
        The genes to keep, in order; by default all, sorted by id.
    most_open
        Number of idle files that stay open; HDF5 holds some megabytes of each.
    draft
        Takes the rows of the union during pass 1.

    Raises
    ------
    DataError
        If a file is damaged; :class:`NotCountsError` if a file does not hold counts.
    """
    if not members:
        raise UsageError("no file was given")
    get_threads(threads)
    sizes: list[int] = []
    stored: list[int | None] = []

    files = _Files(members, most_open)

    def iterate() -> Iterator[Dataset]:
        for k, following in enumerate([*members[1:], None]):
            if following is not None:
                start_probe(following.path)  # in a process of its own, meanwhile
            with files.use(k) as here:
                sizes.append(here.dataset.n_cells)
                stored.append(here.dataset.matrix.nnz)
                yield here.dataset

    survey = None
    try:
        genes = unite_genes(iterate(), wanted=wanted)
        nnz = None if None in stored else sum(stored)  # type: ignore[arg-type]
        if draft is not None and nnz is not None:
            draft.begin(genes, sum(sizes), nnz)
            survey = survey_cells(files, genes, sizes, draft=draft, threads=threads, progress=progress)
    except BaseException:
        files.close()
        raise
    return Union(
        members=list(members), genes=genes, starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        files=files, threads=threads, progress=progress, _survey=survey,
    )  # fmt: skip


def read_rows(ds: Dataset, *, max_values: int = DEFAULT_MAX_VALUES) -> Iterator[tuple[int, Any, Any, Any]]:
    """Yield (first cell, indptr, indices, data) of an open data set of any layout, in the order of the cells."""
    rows = _Rows(ds)
    per_cell = max(1, ds.n_genes if ds.matrix.nnz is None else ds.matrix.nnz // ds.n_cells)
    step = max(1, max_values // per_cell)
    try:
        for a in range(0, ds.n_cells, step):
            yield a, *rows.read(a, min(a + step, ds.n_cells), Buffers())
    finally:
        rows.drop_spill()


def name_members(
    files: Sequence[str | os.PathLike],
    *,
    layer: str | None = None,
    modality: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
) -> list[Member]:
    """Return files as members of a union, named after the files, with their folders if names repeat.

    Raises
    ------
    UsageError
        If a file is given twice.
    """
    paths = [Path(f) for f in files]
    real = [os.path.realpath(p) for p in paths]
    twice = next((p for p, r in zip(paths, real, strict=True) if real.count(r) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice", hint="list every file once")
    names = [p.name for p in paths]
    names = [str(p) if names.count(p.name) > 1 else p.name for p in paths]
    return [
        Member(name=n, path=p, layer=layer, modality=modality, feature_type=feature_type, genome=genome)
        for n, p in zip(names, paths, strict=True)
    ]


def read_batches(union: Union, column: str | None) -> tuple[np.ndarray, list[str]]:
    """Return (batch of each cell, labels), from an obs column or from the files."""
    sizes = np.diff(union.starts)
    if column is None:
        return np.repeat(np.arange(len(sizes)), sizes), [m.name for m in union.members]
    found: dict[str, int] = {}
    out = []
    for m in union.members:
        with open_member(m) as ds:
            labels = ds.obs.column(column).labels()
        out.append(np.array([found.setdefault("(missing)" if x is None else x, len(found)) for x in labels], np.int64))
    return np.concatenate(out), list(found)
