"""Reproduce the order in which an unstable quicksort leaves equal values.

Gene lists truncated at length k depend on it if the cutoff falls among ties, and the official scores are
computed with such a sort. The algorithm is public: pattern-defeating quicksort (Peters 2021, arXiv:2106.05123) with the
block partition of Edelkamp and Weiss (2016, doi:10.4230/LIPIcs.ESA.2016.38). The order of ties depends on its constants
and the order of its steps, which are the same as in Rust's rayon.
"""

from __future__ import annotations

import numpy as np

from vcelltools.kernels._jit import kernel

INSERTION = 20
"""Partitions of up to this many values are sorted by insertion, which keeps ties in order."""
BLOCK = 128
NINTHER = 50
SEQUENTIAL = 2000


@kernel()
def quicksort_order(key, v):
    """Fill ``v`` with the positions of ``key`` in ascending order, with ties in the order of the quicksort.

    Parameters
    ----------
    key
        (n,) float32 without NaN.
    v
        (n,) int64 output.

    Notes
    -----
    O(n log n). Oracle: ``rank("ordinal")`` of polars over structs (``tests/oracle/test_cell_eval.py``).
    """
    n = len(v)
    limit = 0
    while n >> limit:
        limit += 1
    for i in range(n):
        v[i] = i
    # partitions still to sort: start, stop, position of the previous value (-1 for none), bad pivots left
    todo = np.empty((4096, 4), np.int64)
    todo[0] = 0, n, -1, limit
    left = 1
    while left:
        left -= 1
        lo, hi, before, limit = todo[left]
        balanced = True
        whole = True
        while True:
            n = hi - lo
            if n <= INSERTION:
                for i in range(lo + 1, hi):
                    _sink(key, v, lo, i)
                break
            if limit == 0:
                _heapsort(key, v, lo, hi)
                break
            if not balanced:
                _scatter(v, lo, n)
                limit -= 1
            pivot, likely = _choose(key, v, lo, hi)
            if balanced and whole and likely and _finish_sorted(key, v, lo, hi):
                break
            if before >= 0 and not key[before] < key[v[pivot]]:
                lo = _part_equal(key, v, lo, hi, pivot)
                continue
            middle, whole = _part(key, v, lo, hi, pivot)
            a, b = middle - lo, hi - middle - 1
            balanced = min(a, n - a) >= n // 8
            low = (lo, middle, before, limit)
            high = (middle + 1, hi, v[middle], limit)
            if max(a, b) > SEQUENTIAL:
                todo[left] = low
                todo[left + 1] = high
                left += 2
                break
            if a < b:
                todo[left] = low
                lo, hi, before, limit = high
            else:
                todo[left] = high
                lo, hi, before, limit = low
            left += 1


@kernel()
def _sink(key, v, lo, i):
    """Move the value at ``i`` left to its position among the sorted values before it."""
    one = v[i]
    while i > lo and key[one] < key[v[i - 1]]:
        v[i] = v[i - 1]
        i -= 1
    v[i] = one


@kernel()
def _heapsort(key, v, lo, hi):
    n = hi - lo
    for step in range(n // 2 + n - 1):
        node = n // 2 - 1 - step
        end = n
        if node < 0:  # the heap is built, so take its largest value
            end = n - 1 - (step - n // 2)
            v[lo], v[lo + end] = v[lo + end], v[lo]
            node = 0
        while 2 * node + 1 < end:
            child = 2 * node + 1
            if child + 1 < end and key[v[lo + child]] < key[v[lo + child + 1]]:
                child += 1
            if not key[v[lo + node]] < key[v[lo + child]]:
                break
            v[lo + node], v[lo + child] = v[lo + child], v[lo + node]
            node = child


@kernel()
def _scatter(v, lo, n):
    """Swap three values in the middle with others, drawn by xorshift seeded with the length."""
    seed = np.uint64(n)
    top = 1
    while top < n:
        top *= 2
    for i in range(3):
        seed ^= seed << np.uint64(13)
        seed ^= seed >> np.uint64(7)
        seed ^= seed << np.uint64(17)
        other = np.int64(seed & np.uint64(top - 1))
        if other >= n:
            other -= n
        at = lo + n // 4 * 2 - 1 + i
        v[at], v[lo + other] = v[lo + other], v[at]


@kernel()
def _median(key, v, a, b, c):
    """Return the position of the median of three, and the number of swaps to sort them."""
    swaps = 0
    if key[v[b]] < key[v[a]]:
        a, b = b, a
        swaps += 1
    if key[v[c]] < key[v[b]]:
        b, c = c, b
        swaps += 1
    if key[v[b]] < key[v[a]]:
        a, b = b, a
        swaps += 1
    return b, swaps


@kernel()
def _choose(key, v, lo, hi):
    """Return the position of the pivot and whether the partition looks sorted; reverse one that looks descending."""
    n = hi - lo
    a, b, c = lo + n // 4, lo + n // 4 * 2, lo + n // 4 * 3
    swaps = 0
    if n >= NINTHER:
        a, s = _median(key, v, a - 1, a, a + 1)
        swaps += s
        b, s = _median(key, v, b - 1, b, b + 1)
        swaps += s
        c, s = _median(key, v, c - 1, c, c + 1)
        swaps += s
    b, s = _median(key, v, a, b, c)
    swaps += s
    if swaps < 12:
        return b, swaps == 0
    for i in range(n // 2):
        v[lo + i], v[hi - 1 - i] = v[hi - 1 - i], v[lo + i]
    return lo + hi - 1 - b, True


@kernel()
def _finish_sorted(key, v, lo, hi):
    """Move at most five values into place; return whether all are sorted. Short partitions are only checked."""
    i = lo + 1
    for _ in range(5):
        while i < hi and not key[v[i]] < key[v[i - 1]]:
            i += 1
        if i == hi:
            return True
        if hi - lo < NINTHER:
            return False
        v[i - 1], v[i] = v[i], v[i - 1]
        _sink(key, v, lo, i - 1)
    return False


@kernel()
def _part(key, v, lo, hi, pivot):
    """Partition into values less than the pivot and others; return the position of the pivot and whether none moved."""
    v[lo], v[pivot] = v[pivot], v[lo]
    one = key[v[lo]]
    front, back = lo + 1, hi
    while front < back and key[v[front]] < one:
        front += 1
    while front < back and not key[v[back - 1]] < one:
        back -= 1
    whole = front >= back
    middle = _part_blocks(key, v, front, back, one) - 1
    v[lo], v[middle] = v[middle], v[lo]
    return middle, whole


@kernel()
def _part_blocks(key, v, front, back, one):
    """Move values less than ``one`` to the front, one block from each end at a time; return the start of the others."""
    from_l, from_r = (
        np.empty(BLOCK, np.int64),
        np.empty(BLOCK, np.int64),
    )  # offsets of the values that have to change sides
    n_l = n_r = at_l = at_r = 0
    size_l = size_r = BLOCK
    last = False
    while not last:
        last = back - front <= 2 * BLOCK
        if last:
            rest = back - front
            if at_l < n_l:
                size_r = rest - BLOCK
            elif at_r < n_r:
                size_l = rest - BLOCK
            else:
                size_l = rest // 2
                size_r = rest - size_l
        if at_l == n_l:
            at_l = n_l = 0
            for i in range(size_l):
                if not key[v[front + i]] < one:
                    from_l[n_l] = i
                    n_l += 1
        if at_r == n_r:
            at_r = n_r = 0
            for i in range(size_r):
                if key[v[back - 1 - i]] < one:
                    from_r[n_r] = i
                    n_r += 1
        n = min(n_l - at_l, n_r - at_r)
        if n:  # a single cycle through all of them
            first = v[front + from_l[at_l]]
            for i in range(n):
                v[front + from_l[at_l + i]] = v[back - 1 - from_r[at_r + i]]
                v[back - 1 - from_r[at_r + i]] = v[front + from_l[at_l + i + 1]] if i + 1 < n else first
            at_l += n
            at_r += n
        if at_l == n_l:
            front += size_l
        if at_r == n_r:
            back -= size_r
    while at_l < n_l:
        n_l -= 1
        back -= 1
        v[front + from_l[n_l]], v[back] = v[back], v[front + from_l[n_l]]
        if at_l == n_l:
            return back
    while at_r < n_r:
        n_r -= 1
        at = back - 1 - from_r[n_r]
        v[front], v[at] = v[at], v[front]
        front += 1
    return front


@kernel()
def _part_equal(key, v, lo, hi, pivot):
    """Partition into values equal to the pivot, the minimum, and greater ones; return the start of the latter."""
    v[lo], v[pivot] = v[pivot], v[lo]
    one = key[v[lo]]
    front, back = lo + 1, hi
    while True:
        while front < back and not one < key[v[front]]:
            front += 1
        while front < back and one < key[v[back - 1]]:
            back -= 1
        if front >= back:
            return front
        back -= 1
        v[front], v[back] = v[back], v[front]
        front += 1
