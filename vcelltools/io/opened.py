"""The open data set: a matrix with its tables, from any kind of file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.matrix import Matrix
from vcelltools.io.table import Table


@dataclass(kw_only=True)
class Dataset:
    """An open data set; a context manager.

    Attributes
    ----------
    path
        The file or folder, or None for an AnnData in memory.
    kind
        ``h5ad``, ``h5mu``, ``10x-h5``, ``10x-mtx``, ``zarr`` or ``memory``.
    modality
        The modality that was opened (h5mu), or None.
    layer
        ``X``, ``raw`` or a layer's name.
    feature_type, genome
        The type and the genome of the features that were requested as genes, or None.
    matrix
        Cells × genes.
    obs, var
        Tables of cells and genes.
    notes
        Decisions and repairs of the reader, to show to the user.
    source
        The path or the AnnData, from which the data set can be opened again.
    stated_base
        The base of the logarithm in ``uns/log1p/base``, which scanpy writes; None if it is missing.
        It may be wrong: :func:`vcelltools.io.counts.find_log_base` compares it with the values.
    name
        What messages call it when it has no path.
    root
        The key of the AnnData in its file: empty, or a path such as ``mod/rna/``.
    library_col
        The obs column of library sizes to divide counts by, or None for the sums of the counts.
    var_rows
        (n_genes,) positions among the features of the file, if only some of them are used as genes.
    file_bytes
        How the bytes of an HDF5 file are read.
    remote
        The workers of a cluster that read the matrix (:class:`vcelltools.io.remote.Remote`), or None.
    """

    path: Path | None
    kind: str
    modality: str | None
    layer: str
    feature_type: str | None = None
    genome: str | None = None
    matrix: Matrix
    obs: Table
    var: Table
    notes: list[str] = field(default_factory=list)
    source: Any = field(default=None, repr=False)
    stated_base: float | None = None
    name: str = "AnnData"
    root: str = ""
    library_col: str | None = None
    var_rows: np.ndarray | None = field(default=None, repr=False)
    file_bytes: FileBytes | None = field(default=None, repr=False)
    remote: Any = field(default=None, repr=False)
    _closers: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def keep_cached(self) -> None:
        """Read through the page cache, because the same values will be read again and again."""
        if self.file_bytes is not None:
            self.file_bytes.cold = False

    @property
    def part(self) -> dict[str, Any]:
        """The arguments of :func:`vcelltools.io.open_dataset` that open the same part of the source again."""
        return {
            "modality": self.modality, "layer": self.layer, "feature_type": self.feature_type, "genome": self.genome,
        }  # fmt: skip

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.matrix.shape[1]

    @property
    def label(self) -> str:
        """The path, or for one in memory its name, such as ``AnnData`` or ``AnnData (prediction)``."""
        return str(self.path) if self.path else self.name

    def close(self) -> None:
        """Close the files behind the data set."""
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def check_shape(matrix: Matrix, where: str) -> None:
    """Raise if the matrix has no cells or no genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        what = "cells" if matrix.shape[0] == 0 else "genes"
        raise DataError(f"{where} has no {what} (shape {matrix.shape[0]} × {matrix.shape[1]})")
