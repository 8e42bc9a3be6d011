"""``vcelltools features``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, GeneTable, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def features(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="Edge list, gene sets (.gmt), annotations (.gaf), table of numbers (.parquet, .npy, .npz, .csv, "
            ".h5ad), or store.",
        ),
    ],
    out: Annotated[Path, Opt("--out", "-o", help="Parquet to write.")] = Path("features.parquet"),
    perturbations: Annotated[
        Path | None,
        Opt(
            help="Names of the perturbations to describe: a text file, one per line, or a CSV with target_gene.",
            show_default=False,
        ),
    ] = None,
    stores: Annotated[
        list[Path] | None,
        Opt("--store", help="Store whose perturbations are described; may be repeated.", show_default=False),
    ] = None,
    dims: Annotated[int, Opt(min=1, help="Maximum number of columns per source.")] = 64,
    weights: Annotated[
        list[float] | None,
        Opt(
            "--weight",
            help="Weight of a source: give one per source, in the same order [default: 1].",
            show_default=False,
        ),
    ] = None,
    varm: Annotated[str | None, Opt(help="Key of varm in an h5ad source.", show_default=False)] = None,
    gene_table: GeneTable = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compute features of perturbations, for models that predict perturbations without training cells.

    The command reduces every source to at most --dims columns, standardises and weights them, and joins the columns of
    all sources. From a store it uses the control cells, in which it finds genes that vary together. Names match by
    symbol or by Ensembl id. Without --perturbations and --store, every gene of the sources gets a row.

    Example: vcelltools features reactome_pairs.csv go.gaf.gz --store stores/kolf --out features.parquet
    """
    from vcelltools.descriptors.make import features as make

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = make(
        sources, out, perturbations=perturbations, stores=stores or (), dims=dims, weights=weights or (), varm=varm,
        aliases=gene_table, force=force, progress=output.progress,
    )  # fmt: skip
    rows = [[name, c["kind"], c["columns"], c["known"]] for name, c in r.coverage.items()]
    output.result(r.to_json())
    output.table(["source", "kind", "columns", "known"], rows, title=f"{r.n_wanted:,} perturbations")
    if r.missing:
        few = ", ".join(r.missing[:5]) + (", …" if len(r.missing) > 5 else "")
        output.warn([f"{len(r.missing):,} of {r.n_wanted:,} perturbations are in no source: {few}"])
    output.done(
        f"wrote {r.out}: {r.n_covered:,} perturbations × {r.n_features:,} features", ("train", "--features", r.out)
    )
