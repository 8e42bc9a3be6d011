"""Agreement of ``responders`` with pertpy's Mixscape on the THP-1 screen, cell by cell.

    benchmarks/make_peers.sh pertpy-1.0.3
    python -m benchmarks.bench_mixscape --cells 7108

Both classify the same cells of the same log1p CP10K values: Mixscape after it subtracted the mean of the 20 nearest
controls of the replicate, ``responders`` without. A cell responds if Mixscape calls it KO, and if ours calls it
responding. Prints the table of docs/guides.md for both files of the screen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.harness import DATA, OURS, ROOT, need_peer, save

SHARED = ROOT.parent / "shared" / "data"
MIN_CELLS = 10


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's kappa of two boolean classifications; NaN if both put all cells in one class."""
    same = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return float("nan") if chance == 1 else (same - chance) / (1 - chance)


def compare(ours: pd.DataFrame, theirs: pd.DataFrame) -> list[dict[str, object]]:
    """Return the agreement by perturbation, and over all perturbed cells."""
    theirs = theirs.set_index("cell").loc[ours["cell"]]
    perturbed = ours["response"].isin(["responding", "escaping", "no signature"]).to_numpy()
    frame = pd.DataFrame({
        "perturbation": ours["perturbation"].to_numpy(), "ours": (ours["response"] == "responding").to_numpy(),
        "mixscape": (theirs["class"] == "KO").to_numpy(),
    })[perturbed]  # fmt: skip
    rows = []
    for name, part in [*frame.groupby("perturbation", observed=True), ("all", frame)]:
        a, b = part["ours"].to_numpy(), part["mixscape"].to_numpy()
        rows.append({
            "perturbation": str(name), "cells": len(part), "ours": round(float(a.mean()), 4),
            "mixscape": round(float(b.mean()), 4), "agreement": round(float((a == b).mean()), 4),
            "kappa": round(kappa(a, b), 3),
        })  # fmt: skip
    return sorted(rows, key=lambda r: (r["perturbation"] == "all", -max(r["ours"], r["mixscape"])))  # type: ignore


def print_table(rows: list[dict[str, object]]) -> None:
    """Print the rows as they stand in the docs; perturbations without any responding cell in one row."""
    print("| perturbation | cells | ours | Mixscape | same class | kappa |\n|---|---|---|---|---|---|")
    none = [r for r in rows if not r["ours"] and not r["mixscape"]]
    for r in (r for r in rows if r not in none):
        k = "–" if np.isnan(r["kappa"]) else f"{r['kappa']:.2f}".replace("-", "−")  # type: ignore
        name = f"**{r['perturbation']}**" if r["perturbation"] == "all" else r["perturbation"]
        print(
            f"| {name} | {r['cells']:,} | {r['ours']:.1%} | {r['mixscape']:.1%} | {r['agreement']:.1%} | {k} |".replace(
                "%", " %"
            )
        )
    if none:
        print(f"| {', '.join(str(r['perturbation']) for r in none)} | {sum(r['cells'] for r in none):,} |"  # type: ignore
              " none | none | 100 % | – |")  # fmt: skip


def main() -> None:
    """Run both on both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", choices=["7108", "20729"], help="one of the two files of the screen [default: both]")
    chosen = parser.parse_args().cells
    python = need_peer("pertpy-1.0.3")
    DATA.mkdir(parents=True, exist_ok=True)
    single = DATA / "papalexi_single.h5ad"
    screen = SHARED / "papalexi_h5mu/papalexi_7108_gene_guide.h5mu"
    guides = ["guides", str(screen), "--single", "--write", str(single), "--out", str(DATA / "single.parquet")]
    subprocess.run([*OURS, *guides, "-q", "--force"], check=True)
    cases: dict[str, tuple[Path, str, str]] = {
        "20,729 cells, published labels": (
            SHARED / "papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad", "perturbation", "bio_rep",
        ),
        "7,108 cells, labels of guides --single": (single, "target_gene", "replicate"),
    }  # fmt: skip
    results = []
    for case, (counts, pert_col, split_by) in cases.items():
        if chosen is not None and case.split()[0].replace(",", "") != chosen:
            continue
        logs, table, peer = (DATA / f"mixscape{end}" for end in ("_log.h5ad", "_ours.csv", "_peer.csv"))
        subprocess.run([*OURS, "normalize", str(counts), "--out", str(logs), "-q", "--force"], check=True)
        command = [*OURS, "responders", str(logs), "--pert-col", pert_col, "--out", str(table), "-q", "--force"]
        subprocess.run(command, check=True)
        script = str(ROOT / "benchmarks/peers/mixscape.py")
        subprocess.run([python, script, str(logs), str(peer), pert_col, "non-targeting", split_by], check=True)
        rows = compare(pd.read_csv(table, dtype={"cell": str}), pd.read_csv(peer, dtype={"cell": str}))
        print(f"\n{case}\n")
        print_table(rows)
        results += [{"case": case, **r} for r in rows]
    save("mixscape", results)


if __name__ == "__main__":
    sys.exit(main())
