"""``de`` and ``hvg`` against crispyx: whole processes in turn, equal numbers asserted before a clock counts.

    python -m benchmarks.bench_de_crispyx --cells 50000 --genes 18000 --perturbations 100 --rounds 3

The file is simulated once, as counts, and normalised to log1p CP10K, which crispyx needs; both sides read that file and
write their table. crispyx tests the genes that pass its filters, which are off here; it sorts each gene once for every
perturbation and once for the controls, we once for all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import numpy as np

from benchmarks.harness import DATA, OURS, need_peer, save, take_turns

PEER = """
import sys, warnings
warnings.simplefilter("ignore")
import crispyx
what, path, out = sys.argv[1:]
if what == "de":
    crispyx.wilcoxon_test(path, perturbation_column="target_gene", control_label="non-targeting", output_path=out,
                          min_pct_ctrl=0, min_pct_pert=0, min_mean_ctrl=0, min_mean_pert=0, verbose=False, force=True)
else:
    import crispyx.hvg
    crispyx.hvg.highly_variable_genes(path, n_top_genes=2000, flavor="seurat_v3", cell_mask=None, inplace=False)
"""


def compare(theirs: str, ours: str) -> float:
    """Return the largest relative difference of the p-values above 1e-12; both tables hold every gene."""
    import anndata as ad
    import pandas as pd

    peer = ad.read_h5ad(theirs)
    mine = pd.read_parquet(ours).pivot(index="perturbation", columns="gene", values="p_value")
    p = np.asarray(peer.layers["pvalue"], float)
    q = mine.loc[peer.obs_names.astype(str), peer.var_names.astype(str)].to_numpy()
    some = np.isfinite(p) & (q > 1e-12)
    return float((np.abs(p - q)[some] / q[some]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=18_000)
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    size = f"{args.cells}x{args.genes}x{args.perturbations}"
    counts, logs = DATA / f"de_{size}.h5ad", DATA / f"de_{size}_log.h5ad"
    if not logs.exists():
        simulate = [*OURS, "simulate", "--out", str(counts), "--cells", str(args.cells), "--genes", str(args.genes),
                    "--perturbations", str(args.perturbations), "-q", "--force"]  # fmt: skip
        subprocess.run(simulate, check=True)
        subprocess.run([*OURS, "normalize", str(counts), "--out", str(logs), "-q", "--force"], check=True)
    python = need_peer("crispyx-0.2.2")
    ours, theirs = DATA / "de_ours.parquet", DATA / "de_crispyx.h5ad"
    commands = {
        "ours": [*OURS, "de", str(logs), "--out", str(ours), "--force", "-q", "--no-continuity"],
        "peer crispyx": [python, "-c", PEER, "de", str(logs), str(theirs)],
    }
    timings = take_turns(commands, args.rounds, source=logs)
    mine, other = timings["ours"], timings["peer crispyx"]
    row = {
        "case": f"de {size} crispyx",
        "ours_seconds": round(mine.wall, 2), "ours_peak_mb": round(mine.peak_mb),
        "peer_seconds": round(other.wall, 2), "peer_peak_mb": round(other.peak_mb),
        "ratio": round(other.wall / mine.wall, 1), "largest_difference_of_p": compare(str(theirs), str(ours)),
    }  # fmt: skip
    print(row, flush=True)
    rows = [row]
    commands = {
        "ours": [*OURS, "hvg", str(counts), "--top", "2000", "--out", str(DATA / "hvg_ours.txt"), "--force", "-q"],
        "peer crispyx": [python, "-c", PEER, "hvg", str(counts), ""],
    }
    timings = take_turns(commands, args.rounds, source=counts)
    mine, other = timings["ours"], timings["peer crispyx"]
    row = {
        "case": f"hvg {size} crispyx",
        "ours_seconds": round(mine.wall, 2), "ours_peak_mb": round(mine.peak_mb),
        "peer_seconds": round(other.wall, 2), "peer_peak_mb": round(other.peak_mb),
        "ratio": round(other.wall / mine.wall, 1),
    }  # fmt: skip
    print(row)
    save("crispyx", [*rows, row])


if __name__ == "__main__":
    sys.exit(main())
