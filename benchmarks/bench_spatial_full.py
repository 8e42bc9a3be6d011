"""Mode full of the spatial wing on tissues whose coefficients vary, and on tissues in which none does.

python -m benchmarks.bench_spatial_full --seeds 0 1 2

Every tissue is fitted in mode seed and in mode full. The table counts models (target and cluster), those that get
coefficients by cell, held-out R², and the processor seconds that mode full adds to a target, with compilation. Where
coefficients vary, the factor on the coefficients of a cell is compared with the planted one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

if TYPE_CHECKING:
    from vcelltools.spatial._run import Run

RADIUS = 100.0


def compare_factors(run: Run, gene: str, clusters: list[int], planted: np.ndarray) -> list[float]:
    """Return the correlation of the mean factor on a target's coefficients with the planted one, in some clusters."""
    betas, out = run.betas(gene), []
    for c in clusters:
        rows = run.tissue.clusters == c
        values = betas.values[rows][:, betas.values[rows].all(0)]
        out.append(float(np.corrcoef((values / values.mean(0)).mean(1), planted[rows])[0, 1]))
    return out


def measure(folder: Path, *, varies: bool, cells: int, genes: int, seed: int, **options: Any) -> dict[str, Any]:
    """Fit one tissue in both modes, and return the models that were compared and the seconds."""
    import anndata as ad
    import pandas as pd

    from vcelltools import spatial
    from vcelltools.spatial.simulate import simulate_tissue

    made = simulate_tissue(
        folder / "sim.h5ad", cells=cells, genes=56 + genes, radius=RADIUS, per_cell_beta=varies, seed=seed
    )
    targets = [f"Gene{i + 1}" for i in range(genes)]
    seconds = {}
    for mode in ("seed", "full"):
        began = time.process_time()
        extra = options if mode == "full" else {}
        spatial.fit(
            made.out, folder / mode, network=made.network, radius=RADIUS, genes=targets, mode=mode, threads=1, **extra
        )
        seconds[mode] = time.process_time() - began
    rows = pd.read_parquet(folder / "full" / "summary.parquet")
    run = spatial.open_run(folder / "full")
    planted = ad.read_h5ad(made.knockouts, backed="r").obs["beta_factor"].to_numpy()
    like = [
        v for gene, part in rows[rows.per_cell].groupby("gene") if varies
        for v in compare_factors(run, str(gene), part.cluster.tolist(), planted)
    ]  # fmt: skip
    return {"rows": rows, "like": like, "seconds": (seconds["full"] - seconds["seed"]) / genes}


def summarize(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one line of the table over some tissues."""
    import pandas as pd

    rows = pd.concat([one["rows"] for one in found])
    rows = rows[rows.r2_cell.notna()]
    like = [v for one in found for v in one["like"]]
    by_cell = rows[rows.per_cell]
    return {
        "models": len(rows), "by cell": len(by_cell), "share": len(by_cell) / len(rows),
        **{k: float(rows[k].mean()) for k in ("r2_cluster", "r2_cell")},
        "r2_cluster, by cell": float(by_cell.r2_cluster.mean()), "r2_blind, by cell": float(by_cell.r2_blind.mean()),
        "r2_cell, by cell": float(by_cell.r2_cell.mean()),
        "correlation with the planted factor": float(np.median(like)) if like else float("nan"),
        "seconds a target": float(np.mean([one["seconds"] for one in found])),
    }  # fmt: skip


def main() -> None:
    from benchmarks.bench_spatial_truth import show
    from benchmarks.harness import save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--encoders", nargs="*", default=["position"])
    parser.add_argument("--trunks", nargs="*", default=["shared"])
    parser.add_argument("--spatial-dim", type=int, default=32)
    args = parser.parse_args()
    lines = []
    for encoder in args.encoders:
        mesh = {"spatial_dim": args.spatial_dim} if encoder == "map" else {}
        for trunk in args.trunks:
            for varies in (True, False):
                found = []
                for seed in args.seeds:
                    with tempfile.TemporaryDirectory() as folder:
                        found.append(measure(
                            Path(folder), varies=varies, cells=args.cells, genes=args.genes, seed=seed,
                            encoder=encoder, trunk=trunk, **mesh,
                        ))  # fmt: skip
                case = f"{encoder}, {trunk}, {'varying' if varies else 'constant'}"
                lines.append({"case": case, **summarize(found)})
                show(case, [lines[-1]])
    show(f"{len(args.seeds)} tissues of {args.cells:,} cells, {args.genes} targets each", lines)
    save("spatial_full", lines)


if __name__ == "__main__":
    main()
