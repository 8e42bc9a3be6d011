"""Values collected by gene from chunks of any layout, then ranked: every group against the controls.

Chunks are bucketed by gene as they come (4 or 8 bytes of value and 2 bytes of group a non-zero); then
:func:`vcelltools.kernels.ranksum.bucket_rank_sum` sorts and sweeps each gene. Chunks come from any thread, genes are
worked on by several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.kernels.bucket import (
    BAD_INDEX,
    DUPLICATE,
    NEGATIVE,
    NOT_FINITE,
    OK,
    csc_bucket,
    csr_bucket,
    dense_bucket,
)
from vcelltools.kernels.pvalues import asymptotic_p, set_exact_p
from vcelltools.kernels.ranksum import RADIX, bucket_counts_below, bucket_rank_sum
from vcelltools.workers import share_work

if TYPE_CHECKING:
    from vcelltools.scoring.pairwise import Plan

MAX_GROUPS = 65_535


@dataclass(frozen=True, kw_only=True)
class RankSums:
    """What the kernel knows of every group and gene; rows are groups, columns genes.

    Attributes
    ----------
    size_k
        (k,) int64 cells of each group.
    sum_kg, nnz_kg
        Sum (float64, in cell order) and number of positive values.
    moment_kg
        Sum of expm1 (or log1p) of the values, or None where it was not asked for.
    single_kg
        Sums in float32 arithmetic, or None where they were not asked for.
    u_kg, tie_kg, p_kg
        U of the group against the controls, sum of t³ − t over ties, two-sided p; NaN in the control's row;
        None where no test was asked for.
    control_tie_g
        (g,) sum of t³ − t over the positive ties among the controls alone.
    max_value
        The largest value.
    """

    size_k: np.ndarray
    sum_kg: np.ndarray
    nnz_kg: np.ndarray
    moment_kg: np.ndarray | None
    single_kg: np.ndarray | None
    u_kg: np.ndarray | None
    tie_kg: np.ndarray | None
    p_kg: np.ndarray | None
    control_tie_g: np.ndarray | None
    max_value: float

    @property
    def mean_kg(self) -> np.ndarray:
        """(k, g) float64 pseudobulk: the mean over the group's cells; NaN for a group without cells."""
        size = self.size_k.astype(np.float64)[:, None]
        return np.divide(self.sum_kg, size, out=np.full_like(self.sum_kg, np.nan), where=size > 0)


class GeneBuckets:
    """Collects chunks of non-negative values by gene; any number of matrices may be added.

    Parameters
    ----------
    n_genes, n_groups
        Width of the matrices, and number of groups (the control among them).
    capacity
        At most this many positive values will come; memory is touched only as they do.
    dtype
        float32 or float64: the values' type. float64 takes 10 bytes a value, float32 six.
    n_blocks
        How many row chunks will come; CSC and column chunks all share one block.
    """

    def __init__(self, *, n_genes: int, n_groups: int, capacity: int, dtype: np.dtype | str, n_blocks: int) -> None:
        if n_groups > MAX_GROUPS:
            raise UsageError(f"{n_groups:,} groups; at most {MAX_GROUPS:,} are compared at once")
        self.n_genes, self.n_groups = n_genes, n_groups
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"float32 or float64, not {self.dtype}")
        single = self.dtype == np.float32
        self._bits = np.dtype("uint32" if single else "uint64")
        self._magnitude = self._bits.type(2**31 - 1 if single else 2**63 - 1)
        self._inf = self._bits.type(0x7F800000 if single else 0x7FF << 52)
        self._keys = np.empty(capacity, self._bits)
        self._groups = np.empty(capacity, np.uint16)
        self._start_bg = np.zeros((n_blocks, n_genes), np.int64)
        self._stop_bg = np.zeros((n_blocks, n_genes), np.int64)
        self._size_k = np.zeros(n_groups, np.int64)
        self._used = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def size_k(self) -> np.ndarray:
        """(k,) int64 cells of each group so far."""
        return self._size_k

    @property
    def n_values(self) -> int:
        """Positive values so far, those of cells that were left out among them."""
        return self._used

    def _reserve(self, n: int) -> int:
        with self._lock:
            at = self._used
            self._used += n
        if self._used > len(self._keys):
            raise ValueError("more values came than the capacity announced")
        return at

    def _workspace(self, n: int) -> np.ndarray:
        have = getattr(self._local, "seen", None)
        if have is None or len(have) < n:
            have = self._local.seen = np.empty(n, np.int32)
        return have[:n]

    def count_cells(self, codes: np.ndarray) -> None:
        """Add the cells of one matrix to the groups' sizes; call it once per matrix."""
        self._size_k += np.bincount(codes[codes >= 0], minlength=self.n_groups)

    def add_csr(
        self,
        block: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        codes_b: np.ndarray,
        at: int | None = None,
    ) -> Fault | None:
        """Add rows as block ``block``; returns the first fault, with nothing added, or None. Thread-safe.

        After a fault the mended chunk may come again with the fault's ``at``: it takes the place kept for it.
        """
        at = self._reserve(len(data)) if at is None else at
        status, position, _ = csr_bucket(
            indptr, indices, data.view(self._bits), codes_b, self.n_genes, self._magnitude, self._inf,
            self._keys, self._groups, at, self._start_bg[block], self._stop_bg[block], self._workspace(self.n_genes),
        )  # fmt: skip
        return Fault.of(status, position, at)

    def add_csc(
        self,
        block: int,
        first: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        codes_n: np.ndarray,
        at: int | None = None,
    ) -> Fault | None:
        """Add the columns from gene ``first`` on; all columns of a matrix share one block. Thread-safe."""
        at = self._reserve(len(data)) if at is None else at
        status, position, _ = csc_bucket(
            indptr, indices, data.view(self._bits), codes_n, first, self._magnitude, self._inf,
            self._keys, self._groups, at, self._start_bg[block], self._stop_bg[block], self._workspace(len(codes_n)),
        )  # fmt: skip
        return Fault.of(status, position, at)

    def add_dense(self, block: int, first: int, values: np.ndarray, codes_b: np.ndarray) -> Fault | None:
        """Add a dense block (b, w) whose first column is gene ``first``. Thread-safe."""
        at = self._reserve(int(np.count_nonzero(values)))
        status, position, _ = dense_bucket(
            values.view(self._bits), codes_b, first, self._magnitude, self._inf,
            self._keys, self._groups, at, self._start_bg[block], self._stop_bg[block],
        )  # fmt: skip
        return Fault.of(status, position, at)

    def reorder(self, first: int, stop: int, order: np.ndarray) -> None:
        """Bring the genes of the blocks ``first:stop`` into the order of ``order``, their positions so far."""
        for at_bg in (self._start_bg, self._stop_bg):
            at_bg[first:stop] = at_bg[first:stop, order]

    def gene_values(self, gene: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (positive values, group codes) of one gene, in cell order."""
        parts = [slice(a, b) for a, b in zip(self._start_bg[:, gene], self._stop_bg[:, gene], strict=True)]
        values = self._keys.view(self.dtype)
        return np.concatenate([values[s] for s in parts]), np.concatenate([self._groups[s] for s in parts])

    def rank_sum(
        self,
        control: int,
        *,
        test: bool = True,
        continuity: bool = True,
        moment: str | None = None,
        single: np.ndarray | None = None,
        exact: bool = False,
        threads: int = 1,
        advance: Callable[[float], None] = lambda n: None,
    ) -> RankSums:
        """Sort and sweep every gene.

        Parameters
        ----------
        control
            The control's group.
        test
            False leaves out the sort: sums alone.
        continuity
            Subtract 0.5 from U's distance to its mean.
        moment
            ``"expm1"`` or ``"log1p"``: sum that of the values too.
        single
            (k,) factors: sum value · factor in their precision, rounded at every step (how a mean along the cells
            comes out of numpy and scipy.sparse).
        exact
            Exact p where there are no ties and one side has at most eight cells, as scipy's ``method="auto"``.
        advance
            Told the number of values of each batch of genes that is done.
        """
        n_k, n_g = self.n_groups, self.n_genes
        none = np.zeros((1, 1))
        sum_kg = np.zeros((n_k, n_g))
        nnz_kg = np.zeros((n_k, n_g), np.int64)
        moment_kg = np.zeros((n_k, n_g)) if moment else none
        inverse_k = np.empty(0, self.dtype) if single is None else np.ascontiguousarray(single)
        single_kg = np.zeros((n_k, n_g) if single is not None else (1, 1), inverse_k.dtype)
        power = {None: 0, "expm1": 1, "log1p": 2}[moment]
        u_kg = np.full((n_k, n_g), np.nan) if test else none
        tie_kg = np.full((n_k, n_g), np.nan) if test else none
        p_kg = np.full((n_k, n_g), np.nan) if test else none
        control_tie_g, max_g = np.zeros(n_g), np.zeros(n_g)
        count_g = (self._stop_bg - self._start_bg).sum(axis=0)
        largest = int(count_g.max(initial=0))
        values = self._keys.view(self.dtype)
        edges = np.searchsorted(np.cumsum(count_g + 64), np.arange(0, int((count_g + 64).sum()), 1 << 20)).tolist()
        edges = sorted({*edges, 0, n_g})

        def make_worker() -> Callable[[tuple[int, int]], None]:
            buf, tmp = np.empty(largest, np.uint64), np.empty(largest, np.uint64)
            hist = np.empty(RADIX, np.int64)

            def work(genes: tuple[int, int]) -> None:
                first, stop = genes
                bucket_rank_sum(
                    self._start_bg, self._stop_bg, self._keys, values, self._groups, first, stop,
                    self._size_k, control, 0.5 if continuity else 0.0, test, power, inverse_k, buf, tmp, hist,
                    sum_kg, nnz_kg, moment_kg, single_kg, u_kg, tie_kg, p_kg, control_tie_g, max_g,
                )  # fmt: skip
                advance(float(count_g[first:stop].sum()))

            return work

        share_work(pairwise(edges), [make_worker() for _ in range(max(1, threads))])
        if test and exact:
            set_exact_p(u_kg, tie_kg, p_kg, self._size_k, control)
        return RankSums(
            size_k=self._size_k.copy(),
            sum_kg=sum_kg,
            nnz_kg=nnz_kg,
            moment_kg=moment_kg if moment else None,
            single_kg=single_kg if single is not None else None,
            u_kg=u_kg if test else None,
            tie_kg=tie_kg if test else None,
            p_kg=p_kg if test else None,
            control_tie_g=control_tie_g if test else None,
            max_value=float(max_g.max(initial=0.0)),
        )

    def sum_pairwise(self, plan: Plan, *, threads: int = 1) -> np.ndarray:
        """Return (k, g) sums as numpy's own come out, from buckets whose groups are a plan's partial sums.

        The partial sums become the groups that they belong to: the buckets can then be ranked.
        """
        from vcelltools.kernels.pairwise import bucket_pairwise

        n_k = len(plan.leaf_k) - 1
        sum_kg = np.zeros((n_k, self.n_genes), self.dtype)
        values = self._keys.view(self.dtype)

        def make_worker() -> Callable[[tuple[int, int]], None]:
            slot_sum = np.empty(plan.n_slots, self.dtype)

            def work(genes: tuple[int, int]) -> None:
                bucket_pairwise(
                    self._start_bg, self._stop_bg, values, self._groups, *genes, plan.first_l, plan.lanes_l,
                    plan.tail_l, plan.merges_l, plan.leaf_k, slot_sum, sum_kg,
                )  # fmt: skip

            return work

        edges = [*range(0, self.n_genes, 64), self.n_genes]
        share_work(pairwise(edges), [make_worker() for _ in range(max(1, threads))])
        for at in range(0, self._used, 1 << 20):
            part = self._groups[at : min(at + (1 << 20), self._used)]
            part[:] = np.take(plan.group_s, part, mode="clip")  # places that were kept for nothing hold anything
        self._size_k = np.bincount(plan.group_s, weights=self._size_k, minlength=n_k).astype(np.int64)
        self.n_groups = n_k
        return sum_kg

    def rank_constant(
        self, value_g: np.ndarray, size_k: np.ndarray, control: int, sums: RankSums, *, continuity: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare groups whose every cell is ``value_g`` with the controls in the buckets.

        Parameters
        ----------
        value_g
            (g,) the one value of every cell of every group.
        size_k
            (k,) cells of each group.
        sums
            What :meth:`rank_sum` returned for these buckets.

        Returns
        -------
        u_kg, tie_kg, p_kg
            As in :class:`RankSums`.
        """
        value_g = np.ascontiguousarray(value_g, self.dtype)
        below_g, equal_g = np.zeros(self.n_genes, np.int64), np.zeros(self.n_genes, np.int64)
        bits_g = value_g.view(self._bits)
        bucket_counts_below(self._start_bg, self._stop_bg, self._keys, self._groups, control, bits_g, below_g, equal_g)
        n2 = float(sums.size_k[control])
        zeros_g = n2 - sums.nnz_kg[control]
        at_zero = value_g == 0
        a_g = np.where(at_zero, zeros_g, equal_g)
        less_g = np.where(at_zero, 0.0, zeros_g + below_g)
        assert sums.control_tie_g is not None
        controls_tie_g = sums.control_tie_g + zeros_g**3 - zeros_g
        n1 = size_k.astype(np.float64)[:, None]
        u_kg = n1 * (less_g + a_g / 2)
        tie_kg = controls_tie_g + 3 * a_g * n1 * (a_g + n1) + n1**3 - n1
        p_kg = np.empty_like(u_kg)
        asymptotic_p(u_kg, tie_kg, n1[:, 0].copy(), n2, 0.5 if continuity else 0.0, p_kg)
        return u_kg, tie_kg, p_kg


@dataclass(frozen=True)
class Fault:
    """What a bucket kernel found: ``what``, its position in the chunk's values, and the place kept for the chunk."""

    what: str
    position: int
    at: int

    @staticmethod
    def of(status: int, position: int, at: int) -> Fault | None:
        """Return the fault of a kernel's status, or None."""
        names = {BAD_INDEX: "index", NEGATIVE: "negative", NOT_FINITE: "not finite", DUPLICATE: "duplicate"}
        return None if status == OK else Fault(names[status], int(position), at)


def rank_sum(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    codes: np.ndarray,
    *,
    n_genes: int,
    n_groups: int,
    control: int,
    continuity: bool = True,
    exact: bool = False,
    threads: int = 1,
) -> RankSums:
    """Compare every group with the controls on a CSR matrix in memory.

    Parameters
    ----------
    indptr, indices, data
        CSR arrays, cells × genes; data float32 or float64, non-negative.
    codes
        (n,) group of each cell; negative leaves a cell out.

    Raises
    ------
    DataError
        For a column index out of range, a negative or non-finite value, or a duplicate entry.
    """
    data = np.ascontiguousarray(data, dtype=np.float32 if data.dtype == np.float32 else np.float64)
    buckets = GeneBuckets(n_genes=n_genes, n_groups=n_groups, capacity=len(data), dtype=data.dtype, n_blocks=1)
    codes = np.ascontiguousarray(codes, np.int32)
    buckets.count_cells(codes)
    index = np.ascontiguousarray(indices, np.int32 if indices.dtype.itemsize <= 4 else np.int64)
    fault = buckets.add_csr(0, np.ascontiguousarray(indptr, np.int64), index, data, codes)
    if fault is not None:
        cell = int(np.searchsorted(indptr, fault.position, side="right")) - 1
        raise DataError(f"{fault.what} at cell {cell}, stored value {fault.position}")
    return buckets.rank_sum(control, continuity=continuity, exact=exact, threads=threads)
