"""Read single cells from batch files, merged files and stores.

:class:`CellDataset` has the interface that PyTorch's DataLoader expects, and needs only numpy. It opens
its files on first use, once per process, and can be pickled. A list of cells (``__getitems__``) is read in contiguous
runs; an uncompressed h5ad is memory-mapped, so that the cost of a cell depends only on its values.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError, UsageError, checked
from vcelltools.io import Buffers, CsrMatrix, DenseMatrix, Span, open_dataset
from vcelltools.io.stream import get_threads

VALUES = ("counts", "log1p", "cp10k", "log1p-cp10k")
_EXPERIMENT = ("experiment", "SRX_accession")
_GAP = 4  # largest gap, in cells, between requested cells that are read together
_CACHED_BYTES = 64 << 20
_KEPT_BYTES = 256 << 20  # the largest batch whose memory is used again
_MOST_ROOMS = 2
_UNUSED = 2  # references to a room that only the list holds: the list's, and the call's that counts them
Item = tuple[np.ndarray, dict[str, Any]]


class CellDataset:
    """Cells as (values, description) pairs, by position.

    Parameters
    ----------
    source
        A folder of ``batch_*.h5`` files, one file of cells × genes, a list of such files, or a store.
    genes
        The genes to return, in order: names, positions in the first file's list, or an :class:`HvgInfo`; all by
        default. A gene that a file lacks is 0 there; a gene that no file has is an error.
    values
        ``counts``, ``log1p``, ``cp10k`` or ``log1p-cp10k``; the library size of a cell is its total over all genes, and
        a cell without counts is all zeros.

    Attributes
    ----------
    genes
        Names of the genes, as returned.

    Raises
    ------
    DataError
        If a file is damaged, or no file has a gene.
    UsageError
        If ``values`` is unknown.

    Examples
    --------
    >>> import vcelltools as vc
    >>> cells = vc.CellDataset("atlas.h5ad", values="log1p-cp10k")
    >>> x, about = cells[0]
    >>> sorted(about)
    ['batch_idx', 'cell_id', 'experiment_id', 'gene_count', 'local_idx', 'umi_count']
    """

    @checked
    def __init__(
        self, source: str | os.PathLike | Sequence[str | os.PathLike], genes: Any = None, values: str = "counts"
    ) -> None:
        if values not in VALUES:
            raise UsageError(f"values {values!r} are not known", hint=f"one of: {', '.join(VALUES)}")
        self.values = values
        self._paths = _find_files(source)
        self._wanted = _read_wanted(genes)
        self._lock = threading.Lock()
        self._rooms: list[np.ndarray] = []
        self._pid = -1
        self._files: list[_File] = []
        files = self._get_files()
        self.starts = np.concatenate([[0], np.cumsum([f.n_cells for f in files])]).astype(np.int64)
        self.genes = files[0].chosen

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_files": [], "_rooms": [], "_pid": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _get_files(self) -> list[_File]:
        """Return the open files of this process."""
        if self._pid != os.getpid():
            with getattr(self, "_lock", threading.Lock()):
                if self._pid != os.getpid():
                    self._files = _open_files(self._paths, self._wanted)
                    self._pid = os.getpid()
        return self._files

    def __getitem__(self, i: int) -> Item:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[Item]:
        """Return some cells, in the given order; neighbours are read together."""
        X, about = self.take(indices)
        return [(X[i], {k: v[i] for k, v in about.items()}) for i in range(len(X))]

    def take(
        self, indices: Sequence[int] | np.ndarray, *, threads: int | None = 1
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Return (cells, genes) float32 and the descriptions of the cells as columns.

        Raises
        ------
        IndexError
            If a position is outside the data set.
        """
        at = np.asarray(indices, np.int64)
        n = len(self)
        at = np.where(at < 0, at + n, at)
        if len(at) and (int(at.min()) < 0 or int(at.max()) >= n):
            raise IndexError(f"cell {int(at[(at < 0) | (at >= n)][0])} of {n:,}")
        files = self._get_files()
        file = np.searchsorted(self.starts, at, side="right") - 1
        local = at - self.starts[file]
        X = self._get_room(len(at))
        about: dict[str, Any] = {"cell_id": [""] * len(at), "experiment_id": [""] * len(at)}
        genes, umis = np.zeros(len(at), np.int64), np.zeros(len(at), np.int64)
        for k in np.unique(file).tolist():
            rows = np.flatnonzero(file == k)
            f = files[k]
            cells = local[rows]
            genes[rows], umis[rows] = f.gene_count[cells], f.umi_count[cells]
            f.fill(cells, self._get_factors(umis[rows]), self.values.startswith("log1p"), X, rows, threads)
            for i, cell in zip(rows.tolist(), cells.tolist(), strict=True):
                about["cell_id"][i], about["experiment_id"][i] = f.barcodes[cell], f.experiments[cell]
        return X, {**about, "gene_count": genes, "umi_count": umis, "batch_idx": file, "local_idx": local}

    def _get_room(self, n: int) -> np.ndarray:
        """Return (n, genes) float32, in the memory of an earlier batch if nothing refers to it any more.

        The system clears fresh memory page by page, which costs more than the values of a cell.
        """
        with self._lock:
            rooms = self._rooms
            unused = [k for k in range(len(rooms)) if sys.getrefcount(rooms[k]) == _UNUSED]  # views refer to their room
            fitting = [k for k in unused if len(rooms[k]) >= n]
            if fitting:
                return rooms[fitting[0]][:n]
            room = np.empty((n, len(self.genes)), np.float32)
            if room.nbytes <= _KEPT_BYTES:
                used = [rooms[k] for k in range(len(rooms)) if k not in unused]
                self._rooms = [*used[1 - _MOST_ROOMS :], room]
            return room[:n]

    def _get_factors(self, library: np.ndarray) -> np.ndarray:
        if "cp10k" not in self.values:
            return np.ones(len(library))
        return np.divide(1e4, library, out=np.zeros(len(library)), where=library > 0)


def _find_files(source: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    if not isinstance(source, str | os.PathLike):
        paths = [Path(p) for p in source]
        if not paths:
            raise UsageError("no file was given")
        return paths
    path = Path(source)
    if path.is_dir():
        found = sorted(path.glob("batch_*.h5")) or sorted((path / "processed").glob("batch_*.h5"))
        if found:
            return found
    return [path]


def _read_wanted(genes: Any) -> list[str] | np.ndarray | None:
    """Return names, or positions as an array of integers."""
    if genes is None:
        return None
    if hasattr(genes, "indices") and hasattr(genes, "names"):  # from hvg_info.json, with names if there are any
        genes = genes.names or genes.indices
    if isinstance(genes, str | os.PathLike):
        from vcelltools.io.textfile import read_text
        from vcelltools.names import read_lines

        genes = read_lines(read_text(genes, what="a list of genes, one per line,"))
    wanted = list(genes)
    if not wanted:
        raise UsageError("no gene was given")
    if all(isinstance(g, int | np.integer) for g in wanted):
        return np.array(wanted, np.int64)
    if not all(isinstance(g, str) for g in wanted):
        raise UsageError(
            "genes must be either all names or all positions", hint="pass names, positions, or read_hvg_info(...)"
        )
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"gene {next(g for g in wanted if wanted.count(g) > 1)!r} is given twice")
    return wanted


def _open_files(paths: list[Path], wanted: list[str] | np.ndarray | None) -> list[_File]:
    files: list[_File] = []
    chosen: list[str] | None = wanted if isinstance(wanted, list) else None
    found: set[str] = set()
    for path in paths:
        file = _open_file(path)
        if chosen is None:
            names = file.names
            if wanted is not None:
                bad = wanted[(wanted < 0) | (wanted >= len(names))]  # type: ignore[operator]
                if len(bad):
                    raise DataError(f"{path}: gene {int(bad[0])} is requested, but there are only {len(names):,}")
                names = [names[i] for i in wanted.tolist()]  # type: ignore[union-attr]
            chosen = names
        found |= file.choose(chosen)
        files.append(file)
    assert chosen is not None
    lacking = [g for g in chosen if g not in found]
    if lacking:
        raise DataError(
            f"{len(lacking):,} of {len(chosen):,} genes are not in any file (the first: {lacking[0]!r})",
            hint="check whether they are ids or symbols; use the gene names in the files",
        )
    return files


def _open_file(path: Path) -> _File:
    if (path / "manifest.json").is_file() and (path / "X.f16").is_file():
        return _StoreFile(path)
    return _MatrixFile(path)


class _File:
    """The cells of one file."""

    n_cells: int
    names: list[str]
    chosen: list[str]
    barcodes: Sequence[str] | np.ndarray
    experiments: Sequence[str] | np.ndarray
    gene_count: np.ndarray
    umi_count: np.ndarray

    def choose(self, genes: list[str]) -> set[str]:
        """Set the genes to return; return those that the file has."""
        at = {g: i for i, g in enumerate(genes)}
        self.chosen = genes
        self.position = np.array([at.get(g, -1) for g in self.names], np.int32)
        return {g for g in self.names if g in at}

    def fill(
        self, cells: np.ndarray, factor: np.ndarray, log: bool, out: np.ndarray, to: np.ndarray, threads: int | None
    ) -> None:
        """Write some cells as the rows ``to`` of ``out``, whatever they held."""
        raise NotImplementedError


class _MatrixFile(_File):
    """A file of cells × genes, dense or by rows."""

    def __init__(self, path: Path) -> None:
        ds = open_dataset(path)
        ds.keep_cached()
        self.path, self._ds = path, ds
        self.n_cells = ds.n_cells
        self.names = [str(g) for g in ds.var.index]
        if len(set(self.names)) < len(self.names):
            raise DataError(f"{path}: gene names occur more than once", hint="merge it again, which sums duplicates")
        columns = ds.obs.columns
        name = next((c for c in _EXPERIMENT if c in columns), None)
        self.experiments = [path.stem] * ds.n_cells if name is None else ds.obs.column(name).labels()
        self.barcodes = ds.obs.column("barcode").labels() if "barcode" in columns else ds.obs.index
        self._whole = ds.matrix.map_values() if isinstance(ds.matrix, CsrMatrix) else None
        if not isinstance(ds.matrix, CsrMatrix | DenseMatrix):
            raise DataError(
                f"{path} is stored gene by gene, so single cells cannot be read efficiently",
                hint="use vcelltools convert --layout csr, or vcelltools atlas merge",
            )
        self.gene_count, self.umi_count = self._count(columns)
        self._cache: tuple[int, int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def _count(self, columns: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (genes, counts) of each cell, from obs or computed."""
        if "gene_count" in columns and "umi_count" in columns:
            pair = [self._ds.obs.column(c).values for c in ("gene_count", "umi_count")]
            if all(v is not None and v.dtype.kind in "iuf" for v in pair):
                return pair[0].astype(np.int64), pair[1].astype(np.int64)  # type: ignore[union-attr]
        genes, counts = np.zeros(self.n_cells, np.int64), np.zeros(self.n_cells, np.int64)
        m = self._ds.matrix
        for span in m.plan():
            chunk = m.read(span)
            if isinstance(m, CsrMatrix):
                rows = np.repeat(np.arange(span.start, span.stop), np.diff(chunk.indptr))  # type: ignore[union-attr]
                np.add.at(counts, rows, chunk.data.astype(np.int64))  # type: ignore[union-attr]
                np.add.at(genes, rows, chunk.data != 0)  # type: ignore[union-attr]
            else:
                block = chunk.block  # type: ignore[union-attr]
                a, c = chunk.row_start, chunk.col_start  # type: ignore[union-attr]
                assert c == 0 or m.axis == 1  # type: ignore[union-attr]
                counts[a : a + len(block)] += block.sum(axis=1).astype(np.int64)
                genes[a : a + len(block)] += (block != 0).sum(axis=1)
        return genes, counts

    def fill(
        self, cells: np.ndarray, factor: np.ndarray, log: bool, out: np.ndarray, to: np.ndarray, threads: int | None
    ) -> None:
        m = self._ds.matrix
        if isinstance(m, DenseMatrix):
            self._fill_dense(m, cells, factor, log, out, to)
        elif self._whole is not None:
            self._spread(m.indptr[cells], m.indptr[cells + 1], *self._whole, factor, log, out, to, threads)
        else:
            for a, b, rows in _get_runs(cells):
                chunk = m.read(Span(a, b, 0, 0), Buffers())  # type: ignore[union-attr]
                at = cells[rows] - a
                ends = chunk.indptr[at], chunk.indptr[at + 1]
                self._spread(*ends, chunk.indices, chunk.data, factor[rows], log, out, to[rows], threads)

    def _spread(self, starts, stops, indices, data, factor, log, out, to, threads: int | None) -> None:
        from vcelltools.kernels.cells import BAD_INDEX, spread_cells

        def work(span: tuple[int, int]) -> int:
            return spread_cells(starts, stops, indices, data, self.position, factor, log, out, to, *span)

        n = get_threads(threads)
        cuts = np.linspace(0, len(starts), n + 1).astype(int)
        spans = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
        if n == 1:
            found = [work(spans[0])]
        else:
            with ThreadPoolExecutor(n) as pool:
                found = list(pool.map(work, spans))
        if BAD_INDEX in found:
            raise DataError(f"{self.path}: an index is outside the {len(self.names):,} genes; the file is damaged")

    def _fill_dense(
        self, m: DenseMatrix, cells: np.ndarray, factor: np.ndarray, log: bool, out: np.ndarray, to: np.ndarray
    ) -> None:
        from vcelltools.kernels.cells import spread_dense

        for a, b, rows in _get_runs(cells):
            block = self._read_block(m, a, b)
            spread_dense(block, cells[rows] - a, self.position, factor[rows], log, out, to[rows])

    def _read_block(self, m: DenseMatrix, a: int, b: int) -> np.ndarray:
        """Return the cells ``a:b``; their chunk is kept, because the next cell is often in it."""
        chunks = m._values.chunks
        step = chunks[0] if chunks else 1
        lo, hi = a // step * step, min(-(-b // step) * step, self.n_cells)
        with self._lock:
            if self._cache is not None and self._cache[0] <= a and b <= self._cache[1]:
                return self._cache[2][a - self._cache[0] : b - self._cache[0]]
            block = m.read_block(lo, hi, 0, m.n_genes, Buffers()).block
            if block.nbytes <= _CACHED_BYTES:
                self._cache = (lo, hi, block)
            return block[a - lo : b - lo]


class _StoreFile(_File):
    """A store: the exact counts of its basis genes, with cells in store order."""

    def __init__(self, path: Path) -> None:
        from vcelltools.stores.store import open_store

        self._store = open_store(path)
        self.n_cells = self._store.n_cells
        self.names = [str(g) for g in self._store.genes]
        obs = self._store.obs
        name = next((c for c in _EXPERIMENT if c in obs.columns), None)
        self.experiments = [path.name] * self.n_cells if name is None else obs[name].astype(str).tolist()
        self.barcodes = (
            obs["barcode"].astype(str).tolist() if "barcode" in obs.columns else obs.index.astype(str).tolist()
        )
        self.umi_count = np.asarray(self._store.library_size).astype(np.int64)
        if "gene_count" in obs.columns:
            self.gene_count = obs["gene_count"].to_numpy().astype(np.int64)
        else:  # of the basis genes
            steps = range(0, self.n_cells, 1 << 14)
            parts = [np.diff(self._store.counts(slice(a, a + (1 << 14))).indptr) for a in steps]
            self.gene_count = np.concatenate(parts).astype(np.int64)

    def fill(
        self, cells: np.ndarray, factor: np.ndarray, log: bool, out: np.ndarray, to: np.ndarray, threads: int | None
    ) -> None:
        from vcelltools.kernels.cells import spread_cells

        m = self._store.counts(cells)
        ends = m.indptr.astype(np.int64)
        spread_cells(
            ends[:-1], ends[1:], m.indices, m.data, self.position,
            factor, log, out, to, 0, len(cells),
        )  # fmt: skip


def _get_runs(cells: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Return (first cell, end, positions in ``cells``) of runs of nearby cells."""
    order = np.argsort(cells, kind="stable")
    ordered = cells[order]
    cuts = np.flatnonzero(np.diff(ordered) > _GAP) + 1
    runs = [rows for rows in np.split(order, cuts) if len(rows)]
    return [(int(cells[rows[0]]), int(cells[rows[-1]]) + 1, rows) for rows in runs]
