"""Choose the stores to build, from the options for one file or from ``vcelltools.toml``, and build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vcelltools.config import CONFIG_NAME, Config, DatasetConfig, load_config
from vcelltools.errors import UsageError, spell
from vcelltools.genes.identity import Basis, read_basis
from vcelltools.genes.table import read_aliases
from vcelltools.presets import resolve_preset
from vcelltools.runtime.cluster import connect
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.stores.basis import BasisResult
from vcelltools.stores.building.jobs import Outcome, build_one, choose_jobs, run_jobs
from vcelltools.stores.building.layout import MEMORY_BYTES, Layout
from vcelltools.stores.building.make import make_spec


@dataclass(frozen=True, kw_only=True)
class Job:
    """The stores to build.

    Attributes
    ----------
    specs
        The data sets; their paths are relative to ``base``.
    basis
        The genes.
    out
        The folder of the stores.
    keep
        Whether complete, up-to-date stores are kept; otherwise an existing store is an error.
    """

    specs: tuple[DatasetConfig, ...]
    basis: Basis
    out: Path
    base: Path
    target_sum: float
    seed: int
    aliases: Path | None
    keep: bool = False


def _with_options(spec: DatasetConfig, options: Mapping[str, Any]) -> DatasetConfig:
    """Return the spec, overridden by the options that were given."""
    values = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in options.items() if v not in (None, [])}
    return msgspec.structs.replace(spec, **values) if values else spec


def choose_datasets(
    file: Path | None,
    *,
    basis: Path | None,
    out: Path | None,
    name: str | None,
    options: Mapping[str, Any],
    config: tuple[Config, Path] | None = None,
    aliases: Path | None = None,
) -> Job:
    """Determine what to build; ``aliases`` is a table of genes that replaces the configured one.

    Raises
    ------
    UsageError
        If there is neither a file nor a configured data set.
    """
    if options.get("sums") not in (None, "auto", "all", "basis"):
        raise UsageError(f"{spell('sums')} is {options['sums']!r}", hint="one of: auto, all, basis")
    conf, base = config or load_config()
    if file is not None:
        known = [d for d in conf.datasets if (base / d.path).resolve() == file.resolve() or d.name == name]
        if known:
            specs = [_with_options(msgspec.structs.replace(known[0], path=str(file.resolve())), options)]
            if name is not None:
                specs = [msgspec.structs.replace(specs[0], name=name)]
        else:
            specs = [make_spec(file, name, {k: v for k, v in options.items() if v not in (None, [])})]
            specs = [msgspec.structs.replace(specs[0], path=str(file.absolute()))]
    else:
        if not conf.datasets:
            raise UsageError("there is nothing to build", hint="give a FILE, or [[datasets]] in vcelltools.toml")
        specs = [conf.get_dataset(name)] if name is not None else list(conf.datasets)
        specs = [_with_options(s, options) for s in specs]
    specs = [resolve_preset(s) for s in specs]
    specs = [msgspec.structs.replace(s, stats=str(base / s.stats)) if s.stats else s for s in specs]
    basis_fpath = basis if basis is not None else base / conf.basis.path
    if basis is None and not basis_fpath.exists():
        hint = f"{spell('basis')} hvgs_2k.txt, written by vcelltools hvg or vcelltools basis"
        raise UsageError("no gene list is given", hint=hint)
    return Job(
        specs=tuple(specs),
        basis=read_basis(basis_fpath),
        out=out if out is not None else base / conf.store.path,
        base=base,
        target_sum=conf.store.target_sum,
        seed=conf.store.seed,
        aliases=aliases or (base / conf.basis.aliases if conf.basis.aliases else None),
        keep=file is None,
    )


def build_stores(
    job: Job,
    *,
    force: bool = False,
    threads: int | None = None,
    dask: str | None = None,
    jobs: int | None = None,
    memory_bytes: float = MEMORY_BYTES,
    progress: Progress = SILENT,
) -> list[Outcome]:
    """Build every store of a job, and return their outcomes in order.

    A data set that fails does not stop the others. In a run over a whole configuration, an existing store
    that is complete and up to date is kept.

    Parameters
    ----------
    jobs
        Number of data sets to build at the same time, each in a separate process; by default, see
        :func:`vcelltools.stores.building.jobs.choose_jobs`. The bytes do not depend on it.
    memory_bytes
        Memory limit for each of them; see :func:`vcelltools.build_store`.

    Raises
    ------
    UsageError
        If both ``jobs`` and ``dask`` are given.
    """
    options: dict[str, Any] = {
        "basis": job.basis,
        "out": job.out,
        "aliases": job.aliases,
        "target_sum": job.target_sum,
        "seed": job.seed,
        "force": force,
        "keep_whole": job.keep,
        "memory_bytes": memory_bytes,
    }
    if dask is not None:
        if jobs is not None and jobs > 1:
            what = f"{spell('jobs')} and {spell('dask')} are both given"
            raise UsageError(what, hint="a cluster builds one store after another; remove one of the two")
        jobs = 1
    n_jobs, threads = choose_jobs(len(job.specs), jobs, threads)
    sources = [(job.base / spec.path, spec) for spec in job.specs]
    if n_jobs > 1:
        return run_jobs(sources, {**options, "threads": threads}, n_jobs, progress)
    with connect(dask) as client:
        return [
            build_one(path, spec, {**options, "threads": threads, "dask": client, "progress": progress})
            for path, spec in sources
        ]


def plan_stores(job: Job, *, threads: int | None = None, memory_bytes: float = MEMORY_BYTES) -> list[dict[str, Any]]:
    """Return a description of each store, from obs and var only."""
    from vcelltools.stores.building.estimate import describe
    from vcelltools.stores.building.plan import make_plan, open_source

    out = []
    for spec in job.specs:
        with open_source(job.base / spec.path, spec, job.seed) as ds:
            plan = make_plan(
                ds,
                spec,
                job.basis,
                target_sum=job.target_sum,
                seed=job.seed,
                aliases=read_aliases(job.aliases) if job.aliases else None,
            )
            layout = Layout(plan=plan, ds=ds, threads=get_threads(threads), memory_bytes=memory_bytes)
            out.append(describe(layout))
    return out


def choose_basis_job(
    files: list[Path] | None, options: Mapping[str, Any], *, force_targets: bool
) -> tuple[Callable[..., BasisResult], Path, list[Path]]:
    """Return a function that computes the basis of the files or configured data sets, its default path, and its inputs.

    Raises
    ------
    UsageError
        If neither files nor configured data sets are given.
    """
    from vcelltools.stores.basis import basis

    conf, base = load_config()
    if not files and not conf.datasets:
        raise UsageError(
            "there are no data sets to choose a basis from", hint="give FILEs, or [[datasets]] in vcelltools.toml"
        )
    if files and force_targets:
        raise UsageError(
            f"{spell('force_targets', True)} needs the data sets in vcelltools.toml, which names the target columns",
            hint=f"remove FILE, or name the genes with {spell('force_genes')}",
        )
    values = {k: v for k, v in options.items() if v not in (None, []) and k != "aliases"}
    if options.get("aliases"):
        values["aliases"] = read_aliases(options["aliases"])
    if force_targets:
        values["force_targets"] = True
    datasets = list(files) if files else [resolve_preset(d) for d in conf.datasets]

    def run(**more: Any) -> BasisResult:
        return basis(datasets, base=base, config=conf.basis, **values, **more)

    reads = [base / d if isinstance(d, Path) else base / d.path for d in datasets]
    reads += [Path(a) for a in (options.get("aliases"), conf.basis.aliases and base / conf.basis.aliases) if a]
    return run, base / conf.basis.path, [*reads, base / CONFIG_NAME]
