"""Pass one of a store on a Dask cluster, whose workers count ranges of cells or genes.

Rows are written to known positions, and sums are integers, so a part that is lost with its worker is
computed again elsewhere, and the bytes equal those of one machine. Workers read the source and write the folder of the
store by path, so both must be on storage that all of them can access. For a file that is read gene by gene, a first
round sums the library sizes if they are not known; then the worker of a part writes the counts of its genes, in store
order.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vcelltools.config import DatasetConfig
from vcelltools.errors import UsageError
from vcelltools.genes.identity import Basis
from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.write.atomic import dump_json, fsync_path
from vcelltools.runtime.cluster import cut, gather
from vcelltools.runtime.progress import Progress
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.pass_one_cells import scatter_rows
from vcelltools.stores.building.pass_one_genes import add_libsize, get_columns, scatter_genes
from vcelltools.stores.building.plan import make_plan, open_source
from vcelltools.stores.building.work import Checkpoints, WorkFiles, open_work
from vcelltools.stores.files import Journal, trim

if TYPE_CHECKING:
    from distributed import Client

CELLS_A_GENE = 1 << 10  # a part of 65,536 cells corresponds to 64 genes
_ROW_FILES, _GENE_FILES = ("rows", "libsize", "state"), ("columns", "sums", "over")
_NEVER = Checkpoints(None, float("inf"))


class Parts:
    """The folder beside the store where the workers of a cluster write the parts of one plan."""

    def __init__(self, layout: Layout, dpath: Path, journal: Journal) -> None:
        self._layout, self._store_dpath, self._journal = layout, dpath, journal

    @property
    def dpath(self) -> Path:
        """The folder."""
        name = self._layout.plan.spec.name
        return self._store_dpath.with_name(f".{name}.{self._layout.fingerprint[:12]}.parts")

    def remove(self) -> None:
        """Remove the parts of this store, of any plan."""
        for old in self._store_dpath.parent.glob(f".{self._layout.plan.spec.name}.*.parts"):
            shutil.rmtree(old, ignore_errors=True)

    def scatter(
        self, client: Client, done: list[dict[str, Any]], part_cells: int, progress: Progress
    ) -> list[dict[str, Any]]:
        """Run pass one on the workers; return the journal lines of all parts, including those in ``done``.

        A worker writes a part to separate files and renames them when they are complete, so a worker that was
        wrongly given up for lost does no harm.
        """
        layout = self._layout
        if layout.ds.path is None:
            raise UsageError("a cluster cannot read an AnnData in memory", hint="write it to a file first")
        self.dpath.mkdir(exist_ok=True)
        n, size, what, files, work = layout.ds.n_cells, part_cells, "counts", _ROW_FILES, _scatter_cells
        if layout.by_column:
            size = max(1, part_cells // CELLS_A_GENE)
            if layout.plan.libsize is None and not (self.dpath / "libsize.npy").exists():
                self._add_libsize(client, size, progress)
            n, what, files, work = len(_get_items(layout)), "genes", _GENE_FILES, _scatter_genes
        lines = [x for x in done if all((self.dpath / x[k]).exists() for k in files)]
        parts = cut(0, n, size, [tuple(x["part"]) for x in lines])
        progress.start(f"{what} on the cluster", n, "genes" if layout.by_column else "cells")
        progress.advance(sum(x["part"][1] - x["part"][0] for x in lines))
        for part, facts in self._map(client, work, parts, progress):
            line = {"kind": "part", "part": list(part), **facts}
            self._journal.append(line)
            lines.append(line)
        progress.finish()
        return lines

    def _map(
        self, client: Client, work: Callable[..., Any], parts: list[tuple[int, int]], progress: Progress
    ) -> Iterator[tuple[tuple[int, int], Any]]:
        """Yield (part, result) as the workers finish them."""
        futures = client.map(work, parts, task=self._describe_task(), pure=False)
        try:
            yield from gather(client, futures, parts, progress, [z - a for a, z in parts])
        finally:
            client.cancel(futures)

    def _add_libsize(self, client: Client, size: int, progress: Progress) -> None:
        parts = cut(0, self._layout.ds.n_genes, size)
        progress.start("library sizes on the cluster", self._layout.ds.n_genes, "genes")
        total = np.zeros(self._layout.ds.n_cells, np.int64)
        for _, share in self._map(client, _add_part, parts, progress):
            total += share
        progress.finish()
        _save(self.dpath / "libsize.npy", total)

    def _describe_task(self) -> dict[str, Any]:
        """Return everything that a worker needs to make the layout again."""
        layout, plan = self._layout, self._layout.plan
        return {
            "path": os.path.abspath(layout.ds.path) if layout.ds.path else None,
            "spec": msgspec.to_builtins(plan.spec),
            "basis": {"labels": plan.basis.labels, "ids": plan.basis.ids, "symbols": plan.basis.symbols},
            "target_sum": plan.target_sum,
            "seed": plan.seed,
            "aliases": dict(plan.aliases),
            "dpath": str(self.dpath.absolute()),
            "source": layout.source,
            "chunk_values": layout.chunk_values,
            "bucket_bytes": layout.bucket_bytes,
            "fingerprint": layout.fingerprint,
        }

    def merge(self, work: WorkFiles, lines: list[dict[str, Any]]) -> None:
        """Move the content of the parts to its final position, except for work rows."""
        layout = self._layout
        if layout.by_column:
            work.libsize = _get_libsize(layout, self.dpath)
            work.write_libsize(work.libsize)
        for line in lines:
            if not layout.by_column:
                work.add_state(line, self.dpath)
                work.libsize[slice(*line["part"])] = np.load(self.dpath / line["libsize"], allow_pickle=False)
                continue
            counts = np.memmap(self.dpath / line["columns"], np.uint16, "r") if line["positions"] else np.empty(0)
            for p, column in zip(line["positions"], counts.reshape(-1, layout.n), strict=True):
                work.write_column(p, np.ascontiguousarray(column))
            work.add_over(np.load(self.dpath / line["over"], allow_pickle=False))
            sums = np.load(self.dpath / line["sums"], mmap_mode="r", allow_pickle=False)
            work.sums.add_genes(np.array(line["measured"], np.int64), sums)
        trim(work.libsize)  # dirty pages belong to the file, which is flushed

    @contextmanager
    def opened(self, slot_of_cell: np.ndarray, lines: list[dict[str, Any]]) -> Iterator[Callable[..., None]]:
        """Open the rows in the parts; yield a function that reads the work rows ``first:last`` into an array."""
        held: list[tuple[np.ndarray, int]] = []

        def read(first: int, last: int, rows: np.ndarray) -> None:
            for slots, fd in held:
                i, j = np.searchsorted(slots, [first, last])
                if i < j:
                    part = np.empty((j - i, rows.shape[1]), np.uint16)
                    pread_into(fd, part, int(i) * self._layout.row_bytes, str(self.dpath))
                    rows[slots[i:j] - first] = part

        try:
            for line in lines:
                slots = slot_of_cell[slice(*line["part"])]
                held.append((np.sort(slots[slots >= 0]), os.open(self.dpath / line["rows"], os.O_RDONLY)))
            yield read
        finally:
            for _, fd in held:
                os.close(fd)


# -- on a worker -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _get_layout(text: str) -> tuple[Layout, Path]:
    """Return the layout of a task and the folder of its parts; a worker makes the layout once for all its parts."""
    task = json.loads(text)
    spec = msgspec.convert(task["spec"], DatasetConfig)
    fields: dict[str, Any] = {k: tuple(v) for k, v in task["basis"].items()}
    ds = open_source(task["path"], spec, task["seed"])
    options = {k: task[k] for k in ("target_sum", "seed")}
    plan = make_plan(ds, spec, Basis(**fields), aliases=task["aliases"] or None, **options)
    options = {k: task[k] for k in ("source", "chunk_values", "bucket_bytes")}
    layout = Layout(plan=plan, ds=ds, threads=1, **options)
    if layout.fingerprint != task["fingerprint"]:
        raise UsageError(
            "a worker has different data or software than the driver",
            hint="use shared storage and the same version on all workers",
        )
    return layout, Path(task["dpath"])


@contextmanager
def _writing(dpath: Path, part: tuple[int, int]) -> Iterator[tuple[str, Path]]:
    """Yield the name of a part and a separate folder to work in."""
    name = f"{part[0]}.{part[1]}"
    tmp = dpath / f"{name}.{secrets.token_hex(4)}.tmp"
    tmp.mkdir()
    try:
        yield name, tmp
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _move(tmp: Path, dpath: Path, *names: str) -> None:
    """Move complete files to their final names."""
    for name in names:
        fsync_path(tmp / name)
        os.replace(tmp / name, dpath / name)


def _scatter_cells(part: tuple[int, int], *, task: dict[str, Any]) -> dict[str, Any]:
    """Scatter the cells of one part; return its journal entry."""
    layout, dpath = _get_layout(dump_json(task))
    with _writing(dpath, part) as (name, tmp):
        with open_work(layout, tmp, layout.get_ranks(*part)) as work:
            scatter_rows(layout, work, *part, checkpoints=_NEVER)
            facts = work.save_state(f"{name}.state")
            np.save(tmp / f"{name}.libsize.npy", work.libsize[slice(*part)])
        os.replace(tmp / "X.f16", tmp / f"{name}.rows")
        facts |= {"rows": f"{name}.rows", "libsize": f"{name}.libsize.npy"}
        _move(tmp, dpath, *(facts[key] for key in _ROW_FILES))
    return facts


def _scatter_genes(part: tuple[int, int], *, task: dict[str, Any]) -> dict[str, Any]:
    """Scatter the genes of one part; return its journal entry."""
    layout, dpath = _get_layout(dump_json(task))
    items = _get_items(layout)[slice(*part)]
    single = np.array([x[0] for x in items if len(x) == 1], np.int64)
    first = np.array([x[0] for x in items], np.int64)
    positions, measured = (of[first][of[first] >= 0] for of in (layout.basis_of_column, layout.measured_of_column))
    with _writing(dpath, part) as (name, tmp):
        with open_work(layout, tmp, layout.get_ranks(0, 0)) as work:
            work.libsize = _get_libsize(layout, dpath)
            scatter_genes(layout, work, single, [x for x in items if len(x) > 1], checkpoints=_NEVER)
            with open(tmp / f"{name}.columns", "wb") as f:
                column = np.empty(layout.n, np.uint16)
                for p in positions.tolist():
                    work.read_column(p, 0, column)
                    f.write(column.data)
            np.save(tmp / f"{name}.sums.npy", np.ascontiguousarray(work.sums.table[:, measured]))
            np.save(tmp / f"{name}.over.npy", work.get_over())
        facts: dict[str, Any] = {"columns": f"{name}.columns", "sums": f"{name}.sums.npy", "over": f"{name}.over.npy"}
        _move(tmp, dpath, *facts.values())
    return facts | {"positions": positions.tolist(), "measured": measured.tolist()}


def _add_part(part: tuple[int, int], *, task: dict[str, Any]) -> np.ndarray:
    """Return the contribution of some columns to the library sizes."""
    return add_libsize(_get_layout(dump_json(task))[0], range(*part))


def _get_items(layout: Layout) -> list[list[int]]:
    """Return the columns of every required gene, in the order of the parts."""
    single, shared = get_columns(layout)
    return [[int(c)] for c in single] + shared


def _get_libsize(layout: Layout, dpath: Path) -> np.ndarray:
    known = layout.plan.libsize
    return np.load(dpath / "libsize.npy", allow_pickle=False) if known is None else known


def _save(path: Path, values: np.ndarray) -> None:
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(tmp, "wb") as f:
        np.save(f, values)
    fsync_path(tmp)
    os.replace(tmp, path)
