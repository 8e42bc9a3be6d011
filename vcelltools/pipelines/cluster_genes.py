"""Pass one of a store on a cluster, over a file that is read gene by gene: a part is a range of genes.

Where library sizes are not known, a first round adds them up, ranges of columns at a time. Then a part's worker
writes the counts of its genes, in store order, and their sums; the driver puts them where one machine would have.
"""

from __future__ import annotations

import os
import secrets
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.arrays import pread_into
from vcelltools.io.atomic import dump_json, fsync_path
from vcelltools.pipelines.cluster import cut, describe_task, gather, get_builder, scatter_parts
from vcelltools.pipelines.store_columns import add_libsize, get_columns, scatter_genes
from vcelltools.pipelines.store_files import pwrite_all

if TYPE_CHECKING:
    from distributed import Client

    from vcelltools.pipelines.store_build import Builder

CELLS_A_GENE = 1 << 10  # a part of 65,536 cells is one of 64 genes
_FILES = ("columns", "sums", "over")


def _get_items(b: Builder) -> list[list[int]]:
    """Return the columns of every gene that is wanted, in the order of the parts."""
    single, shared = get_columns(b)
    return [[int(c)] for c in single] + shared


def scatter_genes_on_cluster(
    b: Builder, client: Client, done: list[dict[str, Any]], part_cells: int
) -> list[dict[str, Any]]:
    """Return the journal's lines of all parts, those in ``done`` included."""
    genes = max(1, part_cells // CELLS_A_GENE)
    libsize_fpath = b.parts_dpath / "libsize.npy"
    if b.known_libsize is None and not libsize_fpath.exists():
        parts = cut(0, b.ds.n_genes, genes)
        b.progress.start("library sizes on the cluster", b.ds.n_genes, "genes")
        shares = client.map(_add_part, parts, task=describe_task(b), pure=False)
        total = np.zeros(b.ds.n_cells, np.int64)
        try:
            for _, share in gather(client, shares, parts, b.progress, [z - a for a, z in parts]):
                total += share
        finally:
            client.cancel(shares)
        b.progress.finish()
        _save(libsize_fpath, total)
    n = len(_get_items(b))
    done = [x for x in done if all((b.parts_dpath / x[k]).exists() for k in _FILES)]
    parts = cut(0, n, genes, [tuple(x["part"]) for x in done])
    b.progress.start("genes on the cluster", n, "genes")
    b.progress.advance(sum(x["part"][1] - x["part"][0] for x in done))
    return scatter_parts(b, client, _scatter_part, parts, done)


def _save(path: Any, values: np.ndarray) -> None:
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(tmp, "wb") as f:
        np.save(f, values, allow_pickle=False)
    fsync_path(tmp)
    os.replace(tmp, path)


def _add_part(part: tuple[int, int], *, task: dict[str, Any]) -> np.ndarray:
    """Return what some columns add to the library sizes (on a worker)."""
    return add_libsize(get_builder(dump_json(task)), range(*part))


def _get_libsize(b: Builder) -> np.ndarray:
    known = b.plan.libsize
    return np.load(b.parts_dpath / "libsize.npy", allow_pickle=False) if known is None else known


def _scatter_part(part: tuple[int, int], *, task: dict[str, Any]) -> dict[str, Any]:
    """Scatter the genes of one part (on a worker); return the journal's facts about it."""
    b = get_builder(dump_json(task))
    name = f"{part[0]}.{part[1]}"
    items = _get_items(b)[part[0] : part[1]]
    single = np.array([x[0] for x in items if len(x) == 1], np.int64)
    shared = [x for x in items if len(x) > 1]
    columns = np.array([x[0] for x in items], np.int64)
    positions = b.basis_of_column[columns]
    positions = positions[positions >= 0]
    measured = b.measured_of_column[columns]
    measured = measured[measured >= 0]
    tmp = b.parts_dpath / f"{name}.{secrets.token_hex(4)}.tmp"
    tmp.mkdir()
    with b.opened(tmp, rows=(0, 0)):
        b.libsize = _get_libsize(b)
        scatter_genes(b, single, shared, checkpoints=False)
        with open(tmp / "rows", "wb") as f:
            column = np.empty(b.n, np.uint16)
            for p in positions.tolist():
                pread_into(b.columns_fd, column, 2 * p * b.n, str(tmp / "columns.work"))
                f.write(column.data)
        over = np.concatenate(b.over) if b.over else np.empty((0, 3), np.int64)
        _save(b.parts_dpath / f"{name}.sums.npy", np.ascontiguousarray(b.sums[:, measured]))
        _save(b.parts_dpath / f"{name}.over.npy", over)
    fsync_path(tmp / "rows")
    os.replace(tmp / "rows", b.parts_dpath / f"{name}.columns")
    shutil.rmtree(tmp, ignore_errors=True)
    return {
        "columns": f"{name}.columns",
        "sums": f"{name}.sums.npy",
        "over": f"{name}.over.npy",
        "positions": positions.tolist(),
        "measured": measured.tolist(),
    }


def merge_parts(b: Builder, parts: list[dict[str, Any]]) -> None:
    """Put what the parts hold where one machine would have put it."""
    b.libsize = _get_libsize(b)
    pwrite_all(b.lib_fd, b.libsize, 0)
    column = np.empty(b.n, np.uint16)
    for line in parts:
        path = b.parts_dpath / line["columns"]
        fd = os.open(path, os.O_RDONLY)
        try:
            for i, p in enumerate(line["positions"]):
                pread_into(fd, column, 2 * i * b.n, str(path))
                pwrite_all(b.columns_fd, column, 2 * p * b.n)
        finally:
            os.close(fd)
        over = np.load(b.parts_dpath / line["over"], allow_pickle=False)
        if len(over):
            b.over.append(over)
        sums = np.load(b.parts_dpath / line["sums"], mmap_mode="r", allow_pickle=False)
        measured = np.array(line["measured"], np.int64)
        for rows in b.iterate_sums():
            b.sums[rows, measured] = sums[rows]
