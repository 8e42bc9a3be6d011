"""``spatial screen``: many perturbations of data that are loaded once, shared between processes and resumable."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.fingerprint import fingerprint_files
from vcelltools.io.frame import read_frame, write_frame
from vcelltools.io.results import Result
from vcelltools.io.textfile import checking, parse_json, parse_toml, read_text
from vcelltools.io.write.atomic import locked, write_json, write_text
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.spatial.betadata import CELL, list_betas
from vcelltools.spatial.files import REMAKE
from vcelltools.spatial.modulators import read_names
from vcelltools.spatial.task_queue import Queue

if TYPE_CHECKING:
    import pyarrow as pa

    from vcelltools.spatial._opened import FittedRun

JOB, PARTS = "screen.json", ".parts"
EFFECTS, SCORES = "effects.parquet", "scores.parquet"
MODES = ("knockout", "overexpress")
MAX = "max"  # as a value, the observed maximum of the gene
_SETTINGS = (
    "layer", "cluster_annot", "coords", "dims", "radius", "kernel", "radius_rule", "contact_distance",
    "weighted_ligand_scale_factor", "network", "network_dir", "species",
)  # fmt: skip
_EFFECTS = ("perturbation", "cell_type", "gene", "mean_delta", "share_changed")  # columns of the table
_CHANGED = 1e-9  # smaller changes do not count


@dataclass(frozen=True, kw_only=True)
class Task:
    """One perturbation of a screen.

    Attributes
    ----------
    name
        Name in the tables, and of the file.
    desired
        Value of each gene, or ``max``.
    hops, scale
        Number of hops, and ``beta_scale_factor``.
    column
        Column of the CSV file of cells, or None for all cells.
    """

    name: str
    desired: dict[str, float | str]
    hops: int
    scale: float
    column: str | None

    @property
    def file(self) -> str:
        """Name of the file of deltas."""
        values = {v if isinstance(v, str) else f"{v:g}" for v in self.desired.values()}
        stem = f"{'+'.join(self.desired)}_{self.hops}n_{values.pop() if len(values) == 1 else 'mixed'}x"
        return f"{stem}{self.name.partition(' ')[2].replace(' ', '_')}.feather"


@dataclass(frozen=True, kw_only=True)
class ScreenResult(Result):
    """The result of a screen.

    Attributes
    ----------
    output_dir
        The folder with ``effects.parquet`` and ``scores.parquet``.
    n_perturbations, n_done, n_skipped
        Numbers of perturbations: in total, done now, and finished before.
    seconds
        Duration in seconds.
    top
        The perturbations with the largest scores.
    kernel_error_bound
        The certified error of received ligands.
    """

    output_dir: str
    n_perturbations: int
    n_done: int
    n_skipped: int
    seconds: float
    top: dict[str, float]
    kernel_error_bound: float


def make_tasks(run: FittedRun, genes: Sequence[str], mode: str, hops: int, scale: float) -> list[Task]:
    """Return one task per gene."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is not known", hint=f"one of: {', '.join(MODES)}")
    value: float | str = 0.0 if mode == "knockout" else MAX
    return [Task(name=g, desired={g: value}, hops=hops, scale=scale, column=None) for g in dict.fromkeys(genes)]


def read_genes(run: FittedRun, text: str) -> list[str]:
    """Return genes from ``A,B``, ``all`` (every gene that modulates a target), or a file."""
    if text == "all":
        return sorted({g for t in run.genes for g in run.betas(t).modulators.genes})
    path = Path(text)
    genes = list(read_names(None, path) if path.is_file() else read_names(text))
    if not genes:
        raise UsageError("there is no gene to perturb", hint="pass genes, a file of genes, or all")
    return genes


@dataclass(frozen=True)
class Batch:
    """A batch TOML: the tasks, and the settings of output and cells."""

    tasks: list[Task]
    out: str | None
    cells_csv: str | None


def read_batch(path: str | os.PathLike, *, hops: int, scale: float) -> Batch:
    """Read a batch TOML; the tasks are all combinations of its genes, values, hops, factors and columns of cells.

    Raises
    ------
    DataError
        If a key is not known, or there are no genes.
    """
    p = Path(path)
    raw = parse_toml(read_text(p, what="a batch of perturbations in TOML"), where=str(p))
    known = {"gene", "genes", "desired_expr", "n_propagation", "beta_scale_factor", "out", "out_dir", "cells_csv",
             "cells_csv_columns", "cells_csv_column", "compound_genes"}  # fmt: skip
    body = {k: v for section in raw.values() if isinstance(section, dict) for k, v in section.items()}
    body |= {k: v for k, v in raw.items() if not isinstance(v, dict)}
    if unknown := sorted(set(body) - known):
        raise DataError(f"{p}: key {unknown[0]!r} is not known", hint=f"one of: {', '.join(sorted(known))}")

    def listed(*keys: str, default: Any) -> list[Any]:
        found = next((body[k] for k in keys if k in body), default)
        return found if isinstance(found, list) else [found]

    genes = [g for g in listed("genes", "gene", default=[]) if g]
    compound = body.get("compound_genes", [])
    sets = [genes] if compound is True else [[g] for g in genes]
    combined = compound if isinstance(compound, list) else []
    sets += [list(one) if isinstance(one, list) else re.split(r"[+,]", str(one)) for one in combined]
    if not sets or not sets[0] or not all(isinstance(g, str) for one in sets for g in one):
        raise DataError(f"{p} names no genes", hint="add a line such as genes = ['A', 'B']")
    values, hop_list = listed("desired_expr", default=0.0), listed("n_propagation", default=hops)
    scales, columns = (
        listed("beta_scale_factor", default=scale),
        listed("cells_csv_columns", "cells_csv_column", default=""),
    )
    lists = (values, hop_list, scales, columns)
    tasks = []
    for group, value, n, factor, column in product(sets, *lists):
        try:
            v, h, f = (MAX if value == MAX else float(value)), int(n), float(factor)
        except (TypeError, ValueError, OverflowError) as e:
            raise DataError(f"{p}: {e}", hint="values and factors are numbers") from e
        said = zip("xnsc", (v, h, f, column), lists, strict=True)
        name = " ".join(["+".join(group), *(f"{k}{value}" for k, value, many in said if len(many) > 1)])
        tasks.append(Task(name=name, desired=dict.fromkeys(group, v), hops=h, scale=f, column=str(column) or None))
    csv = body.get("cells_csv")
    return Batch(tasks, body.get("out_dir") or body.get("out"), str(p.parent / str(csv)) if csv else None)


def screen(
    run: FittedRun,
    genes: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    help_screen: Callable[[str], int],
    mode: str = "knockout",
    tasks: Sequence[Task] | None = None,
    hops: int = 4,
    response: str = "derivative",
    beta_scale_factor: float = 1.0,
    beta_cap: float | None = None,
    cells: np.ndarray | None = None,
    cells_csv: str | os.PathLike | None = None,
    keep_deltas: bool = False,
    workers: int = 1,
    dask: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ScreenResult:
    """Perturb many genes, one at a time, and write the response of every cell type.

    Parameters
    ----------
    genes, mode
        The genes, which are knocked out or set to their observed maximum.
    tasks
        The tasks of a batch, instead of genes.
    keep_deltas
        Also write the simulated expression of every perturbation.
    help_screen
        What a helping process calls with the folder (:meth:`vcelltools.spatial._run.Run.help_screen`).
    workers, dask
        Number of local processes, or the address of a Dask cluster whose workers can access the folder.
    """
    began = time.monotonic()
    folder = Path(output_dir)
    source = run.tissue.source
    guard_outputs([Target(folder, "screen", owns=_is_screen, reuse=True)], reads=[source, cells_csv])
    todo = list(tasks) if tasks is not None else make_tasks(run, genes, mode, hops, beta_scale_factor)
    run.tissue.need_genes(list(dict.fromkeys(g for t in todo for g in t.desired)), "gene to perturb,")
    for t in todo:
        if "/" in t.name or t.name.startswith("."):
            raise DataError(f"{t.name!r} cannot name a file")
    job = {
        "run": os.path.abspath(run.folder),
        "data": os.path.abspath(source) if isinstance(source, str | os.PathLike) else None,
        "settings": {k: getattr(run.settings, k) for k in _SETTINGS},
        "tasks": [[t.name, t.desired, t.hops, t.scale, t.column] for t in todo],
        "response": response, "beta_cap": beta_cap, "keep_deltas": keep_deltas,
        "cells": None if cells is None else np.arange(run.tissue.n_cells)[cells].tolist(),
        "cells_csv": None if cells_csv is None else os.path.abspath(cells_csv),
        "identity": {
            "data": run.tissue.get_fingerprint(), "betas": fingerprint_files(list_betas(run.folder).values()),
            "cells": None if cells_csv is None else fingerprint_files([cells_csv]),
        },
    }  # fmt: skip
    if (workers > 1 or dask is not None) and job["data"] is None:
        raise UsageError("workers need data in a file", hint="open the run with a path")
    _open_folder(folder, job, force=force)
    names = [t.name for t in todo]
    before = sum(_is_done(folder, n) for n in names)
    progress.start("perturbing", len(names), "perturbations")
    progress.advance(before)
    helpers = _start(help_screen, folder, workers, dask)
    try:
        done = work(run, folder, job, progress=progress)
    finally:
        for h in helpers:
            h.join()
        progress.finish()
    top = _finish(folder, names)
    return ScreenResult(
        output_dir=str(folder), n_perturbations=len(names), n_done=done, n_skipped=before,
        seconds=time.monotonic() - began, top=top, kernel_error_bound=run.receiver.error_bound,
    )  # fmt: skip


def _open_folder(folder: Path, job: Mapping[str, Any], *, force: bool) -> None:
    text = json.dumps(job, indent=1, ensure_ascii=False) + "\n"
    there = folder / JOB
    if there.exists() and there.read_bytes() != text.encode():
        if not force:
            raise UsageError(f"{folder} holds another screen", hint=f"{spell('force', True)} replaces it")
        for pattern in ("*.lock", f"{PARTS}/*", EFFECTS, SCORES):
            for p in folder.glob(pattern):
                p.unlink(missing_ok=True)
    if not there.exists() or force:  # this file identifies the folder as ours: it is written first and never deleted
        write_text(there, text, force=True)
    (folder / PARTS).mkdir(exist_ok=True)


def _is_screen(dpath: Path) -> bool:
    return (dpath / JOB).is_file()


def _is_done(folder: Path, name: str) -> bool:
    return all((folder / PARTS / f"{name}{ending}").exists() for ending in (".json", ".feather"))


class _DaskJob:
    """The work of a Dask cluster on one screen."""

    def __init__(self, client: Any, futures: list[Any]) -> None:
        self._client, self._futures = client, futures

    def join(self) -> None:
        """Wait for the workers."""
        try:
            self._client.gather(self._futures)
        finally:
            self._client.close()


def _start(help_screen: Callable[[str], int], folder: Path, workers: int, dask: str | None) -> list[Any]:
    """Start the other processes of a screen; the calling process works too."""
    if dask is not None:
        from distributed import Client

        client = Client(dask)
        count = len(client.scheduler_info()["workers"])
        return [_DaskJob(client, [client.submit(help_screen, str(folder), pure=False, key=f"screen-{i}-{os.getpid()}")
                                  for i in range(count)])]  # fmt: skip
    if workers <= 1:
        return []
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=help_screen, args=(str(folder),), daemon=True) for _ in range(workers - 1)]
    for p in processes:
        p.start()
    return processes


def read_job(folder: Path) -> dict[str, Any]:
    """Return the job of a started screen, for :func:`work`."""
    text = read_text(folder / JOB, what="a screen")
    with checking(folder / JOB):
        return parse_json(text)


def work(run: FittedRun, folder: Path, job: Mapping[str, Any], *, progress: Progress = SILENT) -> int:
    """Claim and do perturbations until none is left, and return their number."""
    tasks = {n: Task(name=n, desired=d, hops=h, scale=s, column=c) for n, d, h, s, c in job["tasks"]}
    queue = Queue(folder, list(tasks), lambda n: _is_done(folder, n))
    genes = list(dict.fromkeys(g for t in tasks.values() for g in t.desired))
    types = _Types(run)
    done = 0
    with queue.beating():
        while True:
            mine = queue.claim(1)
            if not mine:
                if queue.wait():
                    continue
                return done
            for name in mine:
                _do(run, folder, tasks[name], job, genes, types)
                queue.release(name)
                progress.advance(1)
                done += 1


class _Types:
    """Cell types of a run: names, and a matrix that averages over each type."""

    def __init__(self, run: FittedRun) -> None:
        numbers = sorted(run.tissue.labels)
        self.names = [run.tissue.labels[c] for c in numbers]
        self.rows = [np.flatnonzero(run.tissue.clusters == c) for c in numbers]

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return iter(zip(self.names, self.rows, strict=True))


def _do(run: FittedRun, folder: Path, task: Task, job: Mapping[str, Any], genes: list[str], types: _Types) -> None:
    """Do one perturbation, and write its part of the tables."""
    engine = run.engine(genes, beta_scale_factor=task.scale, beta_cap=job["beta_cap"])
    cells = None if job["cells"] is None else np.array(job["cells"], np.int64)
    if job["cells_csv"] is not None:
        cells = run.read_cells(job["cells_csv"], task.column) if task.column else None
    top = {g: float(run.tissue.expression([g]).max()) for g, v in task.desired.items() if v == MAX}
    desired = {g: top.get(g, v) for g, v in task.desired.items()}
    change = engine.perturb(desired, cells=cells, hops=task.hops, response=job["response"])  # type: ignore[arg-type]
    delta = np.empty(change.delta_cn.shape)
    delta[:, change.order] = change.delta_cn
    rows: dict[str, list] = {k: [] for k in _EFFECTS}
    others = [i for i, g in enumerate(change.changing) if change.genes[g] not in task.desired]
    scores = {"perturbation": [], "cell_type": [], "score": [], "n_genes": []}  # type: dict[str, list]
    for label, at in types:
        if not len(at):
            continue
        part = delta[:, at]
        mean, share = part.mean(1), (np.abs(part) > _CHANGED).mean(1)
        for i in np.flatnonzero(share):
            values = (task.name, label, change.genes[change.changing[i]], float(mean[i]), float(share[i]))
            for key, v in zip(rows, values, strict=True):
                rows[key].append(v)
        score = float(np.sqrt((part[others] ** 2).sum(0)).mean()) if others else 0.0
        for key, v in zip(scores, (task.name, label, score, int((share[others] > 0).sum())), strict=True):
            scores[key].append(v)
    if job["keep_deltas"]:
        columns: dict[str, Any] = {CELL: [str(c) for c in run.tissue.cells]}
        columns |= {g: change.after[:, i] for i, g in enumerate(change.genes)}
        write_frame(folder / task.file, columns, force=True)
    write_json(folder / PARTS / f"{task.name}.json", scores, force=True, indent=None)
    write_frame(folder / PARTS / f"{task.name}.feather", _typed(rows), force=True)


def _typed(rows: Mapping[str, list]) -> dict[str, Any]:
    import pyarrow as pa

    text = ("perturbation", "cell_type", "gene")
    return {
        k: pa.array(v, pa.string() if k in text else pa.int64() if k == "n_genes" else pa.float64())
        for k, v in rows.items()
    }


def _read_effects(path: Path) -> pa.Table:
    """Return the effects of one perturbation."""
    import pyarrow as pa

    table = read_frame(path, what="a part of a screen")
    with checking(path, REMAKE):
        return pa.table(_typed({k: table.column(k).to_pylist() for k in _EFFECTS}))


def _finish(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Write both tables from their parts, and return the perturbations with the largest scores."""
    import pyarrow as pa

    with locked(folder / "finish"):
        scores: dict[str, list] = {k: [] for k in ("perturbation", "cell_type", "score", "n_genes")}
        for name in names:
            path = folder / PARTS / f"{name}.json"
            text = read_text(path, what="a part of a screen", hint=REMAKE)
            with checking(path, REMAKE):
                part = pa.table(_typed({k: parse_json(text)[k] for k in scores})).to_pydict()
            for k in scores:
                scores[k] += part[k]
        if not (folder / EFFECTS).exists():
            parts = [_read_effects(folder / PARTS / f"{n}.feather") for n in names]
            whole = pa.concat_tables(parts).combine_chunks()
            write_frame(folder / EFFECTS, {k: whole.column(k) for k in whole.column_names})
        if not (folder / SCORES).exists():
            write_frame(folder / SCORES, _typed(scores))
    total: dict[str, list[float]] = {}
    for name, score in zip(scores["perturbation"], scores["score"], strict=True):
        total.setdefault(name, []).append(score)
    means = {k: float(np.mean(v)) for k, v in total.items()}
    return dict(sorted(means.items(), key=lambda v: -v[1])[:10])
