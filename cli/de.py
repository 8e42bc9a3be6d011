"""``vcelltools de``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, InFile, Json, Layer, Modality, Quiet, Threads, Verbose, refuse
from vcelltools.cli.output import Output


def de(
    file: InFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="de.parquet, or a .csv.")] = Path("de.parquet"),
    test: Annotated[str, typer.Option("--test", help="wilcoxon or nb.")] = "wilcoxon",
    pert_col: Annotated[str, typer.Option("--pert-col", metavar="C", help="obs column.")] = "target_gene",
    control: Annotated[str, typer.Option("--control", metavar="LABEL", help="The control's label.")] = "non-targeting",
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="C", help="obs column of booleans: the cells to use.")
    ] = None,
    epsilon: Annotated[
        float, typer.Option(min=0, help="Added to both means of a fold change, in counts per ten thousand.")
    ] = 1e-9,
    min_cpm: Annotated[
        float | None,
        typer.Option(min=0, metavar="T", help="Genes at most this CPM in both groups leave before the adjustment."),
    ] = None,
    continuity: Annotated[
        bool, typer.Option("--continuity/--no-continuity", help="wilcoxon: continuity correction.")
    ] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="wilcoxon: exact p where a side has at most 8 cells and nothing is tied.")
    ] = False,
    modality: Modality = None,
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Test every perturbation against the controls, all genes at once, in one pass.

    wilcoxon is the Mann-Whitney U test on log1p CP10K; nb a negative binomial on counts, by the method of moments.

    Example: vcelltools de atlas.h5ad --pert-col perturbation --control non-targeting --out de.parquet
    """
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.io.atomic import check_output
    from vcelltools.pipelines.de import check_name
    from vcelltools.pipelines.de import de as compute

    o = Output(json=json, quiet=quiet, verbose=verbose)
    check_output(out, force=force, sources=[file])
    check_name(out)
    if test == "nb":
        refuse({"--exact": exact, "--no-continuity": not continuity}, "--test nb")
    result = compute(
        file, test=test, pert_col=pert_col, control=control, keep=keep, epsilon=epsilon, min_cpm=min_cpm,
        continuity=continuity, exact=exact, modality=modality, layer=layer, threads=threads, progress=o.progress,
    )  # fmt: skip
    result.write(out, force=force)
    for n in result.notes:
        o.note(n)
    found = sorted(result.significant().items(), key=lambda kv: -kv[1])
    o.table(["perturbation", "genes with FDR < 0.05"], [list(kv) for kv in found])
    o.result({**result.to_json(), "out": str(out)})
    o.done(
        f"wrote {out}: {len(found):,} perturbations × {len(result.genes):,} genes "
        f"against {result.n_controls:,} controls"
    )
