"""Fits and screens a small tissue again and again, killed with SIGKILL at steps; prints what came of it as JSON.

Run as a program, in a process without threads: it forks a child for every run.

    python -m tests.spatial_kill_walk WORK_FOLDER [FIRST_STEP STRIDE]
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.killing import Killer, run_killed
from tests.torture.spatial import fit, hash_files, make_run, screen


def run(call: Callable[[], None], kill_at: int) -> int:
    """Make the call in a child; return the signal that ended it, or 0."""

    def work(killer: Killer) -> None:
        killer.watch("fsync", "replace", "rename", "link", "unlink")
        call()

    return run_killed(work, kill_at)


def main() -> None:
    work = Path(sys.argv[1])
    first, stride = (int(x) for x in (sys.argv[2:4] or ("0", "1")))
    make_run(work)
    out = {"kills": 0, "wrong": [], "left": []}
    for name, call in (
        ("run", lambda: fit(work / "again" / "run")),
        ("screen", lambda: screen(work / "run", work / "again" / "screen")),
    ):
        whole = hash_files(work / name)
        for at in range(first, 10_000, stride):
            again = work / "again"
            shutil.rmtree(again, ignore_errors=True)
            again.mkdir()
            for file in ("x.h5ad", "mouse_network.parquet"):
                (again / file).symlink_to(work / file)
            kills, step = 0, at
            while run(call, step) == signal.SIGKILL:
                kills += 1
                step = at + 5 * kills
            out["kills"] += kills
            found = hash_files(again / name)
            if {k: v for k, v in found.items() if k != "spacetravlr_run_repro.toml"} != {
                k: v for k, v in whole.items() if k != "spacetravlr_run_repro.toml"
            }:
                out["wrong"].append(f"{name} {at}")
            out["left"] += [f"{name} {at}: {p.name}" for p in again.rglob("*.lock") if p.name[0] != "."]
            if not kills:
                break
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
