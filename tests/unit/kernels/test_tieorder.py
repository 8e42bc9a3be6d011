"""The order of ties: captured from polars 2.1, and what holds for any sort."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.kernels.tieorder import INSERTION, quicksort_order

# pl.struct("v").rank("ordinal", descending=True) of v = (7 i² + 3 i) mod 5
POLARS_60 = [
    27, 4, 7, 37, 34, 59, 32, 57, 54, 9, 39, 52, 12, 2, 14, 49, 17, 29, 42, 19,
    47, 44, 22, 24, 23, 43, 28, 38, 18, 48, 13, 53, 58, 33, 8, 3, 30, 35, 36, 0,
    40, 41, 31, 26, 25, 45, 46, 21, 20, 16, 50, 51, 15, 11, 10, 55, 56, 6, 5, 1,
]  # fmt: skip


def get_order(key) -> list[int]:
    key = np.asarray(key, np.float32)
    out = np.empty(len(key), np.int64)
    quicksort_order(key, out)
    return out.tolist()


def test_ties_stand_as_in_polars():
    i = np.arange(60)
    assert get_order(-((7 * i * i + 3 * i) % 5)) == POLARS_60


@pytest.mark.parametrize("n", [0, 1, 2, INSERTION])
def test_short_lists_keep_ties_in_order(n):
    key = np.arange(n) % 3
    assert get_order(key) == np.argsort(key, kind="stable").tolist()


@pytest.mark.parametrize("shape", ["few", "distinct", "descending", "nearly", "organ", "killer", "infinite"])
@pytest.mark.parametrize("n", [21, 49, 50, 129, 300, 2001, 9000])
def test_everything_is_sorted_and_there_once(shape, n):
    rng = np.random.default_rng(n)
    i = np.arange(n)
    key = {
        "few": rng.integers(0, 3, n),
        "distinct": rng.permutation(n),
        "descending": n - i,
        "nearly": np.where(rng.random(n) < 2 / n, 0, i),
        "organ": np.minimum(i, n - i),
        "killer": np.where(i % 2, i, n // 2 + i // 2),
        "infinite": np.where(rng.random(n) < 0.3, -np.inf, rng.random(n)),
    }[shape].astype(np.float32)
    order = get_order(key)
    assert sorted(order) == i.tolist()
    assert np.array_equal(key[order], np.sort(key))
