"""The spatial wing against SpaceTravLR's Python package, on the same files: values first, then times.

python -m benchmarks.bench_spatial --only splash perturb --sizes 1000 10000 100000 --peer-sizes 1000 10000
python -m benchmarks.bench_spatial --only fit received
python -m benchmarks.bench_spatial --only screen --screen-tasks 1000 --rounds 1

Every ratio is one of processor time: both sides run on one thread, and the machine may be shared.
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


def run_peer(script: str, *args: Any) -> dict[str, float]:
    """Return the peer's seconds; its tables lie in the folder that it is given."""
    python = find_peer("spacetravlr-0.1.21")
    if python is None:
        return {}
    command = [str(a) for a in (python, ROOT / "benchmarks" / "peers" / script, *args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
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
    from vcelltools.spatial._received import AUTO_CELLS, Receiver
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
        peer = run_peer("spacetravlr_spatial.py", folder, "Tf9", KNOCKED, HOPS if exact else 0)
        row |= {f"peer_{k}": v for k, v in peer.items()}
        if exact and peer:
            sent = [g for g in GENES if g.startswith("Lig")]
            values = run.tissue.expression(sent)
            for kernel, receiver in (("exact", run.receiver), ("fast", Receiver(run.tissue.xy, radius=200.0,
                                                                               kernel="fast", threads=1))):  # fmt: skip
                row[f"received_{kernel}_seconds"], row[f"received_{kernel}_cpu"] = clock(
                    lambda c=receiver, v=values, s=sent: c.receive(v, s), rounds
                )
                row[f"received_{kernel}_ratio"] = peer["received_cpu"] / row[f"received_{kernel}_cpu"]
            row |= compare(folder, run)
            if n > AUTO_CELLS:
                fast = open_run(folder / "betas", folder / "x.h5ad", radius=200.0, threads=1)
                row["perturb_fast_seconds"], row["perturb_fast_cpu"] = clock(
                    lambda run=fast: run.perturb({KNOCKED: 0}, hops=HOPS), rounds
                )
                row["perturb_fast_ratio"] = peer["perturb_cpu"] / row["perturb_fast_cpu"]
            row["perturb_ratio"] = peer["perturb_cpu"] / row["perturb_derivative_cpu"]
        if peer:
            row["splash_ratio"] = peer["splash_cpu"] / row["splash_cpu"]
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


def make_fit_problem() -> Path:
    """Simulate 2,000 cells in five clusters."""
    from vcelltools.spatial.simulate import simulate_tissue

    sim = DATA / "spatial_fit" / "sim.h5ad"
    if not sim.exists():
        sim.parent.mkdir(parents=True, exist_ok=True)
        simulate_tissue(sim, cells=2000, genes=256, clusters=5)
    return sim


def bench_fit(rounds: int) -> dict[str, Any]:
    """Time the whole command on 200 targets × 2,000 cells in 5 clusters, without validation."""
    sim = make_fit_problem()
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


def bench_solver(rounds: int) -> dict[str, Any]:
    """Time the regressions of 20 targets in five clusters alone, against the solver that the peer imports."""
    from vcelltools.spatial._fit import make_plan
    from vcelltools.spatial.design import Features, join_columns
    from vcelltools.spatial.regress import fit_cluster
    from vcelltools.spatial.settings import make_settings
    from vcelltools.spatial.tissue import open_tissue

    sim = make_fit_problem()
    l1 = group = 0.02
    settings = make_settings(
        {"network": sim.parent / "mouse_network.parquet", "radius": 100.0, "l1_reg": l1, "group_reg": group,
         "standardize": True, "validate": False}
    )  # fmt: skip
    tissue = open_tissue(sim)
    targets = [f"Gene{i + 1}" for i in range(20)]
    plan = make_plan(tissue, settings, targets, None, 1)
    columns = join_columns(plan.modulators)
    features, Y = Features(tissue, columns, plan.receiver), tissue.expression(targets)
    parts = [np.flatnonzero(tissue.clusters == c) for c in sorted(tissue.labels)]
    held = [(features.build(rows), Y[rows]) for rows in parts]
    fits: list[Any] = []

    def solve() -> None:
        fits[:] = [f for X, y in held for f in fit_cluster(X, None, y, [], columns, targets, settings)]

    row: dict[str, Any] = {"case": "spatial solver", "size": [2000, len(targets), len(parts)]}
    row["ours_seconds"], row["ours_cpu"] = clock(solve, rounds)
    problems, arrays = [], {}
    for k, f in enumerate(fits):
        (X, y), t = held[k // len(targets)], k % len(targets)
        starts = columns.starts[targets[t]]
        kinds = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[np.isin(columns.at[targets[t]], f.fitted.cols)]
        X = X[:, f.fitted.cols]
        Z, z = (X - X.mean(0)) / X.std(0), y[:, t] - y[:, t].mean()
        problems.append((Z, z, kinds, f.fitted.w * X.std(0)))
        arrays |= {f"X{k}": Z, f"y{k}": z, f"groups{k}": kinds}
    path = sim.parent / "columns.npz"
    np.savez(path, n_problems=len(problems), **arrays)
    peer = run_peer("group_lasso_fit.py", path, l1 / 2, group / 2)  # its penalties act doubled
    if peer:
        theirs = np.load(sim.parent / "columns_peer.npz")
        gaps = []
        for k, (Z, z, kinds, w) in enumerate(problems):
            sizes = np.bincount(kinds)
            best, other = (
                0.5 * ((z - Z @ v) ** 2).mean() + l1 * np.abs(v).sum()
                + group * sum(np.sqrt(m) * np.linalg.norm(v[kinds == g]) for g, m in enumerate(sizes))
                for v in (w, theirs[f"arr_{k}"])
            )  # fmt: skip
            gaps.append(float(other / best - 1))
        row |= {f"peer_{k}": v for k, v in peer.items()} | {"ratio": peer["cpu"] / row["ours_cpu"]}
        row |= {"least_excess_of_peer": min(gaps), "largest_excess_of_peer": max(gaps)}
    return row


def bench_screen(n_tasks: int, rounds: int) -> dict[str, Any]:
    """Time a screen on 10,000 cells with one worker and with two, in turn: all genes, then pairs of genes."""
    folder = make_problem(10_000)
    pairs = [(g,) for g in GENES] + [(a, b) for a, b in combinations(GENES, 2)][::7]
    tasks = [["+".join(p), dict.fromkeys(p, 0.0)] for p in pairs][:n_tasks]
    row: dict[str, Any] = {"case": f"spatial screen {n_tasks}", "size": [10_000, n_tasks]}
    walls: dict[int, list[float]] = {1: [], 2: []}
    cpus: dict[int, list[float]] = {1: [], 2: []}
    peaks: dict[int, list[float]] = {1: [], 2: []}
    for i in range(rounds):
        for workers in (1, 2):
            out = folder / f"screen{workers}_{i}_{os.getpid()}"
            before, began = _measure_cpu(), time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.bench_spatial", "--screen-child", str(folder), str(out),
                 str(workers)], input=json.dumps(tasks), capture_output=True, text=True, check=True, cwd=ROOT,
            )  # fmt: skip
            walls[workers].append(time.perf_counter() - began)
            cpus[workers].append(_measure_cpu() - before)
            peaks[workers].append(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    for w in (1, 2):
        row |= {f"seconds_{w}": statistics.median(walls[w]), f"cpu_{w}": statistics.median(cpus[w])}
        row[f"peak_mb_{w}"] = max(peaks[w])
    row["processors_1"], row["processors_2"] = (row[f"cpu_{w}"] / row[f"seconds_{w}"] for w in (1, 2))
    row["speedup"] = statistics.median(a / b for a, b in zip(walls[1], walls[2], strict=True))
    same = [(folder / f"screen{w}_0_{os.getpid()}" / "effects.parquet").read_bytes() for w in (1, 2)]
    assert same[0] == same[1], "two workers write other bytes than one"
    return row


def run_screen_child(folder: Path, out: Path, workers: int) -> None:
    """Screen the tasks of stdin on one thread for each worker, and print the largest process's memory."""
    from vcelltools.spatial import open_run
    from vcelltools.spatial.screen import Task

    tasks = [Task(name=n, desired=d, hops=4, scale=1.0, column=None) for n, d in json.load(sys.stdin)]
    run = open_run(folder / "betas", folder / "x.h5ad", radius=200.0, threads=1)
    run.screen([], out, tasks=tasks, workers=workers)
    used = [resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peak_mb": max(used)}))


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
    parser.add_argument("--screen-child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.screen_child:
        folder, out, workers = args.screen_child
        run_screen_child(Path(folder), Path(out), int(workers))
        return
    rows: list[dict[str, Any]] = []
    if "splash" in args.only or "perturb" in args.only:
        rows += bench_models(args.sizes, args.peer_sizes, args.rounds)
    for case, call in (
        ("received", lambda: bench_received(args.rounds)),
        ("fit", lambda: bench_fit(min(args.rounds, 3))),
        ("fit", lambda: bench_solver(min(args.rounds, 3))),
        ("screen", lambda: bench_screen(args.screen_tasks, min(args.rounds, 3))),
    ):
        if case in args.only:
            rows.append(call())
            print(rows[-1], flush=True)
    save("spatial", rows)


if __name__ == "__main__":
    sys.exit(main())
