"""Whole commands side by side: ``vcelltools score --compat vcc2026`` and ``cell-eval2 run --preset vcc2026``.

    python benchmarks/bench_score26.py --cells 9000 --genes 6000 [--peer PYTHON] [--skip-peer]

Both read the same two h5ad files and write their results. The peer computes the six raw metrics alone; ours is timed
so (``values_only``), with the baseline and the replicate that a score needs (``score``), and with a truth pack.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

CONTROL = "non-targeting"


def make(n_cells: int, n_genes: int, n_perts: int, share_controls: float, strength: float, seed: int) -> ad.AnnData:
    """Return negative-binomial counts: the truth with ``strength`` 1, weaker predictions below."""
    fixed = np.random.default_rng(0)
    base = fixed.gamma(0.5, 1.0, n_genes) + 0.005
    effect = fixed.normal(0, 0.6, (n_perts, n_genes)) * (fixed.random((n_perts, n_genes)) < 0.15)
    effect[np.arange(n_perts), np.arange(n_perts)] = -2.5
    rng = np.random.default_rng(seed)
    n_controls = int(n_cells * share_controls)
    code = np.concatenate([np.full(n_controls, -1), np.arange(n_cells - n_controls) % n_perts])
    rng.shuffle(code)
    blocks = []
    for a in range(0, n_cells, 500):
        c = code[a : a + 500]
        lfc = np.where(c[:, None] >= 0, effect[np.maximum(c, 0)] * strength, 0.0)
        mean = base * np.exp(lfc) * rng.lognormal(0, 0.35, (len(c), 1))
        blocks.append(sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)))
    labels = np.array([CONTROL if c < 0 else f"G{c:05d}" for c in code])
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i:05d}" for i in range(n_genes)])
    return ad.AnnData(sparse.vstack(blocks, format="csr"), obs, var)


def timed(command: list[str]) -> dict[str, float]:
    """Run a command; return its wall and CPU seconds, and the peak memory of the children up to now."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command[:5])} failed:\n{done.stderr[-3000:]}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_so_far_gb": round(used.ru_maxrss / 1e6, 2)}


def main() -> None:
    """Make the files, run both, print one JSON object."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--cells", type=int, default=9000)
    ap.add_argument("--genes", type=int, default=6000)
    ap.add_argument("--perturbations", type=int, default=20)
    ap.add_argument("--peer", default=None, help="Python of cell-eval2 0.20.0 [default: .peers]")
    ap.add_argument("--skip-peer", action="store_true")
    a = ap.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory() as folder:
        real, pred = f"{folder}/real.h5ad", f"{folder}/pred.h5ad"
        truth = make(a.cells, a.genes, a.perturbations, 0.15, 1.0, 1)
        truth.write_h5ad(real)
        make(a.cells, a.genes, a.perturbations, 0.15, 0.7, 2).write_h5ad(pred)
        out = {"cells": a.cells, "genes": a.genes, "density": round(truth.X.nnz / np.prod(truth.shape), 3)}
        ours = [sys.executable, "-m", "vcelltools.cli.main", "score", pred, "--compat", "vcc2026", "-q"]
        pack = ["--truth-pack", f"{folder}/truth.npz"]
        runs = {
            "warm_up": ["--truth", real, "--no-anchors"],
            "values_only": ["--truth", real, "--no-anchors"],
            "score": ["--truth", real],
            "makes_pack": ["--truth", real, *pack],
            "with_pack": pack,
        }
        for name, options in runs.items():
            out[name] = timed([*ours, *options, "--out", f"{folder}/{name}"])
        if not a.skip_peer:
            from tests.peers import find_peer

            python = a.peer or find_peer("cell-eval2-0.20.0")
            command = [str(Path(python).parent / "cell-eval2"), "run", "-ap", pred, "-ar", real, "--preset", "vcc2026",
                       "--pert-col", "target_gene", "-o", f"{folder}/peer", "--set", "num_threads=1"]  # fmt: skip
            out["peer"] = timed(command)
            for what in ("wall_s", "cpu_s"):
                out[f"times_faster_{what}"] = {k: round(out["peer"][what] / out[k][what], 1) for k in runs}
    print(json.dumps(out, indent=1))
    if not a.skip_peer:
        from benchmarks.harness import save

        ours = out["values_only"]  # the peer computes the raw values alone
        row = {
            "case": f"score26 {a.cells}x{a.genes}",
            "size": [a.perturbations, a.cells, a.genes],
            "ours_seconds": ours["wall_s"],
            "with_both_ends_seconds": out["score"]["wall_s"],
            "peer_seconds": out["peer"]["wall_s"],
            "ratio": round(out["peer"]["wall_s"] / ours["wall_s"], 1),
        }
        save("score", [row])


if __name__ == "__main__":
    main()
