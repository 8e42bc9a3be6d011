"""Read the cells that a sampler drew, through the memory map or directly from disk with many reads in flight.

The two ways give bitwise equal values and differ only in speed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.direct import ALIGN, make_aligned
from vcelltools.kernels.store import copy_rows, gather_rows
from vcelltools.runtime.memory import get_free_memory
from vcelltools.stores.format import UNIT_ROWS
from vcelltools.stores.store import Store

READS_IN_FLIGHT = 24  # threads, because a disk is fastest with many requests in its queue
PIECE_BYTES = 256 << 10  # maximum bytes per read
MOST_READS = 16  # maximum number of reads that a thread takes at once
SLAB_BYTES = 4 << 20  # bytes to copy at once, without the interpreter lock
WARM_BYTES = 8 << 20


class Loaded(NamedTuple):
    """The cells of a batch: two (sets, S, G) float16 arrays of CP10K+log1p."""

    perturbed: np.ndarray
    control: np.ndarray


class Half(NamedTuple):
    """A request: (sets, S) rows of the store of each set, and the (sets, S, G) float16 output.

    ``raw`` is the (sets · S · stride · 2,) uint8 memory of values whose rows are padded like those of the stores, to
    which the disk can write directly; otherwise None.
    """

    rows: np.ndarray
    values: np.ndarray
    raw: np.ndarray | None = None

    @property
    def flat(self) -> np.ndarray:
        """(sets · S, columns) float16, contiguous, including any padding."""
        if self.raw is not None:
            return self.raw.view(np.float16).reshape(self.rows.size, -1)
        return self.values.reshape(self.rows.size, -1)


class _Lease:
    """Memory that returns to its pool when the last array on it is deleted."""

    def __init__(self, room: np.ndarray, home: list[np.ndarray]) -> None:
        self._room, self._home = room, home
        self.__array_interface__ = room.__array_interface__

    def __del__(self) -> None:
        self._home.append(self._room)


@dataclass(kw_only=True)
class _Slab:
    """Some reads into one block of memory, and the destinations of their rows."""

    store: Store
    reads: list[tuple[int, int, int, int]]  # position in memory, bytes there, position in the file, bytes required
    checks: list[tuple[int, int, int]] = field(default_factory=list)  # first row, position in memory, rows
    first: np.ndarray | None = None  # position in memory of each requested row
    places: np.ndarray | None = None
    out: np.ndarray | None = None
    room: np.ndarray | None = None  # set if nothing has to be copied
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.reads)

    def finish(self) -> None:
        """Wait for the reads, check rows if requested, and copy them out."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        if self.first is None:
            return
        assert self.room is not None and self.places is not None and self.out is not None
        width = self.store.stride * 2
        for row, at, n in self.checks:
            block = self.room[at : at + n * width].view(np.float16).reshape(n, self.store.stride)
            self.store.check_block(row, block)
        word = get_word(self.out.shape[1])
        room: np.ndarray = self.room[: len(self.room) // 8 * 8].view(word)
        if not copy_rows(room, self.first // room.itemsize, self.places, self.out.view(word)):
            raise DataError(f"{self.store.path}: rows were read to the wrong position")


class RowReader:
    """Reads rows of some stores of the same width.

    Parameters
    ----------
    read
        ``memory``, ``disk``, or ``auto``, which uses the memory map if the free memory holds the values of all stores
        and otherwise bypasses the page cache. Stores that fit but are not in memory are fetched into the page
        cache by a thread, while the first batches are read without it.
    verify
        Whether to check every unit of 16 rows against its hash when it is first read.
    threads
        Number of threads that copy rows from the memory map.
    """

    def __init__(self, stores: Sequence[Store], *, read: str, verify: bool, threads: int) -> None:
        self.stores, self.verify, self.n_genes = stores, verify, stores[0].n_genes
        self._threads = threads
        self._lock = threading.Lock()
        width = max(s.stride for s in stores) * 2
        self._slab_bytes = (
            SLAB_BYTES + PIECE_BYTES + 2 * UNIT_ROWS * width + 2 * ALIGN
        )  # the last read may extend beyond the end
        self._rooms: list[np.ndarray] = []  # pools of memory for blocks and for values
        self._outputs: list[np.ndarray] = []
        self._mapped = np.array([self._choose(s, read) for s in stores])
        self._warming: threading.Thread | None = None
        if read == "auto" and not self._mapped.all() and self._fits():
            self._warming = threading.Thread(target=self._warm, daemon=True, name="vcelltools-warm")
            self._warming.start()

    def _fits(self) -> bool:
        return sum(s.padded.nbytes for s in self.stores if not s.staged) <= get_free_memory()

    def _choose(self, store: Store, read: str) -> bool:
        """Return whether the rows of a store are read through the memory map."""
        if store.staged or read == "memory":
            return True
        return read == "auto" and store.in_page_cache and self._fits()

    def _warm(self) -> None:
        """Fetch the stores into the page cache, and use their memory maps from then on."""
        room = np.empty(WARM_BYTES, np.uint8)
        for k in np.flatnonzero(~self._mapped).tolist():
            with open(self.stores[k].path / "X.f16", "rb", buffering=0) as f:
                while f.readinto(room):  # type: ignore[arg-type]
                    pass
            self._mapped[k] = True

    def get_ways(self) -> list[str]:
        """Return the current way of reading each store: ``memory`` or ``disk``."""
        return ["memory" if m else "disk" for m in self._mapped]

    def start(self, halves: Sequence[Half], store_id: np.ndarray) -> Callable[[], None]:
        """Begin to read; return a function that waits until the read is complete.

        Calls may overlap, so that the queue of the disk stays full between batches.

        Raises
        ------
        DataError
            If a row is not in its store, or (with ``verify``) does not match its hash; the waiting function raises it
            too.
        """
        mapped: list[tuple[Store, np.ndarray, np.ndarray, np.ndarray]] = []
        slabs: list[_Slab] = []
        for half in halves:
            S = half.rows.shape[1]
            for k in np.unique(store_id).tolist():
                store, sets = self.stores[k], np.flatnonzero(store_id == k)
                rows = half.rows[sets].reshape(-1)
                if len(rows) and (rows.min() < 0 or rows.max() >= store.n_cells):
                    raise DataError(f"{store.path}: a batch contains rows that the store does not have")
                places = (sets[:, None] * S + np.arange(S)).reshape(-1)
                out = half.flat
                if self._mapped[k]:
                    mapped.append((store, rows, places, out))
                else:
                    slabs += self._read_ahead(store, rows, places, out, half.raw)

        def wait() -> None:
            for args in mapped:
                self._gather(*args)
            for slab in slabs:
                slab.finish()
                if slab.first is not None and slab.room is not None:
                    self._rooms.append(slab.room)

        return wait

    def read(self, rows: np.ndarray, store_id: np.ndarray) -> np.ndarray:
        """Return the values (sets, S, G) float16 of (sets, S) rows of stores; errors as in :meth:`start`."""
        half = self.make_half(rows)
        self.start([half], store_id)()
        return half.values

    # -- through the memory map ------------------------------------------------------------------------------------

    def _gather(self, store: Store, rows: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        if self.verify and not store.is_checked(rows):
            store.check_rows(rows)
        word = get_word(out.shape[1])
        X: np.ndarray = np.asarray(store.padded).view(word)
        flat: np.ndarray = out.view(word)
        cuts = np.linspace(0, len(rows), self._threads + 1).astype(np.int64)
        jobs = [self._pool.submit(gather_rows, X, rows, places, a, b, flat) for a, b in itertools.pairwise(cuts[1:])]
        fine = gather_rows(X, rows, places, cuts[0], cuts[1], flat)
        if not (fine and all(j.result() for j in jobs)):
            raise DataError(f"{store.path}: a batch contains rows that the store does not have")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, self._threads - 1), thread_name_prefix="vcelltools-gather")

    # -- past the page cache ---------------------------------------------------------------------------------------

    def make_half(self, rows: np.ndarray) -> Half:
        """Return an array for the values of (sets, S) rows, padded like the stores if the disk can write to it."""
        shape, stride = (*rows.shape, self.n_genes), self.stores[0].stride
        if self._mapped.all() or stride * 2 % ALIGN:
            return Half(rows, np.empty(shape, np.float16))
        raw = np.asarray(_Lease(self._take_room(self._outputs, rows.size * stride * 2), self._outputs))
        raw = raw[: rows.size * stride * 2]
        return Half(rows, raw.view(np.float16).reshape(*rows.shape, stride)[..., : self.n_genes], raw)

    def _read_ahead(
        self, store: Store, rows: np.ndarray, places: np.ndarray, out: np.ndarray, raw: np.ndarray | None
    ) -> list[_Slab]:
        """Begin to read all runs of neighbouring rows, directly to their destination (``raw``) if they fit."""
        width = store.stride * 2
        first, n = find_stretches(rows, places, max(1, PIECE_BYTES // width))
        a, z = rows[first], rows[first] + n
        unchecked = np.zeros(len(first), bool)
        if self.verify and not store.is_checked(rows):  # read whole units, and check them
            unchecked = np.logical_or.reduceat(store.get_unchecked(rows), first)
            a = np.where(unchecked, a // UNIT_ROWS * UNIT_ROWS, a)
            z = np.where(unchecked, np.minimum(-(-z // UNIT_ROWS) * UNIT_ROWS, store.n_cells), z)
        begin, skip, room = store.direct.get_extents(a * width, (z - a) * width)
        needs = skip + (z - a) * width
        slabs = []
        straight = ~unchecked if raw is not None else np.zeros(len(first), bool)
        if straight.any():
            reads = [v[straight].tolist() for v in (places[first] * width, needs, begin, needs)]
            slabs.append(_Slab(store=store, reads=list(zip(*reads, strict=True)), room=raw))
        rest = np.flatnonzero(~straight)
        ends = np.cumsum(room[rest])
        slab_of = (ends - room[rest]) // SLAB_BYTES
        for pick in np.split(rest, np.flatnonzero(np.diff(slab_of)) + 1) if len(rest) else []:
            at = np.cumsum(room[pick]) - room[pick]
            word = at + skip[pick] - a[pick] * width
            mine = np.concatenate([np.arange(first[p], first[p] + n[p]) for p in pick.tolist()])
            reads = [v.tolist() for v in (at, room[pick], begin[pick], needs[pick])]
            checks = [v[unchecked[pick]].tolist() for v in (a[pick], at + skip[pick], (z - a)[pick])]
            slabs.append(
                _Slab(
                    store=store,
                    reads=list(zip(*reads, strict=True)),
                    checks=list(zip(*checks, strict=True)),
                    first=np.repeat(word, n[pick]) + rows[mine] * width,
                    places=places[mine],
                    out=out,
                )
            )
        some = max(1, min(MOST_READS, PIECE_BYTES // (4 * int(needs.max()))))  # small reads are processed in groups
        todo = iter([(slab, slab.reads[k : k + some]) for slab in slabs for k in range(0, len(slab.reads), some)])
        for _ in range(min(READS_IN_FLIGHT, len(first))):
            self._disk_pool.submit(self._read, todo)
        return slabs

    def _read(self, todo: Iterator[tuple[_Slab, list[tuple[int, int, int, int]]]]) -> None:
        """Execute reads from a list that is shared with other threads."""
        for slab, reads in todo:
            try:
                with self._lock:
                    if slab.room is None:
                        slab.room = self._take_room(self._rooms, self._slab_bytes)
                fill, room = slab.store.direct.fill, slab.room
                for at, n, begin, needed in reads:
                    fill(room[at : at + n], begin, needed)
            except BaseException as e:
                slab.error = e
            with self._lock:
                slab.left -= len(reads)
                if slab.left == 0:
                    slab.done.set()

    @staticmethod
    def _take_room(home: list[np.ndarray], n_bytes: int) -> np.ndarray:
        """Return memory that the disk can write to, from the pool if available."""
        while home:
            with suppress(IndexError):
                if len(room := home.pop()) >= n_bytes:
                    return room
        return make_aligned(n_bytes)

    @cached_property
    def _disk_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="vcelltools-read")


def get_word(n_genes: int) -> type:
    """Return the widest integer type with which rows of float16 can be copied."""
    return np.uint64 if n_genes % 4 == 0 else np.uint16


def find_stretches(rows: np.ndarray, places: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (position of the first, length) of every run of neighbouring rows with neighbouring destinations.

    Runs longer than ``most`` rows are divided.
    """
    if not len(rows):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.append(True, (np.diff(rows) != 1) | (np.diff(places) != 1))
    at = np.arange(len(rows))
    starts |= (at - np.maximum.accumulate(np.where(starts, at, 0))) % most == 0
    first = np.flatnonzero(starts)
    return first, np.diff(np.append(first, len(rows)))
