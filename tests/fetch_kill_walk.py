"""Fetches an atlas again and again, killed with SIGKILL at every step of the writing; prints what came of it as JSON.

Run as a program, in a process without threads: it forks a child for every run.

    python -m tests.fetch_kill_walk URL ORIGIN WORK_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import aiohttp  # noqa: F401  loaded once, before the children
import fsspec.implementations.http  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401

from tests.killing import Killer, run_killed
from vcelltools.atlas import Access, Choice, Transfer, fetch, open_source, verify_folder

CHUNK = 16384


def run(url: str, out: Path, kill_at: int) -> int:
    """Fetch in a child; return the signal that ended it, or 0."""

    def work(killer: Killer) -> None:
        killer.watch("fsync", "replace")
        source = open_source(url, access=Access(first_wait=0.01))
        done = fetch(source, Choice(all=True), out, transfer=Transfer(chunk=CHUNK, jobs=2))
        if done.failed:
            raise RuntimeError(f"failed: {done.failed}")

    return run_killed(work, kill_at)


def main() -> None:
    url, origin, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    right = {p.name: p.read_bytes() for p in origin.rglob("*.h5ad")}
    out = {"kills": 0, "runs": 0, "wrong": [], "unverified": 0}
    for stride in (3, 5, 8):
        folder = work / f"s{stride}"
        step = stride
        while True:
            killed = run(url, folder, step)
            out["runs"] += 1
            out["kills"] += bool(killed)
            if (folder / "raw").is_dir():
                out["wrong"] += [
                    p.name
                    for p in (folder / "raw").iterdir()
                    if p.suffix == ".h5ad" and p.read_bytes() != right[p.name]
                ]
            if not killed:
                break
            step += 1  # a step further each time, so that every run gets somewhere
        out["unverified"] += not verify_folder(folder).ok or len(list((folder / "raw").iterdir())) != len(right)
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
