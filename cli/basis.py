"""``vcelltools basis``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Threads, Verbose

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="Data sets, or folders that hvg --stats wrote [default: all of vcelltools.toml].",
    ),
]
Top = Annotated[int | None, typer.Option("--top", min=1, help="How many genes [default: 2000].", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="F",
        help="Gene list, best first; the reasons go beside it, in .json [default: basis.txt].",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option("--rule", help="mean-rank, or intersection: HVG in all data sets, then in most [default: mean-rank]."),
]
ForceGene = Annotated[
    list[str] | None, typer.Option("--force-gene", metavar="GENE", help="Always in; may be repeated.")
]
Targets = Annotated[bool, typer.Option("--force-targets", help="All perturbation targets are in (vcelltools.toml).")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="REGEX", help="Never in: '^MT-', '^RP[SL]'; may be repeated.")
]
Aliases = Annotated[Path | None, typer.Option("--aliases", metavar="TSV", help="Two columns: alias, symbol or id.")]
Flavor = Annotated[str, typer.Option("--flavor", help="How each data set ranks its genes (see hvg).")]


def basis(
    files: Files = None,
    top: Top = None,
    out: Out = None,
    rule: Rule = None,
    force_gene: ForceGene = None,
    force_targets: Targets = False,
    exclude: Exclude = None,
    aliases: Aliases = None,
    flavor: Flavor = "seurat_v3",
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose the genes that all stores share, over all data sets, gene identity reconciled.

    basis.json says of every gene why it is in: its rank in each data set, and whether it was forced.

    Example: vcelltools basis kolf.h5mu k562.h5ad --top 2000 --exclude '^MT-' --out basis.txt
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_store import show_basis
    from vcelltools.io.atomic import check_output
    from vcelltools.pipelines.store_run import choose_basis_job

    o = Output(json=json, quiet=quiet, verbose=verbose)
    options = {"top": top, "rule": rule, "force": force_gene, "exclude": exclude, "aliases": aliases}
    run, default = choose_basis_job(files, options, force_targets=force_targets)
    target = check_output(out or default, force=force, sources=files or ())
    result = run(flavor=flavor, threads=threads, progress=o.progress)
    return show_basis(o, result, result.write(target, force=force))
