"""``python -m tests.fuzz --minutes 10 --seed 1``: the long mode."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzz.harness import run


def main() -> int:
    """Fuzz for some minutes, or show one mutant; return 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--only", type=int, help="run this mutant alone, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: write the mutant here and stop")
    a = parser.parse_args()
    if a.only is not None:
        from tests.fuzz.child import make_mutant, run_one

        if a.keep is not None:
            a.keep.mkdir(parents=True, exist_ok=True)
            made, names, _ = make_mutant(a.seed, a.only, a.keep)
            print(made.path, made.kind, names)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run_one(a.seed, a.only, Path(folder)), indent=1).replace("\\n", "\n"))
        return 0
    report = run(seed=a.seed, seconds=60 * a.minutes, first=a.first)
    print(report)
    print("mutations:", ", ".join(f"{k} {v:,}" for k, v in report.mutations.most_common()))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
