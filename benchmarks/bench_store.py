"""Stores side by side with other loaders: the same sets of cells, dense float16, values checked before timing.

    python -m benchmarks.bench_store [--cells 194234] [--steps 100] [--parts ours,annbatch,anndata,cell-load,...]

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
from benchmarks.harness import DATA, ROOT, as_installed, save
from tests.peers import find_peer
from vcelltools.io.hdf5.direct import make_aligned
from vcelltools.sampling.sampler import Batch, Loaded, Sampler

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


def warm(path: Path) -> None:
    """Read a file once, so that the page cache holds it."""
    with open(path, "rb") as f:
        while f.read(1 << 24):
            pass


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
    out |= time_cold(store.path, len(batches), rounds)
    return out


def measure_disk(path: Path, *, huge: bool) -> float:
    """Return the bytes/s of one sequential read with O_DIRECT, 8 MiB at a time, as dd has it; or into huge pages."""
    forget(path)
    buffer: Any = make_aligned(8 << 20).data if huge else mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE)
    if not huge:
        buffer.madvise(mmap.MADV_NOHUGEPAGE)
        buffer[:] = bytes(len(buffer))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    began, size = time.perf_counter(), 0
    while n := os.readv(fd, [buffer]):
        size += n
    os.close(fd)
    return size / (time.perf_counter() - began)


def time_cold(path: Path, steps: int, rounds: int) -> dict[str, float]:
    """Return cells/s from the disk, and the disk's own sequential rate in cells/s: medians of rounds taken in turn."""
    x = path / "X.f16"
    store = vc.open_store(path)
    found: dict[str, list[float]] = {}
    for i in range(rounds):
        for name, huge in (("", False), (", huge pages", True)):
            rate = measure_disk(x, huge=huge) / (store.stride * 2)
            found.setdefault(f"disk, sequential, past the page cache{name}", []).append(rate)
        for draw, verify in (("blocks", False), ("blocks", True), ("scatter", False)):
            options = {"set_size": SET_SIZE, "sets_per_batch": SETS, "seed": 7 + i, "draw": draw, "read": "disk"}
            cold = Sampler(vc.open_store(path) if verify else store, verify=verify, **options)
            forget(x)
            began = time.perf_counter()
            n = sum(b.n_cells for b, _ in cold.iterate(0, min(steps, 30 if draw == "blocks" else 8)))
            name = f"{draw}, cold{', checked on the way' if verify else ''}"
            found.setdefault(name, []).append(n / (time.perf_counter() - began))
    return {name: float(np.median(rates)) for name, rates in found.items()}


def time_anndata(work: Path) -> dict[str, float]:
    """Return cells/s of AnnData's backed CSR matrix on the same rows."""
    warm(work / "log.h5ad")
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


BUILD_CHILD = """
import json, sys, time
began = time.perf_counter()
import vcelltools as vc

class Phases:
    def __init__(self):
        self.seconds = {}
    def start(self, phase, total, unit):
        self.phase, self.began = phase, time.perf_counter()
    def advance(self, n):
        pass
    def note(self, text):
        pass
    def finish(self):
        self.seconds[self.phase] = time.perf_counter() - self.began

phases = Phases()
result = vc.build_store(
    sys.argv[1], basis=[f"G{i}" for i in range(int(sys.argv[3]))], out=sys.argv[2], name="x", pert_col="gene",
    control="non-targeting", group_by=["batch"], force=True, progress=phases,
)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
print(json.dumps({"cells": result.n_cells, "seconds": time.perf_counter() - began, "peak_mb": peak,
                  "phases": phases.seconds}))
"""


def make_atlas(path: Path, n: int, *, n_genes: int = 18_000, per_cell: int = 3_600, gzip: bool = False) -> None:
    """Write counts of a whole transcriptome, ``per_cell`` non-zeros a cell, a thousand cells at a time."""
    import h5py

    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1.6, n_genes)
    for _ in range(50):
        rate *= per_cell / n_genes / (1 - np.exp(-rate)).mean()
    share, mean = (1 - np.exp(-rate)).astype(np.float32), np.minimum(rate, 50) * 0.7
    blocks = []
    for _ in range(8):
        rows, columns = np.nonzero(rng.random((1000, n_genes), dtype=np.float32) < share)
        counts = (1 + rng.poisson(mean[columns])).astype(np.float32)
        blocks.append((np.bincount(rows, minlength=1000), columns.astype(np.int32), counts))
    order = [blocks[k % len(blocks)] for k in range(n // 1000)]
    nnz = sum(len(b[1]) for b in order)
    options = {"chunks": (1 << 16,), "compression": "gzip", "compression_opts": 1} if gzip else {}
    with h5py.File(path, "w") as f:
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        X = f.create_group("X")
        shape = [len(order) * 1000, n_genes]
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        indices = X.create_dataset("indices", (nnz,), "i4", **options)
        data = X.create_dataset("data", (nnz,), "f4", **options)
        at = 0
        for _, columns, counts in order:
            indices[at : at + len(columns)], data[at : at + len(columns)] = columns, counts
            at += len(columns)
        X["indptr"] = np.append(0, np.cumsum(np.concatenate([b[0] for b in order])))
        _write_tables(f, shape[0], n_genes)


def make_tall(path: Path, n: int, *, n_genes: int = GENES, per_cell: int = 5) -> None:
    """Write many cells of few counts, with the obs of an atlas: what is kept of every cell shows."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as f:
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        X = f.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n, n_genes]})
        X["indptr"] = np.arange(0, (n + 1) * per_cell, per_cell)
        first = rng.integers(0, n_genes // per_cell, (n, per_cell), dtype=np.int32)
        X["indices"] = (np.sort(first, axis=1) + np.arange(per_cell, dtype=np.int32) * (n_genes // per_cell)).ravel()
        X["data"] = rng.integers(1, 20, n * per_cell).astype(np.float32)
        _write_tables(f, n, n_genes)


def _write_tables(f: Any, n: int, n_genes: int) -> None:
    rng = np.random.default_rng(1)
    labels = np.where(rng.random(n) < 0.1, 0, rng.integers(1, 151, n))
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical.from_codes(labels, ["non-targeting", *(f"P{i}" for i in range(150))]),
            "batch": pd.Categorical.from_codes(rng.integers(0, 4, n), [f"b{i}" for i in range(4)]),
            "guide": [f"P{i % 2000}_guide_sequence_{i % 7}" for i in range(n)],
            "score": rng.random(n),
            "n": rng.integers(0, 9, n),
        },
        index=[f"ACGTACGTACGTACGT-{i}_library" for i in range(n)],
    )
    ad.io.write_elem(f, "obs", obs)
    ad.io.write_elem(f, "var", pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]))


def run_build(source: Path, out: Path, *, n_basis: int = GENES) -> dict[str, Any]:
    """Build the store of a file in a process of its own; return what it took."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD_CHILD, str(source), str(out), str(n_basis)],
        capture_output=True,
        text=True,
        check=False,
        env=as_installed(),
    )
    if done.returncode:
        sys.exit(f"building failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["counts_bytes"] = (out / "x/counts.u8z").stat().st_size / found["cells"]
    return found


def time_reading(source: Path) -> float:
    """Return cells/s of reading all chunks and adding up one value of every cache line of them."""
    from vcelltools.io import open_dataset
    from vcelltools.io.stream import run_spans

    def touch(state: dict[str, Any], chunk: Any, span: Any) -> None:
        state["sum"] = float(chunk.data[::16].sum()) + int(chunk.indices[::16].sum())

    with open_dataset(source) as ds:
        began = time.perf_counter()
        run_spans(ds.matrix, ds.matrix.plan(), dict, touch)
        return ds.n_cells / (time.perf_counter() - began)


def time_building(work: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Return the row of building from an atlas of 60,000 cells × 18,000 genes, raw or gzip-1."""
    source = work / f"atlas-{kind}.h5ad"
    if not source.exists():
        make_atlas(source, 60_000, gzip=kind == "gzip")
    warm(source)
    runs = [run_build(source, work / "built") for _ in range(rounds)]
    best = min(runs, key=lambda r: r["seconds"])
    passes = min(sum(r["phases"].values()) for r in runs)
    return {
        "case": f"building, {kind}",
        "cells_per_s": round(best["cells"] / passes),
        "whole_process_cells_per_s": round(best["cells"] / best["seconds"]),
        "reading_alone_cells_per_s": round(time_reading(source)),
        "peak_mb": round(max(r["peak_mb"] for r in runs)),
        "counts_bytes": round(best["counts_bytes"]),
        "phases": {k: round(v, 2) for k, v in best["phases"].items()},
    }


def measure_memory(work: Path, n: int) -> dict[str, Any]:
    """Return the row of the peak of building from ``n`` cells; of millions a smaller basis, for the disk's sake."""
    source = work / f"tall-{n}.h5ad"
    if not source.exists():
        make_tall(source, n)
    found = run_build(source, work / "built", n_basis=GENES if n <= 1_000_000 else 600)
    rate = round(n / sum(found["phases"].values()))
    return {"case": f"memory of building, {n:,} cells", "peak_mb": round(found["peak_mb"]), "cells_per_s": rate}


def add_ratios(path: Path) -> None:
    """Write our ratios to the peers of the same session beside our rows, and print them."""
    body = json.loads(path.read_text())
    rate = {r["case"]: r.get("cells_per_s") for r in body["rows"]}
    pairs = {
        "vcelltools: runs, warm, fresh arrays": {
            "annbatch": "annbatch 0.3.1: runs", "AnnData": "AnnData, backed CSR: runs, warm",
            "cell-load": "cell-load 0.10.4: default", "cell-load, consecutive": "cell-load 0.10.4: consecutive",
        },
        "vcelltools: scattered, warm, fresh arrays": {
            "annbatch": "annbatch 0.3.1: scattered", "AnnData": "AnnData, backed CSR: scattered, warm",
        },
        "vcelltools: blocks, cold": {
            "annbatch": "annbatch 0.3.1: runs, cold", "disk": "vcelltools: disk, sequential, past the page cache",
            "disk, huge pages": "vcelltools: disk, sequential, past the page cache, huge pages",
        },
    }  # fmt: skip
    for row in body["rows"]:
        found = {k: rate[v] for k, v in pairs.get(row["case"], {}).items() if rate.get(v)}
        if found:
            row["ratios"] = {k: round(row["cells_per_s"] / v, 2) for k, v in found.items()}
            sys.stdout.write(f"{row['case']}: {row['ratios']}\n")
    path.write_text(json.dumps(body, indent=1) + "\n")


PARTS = ("ours", "annbatch", "anndata", "cell-load", "raw", "gzip", "memory")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=194_234)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure now; the rest of the table is kept")
    parser.add_argument("--sizes", default="200000,1000000,5400000", help="cells of the files of the part memory")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - {*PARTS, "prepare"}:
        sys.exit(f"no such part: {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    work = DATA / f"store-{args.cells}"
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def add(who: str, figures: dict[str, float]) -> None:
        for what, rate in figures.items():
            rows.append({"case": f"{who}: {what}", "cells_per_s": round(rate)})
            sys.stdout.write(f"{who:24s} {what:32s} {rate:14,.0f} cells/s\n")
        sys.stdout.flush()

    if {"prepare", "ours", "annbatch", "anndata", "cell-load"} & set(parts):
        sampler = prepare(work, args.cells, args.steps)
    if "prepare" in parts and find_peer("annbatch-0.3.1") and not (work / "annbatch.zarr").exists():
        run_peer("annbatch-0.3.1", "annbatch_sets.py", "prepare", work)
    if "ours" in parts:
        add("vcelltools", time_ours(sampler, work, args.rounds))
    if "annbatch" in parts:
        if not (work / "annbatch.zarr").exists():
            run_peer("annbatch-0.3.1", "annbatch_sets.py", "prepare", work)
        add("annbatch 0.3.1", run_peer("annbatch-0.3.1", "annbatch_sets.py", "run", work, args.steps))
    if "anndata" in parts:
        add("AnnData, backed CSR", time_anndata(work))
    if "cell-load" in parts:
        add("cell-load 0.10.4", run_peer("arc-state-0.11.1", "cell_load_sets.py", work, 128))
    rows += [time_building(work, kind, min(args.rounds, 3)) for kind in ("raw", "gzip") if kind in parts]
    if "memory" in parts:
        rows += [measure_memory(work, int(n)) for n in args.sizes.split(",")]
    for row in rows:
        if "peak_mb" in row:
            sys.stdout.write(f"{row}\n")
    store = vc.open_store(work / "x")
    size = store.manifest["files"]["counts.u8z"]["bytes"] / store.n_cells
    sys.stdout.write(f"counts: {size:.0f} bytes a cell\n")
    add_ratios(save("store", rows, cells=args.cells, counts_bytes_per_cell=round(size)))


if __name__ == "__main__":
    main()
