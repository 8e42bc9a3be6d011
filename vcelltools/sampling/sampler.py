"""Draw sets of perturbed and control cells, as a pure function of (seed, step).

A set consists of S cells of one perturbation in one context, paired with S control cells of the same context. The
content of a step depends only on the seed and the step: resuming needs one integer, and host ``h`` of ``H`` takes the
sets ``[h::H]`` of the same global list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from vcelltools.errors import DataError, UsageError, checked
from vcelltools.kernels.store import draw_distinct
from vcelltools.runtime.prefetch import Prefetch
from vcelltools.runtime.threads import get_threads
from vcelltools.sampling.lines import list_lines, name_line
from vcelltools.sampling.loader import Half, Loaded, RowReader
from vcelltools.sampling.splits import Split
from vcelltools.stores.building.plan import join_labels
from vcelltools.stores.store import Store

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 32  # rows per block for draws from disk: 128 KiB with 2,000 genes


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The cells of a step, which :meth:`load` reads.

    Attributes
    ----------
    step
        The step.
    perturbed_rows, control_rows
        (sets, S) int64 rows of the store of each set.
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
    _begun: list[Callable[[], Loaded]] = field(default_factory=list, repr=False)

    def begin(self, share: slice = slice(None)) -> Batch:
        """Begin to read the values of a part of the sets, for which :meth:`load` then waits; return the batch."""
        self._begun.append(self.sampler.begin(self, share=share))
        return self

    def load(self, share: slice = slice(None)) -> Loaded:
        """Return the values of the cells, of a part of the sets, or of the read that was begun."""
        return (self._begun.pop() if self._begun else self.sampler.begin(self, share=share))()

    @property
    def n_cells(self) -> int:
        """The number of cells that a load reads."""
        return self.perturbed_rows.size + self.control_rows.size


class Sampler:
    """Draws batches of sets from one or more stores with the same basis.

    Parameters
    ----------
    stores
        Stores that share a basis.
    set_size
        Number of cells in a set, S.
    sets_per_batch
        Number of sets in a global batch, over all processes.
    seed
        The seed, which determines all draws together with the step.
    split, part
        The groups to draw: those of ``part`` (``train``, ``val``, ``test``), or all without a split.
    weights
        The weights of groups: ``uniform``, ``cells`` (in proportion to their cells), or a number in between:
        cells ** weights.
    store_weights
        Store name -> factor on the weight of all its groups.
    level
        With ``context``, a set comes from one run, within one context (batch). With ``cell_line``, it comes from all
        cells of a perturbation in a line, each paired with a control of its own context if there is one.
    short
        How to handle groups (or controls) with fewer than S cells: ``skip`` them, or draw with replacement
        (``replace``).
    draw
        ``scatter`` draws random cells, for data in memory or the page cache. ``blocks`` draws random blocks of 32
        stored neighbours (cells are stored in random order within a run), for data on disk.
    read
        ``memory`` reads through
        the memory map, for data in the page cache or in :meth:`Store.to_memory`. ``disk`` bypasses the page cache, with
        many reads in flight, one per run of neighbouring rows. ``auto`` uses ``memory`` if the free memory holds the
        values of all stores, and otherwise ``disk``. The values are the same.
    target
        ``perturbed``, or for sanity checks ``control`` (other control cells) or ``control-same`` (the same control
        cells).
    process_index, process_count
        This process takes the sets ``[process_index::process_count]``.
    verify
        Whether to check every row against its hash when it is first read.

    Raises
    ------
    DataError
        If the bases of the stores differ, no group is left, or the split has names that do not exist.

    Examples
    --------
    >>> import vcelltools as vc
    >>> sampler = vc.Sampler(vc.open_store("stores/atlas"), set_size=8, sets_per_batch=2)
    >>> sampler.batch(0).perturbed_rows.shape
    (2, 8)
    """

    @checked
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
        """All perturbations of the stores, regardless of the split; position 0 is the control."""
        labels = {s.manifest["labels"]["control"] for s in self.stores}
        control = labels.pop() if len(labels) == 1 else "control"
        names: set[str] = set()
        for s in self.stores:
            names |= set(s.runs.loc[~s.runs["is_control"], "perturbation"])
        return [control, *sorted(names)]

    @cached_property
    def contexts(self) -> list[str]:
        """All contexts, regardless of the split: ``STORE.LINE``, or ``STORE.LINE / CONTEXT``."""
        if self.level == "cell_line":
            return list(list_lines(self.stores))
        out = []
        for s in sorted(self.stores, key=lambda s: s.name):
            keys = s.runs[["cell_line", "context"]].drop_duplicates()
            out += sorted(self._name_context(s, *key) for key in keys.itertuples(index=False))
        return out

    def _name_context(self, store: Store, line: str, context: str = "") -> str:
        place = [line] if self.level == "cell_line" or not context else [line, context]
        return name_line(store.name, join_labels(place, " / "))

    @property
    def present(self) -> np.ndarray:
        """(stores, G) bool: the genes that each store measures; the loss excludes the others."""
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
                f"{self.split.where}: no group of {stores} is in the part {self.part!r}",
                hint="list held-out groups in [zeroshot], [fewshot] or [heldout]",
            )
        if not rows:
            raise DataError(
                f"no group of {self.part} has {self.set_size} cells and {self.set_size} controls "
                f"({len(skipped):,} are too small)",
                hint='use smaller sets, level="cell_line", or short="replace"',
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
        """Return the control runs by (line, context) and by line, and keep the data for pairing within a line."""
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
        """Return the sets of a step for this process."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], np.uint64)))
        total = self._cumulative[-1]
        u = rng.random(self.sets_per_batch)
        groups = np.minimum(np.searchsorted(self._cumulative, u * total, side="right"), len(self.groups) - 1)
        shape = (self.sets_per_batch, self.set_size)
        u_perturbed, u_control = rng.random(shape), rng.random(shape)
        mine = slice(self.process_index, None, self.process_count)
        return self._make_batch(step, groups[mine], u_perturbed[mine], u_control[mine])

    def draw_groups(self, group_ids: Sequence[int] | np.ndarray, *, step: int = 0) -> Batch:
        """Return one set from each of the given groups (positions in :attr:`groups`), for evaluation."""
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
        # non-overlapping blocks: sorted offsets into the remaining rows, which are then moved apart
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
        """Return a control for each perturbed cell, from its own context or, if there is none, from its line."""
        out = np.empty_like(perturbed)
        for k in np.unique(store_id):
            sets = store_id == k
            run = np.searchsorted(self._run_start[k], perturbed[sets], side="right") - 1
            start, length = self._control_start[k][run], self._control_length[k][run]
            out[sets] = start + np.minimum((uniform[sets] * length).astype(np.int64), length - 1)
        return out

    # -- reading -------------------------------------------------------------------------------------------------

    def load(self, batch: Batch, out: Loaded | None = None) -> Loaded:
        """Return the values of the cells of a batch, in ``out`` if it is given.

        Arrays read from disk have padded rows; use ``np.ascontiguousarray`` if that matters.

        Raises
        ------
        DataError
            If a row does not match its hash (with ``verify``).
        """
        return self.begin(batch, out)()

    def begin(self, batch: Batch, out: Loaded | None = None, *, share: slice = slice(None)) -> Callable[[], Loaded]:
        """Begin to read a batch, or a part of its sets; return a function that waits for it."""
        rows = (batch.perturbed_rows[share], batch.control_rows[share])
        if out is None:
            halves = [self.reader.make_half(r) for r in rows]
        else:
            halves = [Half(r, v) for r, v in zip(rows, out, strict=True)]
        wait = self.reader.start(halves, batch.store_id[share])

        def finish() -> Loaded:
            wait()
            return Loaded(*(h.values for h in halves))

        return finish

    @cached_property
    def reader(self) -> RowReader:
        """The loader of the rows, the only path from the stores to the values."""
        return RowReader(self.stores, read=self.read, verify=self.verify, threads=self._threads)

    def iterate(self, start: int = 0, stop: int | None = None, *, prefetch: int = 2) -> Iterator[tuple[Batch, Loaded]]:
        """Yield (batch, values) of the steps ``start, start + 1, ...``, prefetched in a thread.

        Parameters
        ----------
        prefetch
            Number of batches to keep ready.
        """
        with Prefetch(
            lambda step: self.batch(step).begin(), lambda batch: (batch, batch.load()), start, stop, ahead=prefetch
        ) as ready:
            yield from ready

    def __iter__(self) -> Iterator[tuple[Batch, Loaded]]:
        return self.iterate()


def _check_options(s: Sampler) -> None:
    if s.split is not None and not hasattr(s.split, "get_part"):
        raise UsageError(
            f"split is a {type(s.split).__name__}, not a Split",
            hint="read one from a file with read_split",
            field="split",
        )
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
        raise UsageError(f"weights is {s.weights!r}", hint="use uniform, cells, or a power of the number of cells")
    if s.set_size < 1 or s.sets_per_batch < 1:
        raise UsageError("set_size and sets_per_batch must be whole numbers of at least 1")
    if not 0 <= s.process_index < s.process_count:
        raise UsageError(f"process {s.process_index} of {s.process_count}")
    if not 0 <= s.seed < 2**64:
        raise UsageError(f"seed is {s.seed}, but must be between 0 and 2**64 - 1")


def _check_bases(stores: Sequence[Store]) -> None:
    if not stores:
        raise UsageError("there is no store to sample from")
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
                hint="build them with the same basis.txt",
            )
