"""Open, read and check a store; ``stores.format`` describes its files and ``stores.building`` writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.config import load_config
from vcelltools.errors import DataError, UsageError, checked
from vcelltools.io.hdf5.direct import DirectFile, get_resident_share, pread_into
from vcelltools.kernels.store import counts_to_csr
from vcelltools.stores.directions import UNKNOWN
from vcelltools.stores.files import trim
from vcelltools.stores.format import (
    MANIFEST,
    UNIT_ROWS,
    decode_frame,
    get_stride,
    hash_file,
    hash_units,
    read_manifest,
)

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse


class Store:
    """An open store; arrays are memory-mapped, and tables are read on first use.

    The tables, the frames of counts and every row that :meth:`rows` returns are checked against their
    hashes as they are read. ``X`` itself is the plain memory map: :meth:`check_rows` or ``vcelltools verify``
    check it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.n_cells: int = self.manifest["n_cells"]
        self.n_genes: int = self.manifest["n_genes"]
        self.stride: int = self.manifest["stride"]
        for part, facts in self.manifest["files"].items():
            p = self.path / part
            size = p.stat().st_size if p.exists() else None
            if size != facts["bytes"]:
                what = "is missing" if size is None else f"has {size:,} bytes instead of {facts['bytes']:,}"
                raise DataError(f"{p} {what}", hint="build the store again")
        if self.stride != get_stride(self.n_genes) or self.manifest["files"]["X.f16"]["bytes"] != (
            self.n_cells * self.stride * 2
        ):
            raise DataError(f"{self.path / 'manifest.json'}: its sizes are inconsistent", hint="build the store again")
        self._checked_parts: set[str] = set()
        self._unit_ok = np.zeros(-(-self.n_cells // UNIT_ROWS), bool)
        self._memory: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.n_cells:,} cells × {self.n_genes:,} genes, {len(self.runs):,} runs)"

    def _part(self, name: str) -> Path:
        """Return the path of a part after checking its hash, once."""
        p = self.path / name
        if name not in self._checked_parts:
            if hash_file(p) != self.manifest["files"][name]["sha256"]:
                raise DataError(f"{p} is damaged (its sha256 does not match)", hint="build the store again")
            self._checked_parts.add(name)
        return p

    def _read_table(self, name: str) -> pd.DataFrame:
        import pyarrow.parquet as pq

        return pq.read_table(self._part(name), memory_map=False).to_pandas()

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.manifest["name"]

    @property
    def sha256(self) -> str:
        """The hash of the store, which covers every part."""
        return self.manifest["sha256"]

    @cached_property
    def _padded(self) -> np.ndarray:
        return np.memmap(self.path / "X.f16", np.dtype("<f2"), "r", shape=(self.n_cells, self.stride))

    @cached_property
    def direct(self) -> DirectFile:
        """X.f16 for reads that bypass the memory map and the page cache; closed with the store."""
        return DirectFile(self.path / "X.f16")

    @property
    def staged(self) -> bool:
        """Whether :meth:`to_memory` has read the values."""
        return self._memory is not None

    @property
    def in_page_cache(self) -> bool:
        """Whether the page cache holds (nearly) all values, as far as the system reports it."""
        return get_resident_share(self._padded) > 0.99

    @property
    def padded(self) -> np.ndarray:
        """(n, stride) float16: the padded rows, zero beyond the basis."""
        return self._memory if self._memory is not None else self._padded

    @property
    def X(self) -> np.ndarray:
        """(n, G) float16 CP10K+log1p, an unchecked view of the memory map."""
        return self.padded[:, : self.n_genes]

    @cached_property
    def genes(self) -> np.ndarray:
        """(G,) object: the labels of the basis, in order."""
        return self.gene_table["gene"].to_numpy(dtype=object)

    @cached_property
    def gene_table(self) -> pd.DataFrame:
        """The basis: gene, id, symbol, source columns, present, how it was matched."""
        return self._read_table("genes.parquet")

    @cached_property
    def present(self) -> np.ndarray:
        """(G,) bool: whether the data set measures the gene; if False, X is zero without meaning."""
        return self.gene_table["present"].to_numpy(dtype=bool)

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The genes of the columns of :attr:`sums`: id, symbol, position in the basis (or -1)."""
        return self._read_table("measured.parquet")

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The obs of the source in store order, indexed by its obs names.

        ``source_row`` is the row in the source, unless the source has a column with that name; see :attr:`source_rows`.
        """
        obs = self._read_table("cells.parquet")
        if "source_row" not in obs.columns:
            obs.insert(0, "source_row", self.source_rows.astype(np.int64))
        return obs

    @cached_property
    def source_rows(self) -> np.ndarray:
        """(n,) integers: the row of each cell in the source."""
        if "source_row.npy" not in self.manifest["files"]:  # a store of version 0.1
            return self._read_table("cells.parquet")["source_row"].to_numpy(np.int64)
        return np.load(self._part("source_row.npy"), mmap_mode="r", allow_pickle=False)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """(cell_line, perturbation, context) -> start, length, is_control, sums_row (and direction, if given)."""
        runs = self._read_table("runs.parquet")
        start, length = runs["start"].to_numpy(), runs["length"].to_numpy()
        if len(runs) == 0 or start[0] != 0 or (start + length != np.append(start[1:], self.n_cells)).any():
            raise DataError(f"{self.path / 'runs.parquet'}: its runs do not tile the cells")
        return runs

    @property
    def directions(self) -> np.ndarray:
        """(runs,) object: how each run's perturbation changes its target, such as ``crispri``, or ``unknown``."""
        if "direction" not in self.runs:
            return np.full(len(self.runs), UNKNOWN, object)
        return self.runs["direction"].to_numpy(dtype=object)

    @cached_property
    def library_size(self) -> np.ndarray:
        """(n,) int64: total counts of each cell over the whole transcriptome."""
        return np.load(self._part("libsize.npy"), mmap_mode="r", allow_pickle=False)

    @cached_property
    def sums(self) -> np.ndarray:
        """(groups, measured) float64 sums of CP10K+log1p; a group is ``runs.sums_row``."""
        return np.load(self._part("sums.npy"), mmap_mode="r", allow_pickle=False)

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """(groups,) int64: number of cells in each row of :attr:`sums`."""
        return np.bincount(self.runs["sums_row"], weights=self.runs["length"]).astype(np.int64)

    @cached_property
    def _frames(self) -> np.ndarray:
        return np.load(self._part("frames.npy"), allow_pickle=False)

    @cached_property
    def _unit_hashes(self) -> np.ndarray:
        return np.load(self._part("X.xxh3.npy"), allow_pickle=False)

    # -- values --------------------------------------------------------------------------------------------------

    def is_checked(self, rows: np.ndarray) -> bool:
        """Return whether all these rows have been checked."""
        return not self.get_unchecked(rows).any()

    def get_unchecked(self, rows: np.ndarray) -> np.ndarray:
        """Return bool: which of these rows have not been checked yet."""
        return ~self._unit_ok[rows // UNIT_ROWS]

    def check_rows(self, rows: np.ndarray | None = None) -> None:
        """Check the rows (by default all) against their hashes; each unit of 16 rows is checked once.

        Raises
        ------
        DataError
            If rows are damaged; the message names the first ones.
        """
        units = np.arange(len(self._unit_ok)) if rows is None else np.unique(np.asarray(rows) // UNIT_ROWS)
        todo = units[~self._unit_ok[units]]
        for u in todo.tolist():
            self.check_block(u * UNIT_ROWS, self._padded[u * UNIT_ROWS : (u + 1) * UNIT_ROWS])

    def check_block(self, start: int, block: np.ndarray) -> None:
        """Check rows from ``start``, (r, stride) in whole units, that were read elsewhere; see :meth:`check_rows`."""
        first = start // UNIT_ROWS
        for u, found in enumerate(hash_units(block).tolist(), first):
            if found != self._unit_hashes[u]:
                last = min((u + 1) * UNIT_ROWS, self.n_cells) - 1
                raise DataError(
                    f"{self.path / 'X.f16'} is damaged in rows {u * UNIT_ROWS:,} to {last:,}",
                    hint="vcelltools verify lists all damage; build the store again",
                )
            self._unit_ok[u] = True

    def release(self) -> None:
        """Release the memory of pages read through the maps of the store; they can be read again.

        The page cache keeps them, so this reduces the resident size of the process but not the speed of the next read.
        """
        for name in ("_padded", "sums", "source_rows", "library_size"):
            if isinstance(self.__dict__.get(name), np.memmap):
                trim(self.__dict__[name])

    def to_memory(self) -> Store:
        """Read and check all values in memory; return the store."""
        if self._memory is None:
            memory = np.empty((self.n_cells, self.stride), np.float16)
            fd = os.open(self.path / "X.f16", os.O_RDONLY)
            try:
                step = UNIT_ROWS * 1024
                for a in range(0, self.n_cells, step):
                    part = memory[a : a + step]
                    pread_into(fd, part, a * self.stride * 2, str(self.path / "X.f16"))
                    units = slice(a // UNIT_ROWS, a // UNIT_ROWS + -(-len(part) // UNIT_ROWS))
                    if not np.array_equal(hash_units(part), self._unit_hashes[units]):
                        raise DataError(f"{self.path / 'X.f16'} is damaged near row {a:,}", hint="vcelltools verify")
            finally:
                os.close(fd)
            self._unit_ok[:] = True
            memory.flags.writeable = False
            self._memory = memory
        return self

    # -- counts --------------------------------------------------------------------------------------------------

    def counts(self, rows: slice | np.ndarray | Sequence[int] | None = None) -> sparse.csr_matrix:
        """Return the exact raw counts of the basis genes as CSR (cells × G), after checking every frame.

        Parameters
        ----------
        rows
            Store rows: a slice, or positions in any order; by default all.
        """
        from scipy import sparse

        wanted = self._get_rows(rows)
        starts, offsets = self._frames
        frame_of = np.searchsorted(starts, wanted, side="right") - 1
        frames = np.unique(frame_of)
        first = np.cumsum(np.append(0, starts[frames + 1] - starts[frames]))
        counts = np.empty((UNIT_ROWS, self.n_genes), np.uint32)
        indptr = np.zeros(int(first[-1]) + 1, np.int64)
        indices, data = [], []
        room_i, room_d = np.empty(counts.size, np.int32), np.empty(counts.size, np.uint32)
        at = 0
        fd = os.open(self.path / "counts.u8z", os.O_RDONLY)
        try:
            for k, f in enumerate(frames.tolist()):
                part = counts[: int(starts[f + 1] - starts[f])]
                raw = os.pread(fd, int(offsets[f + 1] - offsets[f]), int(offsets[f]))
                decode_frame(raw, part, where=f"{self.path / 'counts.u8z'}: frame {f:,}")
                ends = indptr[first[k] + 1 : first[k + 1] + 1]
                n = counts_to_csr(part, 0, ends, room_i, room_d)
                ends += at
                at += n
                indices.append(room_i[:n].copy())
                data.append(room_d[:n].copy())
        finally:
            os.close(fd)
        values = np.concatenate(data) if data else np.empty(0, np.uint32)
        whole = sparse.csr_matrix(
            (
                values.astype(np.int32),
                np.concatenate(indices) if indices else np.empty(0, np.int32),
                indptr,
            ),
            shape=(len(indptr) - 1, self.n_genes),
        )
        picks = first[np.searchsorted(frames, frame_of)] + wanted - starts[frame_of]
        return whole if np.array_equal(picks, np.arange(whole.shape[0])) else whole[picks]

    def _get_rows(self, rows: slice | np.ndarray | Sequence[int] | None) -> np.ndarray:
        """Return the positions of ``rows``, after checking them."""
        if rows is None or isinstance(rows, slice):
            return np.arange(self.n_cells)[rows or slice(None)]
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.n_cells):
            raise IndexError(f"rows reach from {wanted.min()} to {wanted.max()} of {self.n_cells}")
        return wanted.astype(np.int64)

    def means(self) -> np.ndarray:
        """Return (groups, measured) float64 mean CP10K+log1p of each group."""
        return np.asarray(self.sums) / self.group_sizes[:, None]

    def to_anndata(self, rows: slice | np.ndarray | None = None, *, counts: bool = True) -> AnnData:
        """Return an AnnData: X holds the values as float32 CSR, ``layers["counts"]`` the exact counts."""
        import anndata as ad
        from scipy import sparse

        pick = self._get_rows(rows)
        self.check_rows(pick)
        var = self.gene_table.drop(columns="column_indices", errors="ignore").set_index("gene")
        var[["id", "symbol"]] = var[["id", "symbol"]].astype(object).fillna("")  # h5ad does not support missing text
        var.index.name = None
        adata = ad.AnnData(
            X=sparse.csr_matrix(self.X[pick].astype(np.float32)), obs=self.obs.iloc[pick].copy(), var=var
        )
        if counts:
            adata.layers["counts"] = self.counts(pick)
        adata.uns["vcelltools"] = {"store": self.name, "sha256": self.sha256, "target_sum": self.manifest["target_sum"]}
        return adata


@checked
def open_store(path: str | os.PathLike) -> Store:
    """Open a store.

    Raises
    ------
    DataError
        If it is not a store, or a part is missing or damaged.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.open_store("stores/atlas")
    Store('stores/atlas': 200 cells × 30 genes, 10 runs)
    """
    return Store(path)


def find_stores(dpath: str | os.PathLike | None = None, *, missing_ok: bool = False) -> list[Path]:
    """Return the stores in a folder: by default, the one in ``vcelltools.toml``, or ``stores``.

    Raises
    ------
    UsageError
        If there is none, unless ``missing_ok``.
    """
    if dpath is None:
        conf, base = load_config()
        dpath = base / conf.store.path
    found = sorted(p.parent for p in Path(dpath).glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
    if not found and not missing_ok:
        raise UsageError(f"no store in {dpath}", hint="build one with vcelltools build-store")
    return found
