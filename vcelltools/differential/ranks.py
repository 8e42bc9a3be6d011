"""Collect the values of each gene from chunks of any layout, then rank every group against the controls.

Chunks are sorted into buckets by gene as they arrive (4 or 8 bytes of value and 2 bytes of group per non-zero), in
memory or in a temporary file. Then :func:`vcelltools.kernels.ranksum.bucket_rank_sum` sorts and sweeps each gene. Any
thread can add chunks, and several threads rank the genes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from vcelltools.errors import UsageError
from vcelltools.io.hdf5.arrays import Buffer
from vcelltools.io.spill import Spill
from vcelltools.kernels.bucket import csc_bucket, csr_bucket, dense_bucket
from vcelltools.kernels.pvalues import asymptotic_p, set_exact_p
from vcelltools.kernels.ranksum import (
    Buckets,
    RankOutput,
    RankTask,
    bucket_counts_below,
    bucket_rank_sum,
    make_rank_scratch,
)
from vcelltools.kernels.strata import Strata, StrataOutput, bucket_strata, make_strata_scratch
from vcelltools.runtime.threads import share_work

if TYPE_CHECKING:
    from vcelltools.differential.partial_sums import PartialSums

MAX_GROUPS = 65_535
GROUP = np.dtype(np.uint16)


@dataclass(frozen=True, kw_only=True)
class RankSums:
    """Results of the kernel for every group and gene; rows are groups, columns genes.

    Attributes
    ----------
    size_k
        (k,) int64 number of cells of each group.
    sum_kg, nnz_kg
        Sum (float64, in cell order) and number of positive values.
    moment_kg
        Sum of expm1 (or log1p) of the values, or None if it was not requested.
    single_kg
        Sums in float32 arithmetic, or None if they were not requested.
    u_kg, tie_kg, p_kg
        U of the group against the controls, sum of t³ − t over ties, two-sided p; NaN in the row of the control; None
        if no test was requested.
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

    @staticmethod
    def join(parts: list[RankSums]) -> RankSums:
        """Return the results of successive ranges of genes as one."""
        return _join(parts)

    @property
    def mean_kg(self) -> np.ndarray:
        """(k, g) float64 pseudobulks: means over the cells of each group; NaN for a group without cells."""
        size = self.size_k.astype(np.float64)[:, None]
        return np.divide(self.sum_kg, size, out=np.full_like(self.sum_kg, np.nan), where=size > 0)


@dataclass(frozen=True, kw_only=True)
class StrataRanks:
    """Results of :meth:`GeneBuckets.rank_strata`; rows are groups, columns genes.

    Attributes
    ----------
    moment_kg
        Sum of expm1 of the values.
    statistic_kg
        U of the group against its reference, or z of van Elteren's test with several strata.
    p_kg
        Two-sided p; NaN in the row of the control, and if no stratum has cells of both groups.
    max_value
        The largest value.
    """

    moment_kg: np.ndarray
    statistic_kg: np.ndarray
    p_kg: np.ndarray
    max_value: float

    @staticmethod
    def join(parts: list[StrataRanks]) -> StrataRanks:
        """Return the results of successive ranges of genes as one."""
        return _join(parts)


R = TypeVar("R", RankSums, StrataRanks)


def _join(parts: list[R]) -> R:
    """Return the results of successive ranges of genes as one: arrays of genes are concatenated."""
    columns = {}
    for field in fields(parts[0]):
        values = [getattr(p, field.name) for p in parts]
        if field.name.endswith(("_kg", "_g")) and values[0] is not None:
            columns[field.name] = np.concatenate(values, axis=-1)
    return replace(parts[0], **columns, max_value=max(p.max_value for p in parts))


class Piece(NamedTuple):
    """The values of some genes of :class:`GeneBuckets`, to send to another process."""

    start_bg: np.ndarray
    """(blocks, g) int64: the start of the values of each gene in each block."""
    stop_bg: np.ndarray
    """(blocks, g) int64: their end."""
    keys: np.ndarray
    """(m,) uint32 or uint64: the bits of the positive values."""
    groups: np.ndarray
    """(m,) uint16: the group of the cell of each value."""


class GeneBuckets:
    """Collects chunks of non-negative values by gene; any number of matrices may be added.

    Parameters
    ----------
    n_genes, n_groups
        Number of columns of the matrices, and number of groups (including the control).
    capacity
        Maximum number of positive values; memory is only used as they arrive.
    dtype
        float32 or float64: type of the values. float64 takes 10 bytes per value, float32 six.
    n_blocks
        Number of row chunks; all CSC and column chunks share one block.
    limit
        Keep the values in a temporary file if they may take more bytes than this. They can then only be ranked, by
        :meth:`rank_sum` or :meth:`rank_strata`, which read some genes at a time.
    """

    def __init__(
        self,
        *,
        n_genes: int,
        n_groups: int,
        capacity: int,
        dtype: np.dtype | str,
        n_blocks: int,
        limit: float = math.inf,
    ) -> None:
        if n_groups > MAX_GROUPS:
            raise UsageError(f"there are {n_groups:,} groups, but at most {MAX_GROUPS:,} can be compared at once")
        self.n_genes, self.n_groups = n_genes, n_groups
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype is {self.dtype}, not float32 or float64")
        single = self.dtype == np.float32
        self._bits = np.dtype("uint32" if single else "uint64")
        self._magnitude = self._bits.type(2**31 - 1 if single else 2**63 - 1)
        self._inf = self._bits.type(0x7F800000 if single else 0x7FF << 52)
        self._capacity, spilled = capacity, capacity * (self._bits.itemsize + GROUP.itemsize) > limit
        self._spill = Spill(capacity, self._bits, GROUP) if spilled else None
        self._keys = np.empty(0 if spilled else capacity, self._bits)
        self._groups = np.empty(len(self._keys), GROUP)
        self._start_bg = np.zeros((n_blocks, n_genes), np.int64)
        self._stop_bg = np.zeros((n_blocks, n_genes), np.int64)
        self._size_k = np.zeros(n_groups, np.int64)
        self._used = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    @property
    def size_k(self) -> np.ndarray:
        """(k,) int64 number of cells of each group so far."""
        return self._size_k

    @property
    def n_values(self) -> int:
        """Number of positive values so far, including those of cells that were left out."""
        return self._used

    def _reserve(self, n: int) -> int:
        with self._lock:
            at = self._used
            self._used += n
        if self._used > self._capacity:
            raise ValueError("there are more values than the capacity")
        return at

    def _workspace(self, n: int) -> np.ndarray:
        have = getattr(self._local, "seen", None)
        if have is None or len(have) < n:
            have = self._local.seen = np.empty(n, np.int32)
        return have[:n]

    def count_cells(self, codes: np.ndarray) -> None:
        """Add the cells of one matrix to the sizes of the groups; call it once per matrix."""
        self._size_k += np.bincount(codes[codes >= 0], minlength=self.n_groups)

    def add_csr(
        self,
        block: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        codes_b: np.ndarray,
        at: int | None = None,
    ) -> BadValue | None:
        """Add rows as block ``block``. Return the first fault (nothing is added then), or None. Thread-safe.

        After a fault, pass the corrected chunk with the fault's ``at`` to use the space reserved for it.
        """

        def sort(*out: Any) -> tuple[int, int, int]:
            values, seen = data.view(self._bits), self._workspace(self.n_genes)
            return csr_bucket(
                indptr, indices, values, codes_b, self.n_genes, self._magnitude, self._inf, *out, seen
            )  # fmt: skip

        return self._add(block, slice(None), len(data), at, sort)

    def add_csc(
        self,
        block: int,
        first: int,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        codes_n: np.ndarray,
        at: int | None = None,
    ) -> BadValue | None:
        """Add columns, beginning with gene ``first``; all columns of a matrix share one block. Thread-safe."""

        def sort(*out: Any) -> tuple[int, int, int]:
            values, seen = data.view(self._bits), self._workspace(len(codes_n))
            return csc_bucket(indptr, indices, values, codes_n, first, self._magnitude, self._inf, *out, seen)

        return self._add(block, slice(first, first + len(indptr) - 1), len(data), at, sort)

    def add_dense(self, block: int, first: int, values: np.ndarray, codes_b: np.ndarray) -> BadValue | None:
        """Add a dense block (b, w) whose first column is gene ``first``. Thread-safe."""

        def sort(*out: Any) -> tuple[int, int, int]:
            return dense_bucket(values.view(self._bits), codes_b, first, self._magnitude, self._inf, *out)

        return self._add(block, slice(first, first + values.shape[1]), int(np.count_nonzero(values)), None, sort)

    def _add(
        self, block: int, genes: slice, n: int, at: int | None, sort: Callable[..., tuple[int, int, int]]
    ) -> BadValue | None:
        """Sort up to ``n`` values of some genes into the buckets, or into scratch memory and then into the file."""
        at = self._reserve(n) if at is None else at
        start_g, stop_g = self._start_bg[block], self._stop_bg[block]
        if self._spill is None:
            fault, position, _ = sort(self._keys, self._groups, at, start_g, stop_g)
        else:
            keys, groups = self._take(n)
            fault, position, kept = sort(keys, groups, 0, start_g, stop_g)
            if not fault:
                self._spill.write(at, keys[:kept], groups[:kept])
                start_g[genes] += at
                stop_g[genes] += at
        return BadValue(fault, position, at) if fault else None

    def _take(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scratch memory of this thread for ``n`` keys and groups, valid until the next call."""
        if not hasattr(self._local, "keys"):
            self._local.keys, self._local.groups = Buffer(), Buffer()
        return self._local.keys.take(n, self._bits), self._local.groups.take(n, GROUP)

    def _load(self, g0: int, g1: int) -> Buckets:
        """Return buckets with at least the genes ``g0:g1``, valid in this thread until the next call."""
        if self._spill is None:
            return Buckets(self._start_bg, self._stop_bg, self._keys, self._keys.view(self.dtype), self._groups, 0)
        start, stop = self._start_bg[:, g0:g1].ravel(), self._stop_bg[:, g0:g1].ravel()
        ends = np.cumsum(stop - start)
        keys, groups = self._take(int(ends[-1]))
        # the values of successive genes are contiguous if they came in one chunk of rows
        some = np.flatnonzero(stop > start)
        first = some[np.flatnonzero(np.r_[True, start[some][1:] != stop[some][:-1]])] if len(some) else some
        edges = [*(ends - stop + start)[first].tolist(), int(ends[-1])]
        for at, (a, b) in zip(start[first].tolist(), pairwise(edges), strict=True):
            self._spill.read(at, keys[a:b], groups[a:b])
        shape = (len(self._start_bg), g1 - g0)
        return Buckets(
            (ends - stop + start).reshape(shape), ends.reshape(shape), keys, keys.view(self.dtype), groups, g0
        )  # fmt: skip

    def cut(self, g0: int, g1: int, group: int | None = None) -> Piece:
        """Return the values of the genes ``g0:g1``, optionally of one group alone."""
        start, size = self._start_bg[:, g0:g1], (self._stop_bg - self._start_bg)[:, g0:g1]
        ends = np.cumsum(size.ravel())
        at = np.arange(ends[-1]) + np.repeat(start.ravel() - (ends - size.ravel()), size.ravel())
        keys, groups = self._keys[at], self._groups[at]
        if group is not None:
            kept = groups == group
            ends, keys, groups = np.r_[0, np.cumsum(kept)][ends], keys[kept], groups[kept]
            size = np.diff(ends, prepend=0).reshape(size.shape)
        ends = ends.reshape(size.shape)
        return Piece(ends - size, ends, keys, groups)

    @classmethod
    def of(cls, pieces: list[Piece], size_k: np.ndarray, *, axis: int = 0) -> GeneBuckets:
        """Return buckets of pieces: of the same genes in successive cells, or (``axis`` 1) of successive genes."""
        offsets = np.cumsum([0, *(len(p.keys) for p in pieces)])[:-1].tolist()
        start, stop = (
            np.concatenate([at[i] + n for at, n in zip(pieces, offsets, strict=True)], axis) for i in (0, 1)
        )  # fmt: skip
        bits = pieces[0].keys.dtype
        out = cls(
            n_genes=start.shape[1], n_groups=len(size_k), capacity=0, n_blocks=len(start),
            dtype="float32" if bits == np.uint32 else "float64",
        )  # fmt: skip
        out._start_bg, out._stop_bg, out._size_k = start, stop, size_k.copy()
        out._keys, out._groups = (np.concatenate(parts) for parts in list(zip(*pieces, strict=True))[2:])
        out._used = out._capacity = len(out._keys)
        return out

    def reorder(self, first: int, stop: int, order: np.ndarray) -> None:
        """Reorder the genes of the blocks ``first:stop``; ``order`` holds their current positions."""
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
            Group of the control.
        test
            If false, only compute sums, without sorting.
        continuity
            Subtract 0.5 from the distance between U and its mean.
        moment
            ``"expm1"`` or ``"log1p"``: also sum this function of the values.
        single
            (k,) factors: also sum value · factor in their precision with rounding at every step, as numpy and
            scipy.sparse do for a mean along the cells.
        exact
            Exact p if there are no ties and one group has at most eight cells, as scipy's ``method="auto"``.
        advance
            Function that is called with the number of values of each finished batch of genes.
        """
        n_k, n_g = self.n_groups, self.n_genes
        factors_k = np.empty(0, self.dtype) if single is None else np.ascontiguousarray(single)

        def make(wanted: bool, value: float = 0.0, dtype: np.dtype | type = np.float64) -> np.ndarray:
            return np.full((n_k, n_g) if wanted else (1, 1), value, dtype)

        out = RankOutput(
            sum_kg=make(True),
            nnz_kg=make(True, 0, np.int64),
            moment_kg=make(moment is not None),
            single_kg=make(single is not None, 0.0, factors_k.dtype),
            u_kg=make(test, np.nan),
            tie_kg=make(test, np.nan),
            p_kg=make(test, np.nan),
            control_tie_g=np.zeros(n_g),
            max_g=np.zeros(n_g),
        )
        task = RankTask(
            size_k=self._size_k,
            control=control,
            continuity=0.5 if continuity else 0.0,
            with_test=test,
            moment={None: 0, "expm1": 1, "log1p": 2}[moment],
            inverse_k=factors_k,
        )
        count_g, spans = self._share_genes()
        largest = int(count_g.max(initial=0))

        def make_worker() -> Callable[[tuple[int, int]], None]:
            scratch = make_rank_scratch(largest, n_k, factors_k.dtype)

            def work(genes: tuple[int, int]) -> None:
                bucket_rank_sum(self._load(*genes), *genes, task, scratch, out)
                advance(float(count_g[genes[0] : genes[1]].sum()))

            return work

        share_work(spans, [make_worker() for _ in range(max(1, threads))])
        if test and exact:
            set_exact_p(out.u_kg, out.tie_kg, out.p_kg, self._size_k, control)
        return RankSums(
            size_k=self._size_k.copy(),
            sum_kg=out.sum_kg,
            nnz_kg=out.nnz_kg,
            moment_kg=out.moment_kg if moment else None,
            single_kg=out.single_kg if single is not None else None,
            u_kg=out.u_kg if test else None,
            tie_kg=out.tie_kg if test else None,
            p_kg=out.p_kg if test else None,
            control_tie_g=out.control_tie_g if test else None,
            max_value=float(out.max_g.max(initial=0.0)),
        )

    def rank_strata(
        self,
        group_c: np.ndarray,
        stratum_c: np.ndarray,
        control: int | None,
        *,
        n_groups: int,
        continuity: bool = True,
        threads: int = 1,
        advance: Callable[[float], None] = lambda n: None,
    ) -> StrataRanks:
        """Rank every gene within strata; the groups of the buckets encode a group and a stratum.

        Parameters
        ----------
        group_c, stratum_c
            The group and the stratum of each code.
        control
            The group that the others are compared with; None compares each group with all others.
        n_groups
            Number of groups.
        """
        n_g, n_codes, n_strata = self.n_genes, self.n_groups, int(stratum_c.max()) + 1
        moment, statistic, p = (np.full((n_groups, n_g), np.nan) for _ in range(3))
        out = StrataOutput(moment, statistic, p, np.zeros(n_g))
        task = RankTask(self._size_k, -1, 0.5 if continuity else 0.0, True, 1, np.empty(0, self.dtype))
        strata = Strata(
            group_c.astype(np.int64), stratum_c.astype(np.int64), -1 if control is None else control, n_groups, n_strata
        )
        count_g, spans = self._share_genes()
        largest = int(count_g.max(initial=0))

        def make_worker() -> Callable[[tuple[int, int]], None]:
            sort, scratch = make_rank_scratch(largest, n_codes, self.dtype), make_strata_scratch(n_codes, n_strata)
            sums = np.empty((3, n_groups))

            def work(genes: tuple[int, int]) -> None:
                bucket_strata(self._load(*genes), *genes, task, strata, sort, scratch, sums, out)
                advance(float(count_g[genes[0] : genes[1]].sum()))

            return work

        share_work(spans, [make_worker() for _ in range(max(1, threads))])
        return StrataRanks(
            moment_kg=out.moment_kg, statistic_kg=out.statistic_kg, p_kg=out.p_kg,
            max_value=float(out.max_g.max(initial=0.0)),
        )  # fmt: skip

    def _share_genes(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return (g,) the number of values of each gene, and ranges of genes with about a million values each."""
        count_g = (self._stop_bg - self._start_bg).sum(axis=0)
        work = np.cumsum(count_g + 64)
        edges = np.searchsorted(work, np.arange(0, int(work[-1]) if len(work) else 0, 1 << 20)).tolist()
        return count_g, list(pairwise(sorted({*edges, 0, self.n_genes})))

    def sum_pairwise(self, plan: PartialSums, *, threads: int = 1) -> np.ndarray:
        """Return (k, g) sums that equal numpy's, from buckets whose groups are the partial sums of a plan.

        Afterwards the groups of the buckets are those that the partial sums belong to, so that they can be ranked.
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
            part[:] = np.take(plan.group_s, part, mode="clip")  # unused reserved places hold arbitrary codes
        self._size_k = np.bincount(plan.group_s, weights=self._size_k, minlength=n_k).astype(np.int64)
        self.n_groups = n_k
        return sum_kg

    def rank_constant(
        self, value_g: np.ndarray, size_k: np.ndarray, control: int, sums: RankSums, *, continuity: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare groups in which every cell equals ``value_g`` with the controls in the buckets.

        Parameters
        ----------
        value_g
            (g,) value of every cell of every group.
        size_k
            (k,) number of cells of each group.
        sums
            Result of :meth:`rank_sum` for these buckets.

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


class BadValue(NamedTuple):
    """A fault in a chunk: the fault, its position in the chunk's values, and the place reserved for the chunk."""

    fault: int
    position: int
    at: int
