"""``vcelltools init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the data files.")] = Path(),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write [default: vcelltools.toml in FOLDER].", show_default=False),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented vcelltools.toml from the data files found in a folder.

    Perturbation, control, batch and gene columns are guessed as in inspect; every guess is written
    with its evidence, so that you can check it.

    Example: cd project; vcelltools init
    """
    from vcelltools.config import CONFIG_NAME
    from vcelltools.project.init import init as run

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = run(folder, out=out, force=force, progress=output.progress)
    output.warn([f"left out {name}: {reason}" for name, reason in r.skipped])
    output.warn(r.warnings)
    output.result(r.to_json(), *r.datasets)
    n = len(r.datasets)
    if n == 0:
        return output.done(f"wrote {r.out} without a data set: add yours to it")
    return output.done(
        f"wrote {r.out} with {n} data set{'' if n == 1 else 's'}; check it",
        ("basis",) if r.out.resolve() == Path(CONFIG_NAME).resolve() else (),
    )
