"""The sorts that kernels share, against numpy's stable one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.kernels.sorting import ALL_BITS, DIGIT, RADIX, insert_sort, radix_pass, radix_sort

KEYS = st.lists(st.integers(0, 2**64 - 1), max_size=80).map(lambda v: np.array(v, np.uint64))


def make_hist():
    return np.empty(RADIX, np.int64)


def bits(keys, low, top):
    return (keys >> np.uint64(low)) & np.uint64((1 << (top - low)) - 1)


@settings(max_examples=60, deadline=None)
@given(KEYS, st.integers(0, 63), st.integers(1, 64))
def test_radix_sorts_stably_by_some_bits(keys, low, width):
    top = min(low + width, 64)
    got, other = keys.copy(), np.empty_like(keys)
    radix_sort(got, 0, len(keys), low, top, make_hist(), other)
    np.testing.assert_array_equal(got, keys[np.argsort(bits(keys, low, top), kind="stable")])


def test_a_part_is_sorted_and_the_rest_left():
    keys = np.array([9, 8, 7, 6, 5, 4], np.uint64)
    got, other = keys.copy(), np.empty_like(keys)
    radix_sort(got, 1, 5, 0, 4, make_hist(), other)
    assert got.tolist() == [9, 5, 6, 7, 8, 4]


@pytest.mark.parametrize("width", [1, 5, DIGIT])
def test_one_pass_distributes_by_its_bits(width):
    keys = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)
    out = np.empty_like(keys)
    radix_pass(keys, 0, len(keys), 3, width, make_hist(), out)
    np.testing.assert_array_equal(out, keys[np.argsort(bits(keys, 3, 3 + width), kind="stable")])


@pytest.mark.parametrize("mask", [ALL_BITS, np.uint64(0xF0)])
def test_insertion_sorts_stably_by_a_mask(mask):
    from vcelltools.kernels._jit import kernel

    @kernel()
    def sort(keys, lo, hi, mask):
        insert_sort(keys, lo, hi, mask)

    keys = np.random.default_rng(1).integers(0, 256, 40).astype(np.uint64)
    got = keys.copy()
    sort(got, 0, len(got), mask)
    np.testing.assert_array_equal(got, keys[np.argsort(keys & mask, kind="stable")])
