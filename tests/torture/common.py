"""What all drills share: how a drill counts, how long it goes on, and a small source."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANG = 180.0
LEAST = 6  # rounds of a drill, however short its time


@dataclass
class Drill:
    """What a drill did.

    Attributes
    ----------
    counts
        What was done how often: files mutated, kills, full disks, bit flips.
    failures
        One line each: what was done and what came of it.
    """

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, key: str, n: int = 1) -> None:
        self.counts[key] = self.counts.get(key, 0) + n


def rounds(seconds: float, least: int = LEAST) -> Iterator[int]:
    """Count rounds until the time is over, but at least a few."""
    deadline = time.monotonic() + seconds
    number = 0
    while number < least or time.monotonic() < deadline:
        yield number
        number += 1


def write_source(work: Path) -> Path:
    """Write a simulated screen of 3,000 cells, once."""
    from vcelltools.simulation.simulate import simulate

    path = work / "source.h5ad"
    if not path.exists():
        simulate(path, cells=3000, genes=400, perturbations=5, depth=900, seed=1)
    return path


def run_command(
    work: Path,
    words: Sequence[object],
    *,
    kill_after: float | None = None,
    limit: int | None = None,
    env: dict[str, str] | None = None,
) -> tuple[int, str, str]:
    """Run a command; return its exit status (negative: the signal; 124: it hung), stdout and stderr."""
    code = "from vcelltools.cli.main import main; main()"
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {code}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=work, env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=kill_after or HANG)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        out, err = child.communicate()
        if kill_after is None:
            return 124, "", "it hangs"
    return child.returncode, out, err
