"""Rank sums of every group against one control group: one joint sort per gene serves all groups.

Only the ranks *within the controls* matter for a Mann-Whitney U, so sorting the positive values of a gene once,
all groups together, and sweeping them while counting "controls passed" gives U of every group at the same time.
Zeros never enter the sort: they are one tie block whose sizes are known. Cost O(non-zeros) plus the
groups × genes outputs; nothing is ever densified and CSR is never transposed as a whole.

Values go through :class:`GeneBuckets`: chunks of a matrix are bucketed by gene (4 or 8 bytes of value and
2 bytes of group a non-zero), then each gene is gathered, sorted and swept by itself. Positive floats order as
their bits do, so the sort is a radix sort on ``(bits - smallest) << group_bits | group``.

Statistics: two-sided Mann-Whitney U with mid-ranks and tie correction (Mann & Whitney 1947; Lehmann,
Nonparametrics, 1975, ch. 1), optional continuity correction 0.5. Oracle: ``scipy.stats.mannwhitneyu``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.kernels._jit import kernel

MAX_GROUPS = 65_535
_OK, _BAD_INDEX, _NEGATIVE, _NOT_FINITE, _DUPLICATE = 0, 1, 2, 3, 4
_RADIX = 2048


@kernel()
def csr_bucket(
    indptr, indices, bits, codes_b, n_genes, magnitude, inf_bits, keys, groups, at, start_g, stop_g, seen_g
):  # pragma: no cover  compiled
    """Bucket one CSR chunk by gene into ``keys[at:]`` and ``groups[at:]``.

    Parameters
    ----------
    indptr, indices
        The chunk; indices are bounds-checked here.
    bits
        (nnz,) the values' bits as uint32 or uint64.
    codes_b
        (b,) group of each cell; negative leaves the cell out.
    magnitude, inf_bits
        Every bit but the sign, and the bits of +inf, of the float type.
    start_g, stop_g
        (g,) int64 outputs: where each gene's values lie in ``keys``.
    seen_g
        (g,) int32 workspace.

    Returns
    -------
    status, position, kept
        Status 0 for success, else a code and the position of the offender in ``indices``; values kept.
    """
    n = len(indptr) - 1
    seen_g[:] = -1
    start_g[:] = 0
    for i in range(n):
        leave_out = codes_b[i] < 0
        for j in range(indptr[i], indptr[i + 1]):
            g = indices[j]
            if g < 0 or g >= n_genes:
                return _BAD_INDEX, j, 0
            v = bits[j]
            if seen_g[g] == i:
                return _DUPLICATE, j, 0
            seen_g[g] = i
            if v & inf_bits == inf_bits:
                return _NOT_FINITE, j, 0
            if v > magnitude and v & magnitude != 0:
                return _NEGATIVE, j, 0
            if not leave_out and v & magnitude != 0:
                start_g[g] += 1
    position = at
    for g in range(n_genes):
        count = start_g[g]
        start_g[g] = position
        stop_g[g] = position
        position += count
    for i in range(n):
        code = codes_b[i]
        if code < 0:
            continue
        for j in range(indptr[i], indptr[i + 1]):
            v = bits[j]
            if v & magnitude != 0:
                g = indices[j]
                k = stop_g[g]
                keys[k] = v
                groups[k] = code
                stop_g[g] = k + 1
    return _OK, 0, position - at


@kernel()
def csc_bucket(
    indptr, indices, bits, codes_n, first_gene, magnitude, inf_bits, keys, groups, at, start_g, stop_g, seen_n
):  # pragma: no cover  compiled
    """Bucket the columns of a CSC chunk; arguments as in :func:`csr_bucket`, ``seen_n`` per cell."""
    n_cells = len(codes_n)
    position = at
    seen_n[:] = -1
    for c in range(len(indptr) - 1):
        start_g[first_gene + c] = position
        for j in range(indptr[c], indptr[c + 1]):
            i = indices[j]
            if i < 0 or i >= n_cells:
                return _BAD_INDEX, j, 0
            if seen_n[i] == c:
                return _DUPLICATE, j, 0
            seen_n[i] = c
            v = bits[j]
            if v & inf_bits == inf_bits:
                return _NOT_FINITE, j, 0
            if v > magnitude and v & magnitude != 0:
                return _NEGATIVE, j, 0
            if codes_n[i] >= 0 and v & magnitude != 0:
                keys[position] = v
                groups[position] = codes_n[i]
                position += 1
        stop_g[first_gene + c] = position
    return _OK, 0, position - at


@kernel()
def dense_bucket(
    block, codes_b, first_gene, magnitude, inf_bits, keys, groups, at, start_g, stop_g
):  # pragma: no cover  compiled
    """Bucket a dense block (b, w) of value bits; arguments as in :func:`csr_bucket`."""
    n, w = block.shape
    for c in range(w):
        start_g[first_gene + c] = 0
    for i in range(n):
        leave_out = codes_b[i] < 0
        for c in range(w):
            v = block[i, c]
            if v & inf_bits == inf_bits:
                return _NOT_FINITE, i * w + c, 0
            if v > magnitude and v & magnitude != 0:
                return _NEGATIVE, i * w + c, 0
            if not leave_out and v & magnitude != 0:
                start_g[first_gene + c] += 1
    position = at
    for c in range(first_gene, first_gene + w):
        count = start_g[c]
        start_g[c] = position
        stop_g[c] = position
        position += count
    for i in range(n):
        code = codes_b[i]
        if code < 0:
            continue
        for c in range(w):
            v = block[i, c]
            if v & magnitude != 0:
                k = stop_g[first_gene + c]
                keys[k] = v
                groups[k] = code
                stop_g[first_gene + c] = k + 1
    return _OK, 0, position - at


@kernel()
def sort_bits(buf, tmp, n, low, bits, hist):  # pragma: no cover  compiled
    """Sort ``buf[:n]`` (uint64) by its bits ``low .. low + bits - 1``; True when the result lies in ``tmp``."""
    if n < 48:
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) << np.uint64(low)
        for i in range(1, n):
            x = buf[i]
            key = x & mask
            j = i - 1
            while j >= 0 and (buf[j] & mask) > key:
                buf[j + 1] = buf[j]
                j -= 1
            buf[j + 1] = x
        return False
    width = 8 if n < 3000 else 11
    passes = (bits + width - 1) // width
    if passes == 0:
        return False
    width = (bits + passes - 1) // passes
    radix = 1 << width
    digit = np.uint64(radix - 1)
    hist[:passes, :radix] = 0
    for i in range(n):
        x = buf[i] >> np.uint64(low)
        for p in range(passes):
            hist[p, x & digit] += 1
            x >>= np.uint64(width)
    flipped = False
    for p in range(passes):
        shift = np.uint64(low + p * width)
        src, dst = (tmp, buf) if flipped else (buf, tmp)
        if hist[p, (src[0] >> shift) & digit] == n:
            continue
        total = 0
        for b in range(radix):
            c = hist[p, b]
            hist[p, b] = total
            total += c
        for i in range(n):
            x = src[i]
            b = (x >> shift) & digit
            dst[hist[p, b]] = x
            hist[p, b] += 1
        flipped = not flipped
    return flipped


@kernel()
def bucket_rank_sum(
    start_bg,
    stop_bg,
    keys,
    values,
    groups,
    g0,
    g1,
    size_k,
    control,
    continuity,
    with_test,
    moment,
    inverse_k,
    buf,
    tmp,
    hist,
    sum_kg,
    nnz_kg,
    moment_kg,
    single_kg,
    u_kg,
    tie_kg,
    p_kg,
    control_tie_g,
    max_g,
):  # pragma: no cover  compiled
    """Sums, U, tie terms and asymptotic p-values of the genes ``g0:g1``.

    Parameters
    ----------
    start_bg, stop_bg
        (blocks, g) where each block keeps each gene's values.
    keys, values, groups
        The buckets: value bits, the same memory as floats, group codes.
    size_k
        (k,) int64 cells of each group.
    control
        The control's group.
    continuity
        0.5 or 0.0.
    with_test
        Whether to sort and test.
    moment
        0: no further sum; 1: of expm1 of the values; 2: of their log1p.
    inverse_k
        (k,) float32 factors of the values in ``single_kg``, or empty for no such sum.
    buf, tmp, hist
        uint64 workspaces of at least the largest gene's values; (8, 2048) int64.
    sum_kg, nnz_kg, moment_kg, u_kg, tie_kg, p_kg
        Outputs; U of the group (not of the controls); the control's own rows are left alone.
    control_tie_g
        Output: sum of t³ − t over the positive ties among the controls alone.
    max_g
        Output: the largest value.
    single_kg
        Output: the sum of value · factor in float32, rounded at every step, in cell order.
    """
    k_groups = len(size_k)
    group_bits = 0
    while (1 << group_bits) < k_groups:
        group_bits += 1
    group_mask = np.uint64((1 << group_bits) - 1)
    total_k = np.zeros(k_groups)
    moment_k = np.zeros(k_groups)
    single_k = np.zeros(k_groups, np.float32)
    with_single = len(inverse_k) > 0
    nnz_k = np.zeros(k_groups, np.int64)
    count_k = np.zeros(k_groups, np.int64)
    double_u_k = np.zeros(k_groups, np.int64)
    extra_k = np.zeros(k_groups)
    touched = np.zeros(k_groups, np.int64)
    n_blocks = start_bg.shape[0]
    size_c = size_k[control]
    root2 = math.sqrt(2.0)
    for g in range(g0, g1):
        total_k[:] = 0.0
        moment_k[:] = 0.0
        single_k[:] = 0.0
        nnz_k[:] = 0
        n = 0
        low_key = np.uint64(0xFFFFFFFFFFFFFFFF)
        high_key = np.uint64(0)
        for b in range(n_blocks):
            for j in range(start_bg[b, g], stop_bg[b, g]):
                k = groups[j]
                key = np.uint64(keys[j])
                total_k[k] += values[j]
                nnz_k[k] += 1
                if moment == 1:
                    moment_k[k] += math.expm1(np.float64(values[j]))
                elif moment == 2:
                    moment_k[k] += math.log1p(np.float64(values[j]))
                if with_single:
                    single_k[k] = np.float32(single_k[k] + np.float32(np.float32(values[j]) * inverse_k[k]))
                max_g[g] = max(max_g[g], values[j])
                low_key = min(low_key, key)
                high_key = max(high_key, key)
                n += 1
        for k in range(k_groups):
            sum_kg[k, g] = total_k[k]
            nnz_kg[k, g] = nnz_k[k]
            if moment != 0:
                moment_kg[k, g] = moment_k[k]
            if with_single:
                single_kg[k, g] = single_k[k]
        if not with_test:
            continue
        # the zeros: one tie block, known without looking
        zeros_c = size_c - nnz_k[control]
        for k in range(k_groups):
            zeros = size_k[k] - nnz_k[k]
            double_u_k[k] = zeros * zeros_c
            t = np.float64(zeros + zeros_c)
            extra_k[k] = t * t * t - t
        shared = 0.0
        if n > 0:
            span = high_key - low_key
            value_bits = 0
            while value_bits < 64 and (span >> np.uint64(value_bits)) != 0:
                value_bits += 1
            packed = value_bits + group_bits <= 64
            m = 0
            if packed:
                shift = np.uint64(group_bits)
                for b in range(n_blocks):
                    for j in range(start_bg[b, g], stop_bg[b, g]):
                        buf[m] = ((np.uint64(keys[j]) - low_key) << shift) | np.uint64(groups[j])
                        m += 1
                flipped = sort_bits(buf, tmp, n, group_bits, value_bits, hist)
                done = tmp if flipped else buf
                group_of = done
            else:
                # float64 values of more than 64 - group_bits bits: sort positions by value instead
                whole = np.empty(n, np.uint64)
                owner = np.empty(n, np.uint64)
                for b in range(n_blocks):
                    for j in range(start_bg[b, g], stop_bg[b, g]):
                        whole[m] = np.uint64(keys[j])
                        owner[m] = np.uint64(groups[j])
                        m += 1
                order = np.argsort(whole, kind="mergesort")
                done = whole[order]
                group_of = owner[order]
                shift = np.uint64(0)
            passed = zeros_c
            i = 0
            while i < n:
                value = done[i] >> shift
                j = i + 1
                while j < n and (done[j] >> shift) == value:
                    j += 1
                if j == i + 1:
                    k = np.int64(group_of[i] & group_mask)
                    if k == control:
                        passed += 1
                    else:
                        double_u_k[k] += 2 * passed
                else:
                    ties_c = 0
                    n_touched = 0
                    for q in range(i, j):
                        k = np.int64(group_of[q] & group_mask)
                        if k == control:
                            ties_c += 1
                        else:
                            if count_k[k] == 0:
                                touched[n_touched] = k
                                n_touched += 1
                            count_k[k] += 1
                    a = np.float64(ties_c)
                    shared += a * a * a - a
                    for q in range(n_touched):
                        k = touched[q]
                        t = np.float64(count_k[k])
                        extra_k[k] += 3.0 * a * t * (a + t) + t * t * t - t
                        double_u_k[k] += count_k[k] * (2 * passed + ties_c)
                        count_k[k] = 0
                    passed += ties_c
                i = j
        control_tie_g[g] = shared
        for k in range(k_groups):
            if k == control:
                continue
            n1 = size_k[k]
            u = double_u_k[k] / 2.0
            tie = extra_k[k] + shared
            u_kg[k, g] = u
            tie_kg[k, g] = tie
            n12 = np.float64(n1) * np.float64(size_c)
            total = np.float64(n1 + size_c)
            p = 1.0
            if n12 > 0.0 and nnz_k[k] + nnz_k[control] > 0:
                variance = n12 / 12.0 * ((total + 1.0) - tie / (total * (total - 1.0)))
                if variance > 0.0:
                    z = (max(u, n12 - u) - n12 / 2.0 - continuity) / math.sqrt(variance)
                    p = min(1.0, math.erfc(z / root2))
            p_kg[k, g] = p


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
            (k,) float32 factors: sum value · factor in float32, rounded at every step (how a float32 mean along
            the cells comes out of numpy and scipy.sparse).
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
        single_kg = np.zeros((n_k, n_g) if single is not None else (1, 1), np.float32)
        inverse_k = np.empty(0, np.float32) if single is None else np.ascontiguousarray(single, np.float32)
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
        todo = iter(list(pairwise(edges)))
        lock = threading.Lock()
        failed: list[BaseException] = []

        def work() -> None:
            buf, tmp = np.empty(largest, np.uint64), np.empty(largest, np.uint64)
            hist = np.empty((8, _RADIX), np.int64)
            while not failed:
                with lock:
                    span = next(todo, None)
                if span is None:
                    return
                try:
                    bucket_rank_sum(
                        self._start_bg, self._stop_bg, self._keys, values, self._groups, span[0], span[1],
                        self._size_k, control, 0.5 if continuity else 0.0, test, power, inverse_k, buf, tmp, hist,
                        sum_kg, nnz_kg, moment_kg, single_kg, u_kg, tie_kg, p_kg, control_tie_g, max_g,
                    )  # fmt: skip
                except BaseException as e:
                    failed.append(e)
                    return
                advance(float(count_g[span[0] : span[1]].sum()))

        workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, threads))]
        for w in workers:
            w.start()
        for w in workers:
            while w.is_alive():
                w.join(0.2)
        if failed:
            raise failed[0]
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


@kernel()
def asymptotic_p(u_kg, tie_kg, n1_k, n2, continuity, p_kg):  # pragma: no cover  compiled
    """Write the two-sided asymptotic p of U; 1 where nothing varies."""
    root2 = math.sqrt(2.0)
    for k in range(u_kg.shape[0]):
        n1 = n1_k[k]
        n12, total = n1 * n2, n1 + n2
        for g in range(u_kg.shape[1]):
            p_kg[k, g] = 1.0
            variance = n12 / 12.0 * ((total + 1.0) - tie_kg[k, g] / (total * (total - 1.0)))
            if variance > 0.0:
                z = (max(u_kg[k, g], n12 - u_kg[k, g]) - n12 / 2.0 - continuity) / math.sqrt(variance)
                p_kg[k, g] = min(1.0, math.erfc(z / root2))


@dataclass(frozen=True)
class Fault:
    """What a bucket kernel found: ``what``, its position in the chunk's values, and the place kept for the chunk."""

    what: str
    position: int
    at: int

    @staticmethod
    def of(status: int, position: int, at: int) -> Fault | None:
        """Return the fault of a kernel's status, or None."""
        names = {_BAD_INDEX: "index", _NEGATIVE: "negative", _NOT_FINITE: "not finite", _DUPLICATE: "duplicate"}
        return None if status == _OK else Fault(names[status], int(position), at)


@kernel()
def bucket_counts_below(
    start_bg, stop_bg, keys, groups, control, key_g, below_g, equal_g
):  # pragma: no cover  compiled
    """Count each gene's positive control values below and equal to ``key_g``, both as bits."""
    for g in range(len(key_g)):
        for b in range(start_bg.shape[0]):
            for j in range(start_bg[b, g], stop_bg[b, g]):
                if groups[j] == control:
                    if keys[j] < key_g[g]:
                        below_g[g] += 1
                    elif keys[j] == key_g[g]:
                        equal_g[g] += 1


def set_exact_p(u_kg: np.ndarray, tie_kg: np.ndarray, p_kg: np.ndarray, size_k: np.ndarray, control: int) -> None:
    """Replace p by the exact one where there are no ties and a side has at most eight cells."""
    n2 = int(size_k[control])
    for k, n1 in enumerate(size_k.tolist()):
        if k == control or n1 == 0 or n2 == 0 or min(n1, n2) > 8:
            continue
        genes = np.flatnonzero(tie_kg[k] == 0)
        if len(genes):
            tail = get_exact_tail(n1, n2)
            u = np.maximum(u_kg[k, genes], n1 * n2 - u_kg[k, genes]).astype(np.int64)
            p_kg[k, genes] = np.minimum(1.0, 2.0 * tail[u])


_TAILS: dict[tuple[int, int], np.ndarray] = {}


def get_exact_tail(n1: int, n2: int) -> np.ndarray:
    """Return (n1·n2 + 1,) float64: P(U >= u) under the null without ties.

    The number of ways to reach each u is the Gaussian binomial coefficient of n1 + n2 over n1 (Mann & Whitney
    1947), built as Π (1 − q^(n + i)) / (1 − q^i) in whole numbers, so nothing cancels.
    """
    m, n = min(n1, n2), max(n1, n2)
    if (m, n) not in _TAILS:
        size = m * n + 1
        ways = np.zeros(size, dtype=object)
        ways[0] = 1
        for i in range(1, m + 1):
            lag = n + i
            if lag < size:
                ways[lag:] = ways[lag:] - ways[:-lag].copy()
            for offset in range(i):
                ways[offset::i] = np.cumsum(ways[offset::i])
        total = math.comb(m + n, m)
        reached = np.cumsum(ways[::-1])[::-1]
        _TAILS[m, n] = np.array([int(w) / total for w in reached], dtype=np.float64)
    return _TAILS[m, n]


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


def adjust_bh(p: np.ndarray) -> np.ndarray:
    """Return Benjamini-Hochberg adjusted p-values along the last axis (Benjamini & Hochberg 1995).

    Rows of a matrix are adjusted apart; pass ``p.ravel()`` to adjust all together. Equals
    ``scipy.stats.false_discovery_control``.
    """
    p = np.asarray(p, np.float64)
    if p.ndim > 1:
        return np.stack([adjust_bh(row) for row in p])
    m = len(p)
    order = np.argsort(p)
    scaled = p[order] * (m / np.arange(1, m + 1))
    out = np.empty(m)
    out[order] = np.clip(np.minimum.accumulate(scaled[::-1])[::-1], 0.0, 1.0)
    return out
