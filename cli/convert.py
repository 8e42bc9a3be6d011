"""``vcelltools convert`` and ``vcelltools sample``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcelltools.cli.options import FeatureType, Force, Genome, InFile, Json, Layer, Modality, Quiet, Threads, Verbose
from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.files.convert import ConvertResult

Out = Annotated[Path, typer.Option("--out", "-o", help="h5ad file to write.", show_default=False)]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="L", help="Layer to copy as well, or all; may be repeated."),
]
Compression = Annotated[str, typer.Option(help="Compression: none, gzip, lzf or zstd.")]


def convert(
    file: InFile,
    out: Out,
    layout: Annotated[str | None, typer.Option(help="Layout: csr, csc or dense [default: unchanged].")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Data type of the values: uint8 … int64, float32 or float64 [default: unchanged]."),
    ] = None,
    index_dtype: Annotated[
        str | None, typer.Option(help="Data type of the indices: int32 or int64 [default: unchanged].")
    ] = None,
    compression: Compression = "none",
    level: Annotated[
        int | None, typer.Option(help="Compression level: gzip 1 to 12 [default: 4], zstd 1 to 22 [default: 3].")
    ] = None,
    chunk_len: Annotated[
        int | None,
        typer.Option(min=1, help="Values per chunk, rounded to whole rows in a dense matrix [default: 262144]."),
    ] = None,
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="Store the matrix contiguously, without compression.")
    ] = False,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    layers: Layers = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert an h5mu modality, 10x file, zarr store or h5ad to an h5ad, in the layout you choose.

    The file is streamed, so memory does not grow with it. obs, var, obsm, varm and uns are kept. Values that a dtype
    cannot hold are an error; they are never rounded.

    Example: vcelltools convert atlas.h5mu --modality rna --layout csc --dtype uint16 --out atlas.h5ad
    """
    options = {
        "file": file, "out": out, "layout": layout, "dtype": dtype, "index_dtype": index_dtype, "compression":
        compression, "level": level, "chunk_len": chunk_len, "contiguous": contiguous, "modality": modality, "layer":
        layer, "layers": layers, "threads": threads, "force": force, "json": json, "quiet": quiet, "verbose": verbose,
    }  # fmt: skip
    from vcelltools.files.convert import convert as run

    _write(run, options)


def sample(
    file: InFile,
    out: Out,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Number of cells to sample.", show_default=False)] = None,
    frac: Annotated[
        float | None, typer.Option("--frac", help="Fraction of cells to sample, instead of -n.", show_default=False)
    ] = None,
    per_group: Annotated[
        int | None,
        typer.Option("--per-group", help="Maximum number of cells per --by group, instead of -n.", show_default=False),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="COLUMN",
            help="obs column whose proportions are kept (with -n, --frac) or whose groups are sampled (with "
            "--per-group).",
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=A,B",
            help="Keep only cells with these labels; may be repeated, and all conditions must hold.",
        ),
    ] = None,
    matching: Annotated[
        Path | None,
        typer.Option(
            "--matching", metavar="FILE", help="Keep only cells whose --by label (and line) also occurs in this file."
        ),
    ] = None,
    thin: Annotated[
        float | None,
        typer.Option(
            "--thin",
            metavar="SHARE",
            help="Keep each molecule with this chance, for the same cells at a lower depth (counts alone).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    compression: Compression = "none",
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    layers: Layers = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a subset of the cells as an h5ad, chosen by label, at random (with a fixed seed), or both.

    Example: vcelltools sample atlas.h5mu --per-group 200 --by feature_call --out small.h5ad

    The truth for a prediction, as counts to normalize next: vcelltools sample screen.h5ad --where batch=3
    --by target_gene --matching pred.h5ad --out measured.h5ad
    """
    options = {
        "file": file, "out": out, "n": n, "frac": frac, "per_group": per_group, "by": by, "matching": matching,
        "thin": thin, "seed": seed, "compression": compression, "modality": modality, "layer": layer,
        "feature_type": feature_type, "genome": genome,
        "layers": layers, "threads": threads, "force": force, "json": json, "quiet": quiet, "verbose": verbose,
    }  # fmt: skip
    from vcelltools.files.chosen_cells import parse_where
    from vcelltools.files.convert import sample as run

    options["where"] = parse_where(where or [])

    _write(run, options)


def _write(run: Callable[..., ConvertResult], options: dict[str, Any]) -> None:
    """Call the library with a command's options and print what it wrote."""
    output = Output(**{k: options.pop(k) for k in ("json", "quiet", "verbose")})
    r = run(options.pop("file"), **{**options, "layers": options["layers"] or []}, progress=output.progress)
    for n in r.notes:
        output.note(n)
    output.warn(r.warnings)
    stored = "" if r.nnz is None else f", {r.nnz:,} non-zeros"
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes{stored}")
    output.done(f"wrote {r.out} ({r.layout}, {r.dtype})", ("inspect", r.out))
