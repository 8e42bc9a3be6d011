"""A Dask cluster on this machine for tests, and a progress that kills one of its workers."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def run_cluster(workers: int = 2) -> Iterator[Any]:
    """Yield a client of a cluster on this machine."""
    from vcelltools.runtime.cluster import open_cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_cluster("local", workers=workers) as client:
            yield client


class Killer:
    """Progress that kills a worker with SIGKILL once more than ``after`` units of a phase are done."""

    def __init__(self, client: Any, after: float, phase: str = "") -> None:
        self.client, self.after, self.phase, self.killed = client, after, phase, []
        self.done = 0.0
        self.now = ""

    def start(self, phase: str, total: float, unit: str) -> None:
        self.done, self.now = 0.0, phase

    def advance(self, n: float) -> None:
        self.done += n
        if self.phase in self.now and self.done > self.after and not self.killed:
            pid = next(iter(self.client.run(os.getpid).values()))
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def note(self, text: str) -> None:
        pass

    def finish(self) -> None:
        pass
