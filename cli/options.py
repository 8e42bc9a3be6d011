"""Define the options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress and notes on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print details, time and memory on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output of the same kind.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Number of worker threads, at most 64 [default: VCELLTOOLS_THREADS, or the usable cores].",
        show_default=False,
    ),
]
Dask = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDR", help="Run on a Dask cluster: the address of its scheduler, or local."),
]
Modality = Annotated[
    str | None,
    typer.Option("--modality", metavar="M", help="Modality of an h5mu file [default: the one that holds the counts]."),
]
FeatureType = Annotated[
    str | None,
    typer.Option(
        "--feature-type",
        metavar="T",
        show_default=False,
        help="Type of the features to use as genes, such as 'Antibody Capture', or all [default: Gene Expression, "
        "where var has types of Cell Ranger].",
    ),
]
Genome = Annotated[
    str | None,
    typer.Option(
        "--genome",
        metavar="G",
        show_default=False,
        help="Genome (species) of the features to use, as var or a 10x file names it [default: all].",
    ),
]
LibraryCol = Annotated[
    str | None,
    typer.Option(
        "--library-col", "--library-size", metavar="C", show_default=False,
        help="obs column with the total counts of each cell over the whole transcriptome, to divide counts by where "
        "the file holds only some of the genes [default: the sum of the cell's counts in the file].",
    ),
]  # fmt: skip
Layer = Annotated[
    str | None,
    typer.Option("--layer", metavar="L", help="Matrix to read: X, raw, or the name of a layer [default: X]."),
]
InFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="Input file: h5ad, h5mu, 10x h5, loom, CSV or TSV; or a 10x mtx folder or zarr store.",
    ),
]

GeneTable = Annotated[
    Path | None,
    typer.Option(
        "--gene-table", "--aliases", metavar="F", show_default=False,
        help="Names of genes: GTF, GFF3, HGNC's complete set, NCBI's gene_info or gene2ensembl, features.tsv, a "
        "BioMart export, or two columns (alias, and symbol or id); basis and build-store default to the setting "
        "aliases in vcelltools.toml.",
    ),
]  # fmt: skip


def refuse(given: dict[str, object], what: str, *, without: bool = False, hint: str = "remove one of the two") -> None:
    """Raise a :class:`UsageError` if an option was given that has no effect with (or ``without``) ``what``."""
    from vcelltools.errors import UsageError

    names = [k for k, v in given.items() if v]
    if names:
        raise UsageError(f"{', '.join(names)} cannot be used {'without' if without else 'with'} {what}", hint=hint)


def refuse_same(first: tuple[str, Path | None], second: tuple[str, Path | None]) -> None:
    """Raise a :class:`UsageError` if two outputs have the same name."""
    from vcelltools.errors import UsageError

    (a, one), (b, other) = first, second
    if one is not None and other is not None and one.absolute() == other.absolute():
        raise UsageError(f"{a} and {b} are both {one}", hint="choose different names")
