"""The second pass of flavours on normalised values or residuals, once library sizes are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.chunks import Chunk
from vcelltools.io.dataset import Dataset
from vcelltools.io.stream import run_spans
from vcelltools.kernels import moments as m
from vcelltools.selection.flavors import Task
from vcelltools.selection.ranking import get_mean_variance

TARGET_SUM = 10_000.0


@contextmanager
def open_matrix(task: Task) -> Iterator[Dataset]:
    """Open the file again, after checking that its values can be summed."""
    stats, flavor = task.stats, task.flavor
    with task.open_dataset() as dataset:
        if stats.n_duplicates:
            raise DataError(
                f"{dataset.label}: {stats.n_duplicates:,} entries repeat a cell and gene, but {flavor} needs unique "
                "entries",
                hint="write the file in canonical form with vcelltools convert",
            )
        if stats.n_cells > m.MAX_CELLS:
            raise DataError(f"{dataset.label}: flavor {flavor} supports at most {m.MAX_CELLS:,} cells")
        yield dataset


def sum_fixed(
    task: Task, dataset: Dataset, call: Callable[[Chunk, np.ndarray, np.ndarray], None], phase: str
) -> tuple[np.ndarray, np.ndarray]:
    """Run a fixed-point kernel over the matrix and return both sums as (k, g) float64."""
    k, g = len(task.stats.batches), task.stats.n_genes
    spans = dataset.matrix.plan()
    task.progress.start(phase, sum(s.n_bytes for s in spans), "bytes")
    states = run_spans(
        dataset.matrix,
        spans,
        lambda: (np.zeros((k * g, 2), np.int64), np.zeros((k * g, 2), np.int64)),
        lambda sums, chunk, span: call(chunk, *sums),
        threads=task.threads,
        progress=task.progress,
    )
    task.progress.finish()
    out = []
    for i in range(2):
        total = states[0][i]
        for other in states[1:]:
            total += other[i]
        out.append((total[:, 0] + total[:, 1] / m.FRACTION).reshape(k, g))
    return out[0], out[1]


def get_normalised_mean_variance(task: Task, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (k, g) mean and variance (ddof 1) of CP10K values, or of their log1p; of log1p data no second pass."""
    stats = task.stats
    if getattr(stats.histograms, "ready", False):
        pairs = [get_mean_variance(stats.histograms, k) for k in range(stats.histograms.n_batches)]
        return np.stack([mean for mean, _ in pairs]), np.stack([var for _, var in pairs])
    batch, library, g = stats.batch_n.astype(np.int64), stats.library_size, stats.n_genes
    kernels = m.sparse_normalised_moments, m.dense_normalised_moments

    def call(chunk: Chunk, sum1: np.ndarray, sum2: np.ndarray) -> None:
        chunk.run(*kernels, batch, library, TARGET_SUM, log, g, sum1, sum2)

    with open_matrix(task) as dataset:
        s1, s2 = sum_fixed(task, dataset, call, "normalised moments")
    n = stats.histograms.n_cells_k.astype(np.float64)[:, None]
    mean = s1 / n
    var = np.maximum(s2 / n - mean * mean, 0.0) * (n / np.maximum(n - 1, 1))
    return mean, var
