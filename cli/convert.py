"""``vcelltools convert`` and ``vcelltools sample``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcelltools.cli.options import Force, InFile, Json, Layer, Modality, Quiet, Threads, Verbose
from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.pipelines.convert import ConvertResult

Out = Annotated[Path, typer.Option("--out", "-o", help="The new h5ad.", show_default=False)]
Layers = Annotated[
    list[str] | None, typer.Option("--layers", metavar="L", help="Copy this layer too (repeat), or all of them: all.")
]
Compression = Annotated[str, typer.Option(help="none, gzip, lzf or zstd.")]


def convert(
    file: InFile,
    out: Out,
    layout: Annotated[str | None, typer.Option(help="csr, csc or dense [default: as it is].")] = None,
    dtype: Annotated[str | None, typer.Option(help="uint8 … int64, float32, float64 [default: as it is].")] = None,
    index_dtype: Annotated[str | None, typer.Option(help="int32 or int64 [default: as it is].")] = None,
    compression: Compression = "none",
    level: Annotated[int | None, typer.Option(help="Of gzip (1 to 12; 4) or zstd (1 to 22; 3).")] = None,
    chunk_len: Annotated[
        int | None, typer.Option(min=1, help="Values a chunk, of a dense matrix in whole rows [default: 262144].")
    ] = None,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="No chunks, not compressed.")] = False,
    modality: Modality = None,
    layer: Layer = None,
    layers: Layers = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write an h5mu modality, 10x file, zarr store or h5ad as an h5ad, in the layout you choose.

    Streams: memory does not grow with the file. obs, var, obsm, varm and uns are kept; values that a dtype cannot
    hold are an error, never rounded.

    Example: vcelltools convert atlas.h5mu --modality rna --layout csc --dtype uint16 --out atlas.h5ad
    """
    options = dict(locals())
    from vcelltools.pipelines.convert import convert as run

    _write(run, options)


def sample(
    file: InFile,
    out: Out,
    n: Annotated[int | None, typer.Option("--n", "-n", help="So many cells.", show_default=False)] = None,
    frac: Annotated[float | None, typer.Option("--frac", help="Or: this share.", show_default=False)] = None,
    per_group: Annotated[
        int | None, typer.Option("--per-group", help="Or: up to so many of every group of --by.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", metavar="COLUMN", help="obs column: its proportions are kept (-n, --frac), or its groups are meant."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="COLUMN=A,B", help="Only cells with these labels (repeat: all must hold)."),
    ] = None,
    matching: Annotated[
        Path | None, typer.Option("--matching", metavar="FILE", help="Only cells whose --by label this file has too.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    compression: Compression = "none",
    modality: Modality = None,
    layer: Layer = None,
    layers: Layers = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write some of the cells as an h5ad: by their labels, at random (the same seed chooses the same), or both.

    Example: vcelltools sample atlas.h5mu --per-group 200 --by feature_call --out small.h5ad

    The truth of a prediction, still counts (then: normalize): vcelltools sample screen.h5ad --where batch=3
    --by target_gene --matching pred.h5ad --out measured.h5ad
    """
    options = dict(locals())
    from vcelltools.pipelines.choose import parse_where
    from vcelltools.pipelines.convert import sample as run

    options["where"] = parse_where(where or [])

    _write(run, options)


def _write(run: Callable[..., ConvertResult], options: dict[str, Any]) -> None:
    """Call the pipeline with a command's options and print what it wrote."""
    output = Output(**{k: options.pop(k) for k in ("json", "quiet", "verbose")})
    r = run(options.pop("file"), **{**options, "layers": options["layers"] or []}, progress=output.progress)
    for n in r.notes:
        output.note(n)
    output.warn(r.warnings)
    stored = "" if r.nnz is None else f", {r.nnz:,} non-zeros"
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes{stored}")
    output.done(f"wrote {r.out} ({r.layout}, {r.dtype}); next: vcelltools inspect {r.out}")
