"""Check a store byte by byte, and its parts against each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError, VcellError, checked
from vcelltools.io.hdf5.direct import pread_into
from vcelltools.io.results import Result
from vcelltools.kernels.store import finish_rows
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.stores.format import (
    PARTS,
    UNIT_ROWS,
    decode_frame,
    fill_work,
    get_frame_starts,
    hash_file,
    hash_units,
)
from vcelltools.stores.store import Store

_STEP_ROWS = 4096
_MOST = 20  # maximum number of problems of one kind to list


@dataclass(frozen=True, kw_only=True)
class Verified(Result):
    """What :func:`verify_store` found."""

    path: Path
    ok: bool
    problems: tuple[str, ...]
    n_cells: int | None


@checked
def verify_store(path: str | os.PathLike, *, progress: Progress = SILENT) -> Verified:
    """Check every byte of a store: sizes, hashes, frames, schema, and the values against the counts.

    Problems are collected, not raised.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.verify_store("stores/atlas").ok
    True
    """
    problems, n_cells = find_problems(Path(path), progress)
    return Verified(path=Path(path), ok=not problems, problems=tuple(problems), n_cells=n_cells)


def find_problems(dpath: Path, progress: Progress) -> tuple[list[str], int | None]:
    """Return (problems, cells); problems of the store do not raise."""
    problems: list[str] = []
    try:
        store = Store(dpath)
    except VcellError as e:
        return [str(e)], None
    progress.start("verify", sum(f["bytes"] for f in store.manifest["files"].values()), "bytes")
    sound = set()
    for name in (n for n in PARTS if n in store.manifest["files"]):
        path = dpath / name
        try:
            if hash_file(path) == store.manifest["files"][name]["sha256"]:
                sound.add(name)
            else:
                problems.append(f"{name}: its sha256 does not match")
        except OSError as e:
            problems.append(f"{name} cannot be read ({e.strerror})")
        progress.advance(store.manifest["files"][name]["bytes"])
    if "X.xxh3.npy" in sound:
        problems += _check_units(store, progress)
    checks: list[tuple[set[str], Callable]] = [
        ({"genes.parquet"}, _check_genes),
        ({"runs.parquet", "cells.parquet"}, _check_cells),
        ({"source_row.npy"}, _check_source_rows),
        ({"runs.parquet", "sums.npy", "measured.parquet"}, _check_sums),
        ({"runs.parquet", "frames.npy", "counts.u8z", "libsize.npy"}, _check_counts),
    ]
    for needs, check in checks:
        if needs <= sound:
            try:
                problems += check(store)
            except (VcellError, OSError, ValueError, KeyError, IndexError) as e:
                problems.append(f"{', '.join(sorted(needs))}: {e}")
            store.release()
    extra = sorted(p.name for p in dpath.iterdir() if p.name not in {*PARTS, "X.f16", "manifest.json"})
    problems += [f"{name} does not belong to the store" for name in extra]
    progress.finish()
    return problems, store.n_cells


def _check_units(store: Store, progress: Progress) -> list[str]:
    """Compare every unit of X.f16 with its hash, without the memory map."""
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


def _check_genes(store: Store) -> list[str]:
    out = []
    if len(store.gene_table) != store.n_genes:
        out.append(f"genes.parquet: {len(store.gene_table)} genes instead of {store.n_genes}")
    if len(set(store.genes)) != len(store.genes):
        out.append("genes.parquet: a gene is listed twice")
    return out


def _check_cells(store: Store) -> list[str]:
    """Compare the tables of cells and runs; the bytes have a hash, so no cell is decoded."""
    import pyarrow.parquet as pq

    out = []
    runs = store.runs  # raises if they do not tile the cells
    found = pq.read_metadata(store.path / "cells.parquet").num_rows
    if found != store.n_cells:
        out.append(f"cells.parquet: {found} cells instead of {store.n_cells}")
    keys = runs[["cell_line", "perturbation", "context"]]
    if keys.duplicated().any():
        out.append("runs.parquet: a run is listed twice")
    return out


def _check_source_rows(store: Store) -> list[str]:
    rows, n = store.source_rows, store.manifest["source"]["n_cells"]
    if rows.shape != (store.n_cells,) or rows.dtype.kind != "i" or len(rows) == 0:
        return [f"source_row.npy: {rows.dtype} {rows.shape}; there should be one integer per cell"]
    seen = np.zeros(n, bool)
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        return [f"source_row.npy: some rows are outside the {n:,} cells of the source"]
    seen[rows] = True
    return [] if int(seen.sum()) == len(rows) else ["source_row.npy: a row of the source occurs twice"]


def _check_sums(store: Store) -> list[str]:
    sums, n = store.sums, len(store.measured)
    if sums.shape != (len(store.group_sizes), n) or sums.dtype != np.float64:
        return [f"sums.npy: {sums.dtype} {sums.shape} instead of float64 {(len(store.group_sizes), n)}"]
    return [] if all(np.isfinite(row).all() and (row >= 0).all() for row in sums) else ["sums.npy: values below 0"]


def _check_counts(store: Store) -> list[str]:
    """Unpack every frame, and convert its counts to values again."""
    starts, offsets = store._frames
    lib = np.asarray(store.library_size)
    n_genes = store.n_genes
    expected = get_frame_starts(store.runs["length"].to_numpy())
    if not np.array_equal(starts, expected):
        return ["frames.npy: the frames do not match the runs"]
    if lib.shape != (store.n_cells,):
        return [f"libsize.npy: {lib.shape[0]} cells instead of {store.n_cells}"]
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
                problems.append(f"X.f16: row {a + int(np.argmin(same))} does not match its counts")
            store.release()
            f = g
    finally:
        os.close(fd)
    return problems


def turn(work: np.ndarray, row_of: np.ndarray, lib: np.ndarray, over: np.ndarray, store: Store) -> np.ndarray:
    """Return the value rows computed from work rows."""
    values = np.empty((len(row_of), store.stride), np.uint16)
    packed = np.empty((len(row_of), store.n_genes), np.uint8)
    single = store.manifest["arithmetic"] == "float32"
    none = np.empty((0, 3), np.int64)
    target = store.manifest["target_sum"]
    finish_rows(work, row_of, np.ascontiguousarray(lib), over, store.n_genes, target, single, packed, none, values)
    return values
