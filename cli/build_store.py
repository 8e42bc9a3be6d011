"""``vcelltools build-store``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Modality, Quiet, Threads, Verbose

File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", show_default=False, help="One data set [default: all of vcelltools.toml]."),
]
BasisFile = Annotated[
    Path | None, typer.Option("--basis", metavar="F", help="The genes, one a line, in order [default: basis.txt].")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the stores [default: stores].")]
Name = Annotated[str | None, typer.Option("--name", metavar="N", help="Name of the store [default: the file's].")]
PertCol = Annotated[str | None, typer.Option("--pert-col", metavar="C", help="obs column with the perturbation.")]
Control = Annotated[
    list[str] | None, typer.Option("--control", metavar="LABEL", help="Label of control cells; may be repeated.")
]
GroupBy = Annotated[
    list[str] | None,
    typer.Option("--group-by", metavar="C", help="obs column within which controls are matched; may be repeated."),
]
LineCol = Annotated[str | None, typer.Option("--cell-line-col", metavar="C", help="obs column with the cell line.")]
IdCol = Annotated[str | None, typer.Option("--gene-id-col", metavar="C", help="var column with Ensembl ids.")]
NameCol = Annotated[str | None, typer.Option("--gene-name-col", metavar="C", help="var column with symbols.")]
MinCells = Annotated[
    int | None, typer.Option("--min-cells", min=1, metavar="K", help="Leave smaller groups out [default: 1].")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", help="Column names of a public atlas, as docs/atlases.md lists them: kolf, replogle-rpe1, …"
    ),
]
Stats = Annotated[Path | None, typer.Option("--stats", metavar="DIR", help="What hvg --stats kept: library sizes.")]
Dask = Annotated[
    str | None, typer.Option("--dask", metavar="ADDR", help="Read on a Dask cluster: its address, or local.")
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, metavar="J", show_default=False,
        help="Data sets built at the same time, each in a process with its share of the threads [default: one for "
        "every 4 cores, with 1 GB free for each]. One data set keeps two to four cores busy by itself: jobs pay on "
        "larger machines, and where the storage is slow.",
    ),
]  # fmt: skip
Sums = Annotated[
    str | None,
    typer.Option(
        "--sums", metavar="S",
        help="Genes whose mean per group is kept: all, basis, or auto [default: auto]. Files stored gene by gene (CSC) "
        "are read in the basis genes alone by auto; all reads them whole, and lets predict fill genes "
        "outside the basis.",
    ),
]  # fmt: skip
Memory = Annotated[
    float,
    typer.Option(
        "--memory", min=0, metavar="GB",
        help="What building one data set may hold. Sums that do not fit (groups × all genes × 8 bytes) lie on disk, "
        "three times slower.",
    ),
]  # fmt: skip
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be built, from what, how large; then stop.")]


def build_store(
    file: File = None,
    basis: BasisFile = None,
    out: Out = None,
    name: Name = None,
    pert_col: PertCol = None,
    control: Control = None,
    group_by: GroupBy = None,
    cell_line_col: LineCol = None,
    gene_id_col: IdCol = None,
    gene_name_col: NameCol = None,
    modality: Modality = None,
    layer: Layer = None,
    min_cells: MinCells = None,
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
    """Build a compact store of one data set: float16 CP10K+log1p of the basis genes, and their exact counts.

    Groups and controls lie side by side, ready to be sampled; every byte has a checksum. A run that was stopped
    continues where it was when the same command runs again. Without FILE all data sets of vcelltools.toml are built;
    stores that are whole already are kept, and one that fails does not stop the others.

    Example: vcelltools build-store k562.h5ad --basis basis.txt --pert-col gene --control non-targeting --group-by batch
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.cli.render_store import show_built, show_store_plans
    from vcelltools.pipelines.store_run import build_stores, choose_datasets, plan_stores

    o = Output(json=json, quiet=quiet, verbose=verbose)
    options = {
        "pert_col": pert_col, "control": control, "group_by": group_by, "cell_line_col": cell_line_col,
        "gene_id_col": gene_id_col, "gene_name_col": gene_name_col, "modality": modality, "layer": layer,
        "min_cells": min_cells, "preset": preset, "stats": stats, "sums": sums,
    }  # fmt: skip
    job = choose_datasets(file, basis=basis, out=out, name=name, options=options)
    if plan:
        show_store_plans(o, plan_stores(job, threads=threads, memory_bytes=1e9 * memory))
        return None
    done = build_stores(
        job, force=force, threads=threads, dask=dask, jobs=jobs, memory_bytes=1e9 * memory, progress=o.progress
    )
    return show_built(o, done)
