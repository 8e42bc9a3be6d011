"""``vcelltools build-store``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    Dask,
    FeatureType,
    Force,
    GeneTable,
    Genome,
    Json,
    Layer,
    LibraryCol,
    Modality,
    Quiet,
    Threads,
    Verbose,
)

File = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE", show_default=False, help="Data set to build from [default: all in vcelltools.toml]."
    ),
]
BasisFile = Annotated[
    Path | None,
    typer.Option("--basis", metavar="F", help="Gene list, one gene per line, in order [default: basis.txt]."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the stores [default: stores].")]
Name = Annotated[
    str | None, typer.Option("--name", metavar="N", help="Name of the store [default: the name of the file].")
]
PertCol = Annotated[str | None, typer.Option("--pert-col", metavar="C", help="obs column with the perturbation.")]
Control = Annotated[
    list[str] | None, typer.Option("--control", metavar="LABEL", help="Label of the control cells; may be repeated.")
]
Unperturbed = Annotated[
    bool, typer.Option("--unperturbed", help="Treat all cells as controls, because none is perturbed.")
]
NonInteger = Annotated[
    str | None,
    typer.Option(
        "--non-integer", metavar="WHAT", help="Fractional counts: refuse, or round (stochastically, with a fixed seed)."
    ),
]
GroupBy = Annotated[
    list[str] | None,
    typer.Option("--group-by", metavar="C", help="obs column within which controls are matched; may be repeated."),
]
LineCol = Annotated[str | None, typer.Option("--cell-line-col", metavar="C", help="obs column with the cell line.")]
Direction = Annotated[
    str | None,
    typer.Option(
        "--direction", metavar="D",
        help="How the perturbations change their targets: crispri, knockout, knockdown, crispra, overexpression or "
        "treatment. Models then keep effects that lower a target apart from those that raise it.",
    ),
]  # fmt: skip
DirectionCol = Annotated[
    str | None, typer.Option("--direction-col", metavar="C", help="obs column with the direction, instead.")
]
IdCol = Annotated[str | None, typer.Option("--gene-id-col", metavar="C", help="var column with the Ensembl ids.")]
NameCol = Annotated[str | None, typer.Option("--gene-name-col", metavar="C", help="var column with the gene symbols.")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="C", help="Boolean obs column of the cells to use; may be repeated."),
]
MinCells = Annotated[
    int | None, typer.Option("--min-cells", min=1, metavar="K", help="Minimum number of cells in a group [default: 1].")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", help="Preset with the column names of a public atlas (see docs/atlases.md): kolf, replogle-rpe1, …"
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option("--stats", metavar="DIR", help="Folder written by hvg --stats, whose library sizes are reused."),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, metavar="J", show_default=False,
        help="Number of data sets to build at the same time, each in a process with its share of the threads "
        "[default: one for "
        "every 4 cores, with 1 GB free for each]. One data set keeps two to four cores busy, so jobs help on "
        "larger machines and with slow storage.",
    ),
]  # fmt: skip
Sums = Annotated[
    str | None,
    typer.Option(
        "--sums", metavar="S",
        help="Genes whose group means are stored: all, basis, or auto [default: auto]. From files stored gene by "
        "gene (CSC), "
        "auto reads only the basis genes; all reads every gene, so that predict can fill genes "
        "outside the basis.",
    ),
]  # fmt: skip
Memory = Annotated[
    float,
    typer.Option(
        "--memory", min=0, metavar="GB",
        help="Memory limit for building one data set. Sums that do not fit (groups × all genes × 8 bytes) are added "
        "up on disk, which takes somewhat longer.",
    ),
]  # fmt: skip
Plan = Annotated[
    bool,
    typer.Option("--plan", help="Show what would be built, from which files and how large, without building anything."),
]


def build_store(
    file: File = None,
    basis: BasisFile = None,
    out: Out = None,
    name: Name = None,
    pert_col: PertCol = None,
    control: Control = None,
    unperturbed: Unperturbed = False,
    non_integer: NonInteger = None,
    group_by: GroupBy = None,
    cell_line_col: LineCol = None,
    direction: Direction = None,
    direction_col: DirectionCol = None,
    gene_id_col: IdCol = None,
    gene_name_col: NameCol = None,
    gene_table: GeneTable = None,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    library_size: LibraryCol = None,
    min_cells: MinCells = None,
    keep: Keep = None,
    preset: Preset = None,
    stats: Stats = None,
    dask: Dask = None,
    sums: Sums = None,
    jobs: Jobs = None,
    memory: Memory = 0.5,
    plan: Plan = False,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int | None:
    """Build a compact store of one data set: CP10K+log1p values (float16) and exact counts of the basis genes.

    Each group is stored next to its controls, ready for sampling, and every byte has a checksum. To resume an
    interrupted build, run the same command again. Without FILE, all data sets in vcelltools.toml are built:
    complete stores are kept, and one that fails does not stop the others.

    Example: vcelltools build-store k562.h5ad --basis basis.txt --pert-col gene --control non-targeting --group-by batch
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.cli.render_store import show_built, show_store_plans
    from vcelltools.stores.building.request import build_stores, choose_datasets, plan_stores

    o = Output(json=json, quiet=quiet, verbose=verbose)
    options = {
        "pert_col": pert_col, "control": control, "unperturbed": unperturbed or None,
        "non_integer": non_integer, "group_by": group_by, "cell_line_col": cell_line_col,
        "direction": direction, "direction_col": direction_col,
        "gene_id_col": gene_id_col, "gene_name_col": gene_name_col,
        "modality": modality, "layer": layer, "feature_type": feature_type, "genome": genome,
        "library_size": library_size,
        "min_cells": min_cells, "keep": keep, "preset": preset, "stats": stats, "sums": sums,
    }  # fmt: skip
    job = choose_datasets(file, basis=basis, out=out, name=name, options=options, aliases=gene_table)
    if plan:
        show_store_plans(o, plan_stores(job, threads=threads, memory_bytes=1e9 * memory))
        return None
    done = build_stores(
        job, force=force, threads=threads, dask=dask, jobs=jobs, memory_bytes=1e9 * memory, progress=o.progress
    )
    return show_built(o, done)
