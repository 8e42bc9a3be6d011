"""Which stores to build, from the options of one file or from ``vcelltools.toml``; and building them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vcelltools.config import Config, DatasetConfig, load_config
from vcelltools.errors import UsageError
from vcelltools.genes import Basis, read_aliases, read_basis
from vcelltools.pipelines.basis import BasisResult
from vcelltools.pipelines.store_build import MEMORY_BYTES, Builder
from vcelltools.pipelines.store_jobs import Outcome, build_one, choose_jobs, run_jobs
from vcelltools.pipelines.store_make import connect, make_spec
from vcelltools.presets import resolve_preset
from vcelltools.progress import SILENT, Progress


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be built.

    Attributes
    ----------
    specs
        The data sets; their paths are relative to ``base``.
    basis
        The genes.
    out
        The folder of the stores.
    keep
        Whether stores that are there and are what would be built are kept (else they are refused).
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
    """Return the spec with the options that were given on top."""
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
) -> Job:
    """Work out what to build.

    Raises
    ------
    UsageError
        Where neither a file nor a configured data set says what.
    """
    if options.get("sums") not in (None, "auto", "all", "basis"):
        raise UsageError(f"--sums is {options['sums']!r}", hint="one of: auto, all, basis")
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
            raise UsageError("what is to be built?", hint="give a FILE, or [[datasets]] in vcelltools.toml")
        specs = [conf.get_dataset(name)] if name is not None else list(conf.datasets)
        specs = [_with_options(s, options) for s in specs]
    specs = [resolve_preset(s) for s in specs]
    specs = [msgspec.structs.replace(s, stats=str(base / s.stats)) if s.stats else s for s in specs]
    basis_fpath = basis if basis is not None else base / conf.basis.path
    if basis is None and not basis_fpath.exists():
        raise UsageError("which genes?", hint="--basis hvgs_2k.txt (vcelltools hvg or vcelltools basis writes one)")
    return Job(
        specs=tuple(specs),
        basis=read_basis(basis_fpath),
        out=out if out is not None else base / conf.store.path,
        base=base,
        target_sum=conf.store.target_sum,
        seed=conf.store.seed,
        aliases=base / conf.basis.aliases if conf.basis.aliases else None,
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
    """Build every store of a job; return what became of each, in order.

    A data set that fails does not stop the others. In a run over a whole configuration, a store that is there
    already and is what would be built is kept.

    Parameters
    ----------
    jobs
        Data sets built at the same time, each in a process of its own; by default as
        :func:`vcelltools.pipelines.store_jobs.choose_jobs` says. The bytes do not depend on it.
    memory_bytes
        What each of them may hold; see :func:`vcelltools.build_store`.

    Raises
    ------
    UsageError
        Where ``jobs`` is asked for beside ``dask``.
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
            raise UsageError("--jobs and --dask are both given", hint="a cluster builds one store after the other")
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
    """Return what each store would be, from obs and var alone."""
    from vcelltools.io import open_dataset
    from vcelltools.pipelines.store_outlook import describe
    from vcelltools.pipelines.store_plan import make_plan

    out = []
    for spec in job.specs:
        with open_dataset(job.base / spec.path, modality=spec.modality, layer=spec.layer) as ds:
            plan = make_plan(
                ds,
                spec,
                job.basis,
                target_sum=job.target_sum,
                seed=job.seed,
                aliases=read_aliases(job.aliases) if job.aliases else None,
            )
            builder = Builder(plan, ds, job.out / f".{spec.name}.building", source={}, threads=threads,
                              memory_bytes=memory_bytes)  # fmt: skip
            out.append(describe(builder))
    return out


def choose_basis_job(
    files: list[Path] | None, options: Mapping[str, Any], *, force_targets: bool
) -> tuple[Callable[..., BasisResult], Path]:
    """Return a function that computes the basis of the files (or of the configured data sets), and its default path.

    Raises
    ------
    UsageError
        Where neither files nor configured data sets are given.
    """
    from vcelltools.pipelines.basis import basis

    conf, base = load_config()
    if not files and not conf.datasets:
        raise UsageError("a basis of what?", hint="give FILEs, or [[datasets]] in vcelltools.toml")
    if files and force_targets:
        raise UsageError(
            "--force-targets needs the data sets of vcelltools.toml, which says where the targets stand",
            hint="leave FILE out, or name the genes with --force-gene",
        )
    values = {k: v for k, v in options.items() if v not in (None, []) and k != "aliases"}
    if options.get("aliases"):
        values["aliases"] = read_aliases(options["aliases"])
    if force_targets:
        values["force_targets"] = True
    datasets = list(files) if files else [resolve_preset(d) for d in conf.datasets]

    def run(**more: Any) -> BasisResult:
        return basis(datasets, base=base, config=conf.basis, **values, **more)

    return run, base / conf.basis.path
