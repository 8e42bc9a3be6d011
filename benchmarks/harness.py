"""What every benchmark shares: whole processes timed from outside, interleaved, and results as JSON.

The machine may be shared and noisy, so commands take turns (A B A B ...), medians are quoted, and what is compared
from run to run is the ratio to the peer of the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tests.peers import find_peer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("VCELLTOOLS_BENCH_RESULTS", ROOT / "benchmarks" / "results"))
DATA = Path(os.environ.get("VCELLTOOLS_BENCH_DATA", ROOT / ".bench"))
OURS = [sys.executable, "-m", "vcelltools.cli.main"]
SCANPY_REFERENCE = "scanpy-1.11.5"
SCANPY_NEWEST = "scanpy-1.12.4"


@dataclass
class Timing:
    """The runs of one command."""

    walls: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.walls)

    @property
    def peak_mb(self) -> float:
        """Largest peak resident memory, in MB."""
        return max(self.peaks)


def as_installed() -> dict[str, str]:
    """Return the environment in which byte code is kept."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run_once(command: list[str], *, env: dict[str, str] | None = None, timeout: float = 3600) -> tuple[float, float]:
    """Run a command; return (wall seconds, peak MB of the process). Stops the benchmark where it fails."""
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=as_installed() | (env or {}), cwd=DATA)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or wall > timeout:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed ({child.returncode}):\n{log.read()[-3000:].decode()}")
    scale = 1 if platform.system() == "Darwin" else 1024
    return wall, usage.ru_maxrss * scale / 1e6


def warm(path: Path) -> None:
    """Read a file, so that the page cache holds it: a peer's memory may have pushed it out."""
    with open(path, "rb", buffering=0) as f:
        buffer = bytearray(8 << 20)
        while f.readinto(buffer):
            pass


def touch(n_bytes: int = 1 << 30) -> None:
    """Write to fresh memory and give it back: what a large peer freed may have gone from a virtual machine to its host,
    and the next process would pay for fetching it."""
    subprocess.run([sys.executable, "-c", f"bytearray({n_bytes})[::4096] = bytes({n_bytes >> 12})"], check=True)


def take_turns(
    commands: dict[str, list[str]], rounds: int, *, warmup: int = 1, source: Path | None = None
) -> dict[str, Timing]:
    """Run the commands in turn, ``rounds`` times after a warm-up; return their timings.

    Every run finds ``source`` in the page cache, and a gigabyte of free memory that the machine holds.
    """
    out = {name: Timing() for name in commands}
    for i in range(warmup + rounds):
        for name, command in commands.items():
            if i < warmup and name.startswith("peer"):
                continue  # a peer's warm-up is minutes
            if source is not None:
                warm(source)
            touch()
            wall, peak = run_once(command)
            if i >= warmup:
                out[name].walls.append(wall)
                out[name].peaks.append(peak)
    return out


def need_peer(name: str) -> str:
    """Return a peer's Python, or stop and say how to make it."""
    python = find_peer(name)
    if python is None:
        sys.exit(f"the peer {name} is not installed: make peers")
    return str(python)


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), "")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write ``results/<name>.json``; rows of cases that were not run now are kept."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    now = {r["case"] for r in rows}
    merged = [r for r in old if r["case"] not in now] + rows
    body = {"machine": describe_machine(), "date": date.today().isoformat(), **more, "rows": merged}
    path.write_text(json.dumps(body, indent=1) + "\n")
    return path
