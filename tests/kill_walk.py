"""Builds a store again and again, killed with SIGKILL at every step of the writing; prints what came of it as JSON.

Run as a program, in a process of its own: it forks a child for every build.

    python -m tests.kill_walk LAYOUT WORK_FOLDER [FIRST_STEP STRIDE]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import vcelltools as vc
from tests.killing import Killer, run_killed
from tests.screens import BUILD, make_screen, write
from vcelltools.io.write import atomic

BASIS = [f"GENE{i}" for i in range(59, 0, -3)]
OPTIONS = {"threads": 1, "bucket_bytes": 1, "chunk_values": 300, "checkpoint_seconds": 0.0, **BUILD}


def hash_folder(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def build(path: Path, out: Path, *, kill_at: int, basis: list[str] = BASIS, force: bool = False) -> int:
    """Build in a child; return the signal that ended it, or 0."""

    def work(killer: Killer) -> None:
        atomic.on_step = killer
        vc.build_store(path, basis=basis, out=out, name="s", force=force, **OPTIONS)

    return run_killed(work, kill_at)


def main() -> None:
    layout, work = sys.argv[1], Path(sys.argv[2])
    first, stride = (int(x) for x in (sys.argv[3:5] or ("0", "1")))
    path = write(make_screen(n=120, perts=3, deep=True), work / "s.h5ad", layout, "float64")
    vc.build_store(path, basis=BASIS, out=work / "whole", name="s", **OPTIONS)
    vc.build_store(path, basis=BASIS[:5], out=work / "old", name="s", **OPTIONS)
    whole, old = hash_folder(work / "whole/s"), hash_folder(work / "old/s")
    out = {"kills": 0, "steps": 0, "wrong": [], "half": [], "left": []}
    # a new store: killed at a step, and the next run a few steps further on, until it is through
    for at in range(first, 10_000, stride):
        dpath = work / "new"
        kills = 0
        step = at
        while build(path, dpath, kill_at=step):
            kills += 1
            if (dpath / "s").exists() and hash_folder(dpath / "s") != whole:
                out["half"].append(at)
            step = 7 + 5 * kills  # further on than the steps of a resume that it makes anew
        out["kills"] += kills
        out["steps"] = at
        if hash_folder(dpath / "s") != whole:
            out["wrong"].append(at)
        left = sorted(p.name for p in dpath.iterdir() if p.name not in ("s", ".s.lock"))
        out["left"] += left
        for p in (dpath / "s").iterdir():
            p.unlink()
        (dpath / "s").rmdir()
        if not kills:
            break
    # over an old store: what stands at the name is whole, the old or the new, after every kill
    for at in range(first, 10_000, 3 * stride):
        dpath = work / "over"
        vc.build_store(path, basis=BASIS[:5], out=dpath, name="s", force=True, **OPTIONS)
        killed = build(path, dpath, kill_at=at, force=True)
        out["kills"] += bool(killed)
        if hash_folder(dpath / "s") not in (old, whole):
            out["half"].append(-at)
        build(path, dpath, kill_at=-1, force=True)
        if hash_folder(dpath / "s") != whole:
            out["wrong"].append(-at)
        if not killed:
            break
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
