"""The spatial wing against SpaceTravLR's Python package, on the same files: values first, then times.

python -m benchmarks.bench_spatial --sizes 1000 10000 --peer-sizes 1000
python -m benchmarks.bench_spatial --only fit received screen
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.harness import DATA, OURS, ROOT, save
from tests.peers import find_peer

TARGETS, CLUSTERS, HOPS, KNOCKED = 50, 13, 3, "Lig3"
GENES = [f"Tf{i}" for i in range(150)] + [f"Lig{i}" for i in range(100)] + [f"Rec{i}" for i in range(100)] + [
    f"Gen{i}" for i in range(118)
]  # fmt: skip
CASES = ("splash", "perturb", "received", "fit", "screen")


def make_problem(n: int) -> Path:
    """Write n cells × 468 genes and 50 targets with some 420 modulators each."""
    import anndata as ad
    import pandas as pd

    from vcelltools.spatial.betadata import Betas, write_betas

    folder = DATA / f"spatial_{n}"
    if (folder / "x.h5ad").exists():
        return folder
    (folder / "betas").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tf, ligands, receptors = GENES[:150], GENES[150:250], GENES[250:350]
    pairs = [f"{a}${b}" for a, b in zip(rng.choice(ligands, 320), rng.choice(receptors, 320), strict=True)]
    pairs = list(dict.fromkeys(pairs))[:300]
    for target in ["Tf9", *rng.choice(GENES[10:], TARGETS - 1, replace=False)]:
        names = [g for g in rng.choice(tf, 23, replace=False) if g != target]
        tfl = dict.fromkeys(f"{rng.choice(ligands)}#{g}" for g in names[:20] for _ in range(5))
        names += [p for p in pairs if target not in p.split("$")] + [p for p in tfl if target not in p.split("#")]
        beta = rng.normal(size=(CLUSTERS, len(names))) * 0.01
        write_betas(folder / "betas", Betas(target, tuple(names), np.arange(CLUSTERS), np.zeros(CLUSTERS), beta, False))
    x = rng.gamma(1, 1, (n, len(GENES))) * (rng.random((n, len(GENES))) < 0.6)
    kind = rng.integers(0, CLUSTERS, n)
    kind[:CLUSTERS] = range(CLUSTERS)
    obs = pd.DataFrame({"cell_type_int": kind}, index=[f"c{i}" for i in range(n)])
    adata = ad.AnnData(np.zeros((n, len(GENES)), np.float32), obs=obs, var=pd.DataFrame(index=GENES))
    adata.layers["imputed_count"] = x
    adata.obsm["spatial"] = rng.random((n, 2)) * 47 * np.sqrt(n)
    adata.write_h5ad(folder / "x.h5ad")
    return folder


def clock(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return median wall and processor seconds; the first call is not counted."""
    call()
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def run_peer(folder: Path) -> dict[str, float]:
    """Return the peer's seconds; its tables lie in the folder."""
    python = find_peer("spacetravlr-0.1.21")
    if python is None:
        return {}
    script = ROOT / "benchmarks" / "peers" / "spacetravlr_spatial.py"
    done = subprocess.run(
        [python, script, folder, "Tf9", KNOCKED, str(HOPS)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, run: Any) -> dict[str, float]:
    """Return the largest differences from the peer's tables."""
    import pandas as pd

    W = pd.read_parquet(folder / "peer_received.parquet")
    ligands = [c for c in W if c.startswith("Lig")]
    splash = pd.read_parquet(folder / "peer_splash.parquet")
    mine = run.splash("Tf9").to_frame()
    after = pd.read_parquet(folder / "peer_perturb.parquet")
    p = run.perturb({KNOCKED: 0}, hops=HOPS)
    received = run.receiver.receive(run.tissue.expression(ligands), ligands)
    return {
        "received_difference": float(np.abs(received - W[ligands].to_numpy()).max()),
        "splash_difference": float(np.abs(mine[list(splash)].to_numpy() - splash.to_numpy()).max()),
        "perturb_difference": float(np.abs(p.simulated - after[p.genes].to_numpy()).max()),
    }


def bench_models(sizes: list[int], peer_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time splash and perturb at every size."""
    from vcelltools.spatial import open_run
    from vcelltools.spatial.fitted import find_rows, make_features, run_splash

    rows = []
    for n in sizes:
        folder = make_problem(n)
        exact = n in peer_sizes
        run = open_run(
            folder / "betas", folder / "x.h5ad", radius=200.0, kernel="exact" if exact else "auto", threads=1
        )
        betas = run.betas("Tf9")
        genes, ligands = betas.modulators.genes, betas.modulators.ligands
        x = run.tissue.expression(genes)
        W = run.receiver.receive(run.tissue.expression(ligands), ligands)
        at = {g: i for i, g in enumerate(genes)}, {g: i for i, g in enumerate(ligands)}
        features, of_cell = make_features(betas, *at), find_rows(betas, run.tissue)
        row: dict[str, Any] = {"case": f"spatial {n}", "size": [n, len(GENES)]}
        row["splash_seconds"], row["splash_cpu"] = clock(
            lambda f=features, b=betas, r=of_cell, x=x, W=W: run_splash(f, b.ordered, r, x, W, threads=1), rounds
        )
        if n <= 10_000:
            for response in ("derivative", "exact"):
                row[f"perturb_{response}_seconds"], row[f"perturb_{response}_cpu"] = clock(
                    lambda run=run, r=response: run.perturb({KNOCKED: 0}, hops=HOPS, response=r), rounds
                )
        row["kernel_error_bound"] = run.receiver.error_bound
        if exact and (peer := run_peer(folder)):
            row |= {f"peer_{k}": v for k, v in peer.items()} | compare(folder, run)
            row["splash_ratio"] = peer["splash_cpu"] / row["splash_cpu"]
            row["perturb_ratio"] = peer["perturb_cpu"] / row["perturb_derivative_cpu"]
        print(row, flush=True)
        rows.append(row)
    return rows


def bench_received(rounds: int) -> dict[str, Any]:
    """Time 100,000 cells × 16 ligands on one thread."""
    from vcelltools.spatial._received import Fast

    rng = np.random.default_rng(0)
    xy, x = rng.random((100_000, 2)) * 14_862, rng.gamma(1.0, 1.0, (16, 100_000))
    kernel = Fast(xy, 200.0, threads=1)
    wall, cpu = clock(lambda: kernel.sum(x), rounds)
    row = {"case": "spatial received", "size": [100_000, 16], "ours_seconds": wall, "ours_cpu": cpu}
    return row | {"kernel_error_bound": kernel.error_bound}


def bench_fit(rounds: int) -> dict[str, Any]:
    """Time the whole command on 200 targets × 2,000 cells in 5 clusters, without validation."""
    from vcelltools.spatial.simulate import simulate_tissue

    sim = DATA / "spatial_fit" / "sim.h5ad"
    if not sim.exists():
        sim.parent.mkdir(parents=True, exist_ok=True)
        simulate_tissue(sim, cells=2000, genes=256, clusters=5)
    targets = ",".join(f"Gene{i + 1}" for i in range(200))
    command = [
        *OURS, "spatial", "fit", "--h5ad", sim, "--network", sim.parent / "mouse_network.parquet", "--radius", "100",
        "--genes", targets, "--no-validate", "--standardize", "--l1-reg", "0.02", "--threads", "1", "--force", "-q",
        "--json", "--output-dir",
    ]  # fmt: skip
    walls, cpus, kkt = [], [], 0.0
    for i in range(rounds + 1):
        began, before = time.perf_counter(), _measure_cpu()
        done = subprocess.run(
            [*map(str, command), str(sim.parent / f"run{i}_{os.getpid()}")], capture_output=True, text=True, check=True
        )
        walls.append(time.perf_counter() - began)
        cpus.append(_measure_cpu() - before)
        kkt = max(kkt, json.loads(done.stdout)["largest_kkt"])
    return {
        "case": "spatial fit",
        "size": [2000, 200, 5],
        "ours_seconds": statistics.median(walls[1:]),
        "ours_cpu": statistics.median(cpus[1:]),
        "largest_kkt": kkt,
    }


def bench_screen(n_tasks: int) -> dict[str, Any]:
    """Time a screen on 10,000 cells with one worker and with two: knock-outs of every gene, then of pairs of genes."""
    from vcelltools.spatial import open_run
    from vcelltools.spatial.screen import Task

    folder = make_problem(10_000)
    pairs = [(g,) for g in GENES] + [(a, b) for a, b in combinations(GENES, 2)][::7]
    tasks = [Task(name="+".join(p), desired=dict.fromkeys(p, 0.0), hops=4, scale=1.0, column=None) for p in pairs]
    row: dict[str, Any] = {"case": "spatial screen", "size": [10_000, n_tasks]}
    for workers in (1, 2):
        run = open_run(folder / "betas", folder / "x.h5ad", radius=200.0, threads=1)
        before = _measure_cpu()
        r = run.screen([], folder / f"screen{workers}_{os.getpid()}", tasks=tasks[:n_tasks], workers=workers)
        row[f"seconds_{workers}"], row[f"cpu_{workers}"] = r.seconds, _measure_cpu() - before
    row["peak_mb"], row["peak_mb_of_helpers"] = (
        resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return row


def _measure_cpu() -> float:
    """Return the processor's seconds of this process and of those that it has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--peer-sizes", type=int, nargs="*", default=[1000])
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--screen-tasks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if "splash" in args.only or "perturb" in args.only:
        rows += bench_models(args.sizes, args.peer_sizes, args.rounds)
    for case, call in (
        ("received", lambda: bench_received(args.rounds)),
        ("fit", lambda: bench_fit(min(args.rounds, 3))),
        ("screen", lambda: bench_screen(args.screen_tasks)),
    ):
        if case in args.only:
            rows.append(call())
            print(rows[-1], flush=True)
    save("spatial", rows)


if __name__ == "__main__":
    sys.exit(main())
