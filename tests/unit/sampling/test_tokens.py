"""Tokens: the published edges, exact inverses, refused values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vcelltools as vc
from vcelltools.errors import DataError, UsageError

MAX = 100_000
ALL = {"direct": MAX, "binned": None, "log": MAX, "loglinear": None}
TOKENIZERS = {k: vc.Tokenizer(k, max_count=m) for k, m in ALL.items()}
BINS = (0, 1, 5, 10, 50, 100, 500, 1000, 5000)


def naive(kind: str, x: int) -> int:
    if kind == "direct":
        return x
    if kind == "binned":
        return sum(b < x for b in BINS)
    if kind == "log":
        return math.floor(math.log1p(x))
    if x < 16:
        return x
    if x > 65_535:
        return 63
    e = x.bit_length() - 1
    return 16 + 4 * (e - 4) + ((x >> (e - 2)) & 3)


@settings(deadline=None, max_examples=300)
@given(x=st.integers(0, MAX), kind=st.sampled_from(sorted(ALL)), dtype=st.sampled_from(["int32", "int64", "float64"]))
def test_tokens_are_the_formula(x, kind, dtype):
    assert TOKENIZERS[kind].encode(np.array([x], dtype))[0] == naive(kind, x)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_every_token_decodes_to_a_count_of_its_own(kind):
    t = TOKENIZERS[kind]
    tokens = np.arange(t.vocab_size)
    assert np.array_equal(t.encode(np.rint(t.decode(tokens))), tokens)
    assert np.array_equal(t.encode(t.edges), tokens) and (np.diff(t.edges) > 0).all()
    assert t.mask == t.vocab_size
    with pytest.raises(DataError, match="not a token"):
        t.decode([t.mask])


def test_vocabularies_and_edges_are_the_published_ones():
    assert [TOKENIZERS[k].vocab_size for k in ("direct", "binned", "loglinear")] == [MAX + 1, 10, 64]
    assert TOKENIZERS["log"].vocab_size == math.floor(math.log1p(MAX)) + 1
    assert TOKENIZERS["log"].edges[1:12].tolist() == [2, 7, 20, 54, 148, 403, 1096, 2980, 8103, 22026, 59874]
    assert TOKENIZERS["binned"].encode([0, 1, 2, 5, 6, 5000, 5001]).tolist() == [0, 1, 2, 2, 3, 8, 9]
    log = TOKENIZERS["log"]
    assert log.encode([0])[0] == log.encode([1])[0], "the log tokens cannot tell 0 from 1"
    assert TOKENIZERS["loglinear"].encode([65_535, 65_536, 10**9]).tolist() == [63, 63, 63]


@pytest.mark.parametrize("kind", sorted(ALL))
def test_what_is_no_count_is_refused(kind):
    t = TOKENIZERS[kind]
    for bad in ([-1], [1.5], [float("nan")], ["a"], [True], [-0.5]):
        with pytest.raises(DataError):
            t.encode(np.array(bad))
    if kind in ("direct", "log"):
        with pytest.raises(DataError, match="above max_count"):
            t.encode([MAX + 1])


def test_shapes_and_settings():
    t = vc.Tokenizer()
    assert t.encode(np.zeros((2, 3, 4), np.uint16)).shape == (2, 3, 4) and t.encode(np.zeros((0,))).shape == (0,)
    for args, kwargs in (
        (("nope",), {}),
        (("direct",), {}),
        (("log",), {"max_count": 0}),
        (("binned",), {"max_count": 9}),
    ):
        with pytest.raises(UsageError):
            vc.Tokenizer(*args, **kwargs)
