"""``vcelltools predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def predict(
    run: Annotated[Path, Opt("--run", help="The folder that train wrote.", show_default=False)],
    out: Annotated[Path, Opt("--out", "-o", help="The prediction, an h5ad.", show_default=False)],
    perturbations: Annotated[
        Path | None, Opt(help="CSV: target_gene, n_cells, context [default: what was held out].", show_default=False)
    ] = None,
    line: Annotated[
        list[str] | None,
        Opt(
            "--line",
            help="A cell line to predict in; may be repeated, of one store [default: those with held-out groups].",
        ),
    ] = None,
    cells: Annotated[
        int | None, Opt(min=1, help="Cells a perturbation, where no CSV says so [default: as held out; of a CSV 400].")
    ] = None,
    rules: Annotated[
        int | None,
        Opt(help="2025: log1p with controls. 2026: counts, no controls. Checked [default: as 2025, unchecked]."),
    ] = None,
    genes: Annotated[Path | None, Opt(help="The genes wanted, in order (CSV) [default: the source's].")] = None,
    source: Annotated[Path | None, Opt(help="The file behind the store, where it moved.", show_default=False)] = None,
    basis_only: Annotated[bool, Opt("--basis-only", help="The basis genes alone.")] = False,
    pert_col: Annotated[
        str | None, Opt(metavar="C", help="obs column of the labels [default: as score's, target_gene].")
    ] = None,
    control: Annotated[
        str | None, Opt(help="Label of the controls [default: the store's; by rules non-targeting].")
    ] = None,
    seed: Annotated[int, Opt(min=0, help="Of the control cells that are moved.")] = 0,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predict cells with a trained run, streamed to an h5ad in bounded memory.

    Cells are control cells of the line, moved by the predicted effect. Genes outside the basis move by what the
    perturbation did to them in training, else they stay the control cells' own. But for the 2026 rules, up to 2,000 of
    the line's controls go with them.

    Example: vcelltools predict --run runs/rn --out pred.h5ad --rules 2025 --perturbations pert_counts.csv
    """
    options = {k: v for k, v in locals().items() if k not in ("line", "json", "quiet", "verbose")}
    from vcelltools.model.mesh import choose_platform
    from vcelltools.pipelines.predict import predict as predict_run

    if pert_col is None:  # the truth that score will compare with has it under the configured name
        from vcelltools.config import load_config

        options["pert_col"] = (None if rules else load_config()[0].score.pert_col) or "target_gene"
    output = Output(json=json, quiet=quiet, verbose=verbose)
    choose_platform(tpu=False)
    r = predict_run(**options, lines=tuple(line or ()), progress=output.progress)
    output.warn(r.warnings)
    output.result(
        r.to_json(),
        f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.n_perturbations:,} perturbations by {r.model}; "
        f"{r.n_basis:,} genes predicted, {r.n_filled:,} filled from training, {r.n_control_genes:,} as in the controls",
    )
    then = f"prep {r.out} --genes GENES.csv --out SUBMISSION.vcc" if rules else f"score {r.out}"
    output.done(f"wrote {r.out} (peak memory {r.peak_memory_bytes / 1e9:.2f} GB); next: vcelltools {then}")
