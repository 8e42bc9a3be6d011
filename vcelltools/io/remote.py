"""Passes over an open file on a Dask cluster, whose workers open the file themselves and read ranges of it.

A pass is a function of the open file, a range of its cells (of its genes, if it is stored gene by gene) and what all
ranges share. The result of a range depends only on the range, so it can be computed again if a worker is lost. The file
must be on storage that every worker can access under the same path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vcelltools.errors import UsageError
from vcelltools.io.dataset import open_dataset
from vcelltools.io.fingerprint import get_fingerprint
from vcelltools.io.matrix import Matrix
from vcelltools.io.opened import Dataset
from vcelltools.runtime.cluster import cut, gather
from vcelltools.runtime.progress import Progress
from vcelltools.version import __version__

if TYPE_CHECKING:
    from distributed import Client, Future

PART_VALUES = 1 << 25
"""Number of values in the range of a task."""

Part = tuple[int, int]
Work = Callable[[Dataset, Part, Any], Any]


class Source(NamedTuple):
    """What a worker opens, and what it must be equal to."""

    path: str
    how: tuple[tuple[str, str | None], ...]
    fingerprint: str
    version: str


class Remote:
    """The workers of a cluster that read an open file.

    Parameters
    ----------
    client
        A client of the cluster.
    dataset
        The open file.
    how
        The arguments with which it was opened: modality, layer, feature_type, genome.

    Raises
    ------
    UsageError
        If the data set is an AnnData in memory.
    """

    def __init__(self, client: Client, dataset: Dataset, **how: str | None) -> None:
        if not isinstance(dataset.source, str | os.PathLike):
            raise UsageError("a cluster cannot read an AnnData in memory", hint="write it to a file first")
        self.client = client
        self.source = Source(
            os.path.abspath(dataset.source), tuple(how.items()), get_fingerprint(dataset, whole=False), __version__
        )

    def cut(self, matrix: Matrix) -> list[Part]:
        """Divide the cells of a matrix into ranges, or its genes if it is stored gene by gene."""
        total = matrix.shape[0] * matrix.shape[1] if matrix.nnz is None else matrix.nnz
        extent = matrix.shape[matrix.by_gene]
        return cut(0, extent, max(1, extent * PART_VALUES // max(total, 1)))

    def submit(self, work: Work, parts: Sequence[Part], shared: Any) -> list[Future]:
        """Start ``work(dataset, part, shared)`` for every part; ``shared`` goes to each worker once."""
        held = self.hold(shared)
        return [self.client.submit(_run, self.source, work, part, held, pure=False) for part in parts]

    def hold(self, value: Any) -> Future:
        """Return a future of a value. It is a task, and not scattered data, so it survives the loss of a worker."""
        import dask

        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            return self.client.submit(_give, value, pure=False)

    def run(self, matrix: Matrix, work: Work, shared: Any, what: str, progress: Progress) -> Iterator[tuple[Part, Any]]:
        """Yield every part of a matrix and the result of ``work`` on it, as the workers finish them."""
        parts = self.cut(matrix)
        progress.start(f"{what} on the cluster", parts[-1][1], "genes" if matrix.by_gene else "cells")
        futures = self.submit(work, parts, shared)
        try:
            yield from gather(self.client, futures, parts, progress, [b - a for a, b in parts])
        finally:
            self.client.cancel(futures)
        progress.finish()


def set_remote(dataset: Dataset, client: Client | None, **how: str | None) -> None:
    """Let the workers of a cluster read an open file, if there is a client; arguments as in :class:`Remote`."""
    if client is not None:
        dataset.remote = Remote(client, dataset, **how)


def choose_groups(codes: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups that occur among the codes (-1: none), and the new code of each; unused groups have -1.

    A part of a matrix has few of the groups, and a worker returns only these.
    """
    some = np.unique(codes[codes >= 0])
    place = np.full(n_groups + 1, -1, np.int32)
    place[some] = np.arange(len(some), dtype=np.int32)
    return some, place


def get_place(matrix: Matrix, some: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the groups ``some`` and the genes of a part in an array of groups × genes."""
    return some[:, None], np.arange(*part) if matrix.by_gene else np.arange(matrix.shape[1])


# -- on a worker -------------------------------------------------------------------------------------------------------


def _give(value: Any) -> Any:
    return value


_CHECKED: set[tuple[Source, int]] = set()
"""The sources, with their times of change, that this worker found to be those of the driver."""


def _run(source: Source, work: Work, part: Part, shared: Any) -> Any:
    """Run a task; the file is closed afterwards, because a worker that held it would keep others from writing it."""
    with open_dataset(source.path, **dict(source.how)) as dataset:
        key = source, os.stat(source.path).st_mtime_ns
        if key not in _CHECKED:
            if (source.fingerprint, source.version) != (get_fingerprint(dataset, whole=False), __version__):
                raise UsageError(
                    "a worker has different data or software than the driver",
                    hint="use shared storage and the same version on all workers",
                )
            _CHECKED.add(key)
        return work(dataset, part, shared)
