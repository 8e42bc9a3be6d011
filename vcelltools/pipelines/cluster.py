"""The same passes on a Dask cluster: a part is a range of cells (or genes), counted by whoever is free, then merged.

A part's result depends on nothing but the part: integer accumulators, and rows written to places that are known
before. So a part that is lost with its worker is computed again elsewhere, and the bytes are those of one machine.
Workers read the source and write the store's folder by path: both must be on storage that all of them see.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import EnvironmentFault, InterruptedRun, UsageError
from vcelltools.io import CsrMatrix, Dataset, DenseMatrix, open_dataset
from vcelltools.io.atomic import dump_json
from vcelltools.progress import SILENT, Progress
from vcelltools.stream import get_threads

if TYPE_CHECKING:
    from distributed import Client

    from vcelltools.pipelines.statistics import Statistics
    from vcelltools.pipelines.store_build import Builder

PART_CELLS = 1 << 16
_RETRIES = 10  # workers that may be lost over one part


@contextmanager
def open_cluster(address: str, *, workers: int | None = None) -> Iterator[Client]:
    """Connect to a scheduler (``tcp://host:port``), or start one on this machine for ``local``.

    Raises
    ------
    EnvironmentFault
        Where dask.distributed is not installed, or nothing answers at the address.
    """
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as e:
        raise EnvironmentFault("--dask needs dask.distributed", hint="pip install 'vcelltools[dask]'") from e
    with dask.config.set({"distributed.scheduler.allowed-failures": _RETRIES}):
        if address == "local":
            n = workers or get_threads(None)
            local = {"n_workers": n, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
            with LocalCluster(**local) as cluster, Client(cluster) as client:
                yield client
            return
        try:
            client = Client(address, timeout="10s")
        except (OSError, ValueError, TimeoutError) as e:
            raise EnvironmentFault(f"no Dask scheduler answers at {address}: {e}", hint="dask scheduler") from e
        with client:
            yield client


def gather(client: Client, futures: list[Any], keys: list[Any], progress: Progress, sizes: list[int]) -> Iterator[Any]:
    """Yield (key, result) of the parts as they end.

    Raises
    ------
    InterruptedRun
        Where workers were lost again and again over one part.
    """
    from distributed import KilledWorker, as_completed

    at = {f.key: i for i, f in enumerate(futures)}
    for future in as_completed(futures):
        i = at[future.key]
        try:
            result = future.result()
        except KilledWorker as e:
            raise InterruptedRun(
                f"workers died over part {keys[i]} (out of memory?): {e}", hint="run it again: finished parts are kept"
            ) from e
        progress.advance(sizes[i])
        yield keys[i], result
        future.release()


def cut(start: int, stop: int, step: int, done: list[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Cut ``start:stop`` into parts of ``step``, leaving out the ranges that are done."""
    out, at = [], start
    for a, b in [*sorted(done or []), (stop, stop)]:
        out += [(i, min(i + step, a)) for i in range(at, a, step)]
        at = max(at, b)
    return out


# -- statistics ------------------------------------------------------------------------------------------------------


def scan_on_cluster(
    source: str | os.PathLike,
    client: Client,
    *,
    batch_key: str | None = None,
    modality: str | None = None,
    layer: str | None = None,
    part_cells: int = PART_CELLS,
    progress: Progress = SILENT,
) -> Statistics:
    """Return the statistics of :func:`vcelltools.pipelines.statistics.scan`, counted by a cluster.

    Raises
    ------
    UsageError
        For a file that is stored gene by gene: its parts are not ranges of cells.
    """
    from vcelltools.histograms import add
    from vcelltools.pipelines.count_pass import Pass
    from vcelltools.pipelines.statistics import get_batches, make_statistics

    path = str(Path(source).absolute())
    with open_dataset(path, modality=modality, layer=layer) as ds:
        _need_rows(ds)
        labels, batch_n = get_batches(ds, batch_key)
        parts = cut(0, ds.n_cells, part_cells)
        total = ds.matrix.stored_bytes
        progress.start("reading on the cluster", ds.n_cells, "cells")
        task = {"path": path, "modality": modality, "layer": layer, "batch_key": batch_key}
        futures = client.map(_scan_part, parts, task=task, pure=False)
        library_size = np.zeros(ds.n_cells, np.int64)
        genes_per_cell = np.zeros(ds.n_cells, np.int64)
        merged, n_duplicates, n_unsorted = None, 0, 0
        sizes = [b - a for a, b in parts]
        for (a, b), (histograms, lib, genes, duplicates, unsorted) in gather(client, futures, parts, progress, sizes):
            merged = histograms if merged is None else add([merged, histograms])
            library_size[a:b], genes_per_cell[a:b] = lib, genes
            n_duplicates += duplicates
            n_unsorted += unsorted
        progress.finish()
        assert merged is not None
        counted = Pass(
            histograms=merged,
            library_size=library_size,
            genes_per_cell=genes_per_cell,
            n_duplicates=n_duplicates,
            n_unsorted=n_unsorted,
        )
        return make_statistics(ds, labels, batch_n, [counted], bytes_read=total)


def _need_rows(ds: Dataset) -> None:
    m = ds.matrix
    if not (isinstance(m, CsrMatrix) or (isinstance(m, DenseMatrix) and m.axis == 0)):
        raise UsageError(
            f"{ds.label} is stored gene by gene ({m.layout}); a cluster counts ranges of cells",
            hint="leave --dask out",
        )


def _scan_part(part: tuple[int, int], *, task: dict[str, Any]):
    """Count the cells of one part (on a worker)."""
    from vcelltools.pipelines.count_pass import count_spans, get_layout_of_pass
    from vcelltools.pipelines.statistics import get_batches

    a, b = part
    with open_dataset(task["path"], modality=task["modality"], layer=task["layer"]) as ds:
        labels, batch_n = get_batches(ds, task["batch_key"])
        widths = get_layout_of_pass(ds.matrix, 1, 1).widths
        spans = ds.matrix.plan(start=a, stop=b)
        codes = np.full(ds.n_cells, -1, np.int32)
        codes[a:b] = batch_n[a:b]
        out = count_spans(ds, codes, len(labels), widths, spans, 1, SILENT, partial=True)
        return (
            out.histograms,
            out.library_size[a:b].copy(),
            out.genes_per_cell[a:b].copy(),
            out.n_duplicates,
            out.n_unsorted,
        )


# -- stores ----------------------------------------------------------------------------------------------------------


def scatter_on_cluster(
    b: Builder, client: Client, done: list[dict[str, Any]], part_cells: int = PART_CELLS
) -> list[dict[str, Any]]:
    """Pass one of a store by a cluster; return the journal's lines of all parts, those in ``done`` included.

    A worker writes a part's rows to a file of its own and gives it its name when it is whole: a worker that was
    given up for lost, and is not, disturbs nothing.
    """
    if b.ds.path is None:
        raise UsageError("a cluster cannot read an AnnData in memory", hint="write it to a file first")
    b.parts_dpath.mkdir(exist_ok=True)
    if b.by_column:
        from vcelltools.pipelines.cluster_genes import scatter_genes_on_cluster

        return scatter_genes_on_cluster(b, client, done, part_cells)
    done = [x for x in done if all((b.parts_dpath / x[k]).exists() for k in ("rows", "libsize", "state"))]
    parts = cut(0, b.ds.n_cells, part_cells, [tuple(x["part"]) for x in done])
    b.progress.start("counts on the cluster", b.ds.n_cells, "cells")
    b.progress.advance(sum(x["part"][1] - x["part"][0] for x in done))
    return scatter_parts(b, client, _scatter_part, parts, done)


def scatter_parts(
    b: Builder, client: Client, scatter: Callable[..., Any], parts: list[tuple[int, int]], done: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Let the workers scatter ``parts``; return the journal's lines of all parts, each written as its part comes."""
    futures = client.map(scatter, parts, task=describe_task(b), pure=False)
    lines = list(done)
    try:
        for part, facts in gather(client, futures, parts, b.progress, [z - a for a, z in parts]):
            line = {"kind": "part", "part": list(part), **facts}
            b.journal.append(line)
            lines.append(line)
    finally:
        client.cancel(futures)
    b.progress.finish()
    return lines


def describe_task(b: Builder) -> dict[str, Any]:
    """Return all that a worker needs to make this builder again."""
    import msgspec

    basis = b.plan.basis
    return {
        "path": str(b.ds.path.absolute()) if b.ds.path else None,
        "spec": msgspec.to_builtins(b.plan.spec),
        "basis": {"labels": basis.labels, "ids": basis.ids, "symbols": basis.symbols},
        "target_sum": b.plan.target_sum,
        "seed": b.plan.seed,
        "aliases": dict(b.plan.aliases),
        "dpath": str(b.dpath.absolute()),
        "source": b.source,
        "chunk_values": b.chunk_values,
        "bucket_bytes": b.bucket_bytes,
        "fingerprint": b.fingerprint,
    }


def _scatter_part(part: tuple[int, int], *, task: dict[str, Any]) -> dict[str, Any]:
    """Scatter the cells of one part (on a worker); return the journal's facts about it."""
    import secrets

    from vcelltools.io.atomic import fsync_path
    from vcelltools.pipelines.store_rows import scatter_rows

    b = get_builder(dump_json(task))
    name = f"{part[0]}.{part[1]}"
    tmp = b.parts_dpath / f"{name}.{secrets.token_hex(4)}.tmp"
    tmp.mkdir()
    with b.opened(tmp, rows=part):
        scatter_rows(b, *part)
        facts = b.save_state(f"{name}.state", tmp)
        np.save(tmp / f"{name}.libsize.npy", b.libsize[part[0] : part[1]])
    os.replace(tmp / "X.f16", tmp / f"{name}.rows")
    facts |= {"rows": f"{name}.rows", "libsize": f"{name}.libsize.npy"}
    for key in ("rows", "libsize", "state"):
        fsync_path(tmp / facts[key])
        os.replace(tmp / facts[key], b.parts_dpath / facts[key])
    shutil.rmtree(tmp, ignore_errors=True)
    return facts


@lru_cache(maxsize=1)
def get_builder(text: str) -> Builder:
    """Return the builder of a task; a worker makes it once for all its parts."""
    import json

    import msgspec

    from vcelltools.config import DatasetConfig
    from vcelltools.genes import Basis
    from vcelltools.pipelines.store_build import Builder
    from vcelltools.pipelines.store_plan import make_plan

    task = json.loads(text)
    spec = msgspec.convert(task["spec"], DatasetConfig)
    fields: dict[str, Any] = {k: tuple(v) for k, v in task["basis"].items()}
    basis = Basis(**fields)
    ds = open_dataset(task["path"], modality=spec.modality, layer=spec.layer)
    plan = make_plan(ds, spec, basis, target_sum=task["target_sum"], seed=task["seed"], aliases=task["aliases"] or None)
    b = Builder(
        plan,
        ds,
        Path(task["dpath"]),
        source=task["source"],
        threads=1,
        chunk_values=task["chunk_values"],
        bucket_bytes=task["bucket_bytes"],
        checkpoint_seconds=float("inf"),
    )
    if b.fingerprint != task["fingerprint"]:
        raise UsageError("a worker sees other data or other software than the driver", hint="one storage, one version")
    return b
