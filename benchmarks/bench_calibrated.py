"""``score --profile calibrated`` against scPertEval: whole commands, equal numbers asserted before a clock counts.

    python -m benchmarks.bench_calibrated --size 2 --rounds 3

Sizes and files are those of ``bench_score``. The peer scores and calibrates (DRF and BDS) the protocols that we have
too, in one process that reads the data once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.bench_score import SIZES, read
from benchmarks.harness import DATA, OURS, ROOT, need_peer, save, take_turns

PROTOCOLS = {
    **{m: m for m in (
        "mse", "wmse_exp2", "pearson_ctrl", "pearson_pert", "weighted_pearson_ctrl_exp2", "weighted_pearson_pert_exp2",
        "r2_ctrl", "r2_pert", "weighted_r2_ctrl_exp2", "weighted_r2_pert_exp2", "nir", "de_auprc", "de_auroc",
    )},
    "mse_degs": "mse_degs_padj=0.05",
    "de_overlap_50": "de_overlap_k=50",
}  # fmt: skip
TOLERANCE = 2e-3
"""The peer averages float32 files in float32, and its t statistics carry that rounding."""


def check_equal(theirs: Path, ours: Path) -> float:
    """Compare the means of every metric, its DRF and its BDS; return the largest difference."""
    peer = json.loads(theirs.read_text())
    body = json.loads((ours / "score.json").read_text())["components"]
    table, worst = read(ours / "results.csv"), 0.0
    for m, protocol in PROTOCOLS.items():
        found, k = peer[protocol], body[m]["calibration"]
        pairs = [(found["drf"]["mean"], k["drf"]), (found["drf"]["median"], k["drf_median"])]
        pairs += [(v, table[p, m]) for p, v in found["score"].items()]
        # one gene of fifty, where equal statistics stand at the cut; one perturbation, where controls are level
        pairs = [(a, b, 0.04 if m == "de_overlap_50" else TOLERANCE) for a, b in pairs]
        pairs.append((found["bds"]["bds"], k["bds"], 0.021))
        for a, b, slack in pairs:
            if np.isnan(a) and np.isnan(b):
                continue
            if not abs(a - b) <= slack * max(1, abs(a)):
                raise SystemExit(f"{m}: {a} there and {b} here")
            if m != "de_overlap_50":
                worst = max(worst, abs(a - b) / max(1, abs(a)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    paths = {side: DATA / f"score_{args.size}_{side}.h5ad" for side in ("real", "pred")}
    for side, path in paths.items():
        if not path.exists():
            again = [sys.executable, "-m", "benchmarks.bench_score", "--size", args.size, "--make", side]
            subprocess.run(again, check=True)
    pred, real = str(paths["pred"]), str(paths["real"])
    ours, theirs = DATA / "calibrated_ours", DATA / "calibrated_theirs.json"
    script = str(ROOT / "tests" / "oracle" / "peer_scperteval.py")
    peer = [need_peer("scperteval-0.2.0"), script, real, pred, "0", *PROTOCOLS.values()]
    commands = {
        "ours": [*OURS, "score", pred, "--truth", real, "--profile", "calibrated", "-q", "--out", str(ours), "--force"],
        "peer scperteval": ["bash", "-c", 'exec "$@" > "$0"', str(theirs), *peer],
    }
    timings = take_turns(commands, args.rounds)
    mine, other = timings["ours"], timings["peer scperteval"]
    row = {
        "case": f"score {args.size} calibrated",
        "size": list(SIZES[args.size]),
        "ours_seconds": round(mine.wall, 2),
        "ours_peak_mb": round(mine.peak_mb),
        "largest_difference": check_equal(theirs, ours),
        "peer_seconds": round(other.wall, 2),
        "peer_peak_mb": round(other.peak_mb),
        "ratio": round(other.wall / mine.wall, 1),
    }
    print(row)
    save("calibrated", [row])


if __name__ == "__main__":
    main()
