"""Zlib streams of sparse rows against zlib."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from vcelltools.kernels.deflate import _choose_lengths, deflate_rows, get_most_bytes, get_most_tokens


def pack(X: np.ndarray, n_rows: int | None = None) -> bytes:
    n_rows = len(X) if n_rows is None else n_rows
    S = sparse.csr_matrix(X)
    size = X.dtype.itemsize
    n_bytes = S.nnz * size, n_rows * X.shape[1] * size
    out = np.full(get_most_bytes(*n_bytes) + 8, 77, np.uint8)
    tokens = np.full(get_most_tokens(*n_bytes) + 8, -7, np.int16)
    data = S.data.astype(np.int64)
    n = deflate_rows(
        S.indptr.astype(np.int64), S.indices.astype(np.int32), data, X.shape[1], n_rows, size, tokens[:-8], out[:-8]
    )
    assert (out[-8:] == 77).all() and (tokens[-8:] == -7).all() and n <= len(out) - 8
    return out[:n].tobytes()


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 3000)),
    density=st.sampled_from([0, 0.001, 0.02, 0.1, 0.6, 1.0]),
    top=st.sampled_from([1, 3, 255, 256, 30_000]),
    dtype=st.sampled_from(["int16", "uint16", "int32", "int64"]),
    empty=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_zlib_unpacks_the_dense_block(shape, density, top, dtype, empty, seed):
    rng = np.random.default_rng(seed)
    X = np.where(rng.random(shape) < density, rng.integers(1, top + 1, shape), 0).astype(dtype)
    dense = np.concatenate([X, np.zeros((empty, shape[1]), dtype)])
    assert zlib.decompress(pack(X, len(dense))) == dense.tobytes()


@pytest.mark.parametrize("run", [*range(1, 12), *range(256, 266), 515, 516, 517, 518, 519, 1000, 40_000])
def test_every_length_of_a_run(run):
    X = np.zeros((1, run + 2), np.int16)
    X[0, 0] = X[0, -1] = 1 + 256
    assert zlib.decompress(pack(X)) == X.tobytes()


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
def test_the_largest_values_and_all_bytes(dtype):
    X = np.concatenate([np.arange(70_000) % (1 << 15), [np.iinfo(dtype).max]]).astype(dtype)[None]
    assert zlib.decompress(pack(X)) == X.tobytes()


def test_counts_are_packed_tighter_than_by_zlib():
    X = np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(0.05, 1.5, (1, 36_000)), (3, 36_000))
    assert 0.02 < np.mean(X > 0) < 0.15
    assert len(pack(X.astype(np.int16))) < 0.8 * len(zlib.compress(X.astype(np.int16).tobytes(), 4))


@settings(max_examples=200, deadline=None)
@given(
    frequency=st.lists(st.integers(0, 10**9), min_size=2, max_size=40).filter(lambda f: sum(x > 0 for x in f) >= 2),
    most=st.sampled_from([6, 7, 15]),
)
def test_code_lengths_fill_the_code_space(frequency, most):
    lengths = _choose_lengths(np.array(frequency), most)
    used = np.array(frequency) > 0
    assert ((lengths > 0) == used).all() and lengths.max() <= most
    assert sum(2.0**-n for n in lengths[used]) == 1.0
    cost = int(np.dot(frequency, lengths))
    assert cost <= np.sum(frequency) * np.ceil(np.log2(max(used.sum(), 2)))  # no worse than codes of one length


def test_lengths_of_fibonacci_frequencies_are_cut():
    f = [1, 1]
    while len(f) < 30:
        f.append(f[-1] + f[-2])
    assert _choose_lengths(np.array(f), 40).max() == 29
    lengths = _choose_lengths(np.array(f), 15)
    assert lengths.max() == 15 and sum(2.0**-n for n in lengths) == 1.0
