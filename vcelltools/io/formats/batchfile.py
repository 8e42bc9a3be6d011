"""Batch files: dense cells × genes counts with the names of both, as written and read by public training scripts.

``X`` (cells, genes) in chunks of whole rows, ``genes``, ``cells`` (barcodes) and ``obs/SRX_accession, gene_count,
umi_count``; names are bytes of a fixed length. The reader accepts any order of genes, any integer dtype and files
without obs.
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.formats.anndata import open_matrix
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.safe import File, get_node, is_group
from vcelltools.io.hdf5.table import EmptyTable, read_values
from vcelltools.io.opened import Dataset, check_shape
from vcelltools.io.write.atomic import atomic_file
from vcelltools.io.write.sink import Codec, Sink, Space, cast_exact

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
    """A growing batch file; a context manager. The file appears at ``path`` once it is complete and verified."""

    def __init__(
        self, path: str | os.PathLike, *, genes: list[str], dtype: np.dtype, threads: int, force: bool = False
    ) -> None:
        self.path, self.genes, self.dtype = Path(path), genes, np.dtype(dtype)
        self._codec = Codec("gzip", 3, threads)  # libdeflate's 3 packs these as tightly as zlib's 4, and faster
        self._codec.options["compression_opts"] = 4
        self._atomic = atomic_file(self.path, force=force, verify=self._verify)

    def __enter__(self) -> BatchWriter:
        tmp = self._atomic.__enter__()
        self._file = h5py.File(tmp, "w")
        g = len(self.genes)
        rows = max(1, _CHUNK_BYTES // (g * self.dtype.itemsize))
        space = Space(tmp, self.path)
        self._sink = Sink(
            self._file, "X", dtype=self.dtype, codec=self._codec, space=space, chunk=(rows, g), row=(g,)
        )  # fmt: skip
        return self

    def append(self, block: np.ndarray) -> None:
        """Append the next cells, dense (b, g)."""
        self._sink.write(cast_exact(block, self.dtype, str(self.path)))

    def finish(
        self, *, cells: list[str], experiments: list[str], gene_count: np.ndarray, umi_count: np.ndarray
    ) -> None:
        """Write the names and the columns of the cells."""
        self._sink.finish()
        self._file.create_dataset("genes", data=_to_bytes(self.genes))
        self._file.create_dataset("cells", data=_to_bytes(cells))
        obs = self._file.create_group("obs")
        obs.create_dataset(_EXPERIMENT, data=_to_bytes(experiments))
        obs.create_dataset("gene_count", data=gene_count)
        obs.create_dataset("umi_count", data=umi_count)

    def _verify(self, tmp: Path) -> None:
        try:
            with h5py.File(tmp, "r", locking="best-effort") as file:
                self._sink.check(file, every=False)
        except OSError as e:
            raise EnvironmentFault(f"{self.path}: the written file cannot be read back: {e}") from e

    def __exit__(self, kind, value, tb) -> None:
        self._codec.close()
        try:
            self._file.close()
        except (OSError, RuntimeError, ValueError):
            if value is None:
                raise
        self._atomic.__exit__(kind, value, tb)


def _to_bytes(names: list[str]) -> np.ndarray:
    return np.array([str(x).encode() for x in names] or [b""], dtype="S")[: len(names)]
