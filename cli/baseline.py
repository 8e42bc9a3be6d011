"""``vcelltools baseline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.hints import find_free, find_scoring
from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def baseline(
    kind: Annotated[
        str | None,
        Opt(
            "--kind",
            help="With --truth: mean [default] or control-mean. From stores: perturbation-mean [default], ridge or "
            "control-mean.",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None, Opt("--truth", metavar="REAL", help="File of the true cells.", show_default=False)
    ] = None,
    stores: Annotated[
        list[Path] | None,
        Opt(
            "--store",
            help="Store to learn from; may be repeated [default: without --truth, all stores in the configured "
            "folder].",
        ),
    ] = None,
    split: Annotated[Path | None, Opt(help="From stores: TOML file of held-out groups.", show_default=False)] = None,
    features: Annotated[Path | None, Opt(help="From stores: perturbation features, as for train.")] = None,
    rules: Annotated[int | None, Opt(help="From stores: challenge rules to check, 2025 or 2026.")] = None,
    out: Annotated[Path, Opt("--out", "-o", help="h5ad file to write.")] = Path("baseline.h5ad"),
    pert_col: Annotated[
        str | None,
        Opt(
            "--pert-col",
            metavar="C",
            help="With --truth: obs column of the perturbation [default: [score], or target_gene].",
        ),
    ] = None,
    control: Annotated[
        str | None,
        Opt(metavar="LABEL", help="With --truth: label of the controls [default: [score], or non-targeting]."),
    ] = None,
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the prediction of a baseline, which a model has to beat.

    With --truth, every cell of every perturbation gets one profile: the mean of the group means (mean) or of the
    controls (control-mean), log1p-normalised. Such a baseline knows the truth on average but does not distinguish
    perturbations. The real controls follow. `score` reports the mean baseline for every metric without such a file.

    Without --truth, the baseline learns from the training groups of stores, as `train --model` does, and predicts the
    held-out groups, as `predict` does. perturbation-mean is a perturbation's mean effect in the other cell lines.

    Example: vcelltools baseline --truth real.h5ad --out base.h5ad

    vcelltools baseline --kind ridge --store stores/kolf --split split.toml --out ridge.h5ad
    """
    from vcelltools.config import load_config
    from vcelltools.prediction.baseline import BaselineResult
    from vcelltools.prediction.baseline import baseline as write

    o = Output(json=json, quiet=quiet, verbose=verbose)
    if truth is not None:  # so that score finds the columns that it is configured to read
        configured = load_config()[0].score
        pert_col, control = pert_col or configured.pert_col, control or configured.control
    r = write(
        out, truth=truth, stores=stores or (), kind=kind, split=split, features=features, rules=rules,
        pert_col=pert_col, control=control, layer=layer, force=force, threads=threads, progress=o.progress,
    )  # fmt: skip
    o.result(r.to_json())
    if not isinstance(r, BaselineResult):
        return o.done(
            f"wrote {out}: {kind or 'perturbation-mean'} of {r.n_perturbations:,} perturbations in {r.n_cells:,} cells",
            find_scoring(out),
        )
    words: list[object] = ["score", out, "--truth", truth, "--report", find_free("report.html")]
    words += ["--to-cp10k"] if r.scale == "counts" else []  # the baseline is log1p
    named = {"--pert-col": pert_col, "--control": control}
    words += [w for k, v in named.items() if v is not None for w in (k, v)]
    return o.done(f"wrote {out}: the {r.kind} baseline in {r.n_cells:,} cells", words)
