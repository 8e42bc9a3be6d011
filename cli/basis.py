"""``vcelltools basis``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, GeneTable, Json, Quiet, Threads, Verbose

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="Data sets, or folders written by hvg --stats [default: all in vcelltools.toml].",
    ),
]
Top = Annotated[int | None, typer.Option("--top", min=1, help="Number of genes [default: 2000].", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="F",
        help="Gene list to write, best first, with the reasons in a .json beside it [default: basis.txt].",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="Method: mean-rank, or intersection (genes variable in all data sets first) [default: mean-rank].",
    ),
]
ForceGene = Annotated[
    list[str] | None,
    typer.Option("--force-gene", metavar="GENE", help="Gene to include in any case; may be repeated."),
]
Targets = Annotated[
    bool, typer.Option("--force-targets", help="Include every perturbation target of the data sets in vcelltools.toml.")
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="REGEX", help="Regular expression of genes to exclude, such as '^MT-'; may be repeated."
    ),
]
Flavor = Annotated[str, typer.Option("--flavor", help="Flavor that ranks the genes of each data set (see hvg).")]


def basis(
    files: Files = None,
    top: Top = None,
    out: Out = None,
    rule: Rule = None,
    force_genes: ForceGene = None,
    force_targets: Targets = False,
    exclude: Exclude = None,
    gene_table: GeneTable = None,
    flavor: Flavor = "seurat_v3",
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose the genes that all stores share, after reconciling gene identities across data sets.

    basis.json gives the reason for every gene: its rank in each data set, and whether it was forced.

    Example: vcelltools basis kolf.h5mu k562.h5ad --top 2000 --exclude '^MT-' --out basis.txt
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_store import show_basis
    from vcelltools.io.write.atomic import put_beside
    from vcelltools.io.write.guard import Target, guard_outputs
    from vcelltools.stores.building.request import choose_basis_job

    o = Output(json=json, quiet=quiet, verbose=verbose)
    options = {
        "top": top,
        "rule": rule,
        "force_genes": force_genes,
        "exclude": exclude,
        "aliases": gene_table,
    }
    run, default, reads = choose_basis_job(files, options, force_targets=force_targets)
    target = out or default
    guard_outputs([Target(target), Target(put_beside(target, ".json"), "json")], reads=reads, force=force)
    result = run(flavor=flavor, threads=threads, progress=o.progress)
    return show_basis(o, result, result.write(target, force=force))
