"""Build a store in one pass over the source and one over the store, both resumable.

Pass one scatters the basis counts of every cell, as uint16 work rows, to the position in ``X.f16`` of its bucket
(a few thousand neighbouring store rows), and adds up library sizes and values, whose sums it writes at its end.
Pass two processes one bucket after another: it sorts its rows, appends their exact counts to ``counts.u8z``, and only
then replaces them in ``X.f16`` with values. The disk therefore holds nothing twice, memory holds a few buckets, and a
bucket that a crash left incomplete is made again from its counts.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import DataError, spell
from vcelltools.io import DenseMatrix
from vcelltools.io.write.atomic import replace_folder, step
from vcelltools.runtime.memory import trim_heap
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.stores.building.distributed import Parts
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.pass_one_cells import scatter_rows
from vcelltools.stores.building.pass_one_genes import scatter_columns
from vcelltools.stores.building.pass_two import Buckets
from vcelltools.stores.building.tables import write_manifest, write_tables
from vcelltools.stores.building.work import Checkpoints, WorkFiles, open_work
from vcelltools.stores.files import Journal, to_smallest
from vcelltools.stores.format import MANIFEST, PARTS, hash_file, read_manifest

if TYPE_CHECKING:
    from distributed import Client

WORK_FORMAT = 2  # of the files of an unfinished build; those of another one are discarded


class Builder:
    """A store under construction: its layout, folder and journal, and the steps to build it."""

    def __init__(self, layout: Layout, dpath: Path, progress: Progress = SILENT) -> None:
        self.layout, self.dpath, self.progress = layout, dpath, progress
        self.journal = Journal(dpath / "journal")
        self.parts = Parts(layout, dpath, self.journal)

    def run(self, cluster: Client | None = None, part_cells: int = 1 << 16) -> None:
        """Build the store up to the manifest, resuming an interrupted run of the same plan."""
        layout, lines = self.layout, self._resume()
        if not layout.sums_fit:
            gb, (n_groups, n_genes) = (layout.work_bytes + layout.sums_bytes) / 1e9, layout.sums_shape
            memory = f"{spell('memory')} {math.ceil(10 * gb) / 10:g}"
            self.progress.note(
                f"{layout.plan.spec.name}: the sums of {n_groups:,} groups over {n_genes:,} genes are kept on disk, "
                f"which is slow; {memory} keeps them in memory, and {spell('sums', 'basis')} stores fewer"
            )
        scattered = next((x for x in lines if x["kind"] == "scattered"), None)
        parts = scattered.get("parts") if scattered is not None else None
        if scattered is None and cluster is not None:
            done = [x for x in lines if x["kind"] == "part"]
            parts = self.parts.scatter(cluster, done, part_cells, self.progress)
        with ThreadPoolExecutor(1) as pool, open_work(layout, self.dpath, layout.get_slots()) as work:
            if scattered is not None:
                work.add_state(scattered, sums=False)
            elif parts is not None:
                self.parts.merge(work, parts)
                self._end_pass_one(work, **({} if layout.by_column else {"parts": parts}))
            else:
                self._scatter(work, [x for x in lines if x["kind"] == "rows"])
            digest = pool.submit(hash_file, self.dpath / "sums.npy")  # gigabytes; pass two waits for the disk at times
            self._finish(work, parts or [], [x for x in lines if x["kind"] == "bucket"])
            duplicates = work.duplicates
        del work
        trim_heap()
        write_tables(layout, self.dpath)
        write_manifest(layout, self.dpath, duplicates, {"sums.npy": digest.result()})

    def _resume(self) -> list[dict[str, Any]]:
        """Return the lines of the journal to resume from; a folder of another plan is discarded."""
        lines, edges = self.journal.read(), hashlib.sha256(self.layout.edges.tobytes()).hexdigest()
        first = {"kind": "plan", "plan": self.layout.fingerprint, "edges": edges, "work": WORK_FORMAT}
        if lines and lines[0] == first and (self.dpath / "X.f16").exists():
            self.journal.rewrite(lines)
            if len(lines) > 1:
                self.progress.note(f"resuming {self.dpath.parent / self.layout.plan.spec.name}")
            return lines[1:]
        shutil.rmtree(self.dpath, ignore_errors=True)
        self.parts.remove()
        self.dpath.mkdir(parents=True)
        step("folder")
        with open(self.dpath / "X.f16", "wb") as f:
            os.posix_fallocate(f.fileno(), 0, self.layout.n * self.layout.row_bytes)
        step("allocated")
        self.journal.append(first)
        return []

    def _checkpoint(self, work: WorkFiles, kind: str, **more: Any) -> None:
        """Record the progress of pass one in the journal."""
        facts = work.save_state(f"state.{len(self.journal.read())}.work", sums=kind != "scattered")
        self.journal.append({"kind": kind, **facts, **more})
        for old in self.dpath.glob("state.*.work"):
            if old.name != facts["state"]:
                old.unlink()

    def _end_pass_one(self, work: WorkFiles, **more: Any) -> None:
        """Write the sums, and record that the counts need not be read again."""
        work.sums.save(self.dpath / "sums.npy")
        self._checkpoint(work, "scattered", **more)

    def _scatter(self, work: WorkFiles, done: list[dict[str, Any]]) -> None:
        """Run pass one, from the position in the journal."""
        first = 0
        if done:
            first = int(done[-1]["rows"])
            work.add_state(done[-1])
        scatter = scatter_columns if self.layout.by_column else scatter_rows
        checkpoints = Checkpoints(
            lambda stop: self._checkpoint(work, "rows", rows=stop), self.layout.checkpoint_seconds
        )
        scatter(self.layout, work, first, checkpoints=checkpoints, progress=self.progress)
        self._end_pass_one(work)

    def _finish(self, work: WorkFiles, parts: list[dict[str, Any]], done: list[dict[str, Any]]) -> None:
        """Run pass two."""
        layout = self.layout
        slots = work.slot_of_cell
        over, lib = work.take_over(), to_smallest(work.libsize)[layout.plan.order.source]
        work.forget_cells()  # from here on, everything is in store order
        if not isinstance(layout.ds.matrix, DenseMatrix):
            layout.ds.matrix.forget()
        n_frames = int(done[-1]["frames"]) if done else 0
        with self.parts.opened(slots, parts) if parts and not layout.by_column else nullcontext() as read_rows:
            del slots
            trim_heap()
            buckets = Buckets(layout, work, lib, over, read_rows)
            buckets.run(self.dpath, self.journal, len(done), n_frames, self.progress)

    def is_complete(self) -> bool:
        """Return whether the folder holds the complete store of this plan and only has to be moved."""
        try:
            return read_manifest(self.dpath)["plan"] == self.layout.fingerprint
        except DataError:
            return False

    def publish(self, target: Path) -> None:
        """Move the finished folder to its final path."""
        for path in (p for p in self.dpath.iterdir() if p.name not in (*PARTS, "X.f16", MANIFEST)):
            path.unlink()
        step("publish")
        self.parts.remove()
        replace_folder(self.dpath, target)
