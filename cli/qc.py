"""``vcelltools qc``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import FeatureType, Force, Genome, Json, Layer, Modality, Quiet, Threads, Verbose, refuse

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE", show_default=False, help="h5ad, h5mu, 10x h5, 10x mtx folder, zarr store or batch file."
    ),
]
BatchKey = Annotated[
    str | None,
    typer.Option("--batch-key", metavar="C", help="obs column of the batch [default: each file is a batch]."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Table to write, with the metrics and flags of every cell.")]
Write = Annotated[
    Path | None,
    typer.Option("--write", metavar="NEW.h5ad", help="Also write the file with the metrics and flags in obs."),
]
Drop = Annotated[bool, typer.Option("--drop", help="With --write: drop flagged cells.")]
MinGenes = Annotated[int, typer.Option("--min-genes", min=0, help="Flag cells with fewer genes as qc_empty.")]
MaxCounts = Annotated[int, typer.Option("--max-counts", min=1, help="Flag cells with more counts as qc_doublet.")]
MaxMt = Annotated[
    float, typer.Option("--max-mt", min=0, help="Flag cells with a larger percentage of mitochondrial counts as qc_mt.")
]
Mads = Annotated[
    float,
    typer.Option(
        "--mads", min=0, help="Flag cells more than this many MADs from the median of their batch as qc_outlier."
    ),
]


def qc(
    files: Files,
    batch_key: BatchKey = None,
    out: Out = Path("qc.parquet"),
    write: Write = None,
    drop: Drop = False,
    min_genes: MinGenes = 200,
    max_counts: MaxCounts = 50_000,
    max_mt: MaxMt = 20.0,
    mads: Mads = 5.0,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the quality of cells, flag poor ones and compare batches.

    The metrics equal scanpy's: total_counts, n_genes_by_counts, pct_counts_mt and pct_counts_in_top_50_genes. qc_pass
    marks the cells without a flag. No cell is dropped unless you pass --drop.

    Example: vcelltools qc merged.h5ad --batch-key experiment --write flagged.h5ad
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start
    from vcelltools.errors import UsageError

    o = Output(json=json, quiet=quiet, verbose=verbose)
    refuse({"--drop": drop and write is None}, "--write", without=True, hint="add --write NEW.h5ad")
    if write is not None and len(files) > 1:
        raise UsageError("--write takes one FILE", hint="to flag several files, use vcelltools atlas merge --qc")
    start(*files)
    from vcelltools.files.qc import Limits, write_flagged
    from vcelltools.files.qc import qc as run
    from vcelltools.io.write.guard import Target, guard_outputs

    targets = [Target(out, "parquet"), *([Target(write, "hdf5")] if write is not None else [])]
    guard_outputs(targets, reads=files, force=force)
    result = run(
        files, batch_key=batch_key, modality=modality, layer=layer,
        feature_type=feature_type, genome=genome, threads=threads, progress=o.progress,
        limits=Limits(min_genes=min_genes, max_counts=max_counts, max_mt=max_mt, mads=mads),
    )  # fmt: skip
    result.write(out, force=force)
    if write is not None:
        write_flagged(
            result, files[0], write, drop=drop, modality=modality, layer=layer,
            feature_type=feature_type, genome=genome, force=force, threads=threads,
            progress=o.progress,
        )  # fmt: skip
    body = {"out": str(out), "written": None if write is None else str(write), **result.to_json()}
    o.result(body, f"{result.n_pass:,} of {len(result.batch):,} cells have no flag")
    o.table(
        ["batch", "cells", "pass", "empty", "doublet", "mt", "outlier", "counts", "genes", "leading", "odd"],
        [
            [r["batch"], r["cells"], r["pass"], r["qc_empty"], r["qc_doublet"], r["qc_mt"], r["qc_outlier"],
             r["median_total_counts"], r["median_n_genes_by_counts"], r["leading_share"], ", ".join(r["odd"])]
            for r in result.report
        ],
    )  # fmt: skip
    o.warn(result.warnings)
    o.done(f"wrote {out}" + (f" and {write}" if write is not None else ""))
