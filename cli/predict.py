"""``vcelltools predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.hints import find_scoring
from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def predict(
    run: Annotated[Path, Opt("--run", help="Folder of the run, written by train.", show_default=False)],
    out: Annotated[Path, Opt("--out", "-o", help="h5ad file to write.", show_default=False)],
    perturbations: Annotated[
        Path | None,
        Opt(
            help="CSV of the perturbations to predict: target_gene, n_cells, context [default: the held-out groups].",
            show_default=False,
        ),
    ] = None,
    lines: Annotated[
        list[str] | None,
        Opt(
            "--line",
            help="Cell line to predict in, STORE.LINE or LINE; may be repeated within one store "
            "[default: lines with held-out groups].",
        ),
    ] = None,
    cells: Annotated[
        int | None,
        Opt(
            min=1,
            help="Cells per perturbation if the CSV gives none [default: as many as are held out, or 400 with a CSV].",
        ),
    ] = None,
    rules: Annotated[
        int | None,
        Opt(
            help="Challenge rules to follow and check: 2025 (log1p with controls) or 2026 (counts without) "
            "[default: as 2025, unchecked]."
        ),
    ] = None,
    genes: Annotated[
        Path | None, Opt(help="CSV of the genes to write, in order [default: genes of the source file].")
    ] = None,
    source: Annotated[Path | None, Opt(help="Source file of the store, if it was moved.", show_default=False)] = None,
    basis_only: Annotated[bool, Opt("--basis-only", help="Predict only the basis genes.")] = False,
    pert_col: Annotated[
        str | None, Opt(metavar="C", help="obs column for the labels [default: as in [score], or target_gene].")
    ] = None,
    control: Annotated[
        str | None, Opt(help="Label of the controls [default: as in the store; non-targeting with --rules].")
    ] = None,
    emission: Annotated[
        str,
        Opt(
            help="How an effect becomes cells: resampled controls that are moved, counts (negative binomial), or "
            "pseudobulk (one profile repeated)."
        ),
    ] = "resampled",
    fit_emission: Annotated[
        bool,
        Opt("--fit-emission/--no-fit-emission", help="Reduce effects that do not stand out below what a test detects."),
    ] = True,
    direction: Annotated[
        str | None,
        Opt(
            metavar="D",
            help="How the predicted perturbations change their targets: crispri, knockout, knockdown, crispra, "
            "overexpression or treatment [default: as the held-out groups, or the other perturbations of the line].",
        ),
    ] = None,
    seed: Annotated[int, Opt(min=0, help="Random seed for choosing control cells.")] = 0,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predict cells with a trained run, and stream them to an h5ad in bounded memory.

    Predicted cells are control cells of the line, shifted by the predicted effect. Genes outside the basis shift by
    their effect in the training data where it is known, and otherwise keep the values of the control cells. Except
    under the 2026 rules, up to 2,000 control cells of the line are written too.

    Example: vcelltools predict --run runs/rn --out pred.h5ad --rules 2025 --perturbations pert_counts.csv
    """
    from vcelltools.model.mesh import choose_platform
    from vcelltools.prediction.predict import predict as predict_run

    if pert_col is None:  # score compares with a truth that uses the configured column name
        from vcelltools.config import load_config

        pert_col = (None if rules else load_config()[0].score.pert_col) or "target_gene"
    output = Output(json=json, quiet=quiet, verbose=verbose)
    choose_platform(tpu=False)
    r = predict_run(
        run=run, out=out, perturbations=perturbations, cells=cells, rules=rules, genes=genes, source=source,
        basis_only=basis_only, control=control, emission=emission, fit_emission=fit_emission, direction=direction,
        seed=seed, force=force,        pert_col=pert_col, lines=tuple(lines or ()), progress=output.progress,
    )  # fmt: skip
    output.warn(r.warnings)
    output.result(
        r.to_json(),
        f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.n_perturbations:,} perturbations by {r.model}; "
        f"{r.n_basis:,} genes predicted, {r.n_filled:,} filled from training, {r.n_control_genes:,} as in the controls",
    )
    text = f"wrote {r.out} (peak memory {r.peak_memory_bytes / 1e9:.2f} GB)"
    if rules and genes is None:
        return output.done(f"{text}; prep packs it into a .vcc with the challenge's list of genes")
    if not rules:
        then = find_scoring(r.out)
        return output.done(text if then else f"{text}; score compares it with the true cells, given as --truth", then)
    words: list[object] = ["prep", r.out, "--rules", rules, "--genes", genes, "--out", r.out.with_suffix(".vcc")]
    return output.done(text, words + (["--perturbations", perturbations] if rules == 2026 and perturbations else []))
