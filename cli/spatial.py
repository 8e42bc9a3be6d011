"""``vcelltools spatial``: gene regulation across a tissue, and simulated knockouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcelltools.cli.help import Command
from vcelltools.cli.hints import find_free
from vcelltools.cli.options import Force, Json, Quiet, Threads, Verbose

if TYPE_CHECKING:
    from vcelltools.cli.output import Output
    from vcelltools.spatial._run import Run

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def _flag(name: str, text: str) -> Any:
    return typer.Option(name, help=text)


File = Annotated[Path | None, typer.Argument(metavar="FILE", show_default=False, help="h5ad file with coordinates.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="T", help="spaceship_config.toml to read [default: the one in the working directory]."
    ),
]
Moved = Annotated[Path | None, typer.Option("--h5ad", metavar="FILE", help="Data file, if it was moved.")]
RunToml = Annotated[
    Path | None,
    typer.Option("--run-toml", metavar="R", help="TOML or folder of a finished run [default: the working directory]."),
]
Layer = Annotated[
    str | None, typer.Option("--layer", metavar="L", help="X or a layer's name [default: imputed_count].")
]
Annot = Annotated[
    str | None,
    typer.Option(
        "--cluster-annot",
        metavar="C",
        help="obs column of the clusters, or none for a single cluster [default: cell_type_int].",
    ),
]
Coords = Annotated[str | None, typer.Option("--coords", metavar="KEY", help="obsm key of the coordinates.")]
Dims = Annotated[int | None, typer.Option("--dims", min=2, max=3, help="Number of coordinates to use.")]
NetworkDir = Annotated[Path | None, typer.Option("--network-dir", metavar="D", help="Folder with the gene networks.")]
NetworkFile = Annotated[Path | None, typer.Option("--network", metavar="F", help="Gene network (parquet).")]
Species = Annotated[
    str | None, typer.Option("--species", help="Species: mouse or human [default: inferred from the gene names].")
]
Radius = Annotated[
    float | None, typer.Option("--radius", help="Radius within which cells receive ligands [default: 200].")
]
Kernel = Annotated[
    str | None, typer.Option("--kernel", help="How received ligands are computed: exact, fast or auto [default: auto].")
]
RadiusRule = Annotated[
    str | None,
    typer.Option(
        "--radius-rule", help="Ranges: one, or by-signaling, with a shorter range for contact ligands [default: one]."
    ),
]
MaxLigands = Annotated[
    int | None,
    typer.Option("--max-ligands", min=1, help="Number of ligands to keep, the most expressed first [default: all]."),
]
ExtraModulators = Annotated[
    str | None, typer.Option("--extra-modulators", metavar="A,B", help="Additional modulators.")
]
ExtraLr = Annotated[str | None, typer.Option("--extra-lr", metavar="L$R,…", help="Additional ligand-receptor pairs.")]
NoTf = Annotated[bool, _flag("--no-tf-modulators", "Exclude TFs.")]
NoLr = Annotated[bool, _flag("--no-lr-modulators", "Exclude ligand-receptor pairs.")]
NoTfl = Annotated[bool, _flag("--no-tfl-modulators", "Exclude ligand-TF pairs.")]
TfPrior = Annotated[
    Path | None,
    typer.Option(
        "--tf-prior", metavar="F", help="Table of source and target that replaces the TF edges of the network."
    ),
]
Scale = Annotated[
    float | None,
    typer.Option("--weighted-ligand-scale-factor", help="Factor that scales received ligands [default: 1]."),
]
Genes = Annotated[str | None, typer.Option("--genes", "--gene", metavar="A,B", help="Target genes.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="F", help="Output file: feather, parquet or CSV.", show_default=False)
]
BetaScale = Annotated[
    float | None,
    typer.Option("--beta-scale-factor", help="Factor that scales the ligand terms of derivatives [default: 1]."),
]
BetaCap = Annotated[
    float | None, typer.Option("--beta-cap", help="Bound on the absolute value of every derivative [default: none].")
]


def _start(*files: Path | None) -> None:
    """Start with one BLAS thread: targets and cells run in parallel, and results stay the same to the bit."""
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    from vcelltools.cli.start import start

    start(*files)


def _guard(force: bool, reads: list[Path | None], *outs: Path | None) -> None:
    """Check the outputs before any work."""
    from vcelltools.io.write.guard import Target, get_kind, guard_outputs

    guard_outputs([Target(o, get_kind(o)) for o in outs if o is not None], reads=reads, force=force)


def _guard_run(
    force: bool, run_toml: Path | None, h5ad: Path | None, reads: list[Path | None], *outs: Path | None
) -> None:
    """Check the outputs of what reads a run; tables may lie in its folder, beside its own files."""
    from vcelltools.spatial.files import list_inputs

    _guard(force, [*list_inputs(run_toml or Path(), h5ad), *reads], *outs)


def _find_config(config: Path | None) -> Path | None:
    from vcelltools.spatial.settings import CONFIG_NAME

    return config if config is not None else Path(CONFIG_NAME) if Path(CONFIG_NAME).exists() else None


def _collect(**given: Any) -> dict[str, Any]:
    """Return the options that were given, with paths as text."""
    off = {k: v for k, v in given.items() if k.startswith("no_")}
    out = {k: v for k, v in given.items() if v is not None and k not in off}
    return out | {f"use_{k[3:]}" if k != "no_validate" else "validate": False for k, v in off.items() if v}


def _split(names: str | None) -> list[str] | None:
    return [n.strip() for n in names.split(",") if n.strip()] if names is not None else None


def _need_file(file: Path | None, config: Path | None) -> Path:
    """Return the data file: the argument, or the one in the configuration."""
    from vcelltools.errors import UsageError
    from vcelltools.spatial.settings import load_toml

    if file is not None:
        return file
    named = load_toml(config).command.get("data.adata_path") if config is not None else None
    if not named:
        raise UsageError("no data: give an h5ad, or a configuration that names one", hint="vcelltools spatial --help")
    return Path(named)


def _say_unused(o: Output, config: Path | None, mode: str | None = None) -> None:
    from vcelltools.spatial.settings import FULL_ONLY, load_toml

    if config is None:
        return
    loaded = load_toml(config)
    full = (mode or loaded.settings.get("mode")) == "full"
    idle = [".".join(key) for name, key in FULL_ONLY.items() if name in loaded.settings and not full]
    if unused := [*loaded.unused, *idle]:
        o.note(f"{config}: these keys are not used here: {', '.join(unused)}")


def _open(run_toml: Path | None, file: Path | None, threads: int | None, **options: Any) -> Run:
    from vcelltools.spatial import open_run

    return open_run(run_toml or Path(), file, threads=threads, **options)


def _perturb_options(run: Run, scale: float | None, cap: float | None, hops: int | None = None) -> dict[str, Any]:
    """Return β options and hops: those given, then those of the run's configuration, then the defaults."""
    said = run.loaded.command if run.loaded is not None else {}

    def choose(given: Any, key: str, default: Any) -> Any:
        return given if given is not None else said.get(f"perturbation.{key}", default)

    out = {
        "beta_scale_factor": float(choose(scale, "beta_scale_factor", 1.0)),
        "beta_cap": choose(cap, "beta_cap", None),
    }
    return out if hops is None else out | {"hops": int(choose(hops or None, "n_propagation", 4))}


@app.command("check", cls=Command, short_help="Check data and network before a fit")
def check(
    file: File = None,
    genes: Genes = None,
    config: Config = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    dims: Dims = None,
    network_dir: NetworkDir = None,
    network: NetworkFile = None,
    species: Species = None,
    radius: Radius = None,
    kernel: Kernel = None,
    radius_rule: RadiusRule = None,
    max_ligands: MaxLigands = None,
    extra_modulators: ExtraModulators = None,
    extra_lr: ExtraLr = None,
    no_tf_modulators: NoTf = False,
    no_lr_modulators: NoLr = False,
    no_tfl_modulators: NoTfl = False,
    tf_prior: TfPrior = None,
    weighted_ligand_scale_factor: Scale = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check data before a fit: network coverage, cell spacing relative to the radius, and every problem.

    Example: vcelltools spatial check tissue.h5ad --gene Foxp3 --json
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    config = _find_config(config)
    _start(file)
    from vcelltools.spatial import check as run

    options = _collect(
        layer=layer, cluster_annot=cluster_annot, coords=coords, dims=dims, network_dir=network_dir, network=network,
        species=species, radius=radius, kernel=kernel, radius_rule=radius_rule, max_ligands=max_ligands,
        extra_modulators=extra_modulators, extra_lr=extra_lr, no_tf_modulators=no_tf_modulators,
        no_lr_modulators=no_lr_modulators, no_tfl_modulators=no_tfl_modulators, tf_prior=tf_prior,
        weighted_ligand_scale_factor=weighted_ligand_scale_factor,
    )  # fmt: skip
    r = run(_need_file(file, config), genes=_split(genes) or (), config=config, threads=threads, **options)
    _say_unused(o, config)
    o.result(r.to_json())
    o.table(
        ["", "value"],
        [["cells", r.n_cells], ["genes", r.n_genes], ["clusters", len(r.clusters)], ["network", r.network],
         ["species", r.species], *([f"edges: {k}", n] for k, n in r.edges.items()), ["targets", r.n_targets],
         ["spacing", r.spacing], ["radius", r.radius], ["cells within radius", r.neighbors],
         ["variation of received", r.variation],
         *([f"modulators of {g}", sum(map(len, m.values()))] for g, m in r.modulators.items())],
        left=True,
    )  # fmt: skip
    o.warn(r.problems)


@app.command("fit", cls=Command, short_help="Fit every target gene in every cluster")
def fit(
    file: File = None,
    h5ad: Annotated[
        Path | None, typer.Option("--h5ad", metavar="FILE", help="Data file, instead of the argument FILE.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "--out", "-o", metavar="D", help="Folder of the run.")
    ] = None,
    join_output_dir: Annotated[
        Path | None,
        typer.Option("--join-output-dir", metavar="D", help="Join a run that another process or machine started."),
    ] = None,
    genes: Genes = None,
    max_genes: Annotated[
        int | None, typer.Option("--max-genes", min=1, help="Fit only the first N target genes.")
    ] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", min=1, help="Number of processes [default: 1].")] = None,
    config: Config = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    dims: Dims = None,
    condition: Annotated[
        str | None,
        typer.Option("--condition", metavar="COL", help="obs column; each of its values is fitted separately."),
    ] = None,
    network_dir: NetworkDir = None,
    network: NetworkFile = None,
    species: Species = None,
    radius: Radius = None,
    kernel: Kernel = None,
    radius_rule: RadiusRule = None,
    max_ligands: MaxLigands = None,
    extra_modulators: ExtraModulators = None,
    extra_lr: ExtraLr = None,
    no_tf_modulators: NoTf = False,
    no_lr_modulators: NoLr = False,
    no_tfl_modulators: NoTfl = False,
    tf_prior: TfPrior = None,
    weighted_ligand_scale_factor: Scale = None,
    l1_reg: Annotated[
        float | None,
        typer.Option("--l1-reg", min=0, help="Penalty on coefficients [default: chosen by cross-validation]."),
    ] = None,
    group_reg: Annotated[
        float | None, typer.Option("--group-reg", min=0, help="Penalty on groups [default: 0].")
    ] = None,
    scale_reg: Annotated[
        str | None,
        typer.Option(
            "--scale-reg",
            help="Weights of the group penalty: group-size, none or inverse-group-size [default: group-size].",
        ),
    ] = None,
    standardize: Annotated[bool, _flag("--standardize", "Standardise columns for the penalty.")] = False,
    tol: Annotated[
        float | None,
        typer.Option("--tol", help="Tolerance: violation of the optimality conditions to reach [default: 1e-6]."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--training-mode",
            help="Coefficients: seed (one row per cluster), or full (by cell, where that predicts better) "
            "[default: seed].",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Maximum number of epochs, in mode full [default: 100].")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate, in mode full [default: 0.003].")] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="How mode full sees a cell's place: position or map [default: position]."),
    ] = None,
    trunk: Annotated[
        str | None,
        typer.Option("--trunk", help="Networks of mode full: shared by all clusters, or own [default: shared]."),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option("--score-threshold", help="R² below which all coefficients of a model are set to 0 [default: 0]."),
    ] = None,
    min_cells: Annotated[
        int | None, typer.Option("--min-cells", min=1, help="Minimum number of cells in a cluster [default: 20].")
    ] = None,
    min_nonzero: Annotated[
        int | None,
        typer.Option(
            "--min-nonzero", min=0, help="Minimum number of cells in which a column is non-zero [default: 10]."
        ),
    ] = None,
    no_validate: Annotated[bool, _flag("--no-validate", "Skip the held-out R².")] = False,
    null: Annotated[
        int | None, typer.Option("--null", min=0, help="Number of permutations of the sending cells [default: 0].")
    ] = None,
    stability: Annotated[
        int | None,
        typer.Option(
            "--stability", min=0, help="Number of half-samples for the stability of coefficients [default: 0]."
        ),
    ] = None,
    plan: Annotated[bool, _flag("--plan", "Show the plan without fitting anything.")] = False,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fit how a cell's TFs and received ligands set the expression of each target gene, in every cluster.

    To resume an interrupted run, run the same command again. Several processes or machines may share one folder.

    Example: vcelltools spatial fit --h5ad tissue.h5ad --output-dir run --network mouse_network.parquet
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    file = file if file is not None else h5ad
    _start(file)
    from vcelltools.errors import UsageError
    from vcelltools.spatial import fit as run
    from vcelltools.spatial import join
    from vcelltools.spatial.settings import load_toml

    if join_output_dir is not None:
        return _show_fit(o, join(join_output_dir, parallel=parallel or 1, threads=threads, progress=o.progress))
    config = _find_config(config)
    said = load_toml(config).command if config is not None else {}
    folder = output_dir if output_dir is not None else said.get("execution.output_dir")
    if not folder and not plan:
        raise UsageError("no output folder for the run", hint="--output-dir")
    options = _collect(
        layer=layer, cluster_annot=cluster_annot, coords=coords, dims=dims, condition=condition,
        network_dir=network_dir, network=network, species=species, radius=radius, kernel=kernel,
        radius_rule=radius_rule, max_ligands=max_ligands, extra_modulators=extra_modulators, extra_lr=extra_lr,
        no_tf_modulators=no_tf_modulators, no_lr_modulators=no_lr_modulators, no_tfl_modulators=no_tfl_modulators,
        tf_prior=tf_prior, weighted_ligand_scale_factor=weighted_ligand_scale_factor, l1_reg=l1_reg,
        group_reg=group_reg, scale_reg=scale_reg, standardize=standardize or None, tol=tol,
        score_threshold=score_threshold, min_cells=min_cells, min_nonzero=min_nonzero, no_validate=no_validate,
        null=null, stability=stability, mode=mode, epochs=epochs, lr=lr, encoder=encoder, trunk=trunk,
    )  # fmt: skip
    data = _need_file(file, config)
    _say_unused(o, config, mode)
    if plan:
        from vcelltools.spatial import plan_fit

        p = plan_fit(data, genes=_split(genes), max_genes=max_genes, config=config, **options)
        o.result(p.to_json(), f"{p.n_genes:,} targets in {p.n_clusters} clusters, {p.n_columns:,} columns, {p.memory}")
        return None
    return _show_fit(o, run(
        data, folder, genes=_split(genes), max_genes=max_genes, config=config,
        parallel=parallel or said.get("execution.n_parallel") or 1, force=force, threads=threads,
        progress=o.progress, **options,
    ))  # fmt: skip


def _show_fit(o: Output, r: Any) -> None:
    o.result(r.to_json())
    o.table(
        ["", "value"],
        [["targets", r.n_genes], ["fitted now", r.n_fitted], ["finished before", r.n_skipped],
         ["models", r.n_models], ["models kept", r.n_kept], ["targets without a modulator", r.n_orphans],
         *([["models with coefficients by cell", r.n_per_cell]] if r.n_per_cell is not None else []),
         ["R² in the sample, median", r.r2_in], ["R² held out, median", r.r2_out], ["gain, median", r.gain],
         ["largest certificate", r.largest_kkt], ["kernel error bound", r.kernel_error_bound]],
    )  # fmt: skip
    o.warn(r.warnings)
    run = Path(r.output_dir, *(["conditions", r.conditions[0]] if r.conditions else []))
    page = find_free("spatial_report.html")
    o.done(f"wrote {r.output_dir}", ("spatial", "report", "--run-toml", run, "--out", page))


@app.command("received", cls=Command, short_help="Compute the ligands that every cell receives")
def received(
    out: Out,
    file: File = None,
    config: Config = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    dims: Dims = None,
    network_dir: NetworkDir = None,
    network: NetworkFile = None,
    species: Species = None,
    radius: Radius = None,
    kernel: Kernel = None,
    radius_rule: RadiusRule = None,
    weighted_ligand_scale_factor: Scale = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write how much of each ligand in the panel's ligand-receptor pairs every cell receives.

    Example: vcelltools spatial received tissue.h5ad --out received.feather --radius 200
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    config = _find_config(config)
    _start(file)
    from vcelltools.spatial import received as run

    data = _need_file(file, config)
    _guard(force, [data, config, network], out)
    options = _collect(
        layer=layer, cluster_annot=cluster_annot, coords=coords, dims=dims, network_dir=network_dir, network=network,
        species=species, radius=radius, kernel=kernel, radius_rule=radius_rule,
        weighted_ligand_scale_factor=weighted_ligand_scale_factor,
    )  # fmt: skip
    if cluster_annot is None and config is None:
        options["cluster_annot"] = "none"
    r = run(data, config=config, threads=threads, **options)
    r.write(out, force=force)
    n, k = r.values.shape
    o.result(
        {"out": out, "n_cells": n, "n_ligands": k, "kernel_error_bound": r.kernel_error_bound},
        f"{n:,} cells × {k:,} ligands; kernel error bound {r.kernel_error_bound:.2g}",
    )
    o.done(f"wrote {out}")


@app.command("splash", cls=Command, short_help="Compute derivatives of a target gene by its modulators")
def splash(
    gene: Annotated[str, typer.Option("--gene", metavar="G", help="Target gene.", show_default=False)],
    out: Out,
    run_toml: RunToml = None,
    h5ad: Moved = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    radius: Radius = None,
    kernel: Kernel = None,
    beta_scale_factor: BetaScale = None,
    beta_cap: BetaCap = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write how much a target changes with each of its modulating genes, in every cell.

    Example: vcelltools spatial splash --run-toml run --gene Foxp3 --out foxp3.feather
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)

    _guard_run(force, run_toml, h5ad, [], out)
    options = _collect(layer=layer, cluster_annot=cluster_annot, coords=coords, radius=radius, kernel=kernel)
    run = _open(run_toml, h5ad, threads, **options)
    table = run.splash(gene, **_perturb_options(run, beta_scale_factor, beta_cap))
    table.write(out, force=force)
    n = len(table.columns) - 1
    o.result({"out": out, "gene": gene, "n_cells": run.tissue.n_cells, "n_modulators": n,
              "kernel_error_bound": run.receiver.error_bound}, f"{run.tissue.n_cells:,} cells × {n} genes")  # fmt: skip
    o.done(f"wrote {out}")


def _read_desired(genes: list[str], value: float) -> dict[str, float]:
    """Return gene to value from ``A``, ``A=0`` and ``A,B``."""
    from vcelltools.errors import UsageError

    out: dict[str, float] = {}
    for text in genes:
        for part in text.split(","):
            name, mark, number = part.partition("=")
            try:
                out[name.strip()] = float(number) if mark else value
            except ValueError as e:
                raise UsageError(f"--gene {part!r}: {number!r} is not a number", hint="use GENE=VALUE") from e
    for name, v in out.items():
        if not 0 <= v < float("inf"):
            raise UsageError(f"{name}: the desired value {v:g} is negative or not finite")
    return out


def _find_scope(run: Run, cells_csv: Path | None, column: str | None, where: str | None) -> Any:
    from vcelltools.cli.options import refuse

    refuse({"--where": where and cells_csv}, "--cells-csv")
    said = run.loaded.command if run.loaded is not None else {}
    if where is not None:
        return run.where(where)
    csv = cells_csv or said.get("perturbation.cells_csv")
    return run.read_cells(csv, column or said.get("perturbation.cells_csv_column")) if csv else None


Desired = Annotated[
    list[str], typer.Option("--gene", metavar="G[=V]", help="Gene to set; may be repeated.", show_default=False)
]
DesiredExpr = Annotated[float, typer.Option("--desired-expr", help="Value for genes given without one.")]
Hops = Annotated[int | None, typer.Option("--n-propagation", min=1, help="Number of hops to propagate [default: 4].")]
Response = Annotated[str, typer.Option("--response", help="Propagation: derivative (the published scheme) or exact.")]
CellsCsv = Annotated[Path | None, typer.Option("--cells-csv", metavar="F", help="CSV with the cells to perturb.")]
CellsCol = Annotated[
    str | None,
    typer.Option("--cells-csv-column", metavar="C", help="Column of the CSV with the cell names [default: the first]."),
]
WhereCells = Annotated[
    str | None, typer.Option("--where", metavar="COL=LABEL,…", help="Perturb only cells with these labels.")
]


@app.command("perturb", cls=Command, short_help="Simulate knockouts and follow their effects through the tissue")
def perturb(
    gene: Desired,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="F", help="Output file: feather, parquet, CSV or h5ad.", show_default=False
        ),
    ],
    run_toml: RunToml = None,
    h5ad: Moved = None,
    desired_expr: DesiredExpr = 0.0,
    n_propagation: Hops = None,
    response: Response = "derivative",
    cells_csv: CellsCsv = None,
    cells_csv_column: CellsCol = None,
    where: WhereCells = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    radius: Radius = None,
    kernel: Kernel = None,
    beta_scale_factor: BetaScale = None,
    beta_cap: BetaCap = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Set genes to given values, and propagate the change from gene to gene and from cell to cell.

    Example: vcelltools spatial perturb --run-toml run --gene Foxp3 --out ko.feather
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)

    desired = _read_desired(gene, desired_expr)
    _guard_run(force, run_toml, h5ad, [cells_csv], out)
    options = _collect(layer=layer, cluster_annot=cluster_annot, coords=coords, radius=radius, kernel=kernel)
    run = _open(run_toml, h5ad, threads, **options)
    scope = _find_scope(run, cells_csv, cells_csv_column, where)
    settled = _perturb_options(run, beta_scale_factor, beta_cap, n_propagation or 0)
    p = run.perturb(desired, cells=scope, response=response, **settled)
    p.write(out, force=force)
    mean = p.delta.mean(0)
    top = sorted(zip(p.genes, mean.tolist(), strict=True), key=lambda v: -abs(v[1]))[:10]
    o.result({"out": out, "desired": desired, "n_cells": run.tissue.n_cells, "n_genes": len(p.genes),
              "hops": settled["hops"], "response": response, "warnings": list(p.warnings),
              "kernel_error_bound": run.receiver.error_bound, "largest_mean_changes": dict(top)})  # fmt: skip
    o.table(["gene", "mean change"], [[g, v] for g, v in top])
    o.warn(p.warnings)
    o.done(f"wrote {out}")


@app.command("interactions", cls=Command, short_help="Summarise coefficients by cell type")
def interactions(
    out: Out,
    run_toml: RunToml = None,
    h5ad: Moved = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COL", help="obs column of the cell types.")] = None,
    how: Annotated[
        str, typer.Option("--how", help="Statistic over the cells of a type: mean, min, max or sum.")
    ] = "mean",
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="ID", help="Use only this cell and its neighbours.")
    ] = None,
    neighbors: Annotated[int | None, typer.Option("--neighbors", min=0, help="Number of neighbours.")] = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the coefficients of all target genes by cell type: interaction, type, gene, cell type and beta.

    Example: vcelltools spatial interactions --run-toml run --by cell_type --out interactions.csv
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)

    _guard_run(force, run_toml, h5ad, [], out)
    run = _open(run_toml, h5ad, threads, **_collect(layer=layer, cluster_annot=cluster_annot, coords=coords))
    table = run.interactions(by=by, how=how, cell=cell, neighbors=neighbors)
    table.write(out, force=force)
    n = len(table.columns["beta"])
    o.result({"out": out, "n_rows": n, "n_genes": len(run.genes)}, f"{n:,} rows over {len(run.genes)} targets")
    o.done(f"wrote {out}")


@app.command("screen", cls=Command, short_help="Run many perturbations")
def screen(
    out: Annotated[
        Path, typer.Option("--out", "--output-dir", "-o", metavar="D", help="Folder to write.", show_default=False)
    ],
    genes: Annotated[
        str | None, typer.Option("--genes", "--gene", metavar="A,B|all|FILE", help="Genes to perturb.")
    ] = None,
    run_toml: RunToml = None,
    h5ad: Moved = None,
    mode: Annotated[str, typer.Option("--mode", help="Kind of perturbation: knockout or overexpress.")] = "knockout",
    batch_toml: Annotated[
        Path | None,
        typer.Option("--batch-toml", metavar="F", help="TOML file with combinations of perturbations to run."),
    ] = None,
    keep_deltas: Annotated[
        bool, _flag("--keep-deltas", "Also write the simulated expression of every perturbation.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Number of processes.")] = 1,
    dask: Annotated[str | None, typer.Option("--dask", metavar="ADDR", help="Address of a Dask scheduler.")] = None,
    n_propagation: Hops = None,
    response: Response = "derivative",
    cells_csv: CellsCsv = None,
    cells_csv_column: CellsCol = None,
    where: WhereCells = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    radius: Radius = None,
    kernel: Kernel = None,
    beta_scale_factor: BetaScale = None,
    beta_cap: BetaCap = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Perturb one gene after another, and write how each cell type responds.

    Example: vcelltools spatial screen --run-toml run --genes all --workers 2 --out screen
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)
    from vcelltools.cli.options import refuse
    from vcelltools.errors import UsageError
    from vcelltools.spatial.screen import read_batch, read_genes

    refuse({"--genes": genes, "--where": where}, "--batch-toml") if batch_toml is not None else None
    options = _collect(layer=layer, cluster_annot=cluster_annot, coords=coords, radius=radius, kernel=kernel)
    run = _open(run_toml, h5ad, threads, **options)
    settled = _perturb_options(run, beta_scale_factor, beta_cap, n_propagation or 0)
    tasks, chosen, scope = None, [], None
    if batch_toml is not None:
        batch = read_batch(batch_toml, hops=settled["hops"], scale=settled["beta_scale_factor"])
        tasks, cells_csv = batch.tasks, cells_csv or (Path(batch.cells_csv) if batch.cells_csv else None)
    elif genes is None:
        raise UsageError("no genes to perturb", hint="--genes or --batch-toml")
    else:
        chosen, scope = read_genes(run, genes), _find_scope(run, cells_csv, cells_csv_column, where)
    r = run.screen(
        chosen, out, mode=mode, tasks=tasks, response=response, cells=scope,
        cells_csv=cells_csv if tasks is not None else None, keep_deltas=keep_deltas, workers=workers, dask=dask,
        force=force, progress=o.progress, **settled,
    )  # fmt: skip
    o.result(r.to_json())
    o.table(["perturbation", "score"], [[k, v] for k, v in r.top.items()])
    o.done(f"wrote {out}: {r.n_done} perturbations in {r.seconds:.1f} s, {r.n_skipped} were finished before")


@app.command("field", cls=Command, short_help="Compute transition vectors on an embedding")
def field(
    gene: Desired,
    out: Out,
    basis: Annotated[str, typer.Option("--basis", metavar="KEY", help="obsm key of the embedding.")] = "X_umap",
    n_neighbors: Annotated[
        int, typer.Option("--n-neighbors", min=1, help="Number of neighbours on the embedding.")
    ] = 150,
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of the softmax.")] = 0.05,
    keep_null: Annotated[bool, _flag("--keep-null", "Do not subtract the uniform probability.")] = False,
    unit_directions: Annotated[bool, _flag("--unit-directions", "Average unit vectors instead of steps.")] = False,
    grid_out: Annotated[
        Path | None, typer.Option("--grid-out", metavar="F", help="JSON file to write with the vectors on a grid.")
    ] = None,
    run_toml: RunToml = None,
    h5ad: Moved = None,
    desired_expr: DesiredExpr = 0.0,
    n_propagation: Hops = None,
    response: Response = "derivative",
    cells_csv: CellsCsv = None,
    cells_csv_column: CellsCol = None,
    where: WhereCells = None,
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    radius: Radius = None,
    kernel: Kernel = None,
    beta_scale_factor: BetaScale = None,
    beta_cap: BetaCap = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write how a perturbation moves every cell on an embedding: CellID, dx and dy.

    Example: vcelltools spatial field --run-toml run --gene Foxp3 --basis X_umap --out field.feather
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)

    desired = _read_desired(gene, desired_expr)
    _guard_run(force, run_toml, h5ad, [cells_csv], out, grid_out)
    options = _collect(layer=layer, cluster_annot=cluster_annot, coords=coords, radius=radius, kernel=kernel)
    run = _open(run_toml, h5ad, threads, **options)
    f = run.field(
        desired, basis=basis, n_neighbors=n_neighbors, temperature=temperature, keep_null=keep_null,
        unit_directions=unit_directions, cells=_find_scope(run, cells_csv, cells_csv_column, where), response=response,
        **_perturb_options(run, beta_scale_factor, beta_cap, n_propagation or 0),
    )  # fmt: skip
    f.write(out, force=force)
    if grid_out is not None:
        f.write_grid(grid_out, force=force)
    length = float((f.vectors**2).sum(1).mean() ** 0.5)
    o.result({"out": out, "grid_out": grid_out, "n_cells": len(f.cells), "desired": desired, "rms_step": length},
             f"{len(f.cells):,} cells; root mean square step {length:.4g}")  # fmt: skip
    o.done(f"wrote {out}")


@app.command("report", cls=Command, short_help="Write an HTML report with tables and maps")
def report(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="F.html", help="HTML file to write.")] = Path(
        "spatial_report.html"
    ),
    perturbation: Annotated[
        list[str] | None,
        typer.Option("--perturbation", metavar="G[=V]", help="Perturbation to show; may be repeated."),
    ] = None,
    run_toml: RunToml = None,
    h5ad: Moved = None,
    n_propagation: Hops = None,
    response: Response = "derivative",
    layer: Layer = None,
    cluster_annot: Annot = None,
    coords: Coords = None,
    radius: Radius = None,
    kernel: Kernel = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an HTML report: what the data support, maps of targets and ligands, and a knockout before and after.

    Example: vcelltools spatial report --run-toml run --perturbation Foxp3 --out report.html
    """
    from vcelltools.cli.output import Output

    o = Output(json=json, quiet=quiet, verbose=verbose)
    _start(h5ad)
    from vcelltools.spatial.report import write_report

    desired = _read_desired(perturbation, 0.0) if perturbation else None
    _guard_run(force, run_toml, h5ad, [], out)
    options = _collect(layer=layer, cluster_annot=cluster_annot, coords=coords, radius=radius, kernel=kernel)
    run = _open(run_toml, h5ad, threads, **options)
    hops = _perturb_options(run, None, None, n_propagation or 0)["hops"]
    write_report(run, out, desired=desired, response=response, hops=hops, force=force)
    o.result({"out": out, "n_genes": len(run.genes), "perturbation": desired})
    o.done(f"wrote {out}")
