"""``vcelltools init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the data files lie.")] = Path(),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write [default: vcelltools.toml in FOLDER].", show_default=False),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented vcelltools.toml from the data files found in a folder.

    Perturbation, control, batch and gene columns are guessed as inspect guesses them; every guess stands in the
    file with its evidence, for you to check.

    Example: cd project; vcelltools init
    """
    from vcelltools.pipelines.init import init as run

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = run(folder, out=out, force=force, progress=output.progress)
    output.warn([f"left out {name}: {reason}" for name, reason in r.skipped])
    output.result(r.to_json(), "\n".join(r.datasets))
    n = len(r.datasets)
    found = f"{n} data set{'' if n == 1 else 's'}; check it" if n else "no data set: describe yours in it"
    output.done(f"wrote {r.out} with {found}, then: vcelltools basis")
