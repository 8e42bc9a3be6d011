"""Assign the cells of a group to the partial sums that numpy uses when it sums the group's values in one array.

numpy sums an array of less than eight values in order. It sums up to 128 values in eight lanes, adds the lanes in
pairs, and then adds the remaining values. It halves a longer array at a multiple of eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAF = 128
LANES = 8


@dataclass(frozen=True, kw_only=True)
class PartialSums:
    """The partial sums of all groups.

    Attributes
    ----------
    slot_n
        (n,) int32 partial sum of each cell; -1 if it is in no group.
    group_s
        (slots,) uint16 group of each partial sum.
    first_l, lanes_l, tail_l, merges_l, leaf_k
        See :func:`vcelltools.kernels.pairwise.bucket_pairwise`.
    """

    slot_n: np.ndarray
    group_s: np.ndarray
    first_l: np.ndarray
    lanes_l: np.ndarray
    tail_l: np.ndarray
    merges_l: np.ndarray
    leaf_k: np.ndarray

    @property
    def n_slots(self) -> int:
        """Number of partial sums of all groups."""
        return len(self.group_s)


def get_leaves(n: int) -> list[tuple[int, int]]:
    """Return (length, merges) of the leaves of an array of n values, in order."""
    if n <= LEAF:
        return [(n, 0)]
    half = n // 2
    half -= half % LANES
    left, right = get_leaves(half), get_leaves(n - half)
    length, merges = right[-1]
    return [*left, *right[:-1], (length, merges + 1)]


def make_plan(codes_n: np.ndarray, n_groups: int) -> PartialSums:
    """Plan the partial sums of cells in groups ``codes_n`` (-1: none), in the order of the cells."""
    slot_n = np.full(len(codes_n), -1, np.int32)
    order = np.argsort(codes_n, kind="stable")
    edges = np.searchsorted(codes_n[order], np.arange(n_groups + 1))
    leaves: list[tuple[int, int, int, int]] = []
    leaf_k, size_k, n_slots = [0], [], 0
    for k in range(n_groups):
        rows = order[edges[k] : edges[k + 1]]
        begin, at = n_slots, 0
        for n, merges in get_leaves(len(rows)):
            lanes, tail = (LANES, n % LANES) if n >= LANES else (1, 0)
            i = np.arange(n - tail)
            slot_n[rows[at : at + n - tail]] = n_slots + i % lanes
            slot_n[rows[at + n - tail : at + n]] = n_slots + lanes + np.arange(tail)
            leaves.append((n_slots, lanes, tail, merges))
            n_slots += lanes + tail
            at += n
        leaf_k.append(len(leaves))
        size_k.append(n_slots - begin)
    first, lanes_l, tail_l, merges_l = np.array(leaves, np.int64).reshape(-1, 4).T
    return PartialSums(
        slot_n=slot_n,
        group_s=np.repeat(np.arange(n_groups), size_k).astype(np.uint16),
        first_l=np.ascontiguousarray(first),
        lanes_l=np.ascontiguousarray(lanes_l),
        tail_l=np.ascontiguousarray(tail_l),
        merges_l=np.ascontiguousarray(merges_l),
        leaf_k=np.array(leaf_k, np.int64),
    )
