"""Plan and download: nothing is downloaded before the plan is checked, and no complete file is downloaded again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.atlas._choose import Choice, choose
from vcelltools.atlas._folder import MANIFEST, RAW, SCHEMA, Folder, hash_file, open_folder
from vcelltools.atlas._remote import Busy, Changed, Facts, GivenUp, NoRanges, get_scheme, retry, show_url
from vcelltools.atlas._sources import Source
from vcelltools.errors import DataError, EnvironmentFault, UsageError, VcellError, checked, spell
from vcelltools.io.write.atomic import FULL, REFUSED, check_space, fsync_path, locked, say_bytes, translate_os_errors
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.progress import SILENT, Progress

MAX_BYTES = 50_000_000_000
CHUNK = 16 << 20
JOBS = 8
# US dollars per GiB: the highest list price for traffic from a bucket to the internet, as of 2026-11
PRICE_PER_GIB, PRICE_DATE = 0.12, "2026-11"
_RESTARTS = 3  # for a file that keeps changing or whose hash is wrong


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Settings of the transfer.

    Attributes
    ----------
    jobs
        Number of files at the same time.
    chunk
        Bytes per request.
    max_bytes
        Maximum number of bytes; a larger plan is refused.
    max_rate
        Bytes per second over all jobs; None for no limit.
    price_per_gib
        Price for the cost estimate, in US dollars.
    """

    jobs: int = JOBS
    chunk: int = CHUNK
    max_bytes: int = MAX_BYTES
    max_rate: float | None = None
    price_per_gib: float = PRICE_PER_GIB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a fetch.

    Attributes
    ----------
    selected
        {id, path, cells, bytes} of each experiment, in order; bytes is None if the file does not exist.
    cells, overshoot
        Number of cells in the table, and the number beyond the target; None if unknown.
    bytes, bytes_here
        Bytes of all files, and bytes that are already present.
    disk_needed, disk_free
        Bytes of disk space.
    seconds
        Time at the given rate, or None.
    billing_project, cost
        The project that pays, and the maximum cost in US dollars.
    warnings
        Warnings about missing files.
    """

    source: str
    selected: list[dict[str, Any]]
    cells: int | None
    overshoot: int | None
    bytes: int
    bytes_here: int
    disk_needed: int
    disk_free: int
    seconds: float | None
    billing_project: str | None
    cost: float
    price_per_gib: float
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        names = ("source", "selected", "cells", "overshoot", "bytes", "bytes_here", "disk_needed", "disk_free")
        out = {k: getattr(self, k) for k in names}
        out |= {"experiments": len(self.selected), "seconds": self.seconds, "billing_project": self.billing_project}
        return out | {"cost": self.cost, "price_per_gib": self.price_per_gib, "price_date": PRICE_DATE,
                      "warnings": self.warnings}  # fmt: skip

    def describe(self) -> str:
        """Return the plan in a few lines."""
        cells = "an unknown number of" if self.cells is None else f"{self.cells:,}"
        over = f" ({self.overshoot:,} more than requested)" if self.overshoot else ""
        lines = [
            f"{len(self.selected):,} experiments, {cells} cells{over}",
            f"{say_bytes(self.bytes)}, of which {say_bytes(self.bytes_here)} are already present; "
            f"{say_bytes(self.disk_needed)} of disk needed, {say_bytes(self.disk_free)} free",
        ]
        if self.seconds is not None:
            lines.append(f"about {self.seconds:,.0f} s at the given rate")
        if self.billing_project:
            lines.append(
                f"{self.billing_project} pays at most {self.cost:,.2f} US dollars "
                f"({self.price_per_gib:g} per GiB, as of {PRICE_DATE})"
            )
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The result of a fetch.

    Attributes
    ----------
    out
        The folder.
    experiments, cells
        Number of complete files of the choice, and of their cells.
    bytes_fetched, bytes_reused
        Bytes downloaded in this run, and bytes of the choice that were already present.
    failed
        (id, reason) of each experiment that could not be fetched.
    warnings
        Warnings for the user.
    error
        The first failure, or None.
    """

    out: Path
    experiments: int
    cells: int
    bytes_fetched: int
    bytes_reused: int
    failed: list[tuple[str, str]]
    warnings: list[str]
    error: VcellError | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        out = {k: getattr(self, k) for k in ("experiments", "cells", "bytes_fetched", "bytes_reused", "warnings")}
        return {"out": str(self.out), **out, "failed": [{"id": i, "reason": why} for i, why in self.failed]}


class _Rate:
    """Limits the total rate of all jobs, in bytes per second."""

    def __init__(self, limit: float | None) -> None:
        self._limit, self._lock, self._next = limit, threading.Lock(), time.monotonic()

    def spend(self, n: int) -> None:
        if self._limit is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + n / self._limit
            wait = self._next - now
        if wait > 0:
            time.sleep(wait)


@checked
def make_plan(source: Source, choice: Choice, dpath: Path, transfer: Transfer, rows: np.ndarray | None = None) -> Plan:
    """Plan the fetch of a choice into a folder, without writing anything.

    Raises
    ------
    DataError, UsageError
        As in :func:`vcelltools.atlas._choose.choose`.
    EnvironmentFault
        If access is denied.
    """
    rows = choose(source, choice) if rows is None else rows
    folder = _open_or_new(dpath)
    ids = [source.ids[i] for i in rows.tolist()]

    def look(i: int) -> Facts | VcellError:
        url = source.urls[i]
        try:
            return source.remote.find(url)
        except DataError as e:
            return e

    with ThreadPoolExecutor(min(32, max(len(rows), 1))) as pool:
        found = list(pool.map(look, rows.tolist()))
    facts = {n: f for n, f in zip(ids, found, strict=True) if isinstance(f, Facts)}
    here = sum(_get_bytes_here(folder, n, f) for n, f in facts.items())
    total = sum(f.size for f in facts.values())
    cells = source.cells[rows]
    known = None if np.isnan(cells).any() else int(cells.sum())
    at = dpath
    while not at.exists():
        at = at.parent
    project = source.remote.access.billing_project if get_scheme(source.urls[0]) == "gs" else None
    left = total - here
    return Plan(
        source=source.name,
        selected=[
            {"id": n, "path": source.paths[i], "cells": None if np.isnan(c) else int(c),
             "bytes": facts[n].size if n in facts else None}
            for n, i, c in zip(ids, rows.tolist(), cells.tolist(), strict=True)
        ],
        cells=known,
        overshoot=known - choice.cells if known is not None and choice.cells is not None else None,
        bytes=total,
        bytes_here=here,
        disk_needed=left,
        disk_free=shutil.disk_usage(at).free,
        seconds=left / transfer.max_rate if transfer.max_rate else None,
        billing_project=project,
        cost=round(left / 2**30 * transfer.price_per_gib, 4) if project or source.remote.access.requester_pays else 0.0,
        price_per_gib=transfer.price_per_gib,
        warnings=[f"{n}: {f.message}" for n, f in zip(ids, found, strict=True) if not isinstance(f, Facts)],
        facts=facts,
    )  # fmt: skip


def _owns(dpath: Path) -> bool:
    """Return whether a folder holds a fetched atlas, the files of an interrupted fetch, or only raw files.

    Public scripts also fetch into ``raw/``. Their folders are adopted if they hold only h5ad files.
    """
    names = {p.name for p in dpath.iterdir() if not p.name.startswith(".")}
    if not (dpath / MANIFEST).exists():
        return names <= {RAW} and all(p.suffix == ".h5ad" for p in (dpath / RAW).glob("[!.]*"))
    open_folder(dpath)  # raises an error if the manifest is damaged
    return True


def _open_or_new(dpath: Path) -> Folder:
    return open_folder(dpath) if (dpath / MANIFEST).exists() else Folder(dpath)


def _get_bytes_here(folder: Folder, name: str, facts: Facts) -> int:
    raw, part = folder.get_raw(name), _get_part(folder, name)
    if raw.is_file() and raw.stat().st_size == facts.size:
        return facts.size
    return min(part.stat().st_size, facts.size) if part.is_file() else 0


def _get_part(folder: Folder, name: str) -> Path:
    return folder.dpath / RAW / f"{name}.h5ad.part"


def _get_journal(folder: Folder, name: str) -> Path:
    return folder.dpath / RAW / f"{name}.h5ad.part.json"


@checked
def fetch(
    source: Source,
    choice: Choice,
    out: str | os.PathLike,
    *,
    transfer: Transfer | None = None,
    top_up: bool = False,
    progress: Progress = SILENT,
) -> Fetched:
    """Download and verify the chosen experiments in a folder; the same call resumes an interrupted download.

    Parameters
    ----------
    out
        The folder, which is created if necessary.
    top_up
        Replace experiments that fail with others until the target is met.

    Raises
    ------
    UsageError
        If the plan is larger than ``max_bytes``, or the folder holds another choice.
    DataError, EnvironmentFault
        If nothing can be fetched, because of the source, the disk or another writer. Failures of single experiments
        are reported in the result.
    """
    transfer = transfer or Transfer()
    dpath = Path(out)
    if dpath.exists() and not dpath.is_dir():
        raise UsageError(f"{dpath} is a file, but the output is a folder", hint=f"choose another {spell('out')}")
    if top_up and choice.cells is None and choice.experiments is None:
        raise UsageError(
            f"{spell('top_up')} needs a target that can be topped up",
            hint=f"use {spell('cells')} or {spell('experiments')}",
        )
    rows = choose(source, choice)
    plan = make_plan(source, choice, dpath, transfer, rows)
    # a source without a scheme is a local folder or table
    reads = [source.name.removeprefix("file://")]
    guard_outputs([Target(dpath, "fetched atlas", owns=_owns, reuse=True)], reads=reads)
    if plan.bytes > transfer.max_bytes:
        raise UsageError(
            f"{plan.describe()}\nThe download exceeds {say_bytes(transfer.max_bytes)}",
            hint=f"allow more with {spell('max_bytes')}, or take fewer with {spell('cells')} or {spell('experiments')}",
        )
    with translate_os_errors(dpath), locked(dpath / "atlas"):
        folder = _open_or_new(dpath)
        check_space(dpath, plan.disk_needed)
        _check_same_choice(folder, source, choice, [source.ids[i] for i in rows.tolist()])
        (dpath / RAW).mkdir(exist_ok=True)
        run = _Run(source, choice, folder, transfer, progress)
        run.begin(rows, plan)
        run.work(rows, plan.facts)
        if top_up:
            run.top_up(rows)
        return run.finish()


def _check_same_choice(folder: Folder, source: Source, choice: Choice, ids: list[str]) -> None:
    """Raise an error if the choice differs from that in the folder and does not extend it."""
    if not folder.body:
        return
    old, new = folder.body["choice"], choice.to_json()
    here = {"source": source.name, **source.settings}
    for key, mine, theirs in [
        *((k, here.get(k), folder.body.get("origin", {}).get(k)) for k in ("source", "release", "feature", "organism")),
        *((k, new[k], old.get(k)) for k in ("where", "cap", "seed", "all")),
    ]:
        if mine != theirs:
            raise _differs(folder, key, theirs, mine)
    for key in ("cells", "experiments"):
        if (new[key] is None) != (old.get(key) is None) or (new[key] or 0) < (old.get(key) or 0):
            raise _differs(folder, key, old.get(key), new[key])
    lost = [x for x in folder.body.get("chosen", []) if x not in set(ids)]
    if lost:
        raise _differs(folder, "experiments", f"{len(folder.ids)} with {lost[0]}", f"{len(ids)} without it")


def _differs(folder: Folder, key: str, old: Any, new: Any) -> UsageError:
    return UsageError(
        f"{folder.dpath} holds a different choice of experiments: {key} was {old!r} but is now {new!r}",
        hint=f"choose another {spell('out')}, or choose the same experiments",
    )


class _Run:
    """One run of :func:`fetch`, with its counters and the manifest."""

    def __init__(self, source: Source, choice: Choice, folder: Folder, transfer: Transfer, progress: Progress) -> None:
        self.source, self.choice, self.folder = source, choice, folder
        self.transfer, self.progress = transfer, progress
        self.rate = _Rate(transfer.max_rate)
        self.lock = threading.Lock()
        self.fetched = self.reused = 0
        self.failed: dict[str, VcellError] = {}
        self.warnings: list[str] = []
        self.stop: VcellError | None = None
        self._saved = 0.0

    def begin(self, rows: np.ndarray, plan: Plan) -> None:
        """Write the manifest and the table of the chosen experiments."""
        body = self.folder.body
        body |= {
            "schema": SCHEMA,
            "kind": "fetched atlas",
            "origin": {"source": self.source.name, **self.source.settings},
            "choice": self.choice.to_json(),
            "requested_cells": self.choice.cells,
            "chosen": [self.source.ids[i] for i in rows.tolist()],
        }
        body.setdefault("began", _now())
        self._write_samples(rows)
        self.warnings += plan.warnings

    def _write_samples(self, rows: np.ndarray) -> None:
        ids = [self.source.ids[i] for i in rows.tolist()]
        self.folder.body["ids"] = ids
        table = self.source.table.iloc[rows].reset_index(drop=True)
        paths = [self.source.paths[i] for i in rows.tolist()]
        self.folder.save()  # first, because it identifies the folder as ours
        self.folder.write_samples(table, ids, paths, self.source.cells[rows])

    def work(self, rows: np.ndarray, facts: dict[str, Facts]) -> None:
        """Fetch the missing files of these rows, in threads."""
        total = sum(f.size for f in facts.values())
        self.progress.start("fetching", total, "bytes")

        def one(i: int) -> None:
            name = self.source.ids[i]
            if self.stop is not None:
                self._fail(name, self.stop)
                return
            try:
                self._fetch_one(i, facts.get(name))
            except VcellError as e:
                self._fail(name, e)
            except OSError as e:
                if e.errno not in (*FULL, *REFUSED):
                    raise
                self._fail(name, EnvironmentFault(f"{self.folder.dpath}: {(e.strerror or str(e)).lower()}"))

        pool = ThreadPoolExecutor(self.transfer.jobs, thread_name_prefix="fetch")
        try:
            list(pool.map(one, rows.tolist()))
        except BaseException as e:
            self.stop = EnvironmentFault("stopped")
            if isinstance(e, KeyboardInterrupt):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=self.stop is None or bool(self.failed), cancel_futures=True)
            self.progress.finish()

    def _fail(self, name: str, error: VcellError) -> None:
        with self.lock:
            self.failed[name] = error
            # a denied access or a full disk affects all other files too, but a failing server may still have others
            if isinstance(error, EnvironmentFault) and not isinstance(error, GivenUp):
                self.stop = self.stop or error

    def _fetch_one(self, i: int, facts: Facts | None) -> None:
        name, url = self.source.ids[i], self.source.urls[i]
        raw, journal = self.folder.get_raw(name), _get_journal(self.folder, name)
        known = self.folder.files.get(name)
        if raw.is_file() and self._adopt(name, raw, journal, known, facts):
            return
        if facts is None:  # the plan did not find it; ask again for the reason
            facts = self.source.remote.find(url)
        for _ in range(_RESTARTS):
            try:
                done = _Download(self, name, url, facts).run()
            except Changed:
                facts = self.source.remote.find(url)
                continue
            if done is not None:
                self._keep(name, i, done, journal)
                return
        raise DataError(
            f"{show_url(url)}: the file arrived damaged or changed during the download, {_RESTARTS} times",
            hint="try again later",
        )

    def _adopt(self, name: str, raw: Path, journal: Path, known: dict[str, Any] | None, facts: Facts | None) -> bool:
        """Use a file that is already present, and return whether it is complete."""
        size = raw.stat().st_size
        if (
            known is not None
            and size == known["bytes"]
            and (facts is None or (facts.size == size and facts.md5 in (None, known["md5"])))
        ):
            self._count_reused(size)
            return True
        md5, sha = hash_file(raw)
        sealed = _read_json(journal).get("sealed", {})
        same = sealed.get("sha256") == sha or (
            facts is not None and facts.size == size and facts.md5 is not None and facts.md5 == md5
        )
        if same:
            self._count_reused(size)
            row = self.source.ids.index(name)
            self._keep(name, row, {"bytes": size, "md5": md5, "sha256": sha}, journal)
        elif known is None and facts is not None:
            with self.lock:
                self.warnings.append(f"{name}: the local file differed from the source and was replaced")
        return same

    def _count_reused(self, n: int) -> None:
        with self.lock:
            self.reused += n
        self.progress.advance(n)

    def _keep(self, name: str, row: int, facts: dict[str, Any], journal: Path) -> None:
        """Check a complete file, and add it to the manifest."""
        raw = self.folder.get_raw(name)
        try:
            layer, n_cells = look_into(raw)
        except DataError as e:
            raise DataError(f"{name}: the download is complete, but {e.message}", hint=e.hint) from e
        expected = self.source.cells[row]
        with self.lock:
            if not np.isnan(expected) and int(expected) != n_cells:
                self.warnings.append(f"{name} has {n_cells:,} cells, but the table lists {int(expected):,}")
            self.folder.files[name] = {**facts, "cells": n_cells, "layer": layer, "fetched": _now()}
            if time.monotonic() - self._saved > 1:
                self.folder.save()
                self._saved = time.monotonic()
                journal.unlink(missing_ok=True)

    def top_up(self, rows: np.ndarray) -> None:
        """Replace failed experiments with the next ones in order, until the target is met."""
        everything = choose(self.source, _without_target(self.choice))
        rest = [i for i in everything.tolist() if i not in set(rows.tolist())]
        chosen = rows.tolist()
        while rest and self.stop is None and (lack := self._get_lack(chosen)) > 0:
            more: list[int] = []
            while rest and lack > 0:
                i = rest.pop(0)
                more.append(i)
                lack -= 1 if self.choice.experiments is not None else self.source.cells[i]
            chosen += more
            self._write_samples(np.array(chosen))
            plan = make_plan(self.source, self.choice, self.folder.dpath, self.transfer, np.array(more))
            check_space(self.folder.dpath, plan.disk_needed)
            self.work(np.array(more), plan.facts)

    def _get_lack(self, rows: Sequence[int]) -> float:
        good = [i for i in rows if self.source.ids[i] in self.folder.files]
        if self.choice.experiments is not None:
            return self.choice.experiments - len(good)
        return float(self.choice.cells or 0) - float(self.source.cells[good].sum())

    def finish(self) -> Fetched:
        """Write the final manifest, and return the result."""
        folder = self.folder
        ids = [x for x in folder.ids if x in folder.files]
        failed = [(x, str(self.failed[x].message)) for x in folder.ids if x in self.failed]
        folder.body |= {"failed": [{"id": i, "reason": why} for i, why in failed], "warnings": self.warnings}
        folder.body["ended"] = _now()
        folder.save()
        for name in ids:
            _get_journal(folder, name).unlink(missing_ok=True)
        return Fetched(
            out=folder.dpath,
            experiments=len(ids),
            cells=sum(folder.files[x]["cells"] for x in ids),
            bytes_fetched=self.fetched,
            bytes_reused=self.reused,
            failed=failed,
            warnings=self.warnings,
            error=next((self.failed[x] for x, _ in failed), None),
        )


def _without_target(choice: Choice) -> Choice:
    return Choice(where=choice.where, cap=choice.cap, seed=choice.seed, all=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_json(fpath: Path) -> dict[str, Any]:
    try:
        body = json.loads(fpath.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _write_journal(fpath: Path, body: dict[str, Any]) -> None:
    tmp = fpath.with_name(f".{fpath.name}.tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        json.dump(body, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, fpath)


class _Download:
    """The download of one file: its part, the journal of the part, and the hashes so far."""

    def __init__(self, run: _Run, name: str, url: str, facts: Facts) -> None:
        self.run_, self.name, self.url, self.facts = run, name, url, facts
        self.part, self.journal = _get_part(run.folder, name), _get_journal(run.folder, name)
        self.at = 0
        self._restart_hashes()

    def _restart_hashes(self) -> None:
        self.md5, self.sha = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        self.crc = 0

    def _hash(self, block: bytes | memoryview) -> None:
        self.md5.update(block)
        self.sha.update(block)
        if self.facts.crc32c is not None and self.facts.md5 is None:
            from vcelltools.kernels.crc32c import TABLES, crc32c

            self.crc = int(crc32c(np.frombuffer(block, np.uint8), np.uint32(self.crc), TABLES))

    def run(self) -> dict[str, Any] | None:
        """Download the rest of the file and rename it; return None if its hash is wrong.

        Raises
        ------
        Changed
            If the file changed at the source in the meantime; its part is deleted.
        """
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self.part, flags, 0o644)
        with os.fdopen(fd, "r+b") as f:
            self.file = f
            self._resume()
            try:
                while self.at < self.facts.size:
                    self._read_chunk()
            except Changed:
                self._from_start()
                raise
            f.flush()
            os.fsync(f.fileno())
        return self._seal()

    def _resume(self) -> None:
        """Continue after the bytes in the journal, or start again if the version differs."""
        body = _read_json(self.journal)
        mine = {"url": show_url(self.url), "size": self.facts.size, "validator": self.facts.validator}
        vouched = body.get("bytes", 0) if all(body.get(k) == v for k, v in mine.items()) else 0
        if self.facts.validator is None or not isinstance(vouched, int):
            vouched = 0
        vouched = max(0, min(vouched, os.fstat(self.file.fileno()).st_size, self.facts.size))
        self.file.truncate(vouched)
        self.file.seek(0)
        while self.at < vouched:
            block = self.file.read(min(4 << 20, vouched - self.at))
            self._hash(block)
            self.at += len(block)
        with self.run_.lock:
            self.run_.reused += vouched
        self.run_.progress.advance(vouched)

    def _from_start(self) -> None:
        self.file.seek(0)
        self.file.truncate(0)
        self.run_.progress.advance(-self.at)
        self.at = 0
        self._restart_hashes()
        _write_journal(self.journal, self._describe())

    def _describe(self) -> dict[str, Any]:
        facts = self.facts
        return {"url": show_url(self.url), "size": facts.size, "validator": facts.validator, "bytes": self.at}

    def _sink(self, block: bytes) -> None:
        if self.run_.stop is not None:
            raise EnvironmentFault("stopped")
        if self.at + len(block) > self.facts.size:
            raise Changed
        self.file.write(block)
        self._hash(block)
        self.at += len(block)
        with self.run_.lock:
            self.run_.fetched += len(block)
        self.run_.progress.advance(len(block))
        self.run_.rate.spend(len(block))

    def _read_chunk(self) -> None:
        """Read at most one more chunk, and record it in the journal."""
        remote, transfer = self.run_.source.remote, self.run_.transfer
        target = min(self.at + transfer.chunk, self.facts.size)

        def read() -> None:
            try:
                if self.at < target:
                    remote.read(self.url, self.at, target, self.facts, self._sink)
            except NoRanges:
                self._from_start()
                remote.read(self.url, 0, self.facts.size, self.facts, self._sink)
            if self.at < target:
                raise Busy(f"{show_url(self.url)}: the response ended early")

        retry(read, remote.access, self.run_.progress.note, lambda: self.at)
        self.file.flush()
        os.fsync(self.file.fileno())
        _write_journal(self.journal, self._describe())

    def _seal(self) -> dict[str, Any] | None:
        """Compare the size and hash, and rename the part; the journal keeps the hash until the manifest has it."""
        md5, sha = self.md5.hexdigest(), self.sha.hexdigest()
        wrong = (self.facts.md5 is not None and md5 != self.facts.md5) or (
            self.facts.md5 is None and self.facts.crc32c is not None and f"{self.crc:08x}" != self.facts.crc32c
        )
        if wrong or self.part.stat().st_size != self.facts.size:
            with self.run_.lock:
                self.run_.warnings.append(
                    f"{self.name}: the downloaded file has a different hash than the source and is downloaded again"
                )
            self.run_.progress.advance(-self.at)
            for p in (self.part, self.journal):
                p.unlink(missing_ok=True)
            return None
        done = {"bytes": self.facts.size, "md5": md5, "sha256": sha}
        _write_journal(self.journal, {**self._describe(), "sealed": done})
        raw = self.run_.folder.get_raw(self.name)
        os.replace(self.part, raw)
        with suppress(OSError):
            fsync_path(raw.parent)
        return done


def look_into(fpath: Path) -> tuple[str, int]:
    """Return (layer with the counts, number of cells) of an h5ad file.

    Raises
    ------
    DataError
        If it is damaged, or neither X nor raw holds counts.
    """
    from vcelltools.io import get_count_evidence, open_dataset
    from vcelltools.io.survey import require_counts

    with open_dataset(fpath) as ds:
        if get_count_evidence(ds.matrix).is_counts:
            return "X", ds.n_cells
        try:
            with open_dataset(fpath, layer="raw") as raw:
                if get_count_evidence(raw.matrix).is_counts:
                    return "raw", raw.n_cells
        except DataError:
            pass
        require_counts(ds)
        raise AssertionError("unreachable")
