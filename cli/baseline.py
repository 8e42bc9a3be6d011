"""``vcelltools baseline``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose, refuse
from vcelltools.cli.output import Output
from vcelltools.errors import UsageError

Opt = typer.Option


def baseline(
    kind: Annotated[
        str | None,
        Opt(
            "--kind",
            help="Of a truth: mean [default] or control-mean. From stores: perturbation-mean [default], ridge or "
            "control-mean.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[Path | None, Opt("--truth", metavar="REAL", help="The true cells.", show_default=False)] = None,
    store: Annotated[
        list[Path] | None,
        Opt(
            "--store",
            help="A store to learn from; may be repeated [default, without --truth: all of the configured folder].",
        ),
    ] = None,
    split: Annotated[Path | None, Opt(help="With stores: what is held out.", show_default=False)] = None,
    features: Annotated[
        Path | None, Opt(help="With stores: features of the perturbations, as train reads them.")
    ] = None,
    rules: Annotated[int | None, Opt(help="With stores: 2025 or 2026, as predict's.")] = None,
    out: Annotated[Path, Opt("--out", "-o", help="The baseline, as an h5ad.")] = Path("baseline.h5ad"),
    pert_col: Annotated[
        str | None, Opt("--pert-col", metavar="C", help="With --truth: obs column [default: target_gene].")
    ] = None,
    control: Annotated[
        str | None, Opt(metavar="LABEL", help="With --truth: the control's label [default: non-targeting].")
    ] = None,
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a baseline's prediction: what a model has to beat.

    With --truth (it looks at the answer, but tells no perturbation from another): every cell of every perturbation is
    one profile, the mean of the group means (mean) or of the controls (control-mean), log1p-normalised; the real
    controls follow. `score` puts the mean beside every metric without such a file.

    From stores (it learns): from the training groups, as `train --model` does, for the held-out ones, as `predict`
    does. perturbation-mean is each perturbation's own mean effect in the other cell lines.

    Example: vcelltools baseline --truth real.h5ad --out base.h5ad

    vcelltools baseline --kind ridge --store stores/kolf --split split.toml --out ridge.h5ad
    """
    o = Output(json=json, quiet=quiet, verbose=verbose)
    if truth is None:
        kind = kind or "perturbation-mean"
        foreign = {"--pert-col": pert_col, "--control": control, "--layer": layer, "--threads": threads}
        refuse(foreign, "a baseline from stores", hint="--truth REAL makes one of the true cells")
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
    from vcelltools.scoring.evaluate import CONTROL, PERT_COL, Options

    refuse({"--store": store, "--split": split, "--features": features, "--rules": rules}, "--truth")
    if kind == "ridge":
        raise UsageError(f"--kind {kind}: not a mean of the true cells", hint="--store STORE, for a model that learns")
    if kind not in (None, "mean", "perturbation-mean", "control-mean"):
        raise UsageError(f"--kind {kind}: unknown with --truth", hint="one of: mean, control-mean")
    kind = "control-mean" if kind == "control-mean" else "mean"  # cell-eval's mean is one of the perturbations' means
    check_output(out, force=force, sources=[truth])
    options = Options(
        compat="cell-eval", pert_col=pert_col or PERT_COL, control=control or CONTROL, layer=layer, threads=threads
    )
    _, n, scale = write_baseline(truth, out, kind=kind, options=options, force=force, progress=o.progress)
    o.result({"out": str(out), "kind": kind, "n_cells": n})
    same = " --to-cp10k" if scale == "counts" else ""  # the baseline is log1p
    named = {"--pert-col": pert_col, "--control": control}
    same += "".join(f" {k} {shlex.quote(v)}" for k, v in named.items() if v is not None)
    o.done(f"wrote {out}: the {kind} baseline in {n:,} cells; next: vcelltools score {out} --truth {truth}{same}")
