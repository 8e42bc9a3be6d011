"""Moments of fractional counts and of log1p values: sums of floats instead of exact histograms."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import Chunk
from vcelltools.io.dataset import Dataset
from vcelltools.io.fingerprint import describe_source
from vcelltools.io.stream import map_spans, plan_blocks
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.selection.statistics import Statistics, get_batches

_MAX_COUNT = float(1 << 53)
Open = Callable[[], AbstractContextManager[Dataset]]


class Moments:
    """Sums of floats with the interface of :class:`vcelltools.selection.histograms.Histograms`.

    Attributes
    ----------
    n_cells_k
        (k,) number of cells in each batch.
    sums_k3g
        (k, 3, g) sums of the values and of their squares, and numbers of non-zero values.
    """

    ready = False  # whether the values are those that seurat or cell_ranger looks at, normalised already

    def __init__(
        self, n_cells_k: np.ndarray, sums_k3g: np.ndarray, batch_n: np.ndarray, open_dataset: Open, threads: int | None
    ) -> None:
        self.n_cells_k, self.sums_k3g, self._batch_n = n_cells_k, sums_k3g, batch_n
        self._open, self._threads = open_dataset, threads

    @property
    def n_batches(self) -> int:
        """Batches."""
        return len(self.sums_k3g)

    @property
    def n_genes(self) -> int:
        """Genes."""
        return self.sums_k3g.shape[2]

    def moments(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (g,) sums of the values and of their squares in batch ``k``."""
        return self.sums_k3g[k, 0], self.sums_k3g[k, 1]

    def expressing(self, k: int) -> np.ndarray:
        """Return (g,) int64: number of cells in batch ``k`` with a value above 0."""
        return self.sums_k3g[k, 2].astype(np.int64)

    def clipped_moments(self, k: int, clip_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (g,) sums of the values clipped at ``clip_g`` and of their squares, in one more pass."""
        with self._open() as ds:
            only = np.where(self._batch_n == k, 0, -1)
            sums, _ = _sum(ds, only, 1, self._threads, SILENT, clip_g)
        return sums[0, 0], sums[0, 1]

    def pooled(self) -> Moments:
        """Return the moments over all batches."""
        total = self.sums_k3g.sum(axis=0, keepdims=True)
        everyone = np.zeros_like(self._batch_n)
        return Moments(self.n_cells_k.sum(keepdims=True), total, everyone, self._open, self._threads)


def scan_fractions(
    ds: Dataset,
    batch_key: str | None,
    open_dataset: Open,
    threads: int | None,
    progress: Progress,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Statistics:
    """Return the :class:`Statistics` of a matrix of fractions, whose ``histograms`` are :class:`Moments`.

    ``transform`` makes of log1p values, in the file's precision, those that a flavour looks at.
    """
    labels, batch_n = get_batches(ds, batch_key)
    progress.start("reading", ds.matrix.stored_bytes, "bytes")
    sums, (library, n_genes) = _sum(ds, batch_n, len(labels), threads, progress, transform=transform)
    progress.finish()
    moments = Moments(np.bincount(batch_n, minlength=len(labels)), sums, batch_n, open_dataset, threads)
    moments.ready = transform is not None
    said = "fractional counts were kept; moments are sums of floats, which are not exact"
    return Statistics(
        genes=ds.var.index,
        batches=labels,
        histograms=moments,  # type: ignore[arg-type]
        library_size=library,
        genes_per_cell=n_genes.astype(np.int32),
        batch_n=batch_n,
        bytes_read=ds.matrix.stored_bytes,
        source=describe_source(ds),
        warnings=() if moments.ready else (said,),
    )


def _sum(
    ds: Dataset,
    batch_n: np.ndarray,
    n_batches: int,
    threads: int | None,
    progress: Progress,
    clip_g: np.ndarray | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (k, 3, g) sums by batch and gene, and (2, n) by cell; parts are added in the order of the spans."""
    n, g = ds.matrix.shape
    sums = np.zeros((3, n_batches * g))
    cells = np.zeros((2, n))

    def make(chunk: Chunk, _: object) -> tuple[np.ndarray, list[np.ndarray]]:
        row, col, value = chunk.get_entries()
        col, value = col.astype(np.int64), (value if transform is None else transform(value)).astype(np.float64)
        if len(value) and not (row.min() >= 0 and row.max() < n and col.min() >= 0 and col.max() < g):
            raise DataError(f"{ds.matrix.where}: an index is outside the {n:,} × {g:,} matrix")
        if not ((value >= 0) & (value <= _MAX_COUNT)).all():
            raise DataError(f"{ds.matrix.where}: a value is negative, not finite or too large for a count")
        by_cell = [np.bincount(row, weights, n) for weights in (value, (value > 0).astype(float))]
        batch = batch_n[row]
        keep = batch >= 0
        key, value = batch[keep].astype(np.int64) * g + col[keep], value[keep]
        if clip_g is not None:
            value = np.minimum(value, clip_g[col[keep]])
        weights = (value, value * value, (value > 0).astype(float))
        return np.stack([np.bincount(key, w, n_batches * g) for w in weights]), by_cell

    for part, by_cell in map_spans(ds.matrix, plan_blocks(ds.matrix), make, threads=threads, progress=progress):
        sums += part
        cells += by_cell
    return sums.reshape(3, n_batches, g).swapaxes(0, 1).copy(), cells
