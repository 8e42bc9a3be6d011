"""Sets of perturbed and control cells, as a pure function of (seed, step).

A set is S cells of one perturbation in one context, paired with S control cells of the same context. What a step
holds depends on the seed and the step alone: resuming needs one integer, and host ``h`` of ``H`` takes the sets
``[h::H]`` of the same global list.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.kernels.store import draw_distinct
from vcelltools.pipelines.sample_read import Half, Loaded, RowReader
from vcelltools.pipelines.splits import Split
from vcelltools.pipelines.store import Store
from vcelltools.stream import get_threads

if TYPE_CHECKING:
    import pandas as pd

AHEAD = 1  # batches that the disk is asked for before the one that is waited for is there
BLOCK = 32  # rows of a block of a cold draw: 128 KiB at 2,000 genes


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Which cells a step takes; :meth:`load` reads them.

    Attributes
    ----------
    step
        The step.
    perturbed_rows, control_rows
        (sets, S) int64 rows of the set's store.
    store_id
        (sets,) int32 positions in ``sampler.stores``.
    perturbation_id, context_id
        (sets,) int32 positions in ``sampler.perturbations`` and ``sampler.contexts``.
    group_id
        (sets,) int32 positions in ``sampler.groups``.
    """

    step: int
    perturbed_rows: np.ndarray
    control_rows: np.ndarray
    store_id: np.ndarray
    perturbation_id: np.ndarray
    context_id: np.ndarray
    group_id: np.ndarray
    sampler: Sampler

    def load(self) -> Loaded:
        """Return the cells' values."""
        return self.sampler.load(self)

    @property
    def n_cells(self) -> int:
        """Cells that a load reads."""
        return self.perturbed_rows.size + self.control_rows.size


class Sampler:
    """Draws batches of sets from one or several stores of one basis.

    Parameters
    ----------
    stores
        Stores that share a basis.
    set_size
        S, cells in a set.
    sets_per_batch
        Sets in a global batch, over all processes.
    seed
        With the step it decides everything.
    split, part
        Which groups are drawn: those of ``part`` (``train``, ``val``, ``test``); all without a split.
    weights
        How groups are weighed: ``uniform``, ``cells`` (in proportion to their cells), or a number between:
        cells ** weights.
    store_weights
        Store name -> factor on the weight of all its groups.
    level
        ``context``: a set comes from one run, within one context (batch). ``cell_line``: it comes from all of a
        perturbation's cells in a line, each paired with a control of its own context where there is one.
    short
        Groups (or controls) with fewer than S cells: ``skip`` them, or draw with ``replace``-ment.
    draw
        ``scatter``: cells at random, for data in memory or page cache. ``blocks``: random blocks of 32 stored
        neighbours (the stored order within a run is random), for data on disk.
    read
        ``auto``: ``memory`` where the free memory holds the values of all stores, else ``disk``. ``memory``: through
        the memory map, for data that the page cache or :meth:`Store.to_memory` holds. ``disk``: past the page cache,
        many reads in flight, one per stretch of neighbouring rows. The values are the same.
    target
        ``perturbed``; or, for sanity checks, ``control`` (other control cells) or ``control-same`` (the same).
    process_index, process_count
        This process takes the sets ``[process_index::process_count]``.
    verify
        Check every row against its hash when it is first read.

    Raises
    ------
    DataError
        Where the stores' bases differ, no group is left, or the split names what is not there.
    """

    def __init__(
        self,
        stores: Sequence[Store] | Store,
        *,
        set_size: int,
        sets_per_batch: int,
        seed: int = 0,
        split: Split | None = None,
        part: str = "train",
        weights: Literal["uniform", "cells"] | float = "uniform",
        store_weights: Mapping[str, float] | None = None,
        level: Literal["context", "cell_line"] = "context",
        short: Literal["skip", "replace"] = "skip",
        draw: Literal["scatter", "blocks"] = "scatter",
        read: Literal["auto", "memory", "disk"] = "auto",
        target: Literal["perturbed", "control", "control-same"] = "perturbed",
        process_index: int = 0,
        process_count: int = 1,
        verify: bool = True,
        threads: int | None = None,
    ) -> None:
        self.stores: list[Store] = [stores] if isinstance(stores, Store) else list(stores)
        self.set_size, self.sets_per_batch, self.seed = set_size, sets_per_batch, seed
        self.split, self.part, self.level, self.short = split, part, level, short
        self.draw, self.read, self.target, self.verify = draw, read, target, verify
        self.process_index, self.process_count = process_index, process_count
        self.weights, self.store_weights = weights, dict(store_weights or {})
        _check_options(self)
        _check_bases(self.stores)
        if split is not None:
            split.check(self.stores)
        self.n_genes = self.stores[0].n_genes
        self._threads = get_threads(threads)
        self._find_groups()

    # -- the list of groups --------------------------------------------------------------------------------------

    @cached_property
    def perturbations(self) -> list[str]:
        """All perturbations of the stores, whatever the split; position 0 is control."""
        labels = {s.manifest["labels"]["control"] for s in self.stores}
        control = labels.pop() if len(labels) == 1 else "control"
        names: set[str] = set()
        for s in self.stores:
            names |= set(s.runs.loc[~s.runs["is_control"], "perturbation"])
        return [control, *sorted(names)]

    @cached_property
    def contexts(self) -> list[str]:
        """All contexts, whatever the split: ``store / cell line / context``."""
        out = []
        for s in self.stores:
            keys = s.runs[["cell_line", "context"]].drop_duplicates()
            parts = keys["cell_line"].unique() if self.level == "cell_line" else keys.itertuples(index=False)
            out += [self._name_context(s, *([p] if isinstance(p, str) else p)) for p in parts]
        return sorted(out)

    def _name_context(self, store: Store, line: str, context: str = "") -> str:
        tail = "" if self.level == "cell_line" else context
        return " / ".join(x for x in (store.name, line, tail) if x)

    @property
    def present(self) -> np.ndarray:
        """(stores, G) bool: genes that each store measures; the loss leaves the others out."""
        return np.stack([s.present for s in self.stores])

    def _find_groups(self) -> None:
        import pandas as pd

        pert_id = {p: i for i, p in enumerate(self.perturbations)}
        ctx_id = {c: i for i, c in enumerate(self.contexts)}
        rows, skipped = [], []
        self._control_start: list = []
        self._control_length: list = []
        self._run_start: list = []
        for k, store in enumerate(self.stores):
            runs = store.runs
            parts = None if self.split is None else self.split.get_run_parts(store)
            controls, pooled = self._find_controls(store)
            for g in self._get_candidates(runs):
                first = runs.iloc[g[0]]
                line, pert = first["cell_line"], first["perturbation"]
                if parts is not None and parts[g[0]] != self.part:
                    continue
                start, length = int(first["start"]), int(runs["length"].iloc[g[0] : g[1]].sum())
                if self.level == "cell_line":
                    c_start, c_length = pooled.get(line, (0, 0))
                else:
                    c_start, c_length = controls.get((line, first["context"]), (0, 0))
                context = self._name_context(store, line, first["context"])
                few = min(length, c_length) < self.set_size
                if c_length == 0 or (few and self.short == "skip"):
                    why = (
                        "no controls" if c_length == 0 else "few controls" if c_length < self.set_size else "few cells"
                    )
                    skipped.append((store.name, context, pert, length, c_length, why))
                    continue
                rows.append(
                    (k, ctx_id[context], pert_id[pert], start, length, c_start, c_length, store.name, context, pert)
                )
        names = ["store_id", "context_id", "perturbation_id", "start", "length", "control_start", "control_length"]
        self.groups: pd.DataFrame = pd.DataFrame(rows, columns=[*names, "store", "context", "perturbation"])
        self.skipped: pd.DataFrame = pd.DataFrame(
            skipped, columns=["store", "context", "perturbation", "length", "control_length", "why"]
        )
        if not rows and not skipped and self.split is not None:
            if self.part == "train":
                self.split.refuse_empty_training(self.stores)
            stores = ", ".join(s.name for s in self.stores)
            raise DataError(
                f"{self.split.where}: nothing of {stores} is in the part {self.part!r}",
                hint="[zeroshot], [fewshot] or [heldout] name what is held out",
            )
        if not rows:
            raise DataError(
                f"no group of {self.part} has {self.set_size} cells and {self.set_size} controls "
                f"({len(skipped):,} are too small)",
                hint='smaller sets, level="cell_line", or short="replace"',
            )
        self._columns = {n: self.groups[n].to_numpy(np.int64) for n in names}
        self._cumulative = np.cumsum(self._get_weights())

    def _get_candidates(self, runs: pd.DataFrame) -> list[tuple[int, int]]:
        """Return (first run, one past the last run) of every perturbed group."""
        control = runs["is_control"].to_numpy()
        if self.level == "context":
            return [(i, i + 1) for i in np.flatnonzero(~control).tolist()]
        group = runs["sums_row"].to_numpy()
        first = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
        last = np.append(first[1:], len(runs))
        return [(int(a), int(b)) for a, b in zip(first, last, strict=True) if not control[a]]

    def _find_controls(self, store: Store):
        """Return the control runs by (line, context), and by line; keep what pairing within a line needs."""
        runs = store.runs
        by_context: dict[tuple[str, str], tuple[int, int]] = {}
        by_line: dict[str, tuple[int, int]] = {}
        for r in runs[runs["is_control"]].itertuples():
            by_context[r.cell_line, r.context] = (r.start, r.length)
            a, n = by_line.get(r.cell_line, (r.start, 0))
            by_line[r.cell_line] = (a, n + r.length)
        pairs = [
            by_context.get((line, ctx)) or by_line.get(line, (0, 0))
            for line, ctx in zip(runs["cell_line"], runs["context"], strict=True)
        ]
        self._control_start.append(np.array([p[0] for p in pairs], np.int64))
        self._control_length.append(np.array([p[1] for p in pairs], np.int64))
        self._run_start.append(runs["start"].to_numpy(np.int64))
        return by_context, by_line

    def _get_weights(self) -> np.ndarray:
        cells = self._columns["length"].astype(np.float64)
        power = {"uniform": 0.0, "cells": 1.0}.get(self.weights, self.weights)  # type: ignore[arg-type]
        factor = np.array([self.store_weights.get(s.name, 1.0) for s in self.stores])
        out = cells ** float(power) * factor[self._columns["store_id"]]
        if not out.sum() > 0:
            raise UsageError("all weights are zero", hint="store_weights")
        return out

    # -- drawing -------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """Return this process's sets of a step."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        total = self._cumulative[-1]
        u = rng.random(self.sets_per_batch)
        groups = np.minimum(np.searchsorted(self._cumulative, u * total, side="right"), len(self.groups) - 1)
        shape = (self.sets_per_batch, self.set_size)
        u_perturbed, u_control = rng.random(shape), rng.random(shape)
        mine = slice(self.process_index, None, self.process_count)
        return self._make_batch(step, groups[mine], u_perturbed[mine], u_control[mine])

    def draw_groups(self, group_ids: Sequence[int] | np.ndarray, *, step: int = 0) -> Batch:
        """Return one set of each of the given groups (positions in :attr:`groups`), for evaluation."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        groups = np.asarray(group_ids, np.int64)
        shape = (len(groups), self.set_size)
        return self._make_batch(step, groups, rng.random(shape), rng.random(shape))

    def _make_batch(self, step: int, groups: np.ndarray, u_perturbed: np.ndarray, u_control: np.ndarray) -> Batch:
        c = {n: v[groups] for n, v in self._columns.items()}
        perturbed = self._draw(u_perturbed, c["start"], c["length"])
        if self.level == "cell_line":
            control = self._pair(perturbed, c["store_id"], u_control)
        else:
            control = self._draw(u_control, c["control_start"], c["control_length"])
        pert_id = c["perturbation_id"]
        if self.target != "perturbed":
            pert_id = np.zeros_like(pert_id)
            if self.target == "control-same":
                perturbed = control
            else:
                perturbed = self._draw(u_perturbed, c["control_start"], c["control_length"])
        return Batch(
            step=step,
            perturbed_rows=perturbed,
            control_rows=control,
            store_id=c["store_id"].astype(np.int32),
            perturbation_id=pert_id.astype(np.int32),
            context_id=c["context_id"].astype(np.int32),
            group_id=groups.astype(np.int32),
            sampler=self,
        )

    def _draw(self, uniform: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        out = np.empty(uniform.shape, np.int64)
        if self.draw == "scatter":
            draw_distinct(np.ascontiguousarray(uniform), start, length, out)
            return out
        S = self.set_size
        n_blocks = -(-S // BLOCK)
        size = np.full(n_blocks, BLOCK)
        size[-1] = S - BLOCK * (n_blocks - 1)
        # blocks that do not overlap: sorted offsets into what is left over, then pushed apart
        free = np.maximum(length - S, 0)
        gaps = np.sort((uniform[:, :n_blocks] * (free[:, None] + 1)).astype(np.int64), axis=1)
        first = start[:, None] + gaps + np.append(0, np.cumsum(size)[:-1])
        within = np.arange(S) - np.repeat(np.append(0, np.cumsum(size)[:-1]), size)
        out = np.repeat(first, size, axis=1) + within
        short = length < S
        if short.any():
            out[short] = start[short, None] + (uniform[short] * length[short, None]).astype(np.int64)
        return out

    def _pair(self, perturbed: np.ndarray, store_id: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return, for each perturbed cell, a control of its own context (of its line where that has none)."""
        out = np.empty_like(perturbed)
        for k in np.unique(store_id):
            sets = store_id == k
            run = np.searchsorted(self._run_start[k], perturbed[sets], side="right") - 1
            start, length = self._control_start[k][run], self._control_length[k][run]
            out[sets] = start + np.minimum((uniform[sets] * length).astype(np.int64), length - 1)
        return out

    # -- reading -------------------------------------------------------------------------------------------------

    def load(self, batch: Batch, out: Loaded | None = None) -> Loaded:
        """Return the values of a batch's cells, into ``out`` where it is given.

        Arrays that the disk wrote have padded rows: ``np.ascontiguousarray`` where that matters.

        Raises
        ------
        DataError
            Where a row does not fit its hash (with ``verify``).
        """
        return self._start(batch, out)()

    def _start(self, batch: Batch, out: Loaded | None = None) -> Callable[[], Loaded]:
        """Begin to read a batch; return what waits for it."""
        rows = (batch.perturbed_rows, batch.control_rows)
        if out is None:
            halves = [self._reader.make_half(r) for r in rows]
        else:
            halves = [Half(r, v) for r, v in zip(rows, out, strict=True)]
        wait = self._reader.start(halves, batch.store_id)

        def finish() -> Loaded:
            wait()
            return Loaded(*(h.values for h in halves))

        return finish

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.stores, read=self.read, verify=self.verify, threads=self._threads)

    def iterate(self, start: int = 0, stop: int | None = None, *, prefetch: int = 2) -> Iterator[tuple[Batch, Loaded]]:
        """Yield (batch, values) of the steps ``start, start + 1, ...``, read ahead in a thread.

        Parameters
        ----------
        prefetch
            Batches that are ready before they are asked for.
        """
        ready: queue.Queue = queue.Queue(maxsize=max(1, prefetch))
        over = threading.Event()

        def offer(item) -> None:
            while not over.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            steps = itertools.count(start) if stop is None else range(start, stop)
            waiting: deque[tuple[Batch, Callable[[], Loaded]]] = deque()
            try:
                for step in steps:
                    if over.is_set():
                        return
                    batch = self.batch(step)
                    waiting.append((batch, self._start(batch)))
                    if len(waiting) > AHEAD:  # the disk has more to do before this one is waited for
                        ready_batch, wait = waiting.popleft()
                        offer((ready_batch, wait()))
                for batch, wait in waiting:
                    offer((batch, wait()))
            except BaseException as e:
                offer(e)
            else:
                offer(None)

        thread = threading.Thread(target=work, daemon=True, name="vcelltools-prefetch")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            over.set()
            thread.join()

    def __iter__(self) -> Iterator[tuple[Batch, Loaded]]:
        return self.iterate()


def _check_options(s: Sampler) -> None:
    for name, value, choices in (
        ("level", s.level, ("context", "cell_line")),
        ("short", s.short, ("skip", "replace")),
        ("draw", s.draw, ("scatter", "blocks")),
        ("read", s.read, ("auto", "memory", "disk")),
        ("target", s.target, ("perturbed", "control", "control-same")),
        ("part", s.part, ("train", "val", "test")),
    ):
        if value not in choices:
            raise UsageError(f"{name} is {value!r}", hint=f"one of: {', '.join(choices)}")
    if isinstance(s.weights, str) and s.weights not in ("uniform", "cells"):
        raise UsageError(f"weights is {s.weights!r}", hint="uniform, cells, or a power of the number of cells")
    if s.set_size < 1 or s.sets_per_batch < 1:
        raise UsageError("set_size and sets_per_batch are whole numbers from 1")
    if not 0 <= s.process_index < s.process_count:
        raise UsageError(f"process {s.process_index} of {s.process_count}")
    if not 0 <= s.seed < 2**64:
        raise UsageError(f"seed is {s.seed}; 0 to 2**64 - 1 expected")


def _check_bases(stores: Sequence[Store]) -> None:
    if not stores:
        raise UsageError("no store to sample from")
    names = [s.name for s in stores]
    if len(set(names)) != len(names):
        raise DataError(f"two stores are named {next(n for n in names if names.count(n) > 1)!r}")
    first = stores[0]
    for s in stores[1:]:
        if not np.array_equal(s.genes, first.genes):
            n = min(s.n_genes, first.n_genes)
            i = int(np.argmax(s.genes[:n] != first.genes[:n])) if (s.genes[:n] != first.genes[:n]).any() else n
            a, b = (x.genes[i] if i < x.n_genes else "nothing" for x in (first, s))
            raise DataError(
                f"the stores have different bases: gene {i} is {a} in {first.name} and {b} in {s.name} "
                f"(basis hashes {first.manifest['basis']['sha256'][:12]} and {s.manifest['basis']['sha256'][:12]})",
                hint="build them with one basis.txt",
            )
