"""Decide whether a matrix holds counts, from a few samples spread over it.

Only stored values are examined, not positions, so that the check costs a few reads however large the
file is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.matrix import CsrMatrix, DenseMatrix, Matrix

if TYPE_CHECKING:
    from vcelltools.io.opened import Dataset

N_PLACES = 6
VALUES_PER_PLACE = 4_096
_RARE = 0.01  # up to this fraction, negatives and NaN among whole numbers are considered damage
_MAX_COUNT = float(1 << 53)
LOG_BASES = (math.e, 2.0, 10.0)
_SAME_SUM = 1e-3  # the sums of cells normalised to one target differ only by float32 rounding


@dataclass(frozen=True, kw_only=True)
class CountEvidence:
    """The evidence from a sample of the stored values.

    Attributes
    ----------
    looks_like
        ``counts``, ``CP10K`` (each cell sums to one target), ``log1p CP10K``, ``log1p``, ``scaled`` (negative
        values), ``not finite``, ``fractions``, ``huge`` or ``empty``. A rare negative or NaN among whole numbers
        means damaged counts, not another scale: the kernels reject it and name its cell and gene.
    dtype
        The storage dtype.
    n_values
        Number of stored values examined (including zeros of dense matrices).
    non_integer_share, negative_share, not_finite_share
        Fractions of ``n_values``.
    minimum, maximum
        Smallest and largest finite value examined, or None.
    target_sum
        The sum of each complete cell examined, if they agree and the values are not counts; otherwise None.
    log_base
        The base of the logarithm in which complete cells sum to one target; None if there is no such base.
    """

    looks_like: str
    dtype: str
    n_values: int
    non_integer_share: float
    negative_share: float
    not_finite_share: float
    minimum: float | None
    maximum: float | None
    target_sum: float | None = None
    log_base: float | None = None

    @property
    def is_counts(self) -> bool:
        """Whether all values examined are consistent with counts."""
        return self.looks_like in ("counts", "empty")

    def describe(self) -> str:
        """Return the verdict and its evidence in one line."""
        if self.looks_like == "empty":
            return "no stored value among the samples"
        seen = f"{self.n_values:,} values sampled"
        span = "" if self.minimum is None else f", min {self.minimum:.6g}, max {self.maximum:.6g}"
        parts = [f"{self.non_integer_share:.1%} are not whole numbers"]
        if self.negative_share:
            parts.append(f"{self.negative_share:.2%} are negative")
        if self.not_finite_share:
            parts.append(f"{self.not_finite_share:.2%} are NaN or infinite")
        if self.looks_like == "counts":
            whole = "all whole numbers" if len(parts) == 1 else f"damaged: {', '.join(parts[1:])}"
            return f"counts ({seen}: {whole}{span})"
        what = {
            "scaled": "scaled or centred values",
            "fractions": "fractional values",
            "not finite": "NaN or infinite values",
            "huge": "values too large for counts",
        }.get(self.looks_like, f"{self.looks_like} values")
        if self.log_base not in (None, math.e):
            what += f" with base {self.log_base:g}"
        if self.target_sum is not None and self.looks_like == "CP10K":
            what = f"normalised values (each cell sums to {self.target_sum:,.6g})"
        return f"{what}, not counts ({seen}: {', '.join(parts)}{span})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "is_counts": self.is_counts}


def get_count_evidence(matrix: Matrix, *, n_places: int = N_PLACES) -> CountEvidence:
    """Examine some values at ``n_places`` places spread over ``matrix``.

    Raises
    ------
    DataError
        If the file is damaged at one of those places.
    """
    values: list[np.ndarray] = []
    cells: list[np.ndarray] = []  # the values of complete cells, for their sums
    for part, whole in _sample(matrix, n_places):
        values.append(part)
        cells += whole
    return judge_values(np.concatenate(values) if values else np.empty(0), cells, str(matrix.dtype))


def _sample(matrix: Matrix, n_places: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Return, for each place, the values and (if the cells there are complete) the same cell by cell."""
    if isinstance(matrix, DenseMatrix):
        return _sample_dense(matrix, n_places)
    out = []
    n = len(matrix.indptr) - 1
    filled = matrix.nnz
    if filled == 0:
        return []
    done = 0
    for place in range(n_places):
        start = max(int(filled * place / n_places), done)
        if start >= filled:
            break
        row = int(np.searchsorted(matrix.indptr, start, side="right")) - 1
        last = int(np.searchsorted(matrix.indptr, matrix.indptr[row] + VALUES_PER_PLACE, side="right")) - 1
        stop = min(max(last, row + 1), n)
        a = int(matrix.indptr[row])
        b = min(int(matrix.indptr[stop]), a + 4 * VALUES_PER_PLACE)  # a long column is truncated
        part = matrix.read_values(a, b)
        done = max(b, int(matrix.indptr[stop]))
        ends = matrix.indptr[row : stop + 1] - a
        whole = (
            [part[i:j] for i, j in pairwise(ends) if j > i and j <= len(part)] if isinstance(matrix, CsrMatrix) else []
        )
        out.append((part, whole))
    return out


def _sample_dense(matrix: DenseMatrix, n_places: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    n, g = matrix.shape
    out = []
    if matrix.axis == 0:
        rows = max(1, min(-(-n // n_places), VALUES_PER_PLACE // g))
        for r0 in sorted({min(n * i // n_places, n - rows) for i in range(n_places)}):
            block = matrix.read_block(r0, r0 + rows, 0, g).block.copy()
            out.append((block.ravel(), list(block)))
    else:
        rows = min(n, VALUES_PER_PLACE)
        for i, c0 in enumerate(sorted({g * i // n_places for i in range(n_places)})):
            r0 = (n - rows) * i // n_places
            block = matrix.read_block(r0, r0 + rows, c0, c0 + 1).block.copy()
            out.append((block.ravel(), []))
    return out


def judge_values(values: np.ndarray, cells: list[np.ndarray], dtype: str) -> CountEvidence:
    """Judge sampled ``values``; ``cells`` are the values of complete cells, if known."""
    n = len(values)
    if n == 0 or not np.any(values):
        zero = 0.0 if n else None
        return CountEvidence(
            looks_like="empty",
            dtype=dtype,
            n_values=n,
            non_integer_share=0.0,
            negative_share=0.0,
            not_finite_share=0.0,
            minimum=zero,
            maximum=zero,
        )
    finite = np.isfinite(values) if values.dtype.kind == "f" else np.ones(n, bool)
    good = values[finite]
    fractional = int(np.count_nonzero(good != np.rint(good))) if good.dtype.kind == "f" else 0
    negative = int(np.count_nonzero(good < 0))
    low = float(good.min()) if len(good) else None
    high = float(good.max()) if len(good) else None
    target, base = None, None
    rare = max(_RARE * n, 1)
    if n - len(good) > rare:
        looks = "not finite"
    elif negative > rare or (negative and fractional):
        looks = "scaled"
    elif np.count_nonzero(good > _MAX_COUNT) > rare:
        looks = "huge"
    elif fractional == 0:
        looks = "counts"
    else:
        looks, target, base = _judge_fractions(good, cells, high or 0.0)
    return CountEvidence(
        looks_like=looks,
        dtype=dtype,
        n_values=n,
        non_integer_share=fractional / n,
        negative_share=negative / n,
        not_finite_share=(n - len(good)) / n,
        minimum=low,
        maximum=high,
        target_sum=target,
        log_base=base,
    )


def _judge_fractions(
    values: np.ndarray, cells: list[np.ndarray], high: float
) -> tuple[str, float | None, float | None]:
    """Distinguish normalised from log-normalised values by the sums of cells; return (verdict, sum, base)."""
    whole = [c.astype(np.float64) for c in cells if len(c) and np.any(c)]
    sums = np.array([c.sum() for c in whole])
    if _agree(sums):
        return "CP10K", float(np.median(sums)), None
    if high < 30.0:  # log1p of any real count is below 20, to base 2 below 30
        for base in LOG_BASES:
            sums = np.array([np.expm1(c * math.log(base)).sum() for c in whole])
            if _agree(sums):
                return "log1p CP10K", float(np.median(sums)), base
        if np.count_nonzero(values) and high < 15.0:
            return "log1p", None, None
    return "fractions", None, None


def _agree(sums: np.ndarray) -> bool:
    return len(sums) >= 3 and float(np.ptp(sums)) <= _SAME_SUM * float(np.median(sums))


def find_log_base(dataset: Dataset) -> tuple[float, float | None, list[str]]:
    """Return the base of a matrix of log1p values, the sum to which its cells were scaled, and warnings.

    If complete cells were normalised to one target, the base in which they sum to it is the base of the values.
    Otherwise (with a subset of the genes, or in a prediction), the target is None, ``uns/log1p/base`` is used, and the
    natural logarithm is the default.
    """
    stated, notes = dataset.stated_base, []
    if stated is not None and not (stated > 1 and math.isfinite(stated)):
        notes.append(f"{dataset.label}: uns/log1p/base is {stated:g}, which is not a valid base; it was ignored")
        stated = None
    evidence = get_count_evidence(dataset.matrix)
    found = evidence.log_base
    base = found or stated or math.e
    if found is not None and not math.isclose(found, stated or math.e):
        says = "does not state another base than e" if stated is None else f"states base {stated:g}"
        notes.append(
            f"{dataset.label}: the cells sum to one target as log1p with base {_name_base(found)}, but uns/log1p "
            f"{says}; "
            f"the values were read with base {_name_base(found)}"
        )
    elif not math.isclose(base, math.e):
        notes.append(f"{dataset.label}: the values are log1p with base {base:g}, as uns/log1p/base states")
    return base, None if found is None else evidence.target_sum, notes


def _name_base(base: float) -> str:
    return "e" if math.isclose(base, math.e) else f"{base:g}"
