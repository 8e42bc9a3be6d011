"""Watches the children: restarts them after a crash or a hang, and counts what happened."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BAD = ("bug", "different", "accepted invalid", "refused undamaged", "signal", "hang")
BATCH = 2_000


@dataclass
class Report:
    """What a run found."""

    seed: int
    least: int = 0
    n: int = 0
    seconds: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    mutations: Counter = field(default_factory=Counter)
    failures: list[dict] = field(default_factory=list)

    def has_time(self, seconds: float) -> bool:
        """Return whether another mutant is to be run."""
        return self.seconds < seconds or self.n < self.least

    def __str__(self) -> str:
        counts = ", ".join(f"{k} {v:,}" for k, v in self.outcomes.most_common())
        head = f"{self.n:,} mutants of seed {self.seed} in {self.seconds:.0f} s: {counts}"
        return "\n".join([head, *self.list_failures()])

    def list_failures(self) -> list[str]:
        """Return one text a failure: what happened, to what, and the command that repeats it."""
        again = f"python -m tests.fuzz --seed {self.seed} --only"
        return [
            f"{f['outcome']}: {f.get('kind', '?')} {f.get('mutations', '')} ({again} {f['number']})\n"
            + str(f.get("said", ""))
            for f in self.failures
        ]


def run(
    *, seed: int, seconds: float, patience: float = 90.0, first: int = 0, limit: int | None = None, least: int = 0
) -> Report:
    """Run mutants for ``seconds`` (or ``limit`` of them); a mutant that takes longer than ``patience`` hangs.

    At least ``least`` of them run however long they take: the first ones compile the kernels.
    """
    report = Report(seed, least)
    number = first
    with tempfile.TemporaryDirectory() as folder:
        while report.has_time(seconds) and (limit is None or number < first + limit):
            count = BATCH if limit is None else min(BATCH, first + limit - number)
            number = _run_child(report, seed, number, count, Path(folder), seconds, patience)
    return report


def _run_child(report: Report, seed: int, first: int, count: int, folder: Path, seconds: float, patience: float) -> int:
    """Run one child until it ends, crashes, hangs, or the time is up; return the next number."""
    command = [sys.executable, "-m", "tests.fuzz.child", str(seed), str(first), str(count), str(folder)]
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    pump = threading.Thread(target=_pump, args=(child, lines), daemon=True)
    pump.start()
    current = first
    before, began = report.seconds, None  # the start of a child does not count
    try:
        while report.has_time(seconds):
            report.seconds = before + (0.0 if began is None else time.monotonic() - began)
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                _fail(report, current, "hang", f"no answer for {patience} s")
                return current + 1
            if line is None:
                code = child.wait()
                if code == 0:
                    return first + count
                errors.seek(0)
                said = errors.read()
                if began is None:  # not a mutant's doing: the next child would fare no better
                    raise RuntimeError(f"the fuzzer's child does not start:\n{said[-4000:]}")
                outcome = "hang" if "Timeout (" in said else "signal" if code < 0 else "bug"
                _fail(report, current, outcome, f"exit status {code}\n{said[-4000:]}")
                return current + 1
            if not line.startswith("{"):  # HDF5's szip prints its complaints to stdout
                continue
            body = json.loads(line)
            if "ready" in body:
                began = time.monotonic()
            current = body.get("start", current)
            if "done" in body:
                _count(report, body)
                current = body["done"] + 1
        return current
    finally:
        child.kill()
        child.wait()
        pump.join()
        assert child.stdout is not None
        child.stdout.close()
        errors.close()


def _pump(child: subprocess.Popen, lines: queue.Queue) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _count(report: Report, body: dict) -> None:
    report.n += 1
    report.outcomes[body["outcome"]] += 1
    for m in body["mutations"]:
        report.mutations[m] += 1
    if body["outcome"] in BAD:
        report.failures.append({**body, "number": body["done"]})


def _fail(report: Report, number: int, outcome: str, said: str) -> None:
    report.n += 1
    report.outcomes[outcome] += 1
    report.failures.append({"number": number, "outcome": outcome, "said": said})
