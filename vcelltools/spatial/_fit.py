"""``spatial fit``: one regression per target gene and cluster, shared between processes and resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.io.fingerprint import fingerprint_files
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Result
from vcelltools.io.textfile import checking, parse_json, read_text
from vcelltools.io.write.atomic import locked, say_bytes, write_json, write_text
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import one_blas_thread
from vcelltools.spatial._received import Receiver, get_radii
from vcelltools.spatial.betadata import ORPHAN, SUFFIX, Betas, write_betas
from vcelltools.spatial.blocks import make_folds
from vcelltools.spatial.design import Columns, Features, join_columns
from vcelltools.spatial.files import REMAKE, STABILITY, SUMMARY
from vcelltools.spatial.honesty import STABLE, Stability, adjust, get_p_values, measure_stability, rearrange
from vcelltools.spatial.local import CELL_COLUMNS, LocalFitter, estimate_bytes
from vcelltools.spatial.modulators import Finder, Modulators
from vcelltools.spatial.regress import ClusterResult, fit_cluster, hold_out
from vcelltools.spatial.regulatory_network import find_network, read_network
from vcelltools.spatial.settings import RUN_NAME, Options, Settings, dump_toml, load_toml, make_settings
from vcelltools.spatial.task_queue import Queue
from vcelltools.spatial.tissue import Tissue, open_tissue

if TYPE_CHECKING:
    from anndata import AnnData

ROWS = ".rows"  # folder in a run with the summary rows of each finished gene, whose file marks the gene as finished
_MOST = 256  # maximum number of genes that a process claims at once
_ENOUGH = 99  # minimum number of permutations for small q-values
_SMALL = 1e-6  # smaller penalties amount to least squares
_COLUMNS = (
    "gene", "cluster", "n_cells", "n_columns", "n_nonzero", "r2_in", "r2_out", "r2_tf", "r2_own", "gain",
    "gain_error", "p", "q", "kkt", "l1_reg", "group_reg", "n_stable", "expected_false", "kept", "note",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FitResult(Result):
    """The result of a fit.

    Attributes
    ----------
    output_dir
        The run folder.
    n_genes, n_fitted, n_skipped, n_orphans
        Numbers of genes: in the run, fitted now, finished before, and without a remaining modulator.
    n_models, n_kept
        Number of gene × cluster models, and of those whose R² is at least the threshold.
    n_per_cell
        Number of models with coefficients by cell; None in mode ``seed``.
    r2_in, r2_out, gain
        Medians over the models.
    largest_kkt
        The largest certificate, that is, violation of the optimality conditions.
    kernel_error_bound
        The certified error of received ligands, in units of ``s/N sum_j x_j``.
    conditions
        Folders of the conditions, if there are any.
    warnings
        Warnings for the user.
    seconds
        Duration in seconds.
    """

    output_dir: str
    n_genes: int
    n_fitted: int
    n_skipped: int
    n_orphans: int
    n_models: int
    n_kept: int
    n_per_cell: int | None
    r2_in: float | None
    r2_out: float | None
    gain: float | None
    largest_kkt: float | None
    kernel_error_bound: float
    conditions: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float


@dataclass
class Plan:
    """Everything that a process needs to fit any gene of a run."""

    tissue: Tissue
    settings: Settings
    genes: list[str]
    modulators: dict[str, Modulators]
    receiver: Receiver
    condition: str | None = None

    @property
    def n_columns(self) -> int:
        """Number of columns over all targets."""
        return sum(m.n for m in self.modulators.values())


def make_receiver(tissue: Tissue, settings: Settings, finder: Finder, threads: int | None = None) -> Receiver:
    """Return the receiver of a tissue under its settings."""
    radii = get_radii(finder.all_pairs, rule=settings.radius_rule, contact_distance=settings.contact_distance)
    return Receiver(
        tissue.xy, radius=settings.radius, scale=settings.weighted_ligand_scale_factor, kernel=settings.kernel,
        radii=radii, threads=threads,
    )  # fmt: skip


def find_networks(tissue: Tissue, settings: Settings) -> list[Path]:
    """Return the files of the edges: the network, and the table of TF edges if there is one."""
    path = find_network(
        network=settings.network, folder=settings.network_dir, species=settings.species, genes=tissue.genes
    )
    return [path] if settings.tf_prior is None else [path, Path(settings.tf_prior)]


def make_finder(tissue: Tissue, settings: Settings) -> Finder:
    """Return the finder of modulators in the network of the settings."""
    path = find_networks(tissue, settings)[0]
    return Finder(tissue, read_network(path, settings.tf_prior), settings.choice)


def make_plan(
    tissue: Tissue, settings: Settings, genes: Sequence[str] | None, max_genes: int | None, threads: int | None
) -> Plan:
    """Return the plan for the requested genes, or for all genes with a modulator."""
    finder = make_finder(tissue, settings)
    if genes is not None:
        tissue.need_genes(genes)
        wanted = list(dict.fromkeys(genes))
        modulators = {g: finder.find(g) for g in wanted}
    else:
        found = ((g, finder.find(g)) for g in tissue.genes if g not in tissue.duplicated)
        modulators = {g: m for g, m in found if m.n}
    if max_genes is not None:
        modulators = dict(list(modulators.items())[:max_genes])
    if not modulators:
        raise DataError(f"{tissue.where}: no gene has a modulator", hint="check the network and the switches")
    return Plan(tissue, settings, list(modulators), modulators, make_receiver(tissue, settings, finder, threads))


@dataclass(frozen=True, kw_only=True)
class FitPlan(Result):
    """The plan of a fit: numbers of targets, clusters and columns, and the approximate memory.

    The memory is that of the largest cluster and, in mode ``full``, of the network of the target with most columns,
    besides that of the program itself.
    """

    n_genes: int
    n_clusters: int
    n_columns: int
    memory: str
    memory_bytes: int


@checked
def plan_fit(
    adata_or_path: str | os.PathLike | AnnData,
    *,
    genes: Sequence[str] | None = None,
    max_genes: int | None = None,
    config: str | os.PathLike | None = None,
    **options: Unpack[Options],
) -> FitPlan:
    """Return what :func:`fit` would do; the parameters are the same."""
    settings = make_settings(options, load_toml(config) if config is not None else None)
    tissue = open_tissue(adata_or_path, **settings.tissue)
    plan = make_plan(tissue, settings, genes, max_genes, None)
    p = len(join_columns(plan.modulators).kinds)
    largest = max(int((tissue.clusters == c).sum()) for c in tissue.labels)
    need = 8 * (3 * largest * p + 2 * p * p + tissue.n_cells * (len(plan.genes) + p))
    if settings.mode == "full":  # one target at a time
        most = max(m.n for m in plan.modulators.values())
        need += estimate_bytes(tissue.n_cells, most, len(tissue.labels), settings)
    return FitPlan(
        n_genes=len(plan.genes), n_clusters=len(tissue.labels), n_columns=plan.n_columns, memory=say_bytes(need),
        memory_bytes=need,
    )  # fmt: skip


@checked
def fit(
    adata_or_path: str | os.PathLike | AnnData,
    output_dir: str | os.PathLike,
    *,
    genes: Sequence[str] | None = None,
    max_genes: int | None = None,
    config: str | os.PathLike | None = None,
    parallel: int = 1,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
    **options: Unpack[Options],
) -> FitResult:
    """Fit every target gene in every cluster, by TFs of the cell, received ligands and their products.

    The model and its penalties are those of SpaceTravLR's seed mode (sparse-group lasso), solved to a certificate of
    optimality. In mode ``full``, a network then varies the coefficients from cell to cell; a cluster gets rows by cell
    only if these predict held-out blocks better than its own coefficients, by more than the standard error. The same
    call resumes a run that was killed.

    Parameters
    ----------
    adata_or_path
        An AnnData or an h5ad file.
    output_dir
        The run folder, with a betadata file per gene, ``summary.parquet``, and a TOML file of the settings.
    genes, max_genes
        The targets (by default all genes with a modulator), and their maximum number.
    config
        A ``spaceship_config.toml``; options override it.
    parallel
        Number of processes; only if the data are given as a path.
    force
        Replace the results of another run in the folder.
    **options
        See :class:`~vcelltools.spatial.settings.Settings`.

    Raises
    ------
    UsageError
        If the folder holds the results of a run with other settings.
    DataError
        If data, network or genes do not match.
    """
    loaded = load_toml(config) if config is not None else None
    settings = make_settings(options, loaded)
    if loaded is not None:
        genes = genes if genes is not None else loaded.command.get("training.genes") or None
        max_genes = max_genes if max_genes is not None else loaded.command.get("training.max_genes")
    tissue = open_tissue(adata_or_path, **settings.tissue)
    folder = Path(output_dir)
    read = [adata_or_path, *find_networks(tissue, settings)]
    guard_outputs([Target(folder, "run", owns=_is_run, reuse=True)], reads=read)
    if settings.condition is None:
        return _fit_run(tissue, folder, settings, genes, max_genes, parallel, force, threads, progress)
    codes, labels = tissue.column(settings.condition).factorize()
    if (codes < 0).any():
        raise DataError(f"{tissue.where}: obs/{settings.condition} has no value for {(codes < 0).sum():,} cells")
    results = []
    for k, label in enumerate(labels):
        if "/" in label or label in (".", ".."):
            raise DataError(f"{tissue.where}: obs/{settings.condition}: {label!r} cannot name a folder")
        part = tissue.take(np.flatnonzero(codes == k))
        where = folder / "conditions" / label
        results.append(_fit_run(part, where, settings, genes, max_genes, 1, force, threads, progress, label))
    return _join_results(folder, labels, results)


def _join_results(folder: Path, labels: list[str], results: list[FitResult]) -> FitResult:
    def total(name: str) -> Any:
        return sum(getattr(r, name) for r in results)

    def median(name: str) -> float | None:
        values = [v for r in results if (v := getattr(r, name)) is not None]
        return float(np.median(values)) if values else None

    return FitResult(
        output_dir=str(folder), n_genes=total("n_genes"), n_fitted=total("n_fitted"), n_skipped=total("n_skipped"),
        n_orphans=total("n_orphans"), n_models=total("n_models"), n_kept=total("n_kept"),
        n_per_cell=None if results[0].n_per_cell is None else total("n_per_cell"),
        r2_in=median("r2_in"), r2_out=median("r2_out"), gain=median("gain"),
        largest_kkt=max((r.largest_kkt for r in results if r.largest_kkt is not None), default=None),
        kernel_error_bound=max(r.kernel_error_bound for r in results), conditions=tuple(labels),
        warnings=tuple(dict.fromkeys(w for r in results for w in r.warnings)), seconds=total("seconds"),
    )  # fmt: skip


@checked
def join(
    output_dir: str | os.PathLike, *, parallel: int = 1, threads: int | None = None, progress: Progress = SILENT
) -> FitResult:
    """Work on a run that another process, on this or another machine, has started.

    Raises
    ------
    DataError
        If the folder holds no run.
    """
    folder = Path(output_dir)
    loaded = load_toml(folder / RUN_NAME)
    settings = make_settings({}, loaded)
    source = loaded.command.get("data.adata_path")
    if not source:
        raise DataError(f"{folder}: the run was fitted to data in memory", hint="fit from a file to share a run")
    tissue = open_tissue(source, **settings.tissue)
    return _fit_run(
        tissue, folder, settings, loaded.command.get("training.genes"), None, parallel, False, threads, progress
    )


def _fit_run(
    tissue: Tissue,
    folder: Path,
    settings: Settings,
    genes: Sequence[str] | None,
    max_genes: int | None,
    parallel: int,
    force: bool,
    threads: int | None,
    progress: Progress,
    condition: str | None = None,
) -> FitResult:
    began = time.monotonic()
    plan = make_plan(tissue, settings, genes, max_genes, threads)
    plan.condition = condition
    _open_run(folder, plan, force=force)
    before = sum(_is_done(folder, g) for g in plan.genes)
    workers = _start_workers(folder, parallel) if parallel > 1 else []
    progress.start("fitting", len(plan.genes), "genes")
    progress.advance(before)
    try:
        done = work(plan, folder, progress=progress, batch=_get_batch(len(plan.genes), parallel))
    finally:
        for w in workers:
            w.join()
        progress.finish()
    _finish(plan, folder)
    return _describe(plan, folder, before, done, time.monotonic() - began)


def _get_batch(n: int, parallel: int) -> int:
    return max(1, min(_MOST, -(-n // max(4 * parallel, 1)))) if parallel > 1 else min(_MOST, max(n, 1))


def _start_workers(folder: Path, parallel: int) -> list[Any]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_join_quietly, args=(str(folder),), daemon=True) for _ in range(parallel - 1)]
    for w in workers:
        w.start()
    return workers


def _join_quietly(folder: str) -> None:
    join(folder, threads=1)


def _open_run(folder: Path, plan: Plan, *, force: bool) -> None:
    """Write the TOML of the run, or check that an existing one has the same content."""
    source = plan.tissue.source
    command = {
        "data.adata_path": os.path.abspath(source) if isinstance(source, str | os.PathLike) else None,
        "training.genes": plan.genes,
        "data.condition_value": plan.condition,
        "identity.data": plan.tissue.get_fingerprint(),
        "identity.network": fingerprint_files(find_networks(plan.tissue, plan.settings)),
    }
    text = dump_toml(plan.settings, command=command, clusters=plan.tissue.labels)
    toml = folder / RUN_NAME
    folder.mkdir(parents=True, exist_ok=True)
    if toml.exists() and toml.read_bytes() != text.encode():
        if not force:
            raise UsageError(
                f"{folder} holds a run with other settings, data or genes", hint=f"{spell('force', True)} replaces it"
            )
        _clear(folder)
        write_text(toml, text, force=True)  # this file identifies the folder as ours and is never deleted
    elif not toml.exists() and any(folder.glob(f"*{SUFFIX}.*")):
        if not force:
            raise UsageError(f"{folder} holds betadata of another program", hint=f"{spell('force', True)} replaces it")
        _clear(folder)
    if not toml.exists():
        try:
            write_text(toml, text)
        except UsageError:  # another process was first
            if toml.read_bytes() != text.encode():
                raise


def _clear(folder: Path) -> None:
    for pattern in (f"*{SUFFIX}.*", f"*{ORPHAN}", "*.lock", f"{ROWS}/*.json", SUMMARY, STABILITY):
        for p in folder.glob(pattern):
            p.unlink(missing_ok=True)


def _is_run(dpath: Path) -> bool:
    """Return whether a folder holds a run of ours or of another program, perhaps with tables derived from it."""
    has_own = (dpath / RUN_NAME).is_file() or (dpath / "conditions").is_dir()
    return has_own or any(p for kind in (f"*{SUFFIX}.*", f"*{ORPHAN}") for p in dpath.glob(kind))


def _is_done(folder: Path, gene: str) -> bool:
    return (folder / ROWS / f"{gene}.json").exists()


@one_blas_thread()
def work(plan: Plan, folder: Path, *, progress: Progress = SILENT, batch: int = _MOST) -> int:
    """Claim and fit genes until none is free or unfinished, and return the number of genes fitted here."""
    queue = Queue(folder, plan.genes, lambda g: _is_done(folder, g))
    done = 0
    columns = features = local = None
    (folder / ROWS).mkdir(parents=True, exist_ok=True)
    with queue.beating():
        while True:
            mine = queue.claim(batch)
            if not mine:
                if queue.wait():
                    continue
                return done
            if columns is None or features is None:
                columns = join_columns(plan.modulators)
                features = Features(plan.tissue, columns, plan.receiver)
                if plan.settings.mode == "full":
                    local = LocalFitter(plan.tissue, plan.settings, features)
            for gene, rows, betas, stability in fit_batch(plan, features, columns, mine, local):
                write_betas(folder, betas)
                write_json(
                    folder / ROWS / f"{gene}.json", {"rows": rows, "stability": stability}, force=True, indent=None
                )
                queue.release(gene)
                progress.advance(1)
                done += 1


def fit_batch(
    plan: Plan, features: Features, columns: Columns, genes: Sequence[str], local: LocalFitter | None
) -> Iterator[tuple[str, list[dict], Betas, list[dict]]]:
    """Fit some genes in all clusters; yield the summary rows, coefficients and stability of each."""
    s, tissue = plan.settings, plan.tissue
    Y = tissue.expression(genes)
    numbers = sorted(tissue.labels)
    fits: dict[int, list[ClusterResult]] = {}
    stable: dict[int, list[Stability]] = {}
    p_values: dict[int, np.ndarray] = {}
    for c in numbers:
        rows = np.flatnonzero(tissue.clusters == c)
        if len(rows) < s.min_cells:
            continue
        X = features.build(rows)
        own = features.build(rows, own=True) if s.validate else None
        folds = make_folds(tissue.xy[rows], s.radius) if s.validate or s.l1_reg is None else []
        fits[c] = fit_cluster(X, own, Y[rows], folds, columns, genes, s)
        if s.stability:
            stable[c] = measure_stability(X, Y[rows], tissue.xy[rows], columns, genes, fits[c], s)
    if s.null:
        p_values = _get_null(plan, features, columns, genes, Y, fits)
    for t, gene in enumerate(genes):
        found = {c: fits[c][t] for c in fits}
        rows_, betas = _assemble(plan, columns, gene, numbers, found)
        details: list[dict] = []
        for row in rows_:
            c = row["cluster"]
            if c in p_values and np.isfinite(p_values[c][t]):
                row["p"] = float(p_values[c][t])
            if c in stable:
                row["n_stable"] = int((stable[c][t].frequency >= STABLE).sum())
                row["expected_false"] = stable[c][t].expected_false
                details += _list_stability(plan, gene, c, stable[c][t])
        if local is not None:
            betas = _refine(plan, local, rows_, betas, found)
        yield gene, rows_, betas, details


def _refine(
    plan: Plan, local: LocalFitter, rows: list[dict], betas: Betas, found: Mapping[int, ClusterResult]
) -> Betas:
    """Return the coefficients by cell where they are better, and add the comparison to the summary rows."""
    betas, verdicts = local.refine(betas, plan.modulators[betas.target], found)
    for row in rows:
        row.update(dict.fromkeys(CELL_COLUMNS), per_cell=False)
        v = verdicts.get(row["cluster"])
        if v is not None:
            row.update(asdict(v) | {"r2_blind": v.r2_blind if np.isfinite(v.r2_blind) else None})
        note = v.note if v is not None else "one row for the cluster: no coefficient varies"
        row["note"] = "; ".join(n for n in (row["note"], note) if n)
    return betas


def _list_stability(plan: Plan, gene: str, cluster: int, found: Stability) -> list[dict]:
    names = plan.modulators[gene].names
    return [
        {"gene": gene, "cluster": cluster, "modulator": names[i], "frequency": float(found.frequency[i]),
         "sign_agreement": float(found.agreement[i])}
        for i in np.flatnonzero(found.frequency)
    ]  # fmt: skip


def _get_null(
    plan: Plan,
    features: Features,
    columns: Columns,
    genes: Sequence[str],
    Y: np.ndarray,
    fits: Mapping[int, list[ClusterResult]],
) -> dict[int, np.ndarray]:
    """Return (t,) p-values of the gain in every cluster, from the same fits with rearranged senders."""
    from vcelltools.spatial.design import measure
    from vcelltools.spatial.regress import get_path, is_standardized

    s, tissue = plan.settings, plan.tissue
    null = {c: np.full((s.null, len(genes)), np.nan) for c in fits}
    for b in range(s.null):
        rng = np.random.default_rng([s.seed, 0, b])
        W = features.receive(plan.receiver.move_senders(rearrange(tissue.xy, rng)))
        for c, results in fits.items():
            rows = np.flatnonzero(tissue.clusters == c)
            X, folds = features.build(rows, W), make_folds(tissue.xy[rows], s.radius)
            m = measure(X, Y[rows], min_nonzero=s.min_nonzero, standardize=is_standardized(s))
            paths = [get_path(m, columns, g, t, s) for t, g in enumerate(genes)]
            held = hold_out(X, Y[rows], folds, columns, genes, paths, s)
            for t, h in enumerate(held):
                total = float(((Y[rows, t] - Y[rows, t].mean()) ** 2).sum())
                null[c][b, t] = h.r2(total) - max(results[t].r2_tf, results[t].r2_own)
    out = {}
    for c, results in fits.items():
        spatial = [bool(plan.modulators[g].lr or plan.modulators[g].tfl) for g in genes]
        gain = np.where(spatial, [r.gain for r in results], np.nan)
        out[c] = get_p_values(gain, null[c])
    return out


def _assemble(
    plan: Plan, columns: Columns, gene: str, numbers: list[int], fits: Mapping[int, ClusterResult]
) -> tuple[list[dict], Betas]:
    """Return the summary rows and coefficients of one gene."""
    s, tissue, m = plan.settings, plan.tissue, plan.modulators[gene]
    place = {int(c): i for i, c in enumerate(columns.at[gene])}
    values, base = np.zeros((len(numbers), m.n)), np.zeros(len(numbers))
    rows = []
    for i, c in enumerate(numbers):
        n = int((tissue.clusters == c).sum())
        row: dict[str, Any] = dict.fromkeys(_COLUMNS) | {"gene": gene, "cluster": c, "n_cells": n, "n_columns": m.n}
        row |= {"n_nonzero": 0, "kept": False, "note": ""}
        rows.append(row)
        if c not in fits:
            row["note"] = f"fewer than {s.min_cells} cells"
            continue
        r = fits[c]
        score = r.r2_out if s.validate else r.r2_in
        row["kept"] = bool(score >= s.score_threshold)
        row |= {
            "r2_in": r.r2_in, "r2_out": r.r2_out, "r2_tf": r.r2_tf, "r2_own": r.r2_own, "gain": r.gain,
            "gain_error": r.gain_error,
            "kkt": r.fitted.kkt, "l1_reg": r.penalty.l1, "group_reg": r.penalty.group,
            "n_nonzero": int(np.count_nonzero(r.fitted.w)),
        }  # fmt: skip
        notes = [f"{r.constant} columns constant or rarely above 0"] if r.constant else []
        notes += [f"{r.copied} copied columns"] if r.copied else []
        notes += [f"the optimality conditions hold only to {r.fitted.kkt:.1g}"] if r.fitted.kkt > s.tol else []
        row["note"] = "; ".join(notes)
        if row["kept"]:
            base[i] = r.fitted.intercept
            values[i, [place[int(k)] for k in r.fitted.cols]] = r.fitted.w
    return rows, Betas(gene, tuple(m.names), np.array(numbers, np.int64), base, values, False)


def _read_rows(folder: Path, genes: Sequence[str]) -> tuple[list[dict], list[dict]]:
    rows: list[dict] = []
    stability: list[dict] = []
    for g in genes:
        path = folder / ROWS / f"{g}.json"
        text = read_text(path, what="a finished gene", hint=REMAKE)
        with checking(path, REMAKE):
            body = parse_json(text)
            for table in (_get_table(body["rows"]), _get_stability(body["stability"])):
                if {*table["gene"].to_pylist()} - {g}:
                    raise ValueError("it is of another gene")
            rows += body["rows"]
            stability += body["stability"]
    return rows, stability


def _finish(plan: Plan, folder: Path) -> None:
    """Write the summary if every gene is finished; every process would write the same file."""
    with locked(folder / "finish"):
        rows, stability = _read_rows(folder, plan.genes)
        p = np.array([np.nan if r["p"] is None else r["p"] for r in rows], np.float64)
        for r, q in zip(rows, adjust(p), strict=True):
            r["q"] = float(q) if np.isfinite(q) else None
        if not (folder / SUMMARY).exists():
            write_frame(folder / SUMMARY, _get_table(rows))
        if stability and not (folder / STABILITY).exists():
            write_frame(folder / STABILITY, _get_stability(stability))


def _get_table(rows: list[dict]) -> dict[str, Any]:
    import pyarrow as pa

    whole = ("cluster", "n_cells", "n_columns", "n_nonzero", "n_stable", "epochs")
    text, yes_or_no = ("gene", "note"), ("kept", "per_cell")
    full = bool(rows) and "per_cell" in rows[0]
    names = [*_COLUMNS[:-2], *CELL_COLUMNS, *_COLUMNS[-2:]] if full else _COLUMNS
    kinds = {k: pa.int64() if k in whole else pa.string() if k in text else pa.float64() for k in names}
    kinds |= {k: pa.bool_() for k in yes_or_no if k in kinds}
    return {k: pa.array([r[k] for r in rows], kinds[k]) for k in names}


def _get_stability(rows: list[dict]) -> dict[str, Any]:
    import pyarrow as pa

    kinds = {"gene": pa.string(), "cluster": pa.int64(), "modulator": pa.string()}
    columns = ("gene", "cluster", "modulator", "frequency", "sign_agreement")
    return {k: pa.array([r[k] for r in rows], kinds.get(k, pa.float64())) for k in columns}


def _describe(plan: Plan, folder: Path, before: int, done: int, seconds: float) -> FitResult:
    rows, _ = _read_rows(folder, plan.genes)
    s, tissue = plan.settings, plan.tissue
    fitted = [r for r in rows if r["r2_in"] is not None or r["kkt"] is not None]

    def median(name: str) -> float | None:
        values = [r[name] for r in fitted if r[name] is not None]
        return float(np.median(values)) if values else None

    warnings = []
    if s.l1_reg is not None and s.l1_reg < _SMALL and (s.group_reg or 0.0) < _SMALL:
        warnings.append(
            f"penalties of {s.l1_reg:g} and {s.group_reg or 0.0:g} amount to least squares: R² in the sample nears 1, "
            "whether or not the model predicts new cells"
        )
    small = [tissue.labels[c] for c in sorted(tissue.labels) if (tissue.clusters == c).sum() < s.min_cells]
    if small:
        warnings.append(f"clusters with fewer than {s.min_cells} cells get coefficients of 0: {', '.join(small)}")
    short = [r for r in fitted if r["kkt"] is not None and r["kkt"] > s.tol]
    if short:
        worst = max(short, key=lambda r: r["kkt"])
        warnings.append(
            f"{len(short):,} of {len(fitted):,} models did not reach the tolerance {s.tol:g}: their optimality "
            f"conditions hold to {worst['kkt']:.1g} at worst ({worst['gene']}, cluster {worst['cluster']}). Larger "
            "penalties converge faster"
        )
    if 0 < s.null < _ENOUGH:
        warnings.append(
            f"{s.null} permutations give no p-value below {1 / (s.null + 1):.2g}, so q-values stay large: "
            f"use at least {_ENOUGH}"
        )
    if not s.validate:
        warnings.append("R² was measured in the sample, because validation is off")
    by_cell = sum(bool(r["per_cell"]) for r in fitted) if s.mode == "full" else None
    if by_cell is not None and by_cell < len(fitted):
        warnings.append(
            f"{len(fitted) - by_cell:,} of {len(fitted):,} models keep the coefficients of their cluster, because "
            "coefficients by cell do not predict held-out blocks better by more than the standard error, or all are "
            "0; see the note in the summary"
        )
    late = sum(r["epochs"] == s.epochs for r in fitted if s.mode == "full")
    if late:
        warnings.append(f"{late:,} models were still improving in the last of {s.epochs:,} epochs; more may help")
    return FitResult(
        output_dir=str(folder), n_genes=len(plan.genes), n_fitted=done, n_skipped=before,
        n_orphans=sum((folder / f"{g}{ORPHAN}").exists() for g in plan.genes), n_models=len(fitted),
        n_kept=sum(r["kept"] for r in fitted), n_per_cell=by_cell, r2_in=median("r2_in"), r2_out=median("r2_out"),
        gain=median("gain"),
        largest_kkt=max((r["kkt"] for r in fitted), default=None),
        kernel_error_bound=plan.receiver.error_bound, conditions=(), warnings=tuple(warnings), seconds=seconds,
    )  # fmt: skip
