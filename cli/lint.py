"""``vcelltools lint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Threads, Verbose

Vcc = Annotated[Path, typer.Argument(metavar="SUBMISSION.vcc", show_default=False, help=".vcc file to check.")]
Genes = Annotated[Path | None, typer.Option("--genes", "-g", help="CSV of the challenge's genes, in order.")]
Perturbations = Annotated[
    Path | None, typer.Option("--perturbations", "--perts", metavar="CSV", help="2026: the file pert_counts.csv.")
]
Contexts = Annotated[
    str | None,
    typer.Option(
        "--contexts", metavar="A,B,C", help="2026: contexts that the file must hold [default: those that it has]."
    ),
]
CellsPer = Annotated[
    int | None, typer.Option("--cells-per-perturbation", min=1, help="2026: cells per perturbation [default: 400].")
]
Control = Annotated[str, typer.Option("--control", metavar="LABEL", help="Label of the controls.")]
Day = Annotated[str | None, typer.Option("--date", metavar="YYYY-MM-DD", help="2025: date on which the rules applied.")]
MaxBytes = Annotated[
    int | None, typer.Option("--max-bytes", min=1, help="Maximum size of the unpacked file, in bytes.")
]


def lint(
    path: Vcc,
    genes: Genes = None,
    perturbations: Perturbations = None,
    contexts: Contexts = None,
    cells_per_perturbation: CellsPer = None,
    control: Control = "non-targeting",
    day: Day = None,
    max_bytes: MaxBytes = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a .vcc: the archive, its members and the prediction inside. The exit code is 3 if anything is wrong.

    Example: vcelltools lint submission.vcc --genes gene_names.csv
    """
    from vcelltools.challenge import vcc
    from vcelltools.cli.output import Output

    output = Output(json=json, quiet=quiet, verbose=verbose)
    result = vcc.lint(
        path, genes=genes, perturbations=perturbations, contexts=vcc.parse_contexts(contexts),
        cells_per_perturbation=cells_per_perturbation, control=control, day=vcc.parse_day(day), max_bytes=max_bytes,
        threads=threads, progress=output.progress,
    )  # fmt: skip
    output.warn(result.warnings)
    output.result(result.to_json(), *([f"problem: {p}" for p in result.problems] or ["no problem found"]))
    output.done(f"{path}: {'good' if result.ok else _count(len(result.problems))} ({result.rules} rules)")
    if not result.ok:
        raise typer.Exit(3)


def _count(n: int) -> str:
    return f"{n} problem{'' if n == 1 else 's'}"
