"""``vcelltools score`` against ``cell-eval run``: whole commands, equal numbers asserted before a clock starts.

    python benchmarks/bench_score.py --size 2 --repeats 3 --peer-repeats 1 --json out.json

Sizes are perturbations × cells + controls × genes at a density: 0 (moderate), 1, 2, 3 as in the table of the README,
and full (100,000 × 18,080, ours alone). Files are made once and kept in --dir.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.peers import find_peer  # noqa: E402

SIZES = {
    "0": (20, 50, 500, 2000, 0.25),
    "1": (20, 200, 2000, 5000, 0.25),
    "2": (50, 85, 2000, 18080, 0.47),
    "3": (50, 1240, 38000, 1000, 0.47),
    "full": (150, 413, 38050, 18080, 0.47),
}


def make_file(path: Path, size: tuple[int, int, int, int, float], seed: int, strength: float) -> None:
    """Write a log1p CSR h5ad (float32) with effects; controls depend on nothing but the size."""
    import pandas as pd

    from vcelltools.io.write import H5adWriter

    n_p, per, n_c, n_g, density = size
    world = np.random.default_rng(0)
    names = [f"G{i}" if i % 2 else f"T{i}" for i in range(n_p)]
    codes = np.repeat(np.arange(n_p + 1), [n_c, *[per] * n_p])
    codes = codes[world.permutation(len(codes))]
    base = world.gamma(0.7, 1.0, n_g)
    effect = np.exp(world.normal(0, 0.7, (n_p + 1, n_g)) * (world.random((n_p + 1, n_g)) < 0.1))
    effect[0] = 1
    # the depth at which the expected share of non-zeros is the density
    low, high = 1e-3, 1e3
    for _ in range(60):
        depth = math.sqrt(low * high)
        low, high = (depth, high) if (1 - np.exp(-depth * base)).mean() < density else (low, depth)
    labels = np.array(["non-targeting", *names], dtype=object)[codes]
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[f"c{i}" for i in range(len(codes))])
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_g)])
    with H5adWriter(path, n_genes=n_g, var=var, obs=obs, dtype="float32", force=True) as w:
        for start in range(0, len(codes), 2000):
            part = codes[start : start + 2000]
            draws = np.random.default_rng([start, 1])  # the same controls in both files
            library = draws.lognormal(0, 0.3, len(part))[:, None]
            rate = library * depth * base * effect[part] ** strength
            counts = (
                draws.poisson(rate)
                if strength == 1
                else np.where(
                    (part == 0)[:, None], draws.poisson(rate), np.random.default_rng([start, seed]).poisson(rate)
                )
            )
            total = counts.sum(axis=1, keepdims=True)
            X = np.log1p(counts / np.maximum(total, 1) * 1e4).astype(np.float32)
            rows, cols = np.nonzero(X)
            indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(part)))])
            w.append_csr(indptr, cols.astype(np.int32), X[rows, cols])


def run(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Return (wall seconds, peak GB) of a command."""
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        assert p.stderr is not None
        err = p.stderr.read()
        _, status, usage = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
    if p.returncode:
        raise SystemExit(f"{command[0]} failed: {err.decode()[-800:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1e6


def read(path: Path) -> dict[tuple[str, str], float]:
    """Return (row, column) -> value."""
    with path.open() as f:
        rows = list(csv.reader(f))
    return {(r[0], c): float(v) if v else math.nan for r in rows[1:] for c, v in zip(rows[0][1:], r[1:], strict=True)}


def check_equal(theirs: Path, ours: Path) -> float:
    """Compare results.csv; return the largest difference."""
    a, b = read(theirs / "results.csv"), read(ours / "results.csv")
    if a.keys() != b.keys():
        raise SystemExit("the tables have other rows or columns")
    worst = max(abs(a[k] - b[k]) for k in a if not (math.isnan(a[k]) and math.isnan(b[k])))
    if not worst <= 2e-6:
        raise SystemExit(f"the numbers differ by {worst}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--profile", default="vcc")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "vcelltools-bench")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    size = SIZES[args.size]
    args.dir.mkdir(parents=True, exist_ok=True)
    real, pred = (args.dir / f"score_{args.size}_{side}.h5ad" for side in ("real", "pred"))
    if not real.exists():
        make_file(real, size, 1, 1.0)
    if not pred.exists():
        make_file(pred, size, 2, 0.6)
    env = dict(os.environ)
    ours = args.dir / "ours"
    mine = [sys.executable, "-m", "vcelltools.cli.main", "score", str(pred), "--truth", str(real), "--profile",
            args.profile, "--compat", "cell-eval", "--out", str(ours), "--force", "-q"]  # fmt: skip
    python = find_peer("cell-eval-0.8.2") if args.size != "full" else None
    out: dict[str, object] = {"size": size, "profile": args.profile, "file_GB": real.stat().st_size / 1e9}
    run(mine, env)  # compiles and caches
    times: dict[str, list[float]] = {"ours": [], "cell-eval": []}
    peak: dict[str, float] = {}
    if python is not None and args.peer_repeats:
        theirs = args.dir / "theirs"
        peer = [str(python.parent / "cell-eval"), "run", "-ap", str(pred), "-ar", str(real), "--profile", args.profile,
                "-o", str(theirs), "--num-threads", str(len(os.sched_getaffinity(0)))]  # fmt: skip
        t, m = run(peer, env)
        out["largest_difference"] = check_equal(theirs, ours)
        times["cell-eval"].append(t)
        peak["cell-eval"] = m
    for i in range(max(args.repeats, args.peer_repeats)):
        if i < args.repeats:
            t, m = run(mine, env)
            times["ours"].append(t)
            peak["ours"] = max(peak.get("ours", 0), m)
        if python is not None and 0 < i < args.peer_repeats:
            times["cell-eval"].append(run(peer, env)[0])
    out["seconds"] = {k: round(statistics.median(v), 2) for k, v in times.items() if v}
    out["peak_GB"] = {k: round(v, 2) for k, v in peak.items()}
    if times["cell-eval"]:
        out["times_faster"] = round(statistics.median(times["cell-eval"]) / statistics.median(times["ours"]), 1)
    text = json.dumps(out, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
