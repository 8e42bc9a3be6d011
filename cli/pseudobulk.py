"""``vcelltools pseudobulk``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    Dask,
    FeatureType,
    Force,
    Genome,
    InFile,
    Json,
    Layer,
    Modality,
    Quiet,
    Threads,
    Verbose,
)
from vcelltools.cli.output import Output


def pseudobulk(
    file: InFile,
    by: Annotated[
        str,
        typer.Option("--by", metavar="A,B", help="obs columns; every combination of their labels is a group."),
    ] = "target_gene",
    out: Annotated[Path, typer.Option("--out", "-o", help="h5ad file to write.")] = Path("pseudobulk.h5ad"),
    min_cells: Annotated[int, typer.Option(min=1, help="Leave out combinations with fewer cells.")] = 1,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    threads: Threads = None,
    dask: Dask = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Sum the counts of every combination of labels, in one pass, for DESeq2, edgeR and pydeseq2.

    X holds the sums. The layers hold the mean count per cell and the share of cells with a count. obs holds the labels,
    the number of cells and the total counts.

    Example: vcelltools pseudobulk atlas.h5ad --by target_gene,batch --out bulk.h5ad
    """
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.differential.pseudobulk import pseudobulk as run

    o = Output(json=json, quiet=quiet, verbose=verbose)
    columns = [c.strip() for c in by.split(",") if c.strip()]
    r = run(
        file, out, by=columns, min_cells=min_cells, modality=modality, layer=layer,
        feature_type=feature_type, genome=genome, force=force, threads=threads,
        dask=dask, progress=o.progress,
    )  # fmt: skip
    for n in r.notes:
        o.note(n)
    o.result(r.to_json(), f"{r.n_groups:,} combinations × {r.n_genes:,} genes of {r.n_cells:,} cells")
    o.done(f"wrote {out}: the smallest combination has {r.smallest:,} cells", ("inspect", out))
