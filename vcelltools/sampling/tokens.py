"""Convert counts to tokens of a vocabulary, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vcelltools.errors import DataError, UsageError, checked

KINDS = ("direct", "binned", "log", "loglinear")
_BINS = (0, 1, 5, 10, 50, 100, 500, 1000, 5000)
_LINEAR, _TOP = 16, 65_535


class Tokenizer:
    """Converts counts to tokens, one per count.

    Parameters
    ----------
    kind
        ``direct``: the count itself. ``binned``: the number of values among 0, 1, 5, 10, 50, 100, 500, 1000, 5000 below
        the count, 10 tokens. ``log``: ⌊log1p⌋, which does not distinguish 0 from 1. ``loglinear``: the count below 16,
        then four tokens per octave, 64 tokens.
    max_count
        The largest count, which determines the vocabulary of ``direct`` and ``log``.

    Attributes
    ----------
    vocab_size
        Number of tokens, 0 … ``vocab_size`` − 1.
    mask
        The token of masked values, ``vocab_size``, which no count has.
    edges
        (vocab_size,) int64: the smallest count of each token.

    Raises
    ------
    UsageError
        If the kind is unknown, or ``max_count`` is missing or not used.

    Examples
    --------
    >>> import numpy as np
    >>> import vcelltools as vc
    >>> tokens = vc.Tokenizer("loglinear")
    >>> tokens.encode(np.array([0, 1, 15, 16, 20, 70000])).tolist()
    [0, 1, 15, 16, 17, 63]
    >>> tokens.vocab_size, tokens.mask
    (64, 64)
    """

    @checked
    def __init__(self, kind: str = "loglinear", *, max_count: int | None = None) -> None:
        if kind not in KINDS:
            raise UsageError(f"tokenizer {kind!r} is not known", hint=f"one of: {', '.join(KINDS)}")
        needs = kind in ("direct", "log")
        if needs and (max_count is None or max_count < 1):
            raise UsageError(f"the {kind} tokenizer needs the largest count", hint="pass max_count=..., at least 1")
        if not needs and max_count is not None:
            raise UsageError(f"the {kind} tokenizer does not use max_count", hint="remove max_count")
        self.kind, self.max_count = kind, max_count
        self.edges = self._make_edges()
        self.vocab_size = len(self.edges)
        self.mask = self.vocab_size

    def _make_edges(self) -> np.ndarray:
        if self.kind == "direct":
            return np.arange(int(self.max_count or 0) + 1, dtype=np.int64)
        if self.kind == "binned":
            return np.array([0, *(b + 1 for b in _BINS)], np.int64)
        if self.kind == "log":
            top = int(math.log1p(int(self.max_count or 0)))
            return np.array([0, *(_get_log_edge(k) for k in range(1, top + 1))], np.int64)
        octaves = [(4 + q) << (e - 2) for e in range(4, 16) for q in range(4)]
        return np.array([*range(_LINEAR), *octaves], np.int64)

    def encode(self, counts: Any) -> np.ndarray:
        """Return int32 tokens with the shape of ``counts``.

        Raises
        ------
        DataError
            If a count is negative, missing, fractional or above ``max_count``.
        """
        from vcelltools.kernels import tokens as kernels

        values = np.asarray(counts)
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.dtype.kind == "b" or flat.dtype.kind not in "iuf":
            raise DataError(f"counts must be numbers, not {values.dtype}")
        if flat.dtype == np.float16:
            flat = flat.astype(np.float32)
        out, where = np.empty(len(flat), np.int32), np.zeros(1, np.int64)
        if self.kind == "loglinear":
            status = kernels.encode_loglinear(flat, out, where)
        else:
            most = -1 if self.max_count is None else int(self.max_count)
            status = kernels.count_edges(flat, self.edges[1:], most, out, where)
        if status:
            value = flat[where[0]]
            what = {
                kernels.NEGATIVE: "is negative or missing",
                kernels.NOT_WHOLE: "is not a whole number",
                kernels.TOO_LARGE: f"is above max_count {self.max_count:,}" if self.max_count else "",
            }[status]
            raise DataError(
                f"count {value} at position {int(where[0]):,} {what}", hint="only counts can be converted to tokens"
            )
        return out.reshape(values.shape)

    def decode(self, tokens: Any) -> np.ndarray:
        """Return the middle of the counts of each token, float32, or the smallest count for an open last token.

        Raises
        ------
        DataError
            If a value is not a token; the mask is not a token.
        """
        values = np.asarray(tokens)
        if values.dtype.kind not in "iu":
            raise DataError(f"tokens must be whole numbers, not {values.dtype}")
        if values.size and (int(values.min()) < 0 or int(values.max()) >= self.vocab_size):
            bad = values.reshape(-1)[(values.reshape(-1) < 0) | (values.reshape(-1) >= self.vocab_size)][0]
            raise DataError(f"{int(bad)} is not a token", hint=f"0 to {self.vocab_size - 1}; {self.mask} masks")
        return self._get_middles()[values]

    def _get_middles(self) -> np.ndarray:
        last = {"binned": int(self.edges[-1]), "loglinear": _TOP}.get(self.kind, int(self.max_count or 0))
        ends = np.append(self.edges[1:] - 1, last)
        return ((self.edges + ends) / 2).astype(np.float32)


def _get_log_edge(k: int) -> int:
    """Return the smallest whole number whose log1p is at least ``k``."""
    x = math.ceil(math.expm1(k))
    while math.log1p(x - 1) >= k:
        x -= 1
    while math.log1p(x) < k:
        x += 1
    return x
