"""``vcelltools inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from vcelltools.cli.options import FeatureType, Genome, InFile, Json, Layer, Modality, Quiet, Verbose, refuse


def inspect(
    file: InFile,
    card: Annotated[
        bool,
        typer.Option(
            "--card", help="Describe the experiment instead: factors, nesting, confounding, replicates, from obs alone."
        ),
    ] = False,
    pert_col: Annotated[
        str | None,
        typer.Option("--pert-col", metavar="C", help="--card: obs column of the perturbation [default: recognised]."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option("--control", metavar="LABEL", help="--card: label of the controls [default: recognised]."),
    ] = None,
    batch_col: Annotated[
        str | None,
        typer.Option("--batch-col", metavar="C", help="--card: obs column of the batches [default: recognised]."),
    ] = None,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int | None:
    """Describe a file without reading all of it: matrices, counts, recognised columns, genes and problems.

    -v lists every column. The exit code is 3 if no matrix of the file can be opened.

    --card says what an experiment can tell: whether effects can be separated from batches, how many replicates there
    are, and whether a score is possible at all.

    Example: vcelltools inspect KOLF.h5mu
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_inspect import show_inspect
    from vcelltools.errors import DataError
    from vcelltools.files.inspect import inspect as run

    if card:
        from vcelltools.cli.render_inspect import show_card
        from vcelltools.files.card import make_card

        found = make_card(
            file, pert_col=pert_col, control=control, batch_col=batch_col, modality=modality, layer=layer,
            feature_type=feature_type, genome=genome
        )  # fmt: skip
        show_card(Output(json=json, quiet=quiet, verbose=verbose), found)
        return None
    refuse({"--pert-col": pert_col, "--control": control, "--batch-col": batch_col}, "a description without --card")
    report = run(file, modality=modality, layer=layer, feature_type=feature_type, genome=genome)
    show_inspect(Output(json=json, quiet=quiet, verbose=verbose), report)
    return DataError.exit_code if report.opened is None else None
