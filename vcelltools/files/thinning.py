"""Thinning of counts: the same cells at a lower depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ldexp

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.io import Dataset
from vcelltools.io.chunks import Chunk, DenseChunk
from vcelltools.io.faults import raise_fault
from vcelltools.kernels.groupsums import check_entries
from vcelltools.kernels.thinning import dense_thin, sparse_thin


def make_thinning(ds: Dataset, share: float, seed: int) -> Callable[[Chunk], Chunk]:
    """Return the function that keeps each molecule of a chunk with the chance ``share``, and drops zeros.

    Raises
    ------
    UsageError
        For a share that is not between 0 and 1.
    DataError
        From the function: for values that are not counts, and for positions with several entries.
    """
    if not 0 < share < 1:
        raise UsageError(f"{spell('thin')} {share:g}; a share of the counts above 0 and below 1 expected")
    threshold, key = np.uint64(int(ldexp(share, 64))), np.uint64(seed)

    def thin(chunk: Chunk) -> Chunk:
        if not isinstance(chunk, DenseChunk):
            seen = np.zeros(chunk.n_minor, np.int64)
            fault, at = check_entries(chunk.indptr, chunk.indices, chunk.data, chunk.n_minor, seen, 1)
            if fault:
                raise_fault(fault, chunk, at, ds)
        data = np.empty_like(chunk.values)
        fault, at = chunk.run(sparse_thin, dense_thin, key, threshold, data)
        if fault:
            raise_fault(fault, chunk, at, ds)
        if isinstance(chunk, DenseChunk):
            return replace(chunk, block=data.reshape(chunk.block.shape))
        kept = data != 0
        ends = np.concatenate([[0], np.cumsum(kept)])
        return replace(chunk, indptr=ends[chunk.indptr], indices=chunk.indices[kept], data=data[kept])

    return thin
