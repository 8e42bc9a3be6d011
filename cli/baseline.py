"""``vcelltools baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose
from vcelltools.cli.output import Output


def baseline(
    truth: Annotated[Path, typer.Option("--truth", metavar="REAL", help="The true cells.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The baseline, as an h5ad.")] = Path("baseline.h5ad"),
    kind: Annotated[str, typer.Option("--kind", help="perturbation-mean or control-mean.")] = "perturbation-mean",
    pert_col: Annotated[str, typer.Option("--pert-col", metavar="C", help="obs column.")] = "target_gene",
    control: Annotated[str, typer.Option("--control", metavar="LABEL", help="The control's label.")] = "non-targeting",
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the mean baseline of a data set: what a prediction has to beat.

    Every cell of every perturbation is the mean of the group means (or of the controls), log1p-normalised; the real
    controls follow. `score` puts the same baseline beside every metric without such a file.

    vcelltools baseline --truth real.h5ad --kind perturbation-mean --out base.h5ad
    """
    from vcelltools.io.atomic import check_output
    from vcelltools.scoring.baseline import write_baseline
    from vcelltools.scoring.evaluate import Options

    o = Output(json=json, quiet=quiet, verbose=verbose)
    check_output(out, force=force)
    options = Options(compat="cell-eval", pert_col=pert_col, control=control, layer=layer, threads=threads)
    _, n = write_baseline(truth, out, kind=kind, options=options, force=force, progress=o.progress)
    o.result({"out": str(out), "kind": kind, "n_cells": n})
    o.done(f"{out}: the {kind} baseline in {n:,} cells. Next: vcelltools score {out} --truth {truth}")
