"""Batch files: dense cells × genes counts with the names of both, as written and read by public training scripts.

``X`` (cells, genes) in chunks of whole rows, ``genes``, ``cells`` (barcodes) and ``obs/SRX_accession, gene_count,
umi_count``; names are bytes of a fixed length. The reader accepts any order of genes, any integer dtype and files
without obs.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.chunks import Chunk, CsrChunk
from vcelltools.io.formats.anndata import open_matrix
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.safe import File, get_node, is_group
from vcelltools.io.hdf5.table import EmptyTable, read_values
from vcelltools.io.matrix import Span
from vcelltools.io.opened import Dataset, check_shape
from vcelltools.io.write.atomic import atomic_file
from vcelltools.io.write.sink import Space, cast_exact

_CHUNK_BYTES = 1 << 18
_EXPERIMENT = "SRX_accession"


def is_batch(file: File) -> bool:
    """Return whether an open HDF5 file is a batch file, with a dense X, the names of cells and genes, and no var."""
    names = (get_node(file, "genes"), get_node(file, "cells"))
    return (
        isinstance(file, h5py.File)
        and all(isinstance(n, h5py.Dataset) for n in (get_node(file, "X"), *names))
        and get_node(file, "var") is None
    )


def open_batch(path: Path, file: File, source: FileBytes | None) -> Dataset:
    """Open a batch file.

    Raises
    ------
    DataError
        If its names do not match its matrix.
    """
    matrix = open_matrix(file, source, "X")
    check_shape(matrix, f"{path}: X")
    n, g = matrix.shape
    cells, genes = (_read_names(file, key, length) for key, length in (("cells", n), ("genes", g)))
    obs: dict[str, np.ndarray] = {}
    group = get_node(file, "obs")
    if is_group(group):
        for name in (_EXPERIMENT, "gene_count", "umi_count"):
            if get_node(file, f"obs/{name}") is not None:
                obs[name] = read_values(file, f"obs/{name}", length=n)[0]
                if len(obs[name]) != n:
                    raise DataError(f"{path}: obs/{name} has {len(obs[name]):,} entries instead of {n:,}")
    return Dataset(
        path=path,
        kind="batch",
        modality=None,
        layer="X",
        matrix=matrix,
        obs=EmptyTable(cells, where=f"{path}: obs", extra=obs),
        var=EmptyTable(genes, where=f"{path}: genes"),
    )


def _read_names(file: File, key: str, length: int) -> np.ndarray:
    names, _ = read_values(file, key, length=length)
    if len(names) != length:
        raise DataError(f"{file.filename}: {key} has {len(names):,} names, but X requires {length:,}")
    return np.array([str(x) for x in names], object)


class BatchWriter:
    """A growing batch file; a context manager. The file appears at ``path`` once it is complete and verified.

    Attributes
    ----------
    rows
        Number of cells of a chunk; every block but the last has a multiple of it.
    """

    def __init__(self, path: str | os.PathLike, *, genes: list[str], dtype: np.dtype, force: bool = False) -> None:
        self.path, self.genes, self.dtype = Path(path), genes, np.dtype(dtype)
        self.rows = max(1, _CHUNK_BYTES // (len(genes) * self.dtype.itemsize))
        self._n = 0
        self._checks: list[int] = []  # Adler-32 of each chunk
        self._atomic = atomic_file(self.path, force=force, verify=self._verify)

    def __enter__(self) -> BatchWriter:
        tmp = self._atomic.__enter__()
        self._file = h5py.File(tmp, "w")
        g = len(self.genes)
        self._space = Space(tmp, self.path)
        self._X = self._file.create_dataset(
            "X", shape=(0, g), maxshape=(None, g), dtype=self.dtype, chunks=(self.rows, g), compression="gzip"
        )
        return self

    def pack(self, chunk: Chunk, span: Span) -> tuple[int, list[bytes]]:
        """Return the number of cells and their chunks, compressed; for any thread."""
        from vcelltools.kernels.deflate import deflate_rows, get_most_bytes, get_most_tokens

        assert isinstance(chunk, CsrChunk)
        size, g = self.dtype.itemsize, len(self.genes)
        data = cast_exact(chunk.data, self.dtype, str(self.path)).view(f"i{size}")
        out = []
        for a in range(0, chunk.n_rows, self.rows):
            indptr = chunk.indptr[a : a + self.rows + 1]
            n_bytes = int(indptr[-1] - indptr[0]) * size, self.rows * g * size
            room = np.empty(get_most_bytes(n_bytes[0], n_bytes[1]), np.uint8)
            tokens = np.empty(get_most_tokens(n_bytes[0], n_bytes[1]), np.int16)
            n = deflate_rows(indptr, chunk.indices, data, g, self.rows, size, tokens, room)
            out.append(room[:n].tobytes())
        return chunk.n_rows, out

    def append(self, n_rows: int, packed: list[bytes]) -> None:
        """Append the next cells, as :meth:`pack` returned them."""
        self._X.resize(self._n + n_rows, axis=0)
        for k, raw in enumerate(packed):
            self._space.spend(len(raw))
            self._X.id.write_direct_chunk((self._n + k * self.rows, 0), raw)
            self._checks.append(int.from_bytes(raw[-4:], "big"))
        self._n += n_rows

    def finish(
        self, *, cells: list[str], experiments: list[str], gene_count: np.ndarray, umi_count: np.ndarray
    ) -> None:
        """Write the names and the columns of the cells."""
        self._file.create_dataset("genes", data=_to_bytes(self.genes))
        self._file.create_dataset("cells", data=_to_bytes(cells))
        obs = self._file.create_group("obs")
        obs.create_dataset(_EXPERIMENT, data=_to_bytes(experiments))
        obs.create_dataset("gene_count", data=gene_count)
        obs.create_dataset("umi_count", data=umi_count)

    def _verify(self, tmp: Path) -> None:
        n = len(self._checks)
        try:
            with h5py.File(tmp, "r", locking="best-effort") as file:
                for k in sorted({int(i) for i in np.linspace(0, n - 1, 24)} if n else set()):
                    block = np.zeros((self.rows, len(self.genes)), self.dtype)
                    rows = file["X"][k * self.rows : min((k + 1) * self.rows, self._n)]
                    block[: len(rows)] = rows
                    if zlib.adler32(block.data) != self._checks[k]:
                        raise DataError(f"{self.path}: chunk {k} of X differs from what was written")
        except OSError as e:
            raise EnvironmentFault(f"{self.path}: the written file cannot be read back: {e}") from e

    def __exit__(self, kind, value, tb) -> None:
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            if value is None:
                raise
        self._atomic.__exit__(kind, value, tb)


def _to_bytes(names: list[str]) -> np.ndarray:
    return np.array([str(x).encode() for x in names] or [b""], dtype="S")[: len(names)]
