"""Stores side by side with other loaders: the same sets of cells, dense float16, values checked before timing.

    python -m benchmarks.bench_store [--cells 194234] [--steps 100] [--peers annbatch,anndata,cell-load]

A batch is 32 sets of 64 perturbed and 64 control cells of 2,000 genes. ``runs``: every set 64 stored neighbours;
``scattered``: cells at random. Warm: the page cache holds the data. Cold: it was told to forget it. Ratios to a peer
of the same run are what counts; the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import vcelltools as vc
from benchmarks.harness import DATA, ROOT, save
from tests.peers import find_peer
from vcelltools.pipelines.sampler import Batch, Loaded, Sampler

SETS, SET_SIZE, GENES = 32, 64, 2000


def make_source(path: Path, n: int) -> None:
    """Write counts of 2,000 genes, 22.5 % non-zero."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.6, 2.0, GENES)
    p = np.clip(p * 0.225 / p.mean(), 0.005, 0.98)
    blocks = []
    for a in range(0, n, 10_000):
        mask = rng.random((min(10_000, n - a), GENES), dtype=np.float32) < p
        c = np.zeros(mask.shape, np.float32)
        c[mask] = rng.geometric(0.55, int(mask.sum()))
        blocks.append(sparse.csr_matrix(c))
    labels = np.where(rng.random(n) < 0.1, "non-targeting", rng.choice([f"P{i}" for i in range(150)], n))
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(labels),
            "batch": pd.Categorical(rng.choice([f"b{i}" for i in range(4)], n)),
            "cell_type": pd.Categorical(["K562"] * n),
        },
        index=[f"C{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"G{i}" for i in range(GENES)])
    ad.AnnData(sparse.vstack(blocks, format="csr"), obs, var).write_h5ad(path)


def prepare(work: Path, n: int, steps: int) -> Sampler:
    """Make the source, the store, and what the peers read; return our sampler."""
    source = work / "source.h5ad"
    if not source.exists():
        make_source(source, n)
    if not (work / "x").exists():
        genes = [f"G{i}" for i in range(GENES)]
        vc.build_store(
            source, basis=genes, out=work, name="x", pert_col="gene", control="non-targeting", group_by=["batch"]
        )
    store = vc.open_store(work / "x")
    sampler = Sampler(store, set_size=SET_SIZE, sets_per_batch=SETS, seed=1)
    if not (work / "X.npy").exists():
        np.save(work / "X.npy", np.asarray(store.X))
        log = store.to_anndata(counts=False)
        log.uns["log1p"] = {}
        log.write_h5ad(work / "log.h5ad")
        np.save(work / "row_sums.npy", np.sort(store.X.astype(np.float64).sum(axis=1)))
    runs, scattered = [], []
    rng = np.random.default_rng(2)
    for t in range(steps):
        b = sampler.batch(t)
        scattered.append(np.concatenate([b.perturbed_rows.ravel(), b.control_rows.ravel()]))
        g = sampler.groups.iloc[b.group_id]
        starts = [
            (g[s] + (rng.random(SETS) * (g[m] - SET_SIZE + 1)).astype(int)).to_numpy()
            for s, m in (("start", "length"), ("control_start", "control_length"))
        ]
        runs.append((np.concatenate(starts)[:, None] + np.arange(SET_SIZE)).ravel())
    np.save(work / "runs.npy", np.array(runs))
    np.save(work / "scattered.npy", np.array(scattered))
    np.savez(work / "check.npz", runs=store.X[runs[0]], scattered=store.X[scattered[0]], set_size=SET_SIZE)
    return sampler


def make_batches(sampler: Sampler, rows: np.ndarray) -> list[Batch]:
    """Return batches of given rows."""
    zero = np.zeros(SETS, np.int32)
    half = SETS * SET_SIZE
    ids = {"store_id": zero, "perturbation_id": zero, "context_id": zero, "group_id": zero, "sampler": sampler}
    return [
        Batch(
            step=t,
            perturbed_rows=r[:half].reshape(SETS, SET_SIZE),
            control_rows=r[half:].reshape(SETS, SET_SIZE),
            **ids,
        )
        for t, r in enumerate(rows)
    ]


def forget(path: Path) -> None:
    """Ask the page cache to drop a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def time_ours(sampler: Sampler, work: Path, rounds: int) -> dict[str, float]:
    """Return cells/s of our loads; the best of some rounds each."""
    expected = np.load(work / "check.npz")
    store = sampler.stores[0]
    store.check_rows()
    out: dict[str, float] = {}
    shape = (SETS, SET_SIZE, GENES)
    buffer = Loaded(np.empty(shape, np.float16), np.empty(shape, np.float16))
    for kind in ("runs", "scattered"):
        batches = make_batches(sampler, np.load(work / f"{kind}.npy"))
        got = np.concatenate([v.reshape(-1, GENES) for v in batches[0].load()])
        if not np.array_equal(got, expected[kind]):
            sys.exit(f"our {kind} differ")
        for name, into in (("fresh arrays", None), ("into a buffer", buffer)):
            best = 0.0
            for _ in range(rounds):
                began = time.perf_counter()
                for b in batches:
                    sampler.load(b, into)
                best = max(best, sum(b.n_cells for b in batches) / (time.perf_counter() - began))
            out[f"{kind}, warm, {name}"] = best
    best = 0.0
    for i in range(rounds):
        began = time.perf_counter()
        n = sum(b.n_cells for b, _ in sampler.iterate(1000 * i, 1000 * i + len(batches)))
        best = max(best, n / (time.perf_counter() - began))
    out["drawn and read ahead, warm"] = best
    out |= time_cold(store, len(batches))
    return out


def measure_disk(path: Path) -> float:
    """Return the bytes/s of one sequential read with O_DIRECT."""
    forget(path)
    buffer = mmap.mmap(-1, 8 << 20)  # page-aligned, as O_DIRECT wants it
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    began, size = time.perf_counter(), 0
    while n := os.readv(fd, [buffer]):
        size += n
    os.close(fd)
    return size / (time.perf_counter() - began)


def time_cold(store: Any, steps: int) -> dict[str, float]:
    """Return cells/s from the disk, and the disk's own sequential rate in cells/s."""
    path = store.path / "X.f16"
    row = store.stride * 2
    out = {"disk, sequential, past the page cache": measure_disk(path) / row}
    for draw in ("blocks", "scatter"):
        cold = Sampler(store, set_size=SET_SIZE, sets_per_batch=SETS, seed=7, draw=draw, read="disk", verify=False)
        batches = [cold.batch(t) for t in range(min(steps, 20))]  # few, so that little is read twice
        forget(path)
        began = time.perf_counter()
        for b in batches:
            b.load()
        out[f"{draw}, cold"] = sum(b.n_cells for b in batches) / (time.perf_counter() - began)
    return out


def time_anndata(work: Path) -> dict[str, float]:
    """Return cells/s of AnnData's backed CSR matrix on the same rows."""
    adata = ad.read_h5ad(work / "log.h5ad", backed="r")
    expected = np.load(work / "check.npz")
    out = {}
    for kind in ("runs", "scattered"):
        rows = np.load(work / f"{kind}.npy")[:3]
        n, began = 0, time.perf_counter()
        for t, r in enumerate(rows):
            unique, inverse = np.unique(r, return_inverse=True)
            got = adata.X[unique].toarray().astype(np.float16)[inverse]
            n += len(got)
            if t == 0 and not np.array_equal(got, expected[kind]):
                sys.exit(f"AnnData's {kind} differ")
        out[f"{kind}, warm"] = n / (time.perf_counter() - began)
    adata.file.close()
    return out


def run_peer(name: str, script: str, *args: object) -> dict[str, float]:
    """Run a peer's script in its environment; return its figures."""
    python = find_peer(name)
    if python is None:
        return {}
    command = [str(python), str(ROOT / "benchmarks/peers" / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=194_234)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="annbatch,anndata,cell-load")
    args = parser.parse_args()
    work = DATA / f"store-{args.cells}"
    work.mkdir(parents=True, exist_ok=True)
    sampler = prepare(work, args.cells, args.steps)
    rows: list[dict[str, Any]] = []

    def add(who: str, figures: dict[str, float]) -> None:
        for what, rate in figures.items():
            rows.append({"case": f"{who}: {what}", "cells_per_s": round(rate)})
            sys.stdout.write(f"{who:24s} {what:32s} {rate:14,.0f} cells/s\n")
        sys.stdout.flush()

    add("vcelltools", time_ours(sampler, work, args.rounds))
    peers = args.peers.split(",")
    if "annbatch" in peers:
        if not (work / "annbatch.zarr").exists():
            run_peer("annbatch-0.3.1", "annbatch_sets.py", "prepare", work)
        add("annbatch 0.3.1", run_peer("annbatch-0.3.1", "annbatch_sets.py", "run", work, args.steps))
    if "anndata" in peers:
        add("AnnData, backed CSR", time_anndata(work))
    if "cell-load" in peers:
        add("cell-load 0.10.4", run_peer("arc-state-0.11.1", "cell_load_sets.py", work, 64))
    store = sampler.stores[0]
    size = store.manifest["files"]["counts.u8z"]["bytes"] / store.n_cells
    sys.stdout.write(f"counts: {size:.0f} bytes a cell\n")
    save("store", rows, cells=args.cells, counts_bytes_per_cell=round(size))


if __name__ == "__main__":
    main()
