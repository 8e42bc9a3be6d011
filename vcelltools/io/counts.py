"""Whether a matrix holds counts, told from a few samples spread over it, and what to open instead where it does not.

Only stored values are looked at (never the positions), so that the question costs a few reads however large the
file is.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import NotCountsError, VcellError
from vcelltools.io.matrix import CsrMatrix, DenseMatrix, Matrix

if TYPE_CHECKING:
    from vcelltools.io.dataset import Dataset

N_PLACES = 6
VALUES_PER_PLACE = 4_096
_RARE = 0.01  # up to this share, negatives and NaN among whole numbers are damage
_MAX_COUNT = float(1 << 53)
_SAME_SUM = 1e-3  # cells normalised to one target differ by float32 rounding alone


@dataclass(frozen=True, kw_only=True)
class CountEvidence:
    """What a sample of the stored values says.

    Attributes
    ----------
    looks_like
        ``counts``, ``CP10K`` (each cell sums to one target), ``log1p CP10K``, ``log1p``, ``scaled`` (negative
        values), ``not finite``, ``fractions``, ``huge`` or ``empty``. A rare negative or NaN among whole numbers
        is damaged counts, not another scale: the kernels refuse it with its cell and gene.
    dtype
        How the values are stored.
    n_values
        Stored values looked at (zeros of dense matrices included).
    non_integer_share, negative_share, not_finite_share
        Shares of ``n_values``.
    minimum, maximum
        Smallest and largest finite value looked at; None where there is none.
    target_sum
        What each whole cell looked at sums to, where they agree and the values are not counts; else None.
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

    @property
    def is_counts(self) -> bool:
        """Whether nothing that was looked at contradicts counts."""
        return self.looks_like in ("counts", "empty")

    def describe(self) -> str:
        """Return one line: the verdict and what it rests on."""
        if self.looks_like == "empty":
            return "no value stored where it was sampled"
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
            "huge": "values beyond any count",
        }.get(self.looks_like, f"{self.looks_like} values")
        if self.target_sum is not None and self.looks_like == "CP10K":
            what = f"normalised values (each cell sums to {self.target_sum:,.6g})"
        return f"{what}, not counts ({seen}: {', '.join(parts)}{span})"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "is_counts": self.is_counts}


def get_count_evidence(matrix: Matrix, *, n_places: int = N_PLACES) -> CountEvidence:
    """Look at some values at ``n_places`` places spread over ``matrix``.

    Raises
    ------
    DataError
        Where the file is damaged at one of those places.
    """
    values: list[np.ndarray] = []
    cells: list[np.ndarray] = []  # the values of whole cells, for their sums
    for part, whole in _sample(matrix, n_places):
        values.append(part)
        cells += whole
    return judge_values(np.concatenate(values) if values else np.empty(0), cells, str(matrix.dtype))


def _sample(matrix: Matrix, n_places: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Return, for each place, the values and (where cells are whole there) the same cell by cell."""
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
        b = min(int(matrix.indptr[stop]), a + 4 * VALUES_PER_PLACE)  # one long column is cut
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
    """Judge sampled ``values``; ``cells`` are the values of whole cells, where they are known."""
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
    target = None
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
        looks, target = _judge_fractions(good, cells, high or 0.0)
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
    )


def _judge_fractions(values: np.ndarray, cells: list[np.ndarray], high: float) -> tuple[str, float | None]:
    """Tell normalised from log-normalised values by what whole cells sum to."""
    sums = np.array([c.sum(dtype=np.float64) for c in cells if len(c) and np.any(c)])
    if _agree(sums):
        return "CP10K", float(np.median(sums))
    if high < 20.0:  # log1p of any real count is below 20
        logged = np.array([np.expm1(c.astype(np.float64)).sum() for c in cells if len(c) and np.any(c)])
        if _agree(logged):
            return "log1p CP10K", float(np.median(logged))
        if np.count_nonzero(values) and high < 15.0:
            return "log1p", None
    return "fractions", None


def _agree(sums: np.ndarray) -> bool:
    return len(sums) >= 3 and float(np.ptp(sums)) <= _SAME_SUM * float(np.median(sums))


def require_counts(dataset: Dataset) -> CountEvidence:
    """Return the evidence that the data set's matrix holds counts.

    Raises
    ------
    NotCountsError
        Where it does not, with the evidence, naming the layers and modalities of the file that do.
    """
    evidence = get_count_evidence(dataset.matrix)
    if evidence.is_counts:
        return evidence
    raise NotCountsError(f"{dataset.matrix.where} holds {evidence.describe()}", hint=suggest_counts(dataset))


def suggest_counts(dataset: Dataset) -> str:
    """Return the remedy: the options that open a matrix of the same source that looks like counts."""
    here = (dataset.modality, dataset.layer)
    found = []
    for modality, layer, evidence in survey_counts(dataset.source):
        if evidence is None or not evidence.is_counts or evidence.looks_like == "empty" or (modality, layer) == here:
            continue
        options = (
            [f"--modality {shlex.quote(modality)}"] if modality is not None and modality != dataset.modality else []
        )
        if layer != "X" or not options:
            options.append(f"--layer {shlex.quote(layer)}")
        found.append((modality != dataset.modality, " ".join(options)))
    if not found:
        return "no other layer, raw or modality of it looks like counts: pass the file with the raw counts"
    return "counts are in it: pass " + ", or ".join(text for _, text in sorted(found))


def survey_counts(source: Any) -> list[tuple[str | None, str, CountEvidence | None]]:
    """Return (modality, layer, evidence) of every matrix of a source; no evidence where one cannot be read."""
    from vcelltools.io.dataset import list_choices, open_dataset

    out: list[tuple[str | None, str, CountEvidence | None]] = []
    for modality, layer in list_choices(source):
        try:
            with open_dataset(source, modality=modality, layer=layer) as ds:
                out.append((modality, layer, get_count_evidence(ds.matrix)))
        except VcellError:
            out.append((modality, layer, None))
    return out
