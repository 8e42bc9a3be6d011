"""Checking a store byte by byte, and its parts against each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError, VcellError
from vcelltools.io.arrays import pread_into
from vcelltools.kernels.store import finish_rows
from vcelltools.pipelines.store_format import (
    PARTS,
    UNIT_ROWS,
    decode_frame,
    fill_work,
    get_frame_starts,
    hash_file,
    hash_units,
)
from vcelltools.progress import Progress

_STEP_ROWS = 4096
_MOST = 20  # problems of one kind that are listed


def find_problems(dpath: Path, progress: Progress) -> tuple[list[str], int | None]:
    """Return (problems, cells). Nothing is raised for what is wrong with the store."""
    from vcelltools.pipelines.store import Store

    problems: list[str] = []
    try:
        store = Store(dpath)
    except VcellError as e:
        return [str(e)], None
    progress.start("verify", sum(f["bytes"] for f in store.manifest["files"].values()), "bytes")
    sound = set()
    for name in PARTS:
        path = dpath / name
        try:
            if hash_file(path) == store.manifest["files"][name]["sha256"]:
                sound.add(name)
            else:
                problems.append(f"{name}: its sha256 does not fit")
        except OSError as e:
            problems.append(f"{name}: cannot be read ({e.strerror})")
        progress.advance(store.manifest["files"][name]["bytes"])
    if "X.xxh3.npy" in sound:
        problems += _check_units(store, progress)
    checks: list[tuple[set[str], Callable]] = [
        ({"genes.parquet"}, _check_genes),
        ({"runs.parquet", "cells.parquet"}, _check_cells),
        ({"runs.parquet", "sums.npy", "measured.parquet"}, _check_sums),
        ({"runs.parquet", "frames.npy", "counts.u8z", "libsize.npy"}, _check_counts),
    ]
    for needs, check in checks:
        if needs <= sound:
            try:
                problems += check(store)
            except (VcellError, OSError, ValueError, KeyError, IndexError) as e:
                problems.append(f"{', '.join(sorted(needs))}: {e}")
    extra = sorted(p.name for p in dpath.iterdir() if p.name not in {*PARTS, "X.f16", "manifest.json"})
    problems += [f"{name}: does not belong to the store" for name in extra]
    progress.finish()
    return problems, store.n_cells


def _check_units(store, progress: Progress) -> list[str]:
    """Compare every unit of X.f16 with its hash, read past the memory map."""
    bad = []
    rows = np.empty((_STEP_ROWS, store.stride), np.float16)
    path = store.path / "X.f16"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        return [f"X.f16: cannot be read ({e.strerror})"]
    try:
        for a in range(0, store.n_cells, _STEP_ROWS):
            part = rows[: min(_STEP_ROWS, store.n_cells - a)]
            pread_into(fd, part, a * store.stride * 2, str(path))
            first = a // UNIT_ROWS
            hashes = hash_units(part)
            bad += (first + np.flatnonzero(hashes != store._unit_hashes[first : first + len(hashes)])).tolist()
            progress.advance(part.nbytes)
    except DataError as e:
        return [str(e)]
    finally:
        os.close(fd)
    out = [f"X.f16: damaged in rows {u * UNIT_ROWS} to {(u + 1) * UNIT_ROWS - 1}" for u in bad[:_MOST]]
    return out + ([f"X.f16: and {len(bad) - _MOST} more damaged places"] if len(bad) > _MOST else [])


def _check_genes(store) -> list[str]:
    out = []
    if len(store.gene_table) != store.n_genes:
        out.append(f"genes.parquet: {len(store.gene_table)} genes; {store.n_genes} expected")
    if len(set(store.genes)) != len(store.genes):
        out.append("genes.parquet: a gene is listed twice")
    return out


def _check_cells(store) -> list[str]:
    out = []
    runs = store.runs  # raises where they do not tile the cells
    if len(store.obs) != store.n_cells:
        out.append(f"cells.parquet: {len(store.obs)} cells; {store.n_cells} expected")
    keys = runs[["cell_line", "perturbation", "context"]]
    if keys.duplicated().any():
        out.append("runs.parquet: a run is listed twice")
    return out


def _check_sums(store) -> list[str]:
    sums, n = store.sums, len(store.measured)
    if sums.shape != (len(store.group_sizes), n) or sums.dtype != np.float64:
        return [f"sums.npy: {sums.dtype} {sums.shape}; float64 {(len(store.group_sizes), n)} expected"]
    return [] if all(np.isfinite(row).all() and (row >= 0).all() for row in sums) else ["sums.npy: values below 0"]


def _check_counts(store) -> list[str]:
    """Unpack every frame, and turn its counts into values again."""
    starts, offsets = store._frames
    lib = np.asarray(store.library_size)
    n_genes = store.n_genes
    expected = get_frame_starts(store.runs["length"].to_numpy())
    if not np.array_equal(starts, expected):
        return ["frames.npy: its frames do not follow the runs"]
    if lib.shape != (store.n_cells,):
        return [f"libsize.npy: {lib.shape[0]} cells; {store.n_cells} expected"]
    problems: list[str] = []
    fd = os.open(store.path / "counts.u8z", os.O_RDONLY)
    try:
        f = 0
        while f < len(starts) - 1 and len(problems) < _MOST:
            g = max(f + 1, int(np.searchsorted(starts, starts[f] + _STEP_ROWS, side="right")) - 1)
            a, b = int(starts[f]), int(starts[g])
            raw = os.pread(fd, int(offsets[g] - offsets[f]), int(offsets[f]))
            work = np.zeros((b - a, store.stride), np.uint16)
            over = []
            for k in range(f, g):
                r0, r1 = int(starts[k]) - a, int(starts[k + 1]) - a
                piece = raw[int(offsets[k] - offsets[f]) : int(offsets[k + 1] - offsets[f])]
                counts = np.empty((r1 - r0, n_genes), np.uint32)
                decode_frame(piece, counts, where=f"counts.u8z: frame {k}")
                over.append(fill_work(work[r0:r1], counts, r0))
            values = turn(work, np.arange(b - a), lib[a:b], np.concatenate(over), store)
            same = (values == np.asarray(store._padded[a:b]).view(np.uint16)).all(axis=1)
            if not same.all():
                problems.append(f"X.f16: row {a + int(np.argmin(same))} does not follow from its counts")
            f = g
    finally:
        os.close(fd)
    return problems


def turn(work: np.ndarray, row_of: np.ndarray, lib: np.ndarray, over: np.ndarray, store) -> np.ndarray:
    """Return the value rows that follow from work rows."""
    values = np.empty((len(row_of), store.stride), np.uint16)
    packed = np.empty((len(row_of), store.n_genes), np.uint8)
    single = store.manifest["arithmetic"] == "float32"
    none = np.empty((0, 3), np.int64)
    target = store.manifest["target_sum"]
    finish_rows(work, row_of, np.ascontiguousarray(lib), over, store.n_genes, target, single, packed, none, values)
    return values
