"""Differential expression of one file in memory: ours against illico, warm, in turns.

    python -m benchmarks.bench_de --size 3 --rounds 5

The files are those of :mod:`benchmarks.bench_score`. Both sides hold the cells in memory, have compiled, use all cores,
and return U, p, adjusted p and fold changes of every perturbation against the controls. A turn is three runs without a
pause: memory that has lain free while the other side had its turn may have gone back to a virtual machine's host, and
the first run of a turn then pays for fetching it (``first_seconds``). The ratio is that of the other two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench_score import SIZES
from benchmarks.harness import DATA, need_peer, save

WORKER = """
import sys, json, time, warnings
warnings.simplefilter("ignore")
import anndata, numpy as np
side, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
adata = anndata.read_h5ad(path)
if side == "ours":
    from vcelltools.io import open_dataset
    from vcelltools.scoring.cell_eval.rules import get_rules
    from vcelltools.scoring.cell_eval.de_table import make_de_table
    from vcelltools.differential.cell_labels import read_cells
    from vcelltools.differential.expression import find_scale
    from vcelltools.differential.reduce import ReadOptions, reduce_cells
    rules = get_rules("ours")
    def run(a):
        with open_dataset(a) as data:
            cells = read_cells(data, "target_gene", "non-targeting")
            side = reduce_cells(data, cells, "non-targeting", find_scale(data), ReadOptions(threads=threads))
        return make_de_table(side, rules).p_pg
else:
    from illico import asymptotic_wilcoxon
    def run(a):
        out = asymptotic_wilcoxon(a, is_log1p=True, group_keys="target_gene", reference="non-targeting",
                                  n_threads=threads)
        groups = out.index.get_level_values(0)
        return out["p_value"].to_numpy()[groups != "non-targeting"]
p = run(adata)
print(json.dumps({"p": [float(v) for v in np.sort(p.ravel())[:: max(1, p.size // 200)]]}), flush=True)
for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    run(adata)
    print(json.dumps({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}), flush=True)
"""


class Worker:
    """A process that has the file in memory and runs when it is told."""

    def __init__(self, python: str, side: str, path: Path) -> None:
        threads = str(len(os.sched_getaffinity(0)))
        self._child = subprocess.Popen(
            [python, "-c", WORKER, side, str(path), threads], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("a worker failed")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
        """Run once; return wall and CPU seconds."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    path = DATA / f"score_{args.size}_real.h5ad"
    if not path.exists():
        again = [sys.executable, "-m", "benchmarks.bench_score", "--size", args.size, "--make", "real"]
        subprocess.run(again, check=True)
    workers = {
        "ours": Worker(sys.executable, "ours", path),
        "illico": Worker(need_peer("cell-eval-0.8.2"), "illico", path),
    }
    mine, theirs = workers["ours"].first["p"], workers["illico"].first["p"]
    worst = max(abs(a - b) / max(b, 1e-12) for a, b in zip(mine, theirs, strict=True) if b > 1e-9)
    if worst > 0.02:  # its default backend is good to about one per cent
        raise SystemExit(f"the p-values differ by {worst:.1%}")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    first: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            first[name].append(worker.run()["wall"])
            runs[name] += [worker.run(), worker.run()]
    for worker in workers.values():
        worker.close()
    wall = {k: statistics.median(r["wall"] for r in v) for k, v in runs.items()}
    cpu = {k: statistics.median(r["cpu"] for r in v) for k, v in runs.items()}
    row = {
        "case": f"de {args.size}", "size": list(SIZES[args.size]), "ours_seconds": round(wall["ours"], 3),
        "peer_seconds": round(wall["illico"], 3), "ours_cpu": round(cpu["ours"], 3),
        "peer_cpu": round(cpu["illico"], 3), "ratio": round(wall["illico"] / wall["ours"], 2),
        "ours_first_seconds": round(statistics.median(first["ours"]), 3),
        "peer_first_seconds": round(statistics.median(first["illico"]), 3),
        "largest_difference_of_p": round(worst, 4),
    }  # fmt: skip
    print(row)
    save("score", [row])


if __name__ == "__main__":
    main()
