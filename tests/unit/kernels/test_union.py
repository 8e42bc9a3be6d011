"""Rows on a union of genes, and cells as dense rows, against plain numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.kernels.cells import spread_dense
from vcelltools.kernels.faults import BAD_INDEX, NEGATIVE, NOT_WHOLE, OK
from vcelltools.kernels.union import count_rows, map_rows

U = 150  # three words of bits


def run(indptr, indices, data, gene_of, n_out):
    distinct = len(np.unique(gene_of)) == len(gene_of)
    bits, acc = np.zeros(-(-U // 64), np.uint64), np.zeros(U, np.int64)
    b = len(indptr) - 1
    nnz, found, where = np.empty(b, np.int64), np.empty((5, b), np.int64), np.zeros(2, np.int64)
    rows = (indptr, indices, data, gene_of, n_out, distinct, bits, acc)
    assert count_rows(*rows, nnz, found, where) == OK
    acc[:] = 12345  # what a row left behind must not matter
    ends, i_out, d_out = np.empty(b + 1, np.int64), np.empty(len(data), np.int32), np.empty(len(data), np.int32)
    assert map_rows(*rows, ends, i_out, d_out, where) == OK
    assert not bits.any()
    return nnz, found, ends, i_out[: ends[-1]], d_out[: ends[-1]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_out=st.sampled_from([1, 64, 65, 149, U]),
    distinct=st.booleans(),
    rising=st.booleans(),
    dtype=st.sampled_from(["int32", "float32"]),
)
def test_rows_on_a_union_are_those_of_numpy(seed, n_out, distinct, rising, dtype):
    rng = np.random.default_rng(seed)
    g = 90
    gene_of = rng.permutation(U)[:g].astype(np.int32) if distinct else rng.integers(0, U, g).astype(np.int32)
    rows = [rng.choice(g, rng.integers(0, 40), replace=not rising) for _ in range(5)]
    indices = np.concatenate([np.sort(r) if rising else r for r in rows]).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    data = rng.integers(0, 4, len(indices)).astype(dtype)
    dense = np.zeros((5, U), np.int64)
    np.add.at(dense, (np.repeat(np.arange(5), np.diff(indptr)), gene_of[indices]), data.astype(np.int64))
    kept = dense[:, :n_out]
    nnz, found, ends, i_out, d_out = run(indptr, indices, data, gene_of, n_out)
    back = np.zeros_like(kept)
    back[np.repeat(np.arange(5), np.diff(ends)), i_out] = d_out
    assert np.array_equal(back, kept) and np.array_equal(nnz, (kept > 0).sum(1)) and np.array_equal(np.diff(ends), nnz)
    assert all((np.diff(i_out[a:b]) > 0).all() for a, b in pairwise(ends)) and (d_out > 0).all()
    assert np.array_equal(found[0], (dense > 0).sum(1)) and np.array_equal(found[1], dense.sum(1))
    assert np.array_equal(found[2], kept.sum(1)) and np.array_equal(found[3], kept.max(1))
    top = kept.max(1) > 0
    assert np.array_equal(found[4][top], kept.argmax(1)[top])


@pytest.mark.parametrize(("index", "value", "fault"), [(90, 1, BAD_INDEX), (-1, 1, BAD_INDEX), (3, -1, NEGATIVE),
                                                       (3, 0.5, NOT_WHOLE)])  # fmt: skip
def test_a_fault_is_found_where_it_is(index, value, fault):
    indices, data = np.array([0, 5, index, 7], np.int32), np.array([1, 2, value, 3], np.float32)
    gene_of = np.arange(90, dtype=np.int32)
    bits, acc, where = np.zeros(3, np.uint64), np.zeros(U, np.int64), np.zeros(2, np.int64)
    rows = (np.array([0, 2, 4]), indices, data, gene_of, U, True, bits, acc)
    assert count_rows(*rows, np.empty(2, np.int64), np.empty((5, 2), np.int64), where) == fault
    assert where.tolist() == [1, 2]
    assert map_rows(*rows, np.empty(3, np.int64), np.empty(4, np.int32), np.empty(4, np.int32), where) == fault


@pytest.mark.parametrize("log", [False, True])
def test_dense_rows_are_scaled_and_placed(log):
    rng = np.random.default_rng(0)
    block = rng.integers(0, 3, (6, 9)).astype(np.int32)
    position = np.array([2, -1, 0, 3, -1, 1, 4, -1, -1], np.int32)
    rows, to, factor = np.array([4, 0, 4]), np.array([1, 3, 0]), np.array([2.0, 0.5, 1.0])
    out = np.full((4, 5), 7, np.float32)
    spread_dense(block, rows, position, factor, log, out, to)
    wanted = np.full((4, 5), 7.0)  # the row that no cell goes to
    wanted[to] = 0
    for r, t, f in zip(rows, to, factor, strict=True):
        for c, p in enumerate(position):
            if p >= 0:
                wanted[t, p] = np.log1p(block[r, c] * f) if log else block[r, c] * f
    np.testing.assert_allclose(out, wanted, rtol=1e-6)
