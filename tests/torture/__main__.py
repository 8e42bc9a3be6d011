"""``python -m tests.torture --minutes 5 --seed 1``: all drills; exit code 1 where one found something."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.torture.drills import run_all


def main() -> int:
    """Run the drills and print the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Try to break vcelltools.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep what the failing drills left, in this new folder")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drills = run_all(
            a.keep or Path(folder), seconds=60 * a.minutes, seed=a.seed, say=lambda t: print(t, flush=True)
        )
    failures = sum(len(d.failures) for d in drills)
    total = {k: sum(d.counts.get(k, 0) for d in drills) for k in ("files mutated", "containers mutated", "kills")}
    total |= {k: sum(d.counts.get(k, 0) for d in drills) for k in ("full disks", "bit flips")}
    print(f"{', '.join(f'{v:,} {k}' for k, v in total.items())}: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
