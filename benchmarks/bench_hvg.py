"""``vcelltools hvg`` against a whole scanpy script: every layout, batches, scaling, threads; equality first.

    python -m benchmarks.bench_hvg [--cells 100000] [--genes 36000] [--rounds 3] [--only csr,gzip,...]
    python -m benchmarks.bench_hvg --scaling [--largest 400000]
    python -m benchmarks.bench_hvg --cold [--largest 1000000]

Data are simulated once (``vcelltools simulate``, 6.85 % non-zero) into ``.bench/`` or ``VCELLTOOLS_BENCH_DATA``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    DATA,
    OURS,
    ROOT,
    SCANPY_NEWEST,
    SCANPY_REFERENCE,
    need_peer,
    run_once,
    save,
    take_turns,
)
from vcelltools.io import open_dataset
from vcelltools.io.hdf5.direct import drop_pages

DENSITY = "0.0685"
TOP = 2000
# case -> (options of simulate, suffix, share of --cells, options of hvg, least ratio, most MB)
CASES: dict[str, tuple[list[str], str, float, list[str], float, float]] = {
    "csr": ([], "h5ad", 1.0, [], 8, 400),
    "csc": (["--layout", "csc"], "h5ad", 1.0, [], 8, 400),
    "h5mu": (["--modality", "rna", "--dtype", "int64"], "h5mu", 1.0, ["--modality", "rna"], 8, 400),
    "gzip": (["--compression", "gzip"], "h5ad", 1.0, [], 5, 400),
    "batches": (["--batches", "8"], "h5ad", 1.0, ["--batch-key", "batch"], 5, 800),
    "dense": (["--layout", "dense"], "h5ad", 0.2, [], 30, 400),
    "mudata": ([], "h5mu", 1.0, ["--modality", "rna"], 8, 400),  # written by the mudata package; only on request
}
BY_MUDATA = """
import sys, warnings
import anndata, mudata
warnings.simplefilter("ignore")
rna = anndata.read_h5ad(sys.argv[1])
mudata.MuData({"rna": rna, "prot": rna[:, :20].copy()}).write(sys.argv[2])
"""


def make_data(case: str, cells: int, genes: int) -> Path:
    """Simulate the case's file, unless it is there; return it."""
    options, suffix, share, *_ = CASES[case]
    n = int(cells * share)
    path = DATA / f"{case}_{n}x{genes}.{suffix}"
    if not path.exists():
        DATA.mkdir(parents=True, exist_ok=True)
        if case == "mudata":
            run_once([sys.executable, "-c", BY_MUDATA, str(make_data("csr", cells, genes)), str(path)])
            return path
        size = ["--cells", str(n), "--genes", str(genes), "--perturbations", "100", "--density", DENSITY]
        wall, _ = run_once([*OURS, "simulate", "--out", str(path), *size, *options, "-q"])
        print(f"{path.name}: simulated in {wall:.0f} s, {path.stat().st_size / 1e9:.2f} GB", flush=True)
    return path


def check_equal(ours: Path, theirs: Path, *, rtol: float) -> dict[str, float]:
    """Compare the two results; stop where they differ beyond ``rtol`` or exact ties."""
    table = json.loads(ours.read_text())["genes"]
    ref = np.load(theirs)
    norm = np.array(table["variances_norm"], float)
    if table["gene"] != ref["genes"].tolist():
        sys.exit("the genes differ")
    if not (np.array_equal(table["means"], ref["means"]) and np.array_equal(table["variances"], ref["variances"])):
        sys.exit("means or variances are not bit-equal")
    scale = np.maximum(np.abs(ref["variances_norm"]), 1e-300)
    worst = float(np.max(np.abs(norm - ref["variances_norm"]) / scale))
    if worst > rtol:
        sys.exit(f"variances_norm differs by {worst:.2e}")
    differ = np.flatnonzero(np.array(table["highly_variable"]) != ref["chosen"])
    if len(differ) > 0.01 * TOP:
        sys.exit(f"{len(differ)} genes differ")
    return {"worst_relative_difference": worst, "genes_that_differ_by_ties": len(differ)}


def bench_case(case: str, args: argparse.Namespace) -> dict:
    """Check one case for equality, then time it."""
    path = make_data(case, args.cells, args.genes)
    options = CASES[case][3]
    out = DATA / "out" / case
    out.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "benchmarks" / "peers" / "scanpy_hvg.py")
    ours = [*OURS, "hvg", str(path), "--top", str(TOP), "--out", str(out / "h.txt"), "--force", "-q", *options]

    def theirs(peer: str) -> list[str]:
        return [need_peer(peer), script, str(path), str(out / f"{peer}.npz"), str(TOP), *options]

    run_once(ours)
    run_once(theirs(SCANPY_REFERENCE))
    equal = check_equal(out / "hvg_scores.json", out / f"{SCANPY_REFERENCE}.npz", rtol=1e-12)
    commands = {"ours": ours, "peer": theirs(SCANPY_REFERENCE)}
    if args.newest:
        commands["peer newest"] = theirs(SCANPY_NEWEST)
    t = take_turns(commands, args.rounds, source=path)
    row = {
        "case": case,
        "cells": int(args.cells * CASES[case][2]),
        "genes": args.genes,
        "ours_s": round(t["ours"].wall, 3),
        "ours_peak_mb": round(t["ours"].peak_mb),
        "scanpy_s": round(t["peer"].wall, 2),
        "scanpy_peak_mb": round(t["peer"].peak_mb),
        "ratio": round(t["peer"].wall / t["ours"].wall, 1),
        "least_ratio": CASES[case][4],
        "most_mb": CASES[case][5],
        **equal,
    }
    if args.newest:
        row["scanpy_newest_s"] = round(t["peer newest"].wall, 2)
        row["ratio_newest"] = round(t["peer newest"].wall / t["ours"].wall, 1)
    row["met"] = row["ratio"] >= row["least_ratio"] and row["ours_peak_mb"] <= row["most_mb"]
    print(json.dumps(row), flush=True)
    return row


def bench_cold(args: argparse.Namespace) -> list[dict]:
    """A file that is not in the page cache: ``hvg`` beside ``dd`` past the cache, in turns, and ``build-store``."""
    path = DATA / f"kolf_{args.largest}x38606.h5mu"
    if not path.exists():
        DATA.mkdir(parents=True, exist_ok=True)
        size = ["--cells", str(args.largest), "--genes", "38606", "--perturbations", "2000", "--cell-lines", "4"]
        run_once([*OURS, "simulate", "--like", "kolf", *size, "--out", str(path), "-q"])
    genes = DATA / "cold.txt"
    hvg = [*OURS, "hvg", str(path), "--top", str(TOP), "--out", str(genes), "--force", "-q"]
    build = [*OURS, "build-store", str(path), "--preset", "kolf", "--basis", str(genes), "--out", str(DATA / "cold")]
    commands = {
        "dd": ["dd", f"if={path}", "of=/dev/null", "bs=16M", "iflag=direct"],
        "hvg": hvg,
        "build-store": [*build, "--name", "kolf", "--force", "-q"],
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for k in range(args.rounds):
        for name, command in commands.items():
            if name == "build-store" and k:
                continue  # minutes
            drop_pages(path)
            runs[name].append(run_once(command))
            print(name, *runs[name][-1], flush=True)
    disk = statistics.median(wall for wall, _ in runs["dd"])
    rows = []
    for name in ("hvg", "build-store"):
        wall = statistics.median(w for w, _ in runs[name])
        rows.append(
            {
                "case": f"cold {name}",
                "cells": args.largest,
                "bytes": path.stat().st_size,
                "dd_s": round(disk, 2),
                "ours_s": round(wall, 2),
                "rate_of_dd": round(disk / wall, 2),
                "ours_peak_mb": round(max(m for _, m in runs[name])),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def bench_scaling(args: argparse.Namespace) -> list[dict]:
    """Time and memory of ours over cells and threads (raw CSR)."""
    rows = []
    for cells in [c for c in (20_000, 100_000, 400_000) if c <= args.largest]:
        path = make_data("csr", cells, args.genes)
        commands = {
            f"{t} threads": [
                *OURS, "hvg", str(path), "--top", str(TOP), "--out", str(DATA / "s.txt"), "--force", "-q",
                "--threads", str(t),
            ]
            for t in (1, 2)
        }  # fmt: skip
        timings = take_turns(commands, args.rounds, source=path)
        with open_dataset(path) as ds:
            nnz = int(ds.matrix.nnz or 0)
        rows.append(
            {
                "case": f"scaling {cells}",
                "cells": cells,
                "non_zeros": nnz,
                "bytes": path.stat().st_size,
                "one_thread_s": round(timings["1 threads"].wall, 3),
                "two_threads_s": round(timings["2 threads"].wall, 3),
                "peak_mb": round(timings["2 threads"].peak_mb),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Parse, run, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=36_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(c for c in CASES if c != "mudata"))
    parser.add_argument("--newest", action="store_true", help=f"time {SCANPY_NEWEST} too")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--cold", action="store_true", help="a file larger than the cache should hold (17.5 GB)")
    parser.add_argument("--largest", type=int)
    parser.add_argument("--save", default="hvg", help="name under benchmarks/results")
    args = parser.parse_args()
    args.largest = args.largest or (1_000_000 if args.cold else 400_000)
    if args.cold:
        rows = bench_cold(args)
    elif args.scaling:
        rows = bench_scaling(args)
    else:
        rows = [bench_case(case, args) for case in args.only.split(",")]
    print(save(args.save, rows))


if __name__ == "__main__":
    main()
