"""Reject stores that hold the same cells, because training on one would use cells that the other holds out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError

if TYPE_CHECKING:
    from vcelltools.stores.store import Store

_MOST_PAIRS = 2000  # number of pairs of cells to compare between two stores
_FEW = 4  # maximum number of cells with a library size for it to be compared
_LEAST = 3  # number of equal cells that is not a coincidence
_LEAST_GENES = 5  # minimum number of expressed genes for a cell to be distinctive


def refuse_repeated_cells(stores: Sequence[Store]) -> None:
    """Compare the cells of every pair of stores.

    Two stores of one source must not share rows of it. Other stores are compared by cells of equal library size whose
    values on the basis are equal to the bit, with up to 2,000 pairs of rare library sizes.

    Raises
    ------
    DataError
        If two stores hold the same cells; the message names both and their sources.
    """
    for a, b in itertools.combinations(stores, 2):
        n = _count_repeated(a, b)
        if n:
            raise DataError(
                f"the stores {a.name} ({_get_source(a)}) and {b.name} ({_get_source(b)}) hold the same cells ({n:,} "
                "were found), so cells that one holds out would be used to train in the other",
                hint="remove one of the two",
            )


def _get_source(store: Store) -> str:
    return store.manifest["source"].get("path") or "an AnnData"


def _count_repeated(a: Store, b: Store) -> int:
    """Return the number of cells found in both stores."""
    one, two = (s.manifest["source"].get("fingerprint") for s in (a, b))
    if one is not None and one == two:
        return len(np.intersect1d(a.source_rows, b.source_rows))
    if not np.array_equal(a.genes, b.genes):
        return 0
    rows_a, rows_b = _pair(np.asarray(a.library_size), np.asarray(b.library_size))
    x, y = (np.asarray(s.X[rows]) for s, rows in ((a, rows_a), (b, rows_b)))
    equal = (x == y).all(axis=1) & (np.count_nonzero(x, axis=1) >= _LEAST_GENES)
    found = len(np.unique(rows_a[equal]))
    return found if found >= _LEAST else 0


def _pair(size_a: np.ndarray, size_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows of two stores whose cells share a library size that few cells of either store have."""
    order_a, order_b = (np.argsort(s, kind="stable") for s in (size_a, size_b))
    (sizes_a, first_a, n_a), (sizes_b, first_b, n_b) = (
        np.unique(s[o], return_index=True, return_counts=True) for s, o in ((size_a, order_a), (size_b, order_b))
    )
    _, i, j = np.intersect1d(sizes_a, sizes_b, assume_unique=True, return_indices=True)
    rare = (sizes_a[i] > 0) & (n_a[i] <= _FEW) & (n_b[j] <= _FEW)
    i, j = i[rare], j[rare]
    pick = np.random.default_rng(0).permutation(len(i))[: _MOST_PAIRS // _FEW]
    rows: list[tuple[int, int]] = [
        (int(order_a[first_a[p] + k]), int(order_b[first_b[q] + m]))
        for p, q in zip(i[pick].tolist(), j[pick].tolist(), strict=True)
        for k in range(int(n_a[p]))
        for m in range(int(n_b[q]))
    ]
    pairs = np.array(rows[:_MOST_PAIRS], np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
