"""``vcelltools simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vcelltools.cli.options import Force, Json, Quiet, Threads, Verbose, refuse
from vcelltools.cli.output import Output

_SPATIAL = ("clusters", "pattern", "radius", "ligand_share", "per_cell_beta", "confound", "nonlinear")
_SHARED = ("out", "cells", "genes", "seed", "spatial", "force", "json", "quiet", "verbose")


def simulate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help=".h5ad or .h5mu file to write.", show_default=False)],
    cells: Annotated[int, typer.Option(min=1, help="Total number of cells.")] = 10_000,
    genes: Annotated[int, typer.Option(min=1, help="Total number of genes.")] = 36_000,
    perturbations: Annotated[int, typer.Option(min=0, help="Number of perturbations besides the control.")] = 100,
    cell_lines: Annotated[int, typer.Option(min=1, help="Number of cell lines among which the cells are divided.")] = 1,
    batches: Annotated[int, typer.Option(min=1, help="Batches per cell line.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for drawing cells.")] = 0,
    like: Annotated[
        str, typer.Option(help="Style of the column names and the control label: generic or kolf.")
    ] = "generic",
    layout: Annotated[str, typer.Option(help="Layout: csr, csc or dense.")] = "csr",
    dtype: Annotated[str, typer.Option(help="Data type of the values: uint8 … int64, float32 or float64.")] = "float32",
    index_dtype: Annotated[str, typer.Option(help="Data type of the indices: int32 or int64.")] = "int32",
    compression: Annotated[str, typer.Option(help="Compression: none, gzip, lzf or zstd.")] = "none",
    level: Annotated[
        int | None, typer.Option(help="Compression level: gzip 1 to 12 [default: 4], zstd 1 to 22 [default: 3].")
    ] = None,
    chunk_len: Annotated[
        int | None,
        typer.Option(min=1, help="Values per chunk, rounded to whole rows in a dense matrix [default: 262144]."),
    ] = None,
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="Store a dense matrix contiguously, without compression.")
    ] = False,
    modality: Annotated[str | None, typer.Option(help="Modality of an h5mu [default: rna].")] = None,
    guides: Annotated[
        bool, typer.Option("--guides", help="h5mu: also write a modality named guide with the guide counts.")
    ] = False,
    depth: Annotated[
        float | None,
        typer.Option(help="Median number of molecules per cell [default: 6819, or less with fewer than 12,000 genes]."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Fraction of non-zero entries, instead of --depth.")] = None,
    multiplets: Annotated[
        float | None, typer.Option(help="Fraction of cells with two guides, A|B [default: 0, or 0.1 with --like kolf].")
    ] = None,
    unassigned: Annotated[
        float | None, typer.Option(help="Fraction of cells without a guide [default: 0, or 0.02 with --like kolf].")
    ] = None,
    control_share: Annotated[float, typer.Option(help="Fraction of control cells.")] = 0.12,
    inert: Annotated[float, typer.Option(help="Fraction of perturbations that change only their target.")] = 0.2,
    escape: Annotated[float, typer.Option(help="Fraction of perturbed cells that do not respond.")] = 0.0,
    shared: Annotated[float, typer.Option(help="Fraction of each effect that all cell lines share.")] = 0.7,
    lineages: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of lineages, whose lines share expression and effects; each does not express some targets "
            "[default: lines are independent].",
        ),
    ] = 0,
    activated: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of cell lines, the last ones, that are screened by CRISPRa: their effects are reversed, and "
            "the obs column direction is written.",
        ),
    ] = 0,
    effect_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Random seed for the biology: atlases with the same one share genes, lines and effects [default: "
            "--seed].",
        ),
    ] = None,
    perturbation_universe: Annotated[
        int | None,
        typer.Option(help="Size of the pool from which --perturbations are drawn [default: --perturbations]."),
    ] = None,
    first_cell_line: Annotated[int, typer.Option(min=1, help="Index of the first cell line.")] = 1,
    genes_drop: Annotated[float, typer.Option(help="Fraction of the genes to leave out of this atlas.")] = 0.0,
    spatial: Annotated[
        bool,
        typer.Option(
            "--spatial", help="Simulate a tissue with known regulation instead [default: 2000 cells, 120 genes]."
        ),
    ] = False,
    clusters: Annotated[int, typer.Option(min=1, help="--spatial: number of cell types.")] = 3,
    pattern: Annotated[
        str, typer.Option(help="--spatial: arrangement of the cell types: layers, patches or gradient.")
    ] = "layers",
    radius: Annotated[float, typer.Option(help="--spatial: radius within which cells receive ligands.")] = 100.0,
    ligand_share: Annotated[
        float, typer.Option(min=0, max=1, help="--spatial: fraction of target genes that ligands regulate.")
    ] = 0.5,
    per_cell_beta: Annotated[
        bool, typer.Option("--per-cell-beta", help="--spatial: let coefficients vary across the tissue.")
    ] = False,
    confound: Annotated[
        float, typer.Option(min=0, help="--spatial: strength of a hidden confounder of ligands and targets.")
    ] = 0.0,
    nonlinear: Annotated[bool, typer.Option("--nonlinear", help="--spatial: let responses saturate.")] = False,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Simulate a realistic Perturb-seq atlas with known effects.

    Counts are negative binomial with gene means, dispersions and depths like real 10x data. Perturbations lower
    their target and act on other genes, directly or through programmes that perturbations share. The same
    seed gives the same file with any number of threads.

    The command also writes sim.truth.h5ad (log2 fold changes by perturbation and cell line, means),
    sim.truth_cells.parquet (the identity of every cell) and sim.features.parquet (gene embeddings that
    predict effects).

    Example: vcelltools simulate --out sim.h5mu --cells 20000 --perturbations 200 --like kolf

    With --spatial, it simulates a tissue in which known coefficients of TFs and received ligands set the expression of
    target genes. It also writes a network with true and decoy edges, the truth, and the true responses to knockouts.

    To simulate two laboratories that share one biology, pass --effect-seed 1 to both, and another --seed, --genes-drop
    0.1 and --first-cell-line 3 to the second.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("ctx", "json", "quiet", "verbose")}
    from vcelltools.cli.start import start

    start()
    output = Output(json=json, quiet=quiet, verbose=verbose)
    given = [k for k in arguments if str(ctx.get_parameter_source(k)).endswith("COMMANDLINE")]
    if spatial:
        refuse({_say(k): True for k in given if k not in _SPATIAL + _SHARED}, "--spatial")
        sizes = {k: arguments[k] for k in ("cells", "genes") if k in given}
        return _simulate_tissue(
            output, out, seed=seed, force=force, **sizes, **{k: arguments[k] for k in _SPATIAL}
        )  # fmt: skip
    refuse(
        {_say(k): True for k in given if k in _SPATIAL},
        "--spatial",
        without=True,
        hint="add --spatial to simulate a tissue",
    )
    arguments = {k: v for k, v in arguments.items() if k != "spatial" and k not in _SPATIAL}
    from vcelltools.simulation.simulate import simulate as run

    r = run(**arguments, progress=output.progress)
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.nnz:,} non-zeros ({r.density:.2%})")
    output.done(f"wrote {r.out} and its truth {r.truth.name}", ("inspect", r.out))
    return None


def _say(name: str) -> str:
    return "--" + name.replace("_", "-")


def _simulate_tissue(output: Output, out: Path, **options: Any) -> None:
    from vcelltools.spatial.simulate import simulate_tissue

    r = simulate_tissue(out, **options)
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.n_edges:,} planted edges")
    output.done(f"wrote {r.out}, its network and truth", ("spatial", "check", r.out, "--network", r.network))
