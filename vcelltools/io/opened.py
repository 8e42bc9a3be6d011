"""What an open data set is, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vcelltools.errors import DataError
from vcelltools.io.matrix import Matrix
from vcelltools.io.table import Table


@dataclass(kw_only=True)
class Dataset:
    """An open data set; a context manager.

    Attributes
    ----------
    path
        The file or folder; None for an AnnData in memory.
    kind
        ``h5ad``, ``h5mu``, ``10x-h5``, ``10x-mtx``, ``zarr`` or ``memory``.
    modality
        The modality that was opened (h5mu), or None.
    layer
        ``X``, ``raw`` or a layer's name.
    matrix
        Cells × genes.
    obs, var
        Tables of cells and genes.
    notes
        What the reader decided or repaired, for the user to see.
    source
        What was opened: the path or the AnnData, fit to be opened again.
    """

    path: Path | None
    kind: str
    modality: str | None
    layer: str
    matrix: Matrix
    obs: Table
    var: Table
    notes: list[str] = field(default_factory=list)
    source: Any = field(default=None, repr=False)
    _closers: list[Callable[[], None]] = field(default_factory=list, repr=False)

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
        """The path, or ``AnnData`` for one in memory."""
        return str(self.path) if self.path else "AnnData"

    def close(self) -> None:
        """Close the files behind the data set."""
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def check_shape(matrix: Matrix, where: str) -> None:
    """Refuse a matrix without cells or without genes."""
    if matrix.shape[0] == 0 or matrix.shape[1] == 0:
        what = "cells" if matrix.shape[0] == 0 else "genes"
        raise DataError(f"{where} has no {what} (shape {matrix.shape[0]} × {matrix.shape[1]})")
