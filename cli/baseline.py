"""``vcelltools baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose
from vcelltools.cli.output import Output
from vcelltools.errors import UsageError

Opt = typer.Option


def baseline(
    kind: Annotated[str, Opt("--kind", help="control-mean, perturbation-mean or ridge.")] = "perturbation-mean",
    truth: Annotated[Path | None, Opt("--truth", metavar="REAL", help="The true cells.", show_default=False)] = None,
    store: Annotated[list[Path] | None, Opt("--store", help="Stores to learn from.", show_default=False)] = None,
    split: Annotated[Path | None, Opt(help="With stores: what is held out.", show_default=False)] = None,
    features: Annotated[Path | None, Opt(help="With stores: perturbation features.", show_default=False)] = None,
    rules: Annotated[int | None, Opt(help="With stores: 2025 or 2026.", show_default=False)] = None,
    out: Annotated[Path, Opt("--out", "-o", help="The baseline, as an h5ad.")] = Path("baseline.h5ad"),
    pert_col: Annotated[str, Opt("--pert-col", metavar="C", help="With --truth: obs column.")] = "target_gene",
    control: Annotated[str, Opt(metavar="LABEL", help="With --truth: the control's label.")] = "non-targeting",
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a baseline's prediction: what a model has to beat.

    With --truth: every cell of every perturbation is the mean of the group means (or of the controls),
    log1p-normalised; the real controls follow. `score` puts the same baseline beside every metric without such a file.

    Without: the baseline learns from the training groups of the stores, as `train --model` does, and predicts the
    held-out ones, as `predict` does.

    Example: vcelltools baseline --truth real.h5ad --kind perturbation-mean --out base.h5ad

    vcelltools baseline --kind ridge --store stores/kolf --split split.toml --out ridge.h5ad
    """
    o = Output(json=json, quiet=quiet, verbose=verbose)
    if truth is None:
        from vcelltools.pipelines.train_command import prepare_baseline

        options = {"store": store, "split": split, "features": features}
        r = prepare_baseline(kind, options)(out, rules=rules, force=force, progress=o.progress)
        o.result(r.to_json())
        o.done(
            f"wrote {out}: {kind} of {r.n_perturbations:,} perturbations in {r.n_cells:,} cells; "
            f"next: vcelltools score {out}"
        )
        return
    from vcelltools.io.atomic import check_output
    from vcelltools.scoring.baseline import write_baseline
    from vcelltools.scoring.evaluate import Options

    if store or split or features or rules:
        raise UsageError("--truth and --store are two ways to a baseline", hint="leave one of them out")
    if kind not in ("control-mean", "perturbation-mean", "ridge"):
        raise UsageError(f"--kind {kind}: unknown", hint="one of: control-mean, perturbation-mean, ridge")
    if kind == "ridge":
        raise UsageError(f"--kind {kind}: not a mean of the true cells", hint="--store STORE, for a model that learns")
    check_output(out, force=force, sources=[truth])
    options = Options(compat="cell-eval", pert_col=pert_col, control=control, layer=layer, threads=threads)
    _, n = write_baseline(truth, out, kind=kind, options=options, force=force, progress=o.progress)
    o.result({"out": str(out), "kind": kind, "n_cells": n})
    o.done(f"wrote {out}: the {kind} baseline in {n:,} cells; next: vcelltools score {out} --truth {truth}")
