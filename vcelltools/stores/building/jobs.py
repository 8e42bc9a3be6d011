"""Build several data sets at the same time, each in a separate process.

A process only writes its own store, so the bytes equal those of a serial run, and a failure of one
(an error, a kill) does not affect the others. A process whose parent dies stops; a second run resumes all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from vcelltools.config import DatasetConfig
from vcelltools.errors import InterruptedRun, UsageError, VcellError, get_flags, speak_flags
from vcelltools.names import show_lines
from vcelltools.runtime.memory import get_free_memory
from vcelltools.runtime.progress import Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.stores.building.make import BuildResult, build_store

THREADS_A_JOB = 4  # with more threads, a second data set gains more than the first one
JOB_BYTES = 1 << 30  # free memory required for each additional job
_SAY_SECONDS = 0.2
# approximate fraction of the work in each phase
_SHARES = {"library sizes": 0.3, "counts": 0.6, "counts on the cluster": 0.6, "genes": 0.6, "rows": 0.4}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one data set: a result or an error."""

    name: str
    result: BuildResult | None = None
    error: VcellError | None = None


def choose_jobs(n: int, jobs: int | None = None, threads: int | None = None) -> tuple[int, int | None]:
    """Return (number of data sets at the same time, threads per data set).

    By default, there is one job for every four cores, if a gigabyte of memory is free for each; the cores are divided.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}, but must be a whole number of at least 1")
    cores = get_threads(None)
    if jobs is None:
        jobs = max(1, min(cores // (threads or THREADS_A_JOB), get_free_memory() // JOB_BYTES))
    jobs = min(jobs, n)
    return jobs, threads if threads is not None or jobs == 1 else max(1, cores // jobs)


def build_one(path: Path, spec: DatasetConfig, options: dict[str, Any]) -> Outcome:
    """Build one data set; an expected failure becomes its outcome, unless the whole run is interrupted."""
    try:
        return Outcome(name=spec.name, result=build_store(path, spec=spec, **options))
    except InterruptedRun:
        raise
    except VcellError as e:
        return Outcome(name=spec.name, error=e)


# -- in the child ----------------------------------------------------------------------------------------------------


class _Reporter:
    """Sends the completed fraction of the work to the parent a few times per second."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._before, self._share, self._total, self._done = 0.0, 0.0, 1.0, 0.0
        self._said = 0.0

    def start(self, phase: str, total: float, unit: str) -> None:
        self._share, self._total, self._done = _SHARES.get(phase, 0.0), max(total, 1e-9), 0.0

    def advance(self, n: float) -> None:
        with self._lock:
            self._done += n
            if time.monotonic() - self._said > _SAY_SECONDS:
                self._said = time.monotonic()
                done = self._before + self._share * min(self._done / self._total, 1.0)
                self._pipe.send(("done", min(done, 1.0)))

    def note(self, text: str) -> None:
        with self._lock:
            self._pipe.send(("note", text))

    def finish(self) -> None:
        self._before, self._share = self._before + self._share, 0.0


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(InterruptedRun.exit_code)


def _work(
    pipe: connection.Connection, path: Path, spec: DatasetConfig, options: dict[str, Any], flags: Any = None
) -> None:
    """Build one data set in a separate process, whose messages name arguments like those of the parent."""
    speak_flags(flags)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        outcome: Any = build_one(path, spec, {**options, "progress": _Reporter(pipe)})
    except VcellError as e:
        outcome = Outcome(name=spec.name, error=e)
    except BaseException:
        outcome = traceback.format_exc()
    pipe.send(("outcome", outcome))


# -- in the parent ---------------------------------------------------------------------------------------------------


@dataclass
class _Child:
    """A running build and its progress."""

    name: str
    process: Any
    share: float = 0.0
    outcome: Outcome | None = None


def run_jobs(
    sources: list[tuple[Path, DatasetConfig]], options: dict[str, Any], n_jobs: int, progress: Progress
) -> list[Outcome]:
    """Build the data sets, ``n_jobs`` at a time; return their outcomes, in order.

    Raises
    ------
    RuntimeError
        If a process ends with an unexpected error; it is raised after the others have ended.
    """
    context = multiprocessing.get_context("spawn")
    todo = list(enumerate(sources))
    running: dict[connection.Connection, tuple[int, _Child]] = {}
    outcomes: dict[int, Outcome] = {}
    bugs: list[str] = []
    progress.start(f"{len(sources)} stores, {n_jobs} at a time", float(len(sources)), "stores")
    try:
        while todo or running:
            while todo and len(running) < n_jobs:
                i, (path, spec) = todo.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, path, spec, options, get_flags()), daemon=False)
                process.start()
                theirs.close()
                running[ours] = (i, _Child(spec.name, process))
            for pipe in connection.wait(list(running)):
                assert isinstance(pipe, connection.Connection)
                i, child = running[pipe]
                try:
                    kind, body = pipe.recv()
                except (EOFError, OSError):
                    kind, body = "gone", None
                if kind == "done":
                    progress.advance(body - child.share)
                    child.share = body
                elif kind == "note":
                    progress.note(f"{child.name}: {body}")
                else:
                    child.process.join()
                    pipe.close()
                    del running[pipe]
                    progress.advance(1.0 - child.share)
                    outcomes[i] = _judge(child, body, bugs)
                    progress.note(_describe(outcomes[i]))
    finally:
        for _, child in running.values():
            child.process.terminate()
        for pipe, (_, child) in running.items():
            child.process.join()
            with suppress(OSError):
                pipe.close()
        progress.finish()
    if bugs:
        sys.stderr.write(show_lines("\n".join(bugs)))
        raise RuntimeError(f"{len(bugs)} data sets ended with an unexpected error")
    return [outcomes[i] for i in range(len(sources))]


def _judge(child: _Child, body: Any, bugs: list[str]) -> Outcome:
    if isinstance(body, Outcome):
        return body
    if body is not None:
        bugs.append(f"{child.name}: {body}")
    code = child.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else "failed"
    error = InterruptedRun(f"the process that built {child.name} {how}", hint="run the same command again to resume")
    return Outcome(name=child.name, error=error)


def _describe(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"{outcome.name}: failed"
    assert outcome.result is not None
    what = "kept" if outcome.result.kept else "built"
    return f"{outcome.name}: {what}, {outcome.result.n_cells:,} cells, {outcome.result.seconds:.1f} s"
