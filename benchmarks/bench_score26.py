"""``vcelltools score --compat vcc2026`` against ``cell-eval2 run --preset vcc2026``: whole commands, numbers compared.

    python -m benchmarks.bench_score26 --cells 9000 --genes 6000 --rounds 3 [--skip-peer] [--anchors]

Both read the same two h5ad files and write their results. The peer's ``run`` computes the six raw values alone. Ours is
timed so (``values``), with both ends of the scale, which a score needs (``score``: what the command does when nothing
else is asked for), and from a truth pack. ``--anchors`` lets the peer compute the ends too: ``run --anchor``, then
``baseline``. Files are made once.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import DATA, OURS, need_peer, run_once, save, take_turns

CONTROL = "non-targeting"


def make(path: Path, n_cells: int, n_genes: int, n_perts: int, share_controls: float, strength: float, seed: int):
    """Write negative-binomial counts as CSR: the truth with ``strength`` 1, weaker predictions below."""
    import pandas as pd
    from scipy import sparse

    from vcelltools.io.write.h5ad import H5adWriter

    fixed = np.random.default_rng(0)
    base = fixed.gamma(0.5, 1.0, n_genes) + 0.005
    effect = fixed.normal(0, 0.6, (n_perts, n_genes)) * (fixed.random((n_perts, n_genes)) < 0.15)
    effect[np.arange(n_perts), np.arange(n_perts)] = -2.5
    rng = np.random.default_rng(seed)
    n_controls = int(n_cells * share_controls)
    code = np.concatenate([np.full(n_controls, -1), np.arange(n_cells - n_controls) % n_perts])
    rng.shuffle(code)
    labels = np.array([CONTROL if c < 0 else f"G{c:05d}" for c in code])
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i:05d}" for i in range(n_genes)])
    with H5adWriter(path, n_genes=n_genes, var=var, obs=obs, dtype="float32", force=True) as w:
        for a in range(0, n_cells, 500):
            c = code[a : a + 500]
            lfc = np.where(c[:, None] >= 0, effect[np.maximum(c, 0)] * strength, 0.0)
            mean = base * np.exp(lfc) * rng.lognormal(0, 0.35, (len(c), 1))
            block = sparse.csr_matrix(rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32))
            w.append_csr(block.indptr.astype(np.int64), block.indices, block.data)


def check_equal(peer: Path, ours: Path) -> float:
    """Compare the six raw values; return the largest difference."""
    with next(peer.glob("agg_results.csv")).open() as f:
        rows = list(csv.DictReader(f))
    components = json.loads((ours / "score.json").read_text())["components"]
    mean = next(r for r in rows if r["statistic"] == "mean")
    worst = max(abs(float(mean[m]) - c["value"]) for m, c in components.items() if not math.isnan(c["value"]))
    if not worst <= 1e-9:
        raise SystemExit(f"the numbers differ by {worst}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=9000)
    parser.add_argument("--genes", type=int, default=6000)
    parser.add_argument("--perturbations", type=int, default=20)
    parser.add_argument("--share-controls", type=float, default=0.15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--anchors", action="store_true", help="let the peer compute both ends of the scale too")
    parser.add_argument("--make", choices=("real", "pred"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    name = f"{a.cells}x{a.genes}"
    DATA.mkdir(parents=True, exist_ok=True)
    paths = {side: DATA / f"score26_{name}_{side}.h5ad" for side in ("real", "pred")}
    if a.make:
        strength, seed = (1.0, 1) if a.make == "real" else (0.7, 2)
        return make(paths[a.make], a.cells, a.genes, a.perturbations, a.share_controls, strength, seed)
    for side, path in paths.items():  # in a process of its own: its memory must not count as the command's
        if not path.exists():
            subprocess.run(
                [sys.executable, "-m", "benchmarks.bench_score26", *sys.argv[1:], "--make", side], check=True
            )
    pred, real = str(paths["pred"]), str(paths["real"])
    pack = DATA / f"score26_{name}.pack"
    pack.unlink(missing_ok=True)
    score = [*OURS, "score", pred, "--compat", "vcc2026", "-q", "--force", "--out"]
    out, theirs = DATA / "score26_ours", DATA / "score26_theirs"
    run_once([*score, str(out), "--truth", real, "--truth-pack", str(pack)])  # compiles too, and makes the pack
    whole = [*score, str(DATA / "score26_whole"), "--truth", real]
    peer = "" if a.skip_peer else str(Path(need_peer("cell-eval2-0.20.0")).parent / "cell-eval2")
    shared = ["--preset", "vcc2026", "--pert-col", "target_gene", "--set", "num_threads=2", "-o"]
    run = [peer, "run", "-ap", pred, "-ar", real, *shared]
    if a.anchors:
        both = [*run, f"{theirs}_anchor", "--anchor", "&&", peer, "baseline", "-ar", real, *shared, f"{theirs}_base"]
        commands = {"ours": whole, "peer": ["bash", "-c", " ".join(both)]}
    else:
        commands = {
            "ours": [*score, str(out), "--truth", real, "--no-anchors"],
            "with_both_ends": whole,
            "from_pack": [*score, str(DATA / "score26_pack"), "--truth-pack", str(pack)],
            "peer": [*run, str(theirs)],
        }
    if a.skip_peer:
        del commands["peer"]
    timings = take_turns(commands, a.rounds)
    row = {"case": f"score26 {name}{' both ends' if a.anchors else ''}", "size": [a.perturbations, a.cells, a.genes],
           "pack_mb": round(pack.stat().st_size / 1e6, 1)}  # fmt: skip
    for what, t in timings.items():
        row |= {f"{what}_seconds": round(t.wall, 2), f"{what}_peak_mb": round(t.peak_mb)}
    if "peer" in timings:
        row["ratio"] = round(timings["peer"].wall / timings["ours"].wall, 1)
        if not a.anchors:
            row["largest_difference"] = check_equal(theirs, out)
            row["ratio_with_both_ends"] = round(timings["peer"].wall / timings["with_both_ends"].wall, 1)
    print(row)
    save("score", [row])
    return None


if __name__ == "__main__":
    main()
