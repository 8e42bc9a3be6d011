"""``vcelltools normalize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, InFile, Json, Layer, Modality, Quiet, Threads, Verbose
from vcelltools.cli.output import Output


def normalize(
    file: InFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new h5ad.", show_default=False)],
    target_sum: Annotated[str, typer.Option(metavar="X", help="Counts a cell, or median.")] = "10000",
    log: Annotated[bool, typer.Option("--log/--no-log", help="Take log1p.")] = True,
    base: Annotated[float | None, typer.Option(help="Of the logarithm [default: e].", show_default=False)] = None,
    library_size: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="obs column with library sizes [default: counted].")
    ] = None,
    keep_counts: Annotated[bool, typer.Option("--keep-counts", help="Keep the counts as the layer counts.")] = False,
    compression: Annotated[str, typer.Option(help="none, gzip, lzf or zstd.")] = "none",
    modality: Modality = None,
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Scale every cell to 10,000 counts, take log1p, write an h5ad.

    Equal to scanpy's normalize_total and log1p, in memory that does not grow with the file. The layout stays
    (CSR, CSC, dense); values become float32.

    Example: vcelltools normalize atlas.h5mu --modality rna --out atlas.log1p.h5ad
    """
    arguments = {k: v for k, v in locals().items() if k not in ("json", "quiet", "verbose", "file", "target_sum")}
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.pipelines.normalize import normalize as run
    from vcelltools.pipelines.normalize import parse_target_sum

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = run(file, target_sum=parse_target_sum(target_sum), progress=output.progress, **arguments)
    for n in r.notes:
        output.note(n)
    output.warn(r.warnings)
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.n_empty:,} cells without counts")
    output.done(
        f"wrote {r.out} ({r.layout}, float32, {r.target_sum:g} a cell); next: vcelltools score PRED --truth {r.out}"
    )
