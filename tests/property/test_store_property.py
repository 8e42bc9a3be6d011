"""Whatever the counts are: frames give them back, values are scanpy's, draws are distinct."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.screens import normalise
from vcelltools.kernels.store import draw_distinct, finish_rows
from vcelltools.stores.format import decode_frame, encode_frames, fill_work, get_frame_starts

COUNTS = st.one_of(st.just(0), st.integers(0, 5), st.sampled_from([254, 255, 256, 65_534, 65_535, 2_147_483_647]))


@given(
    counts=hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 30)), elements=COUNTS, fill=st.just(0)),
    cuts=st.lists(st.integers(1, 40), max_size=4),
    extra=st.integers(0, 1000),
    single=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_rows_to_frames_and_back(counts, cuts, extra, single):
    n, g = counts.shape
    edges = np.unique([0, *[c for c in cuts if c < n], n])
    starts = get_frame_starts(np.diff(edges))
    assert starts[0] == 0 and starts[-1] == n and set(edges) <= set(starts.tolist())
    assert (np.diff(starts) >= 1).all() and (np.diff(starts) <= 16).all()
    libsize = counts.sum(axis=1) + extra
    work = np.zeros((n, 128), np.uint16)
    over = fill_work(work, counts.astype(np.uint32), 0)
    packed, values = np.empty((n, g), np.uint8), np.empty((n, 128), np.uint16)
    escapes = np.empty((n * g, 3), np.int64)
    k = finish_rows(work, np.arange(n), libsize, over, g, 1e4, single, packed, escapes, values)
    dtype = np.float32 if single else np.float64
    assert np.array_equal(values[:, :g].view(np.float16), normalise(counts, libsize, dtype=dtype))
    assert not values[:, g:].any()
    blob, sizes = encode_frames(packed, escapes[:k], starts)
    at = 0
    for f, size in enumerate(sizes.tolist()):
        back = np.empty((starts[f + 1] - starts[f], g), np.uint32)
        decode_frame(blob[at : at + size], back, where="frame")
        assert np.array_equal(back, counts[starts[f] : starts[f + 1]])
        at += size
    assert at == len(blob)
    if extra == 0 and counts.any():
        row = int(np.argmax(counts.any(axis=1)))
        libsize[row] -= 1  # a library smaller than its counts is told, not divided by
        assert finish_rows(work, np.arange(n), libsize, over, g, 1e4, single, packed, escapes, values) == -row - 1


@given(
    seed=st.integers(0, 2**32),
    length=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    size=st.integers(1, 50),
)
@settings(max_examples=150, deadline=None)
def test_draws_are_distinct_and_inside(seed, length, size):
    rng = np.random.default_rng(seed)
    length = np.array(length)
    start = rng.integers(0, 1000, len(length))
    out = np.empty((len(length), size), np.int64)
    draw_distinct(rng.random(out.shape), start, length, out)
    for rows, a, n in zip(out, start, length, strict=True):
        assert (rows >= a).all() and (rows < a + n).all()
        if n >= size:
            assert len(set(rows)) == size
