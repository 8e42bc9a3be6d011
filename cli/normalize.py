"""``vcelltools normalize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    FeatureType,
    Force,
    Genome,
    InFile,
    Json,
    Layer,
    LibraryCol,
    Modality,
    Quiet,
    Threads,
    Verbose,
)
from vcelltools.cli.output import Output


def normalize(
    file: InFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="h5ad file to write.", show_default=False)],
    target_sum: Annotated[str, typer.Option(metavar="X", help="Target sum of counts per cell, or median.")] = "10000",
    log: Annotated[bool, typer.Option("--log/--no-log", help="Apply log1p.")] = True,
    base: Annotated[float | None, typer.Option(help="Base of the logarithm [default: e].", show_default=False)] = None,
    library_size: LibraryCol = None,
    keep_counts: Annotated[
        bool, typer.Option("--keep-counts", help="Keep the counts in a layer named counts.")
    ] = False,
    compression: Annotated[str, typer.Option(help="Compression: none, gzip, lzf or zstd.")] = "none",
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
    """Scale every cell to 10,000 counts, apply log1p and write an h5ad.

    The result equals scanpy's normalize_total and log1p, in memory that does not grow with the file. The layout
    (CSR, CSC or dense) is kept, and values become float32.

    Example: vcelltools normalize atlas.h5mu --modality rna --out atlas.log1p.h5ad
    """
    from vcelltools.cli.hints import find_comparing
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.files.normalize import normalize as run
    from vcelltools.files.normalize import parse_target_sum

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = run(
        file, target_sum=parse_target_sum(target_sum), progress=output.progress,
        out=out, log=log, base=base, library_size=library_size, keep_counts=keep_counts, compression=compression,
        modality=modality, layer=layer, feature_type=feature_type, genome=genome, threads=threads, force=force,
    )  # fmt: skip
    for n in r.notes:
        output.note(n)
    output.warn(r.warnings)
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.n_empty:,} cells without counts")
    text = f"wrote {r.out} ({r.layout}, float32, {r.target_sum:g} counts per cell); score takes it as --truth"
    output.done(text, find_comparing(r.out) if log else ("inspect", r.out))
