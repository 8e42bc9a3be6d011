"""``vcelltools doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Accelerators = Annotated[bool, typer.Option("--accelerators/--no-accelerators", help="Start JAX and ask what it sees.")]


def doctor(
    accelerators: Accelerators = True, json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Check this machine: versions, threads, caches, HDF5 filters, disk, accelerators; each problem with a remedy.

    64 MB are written to the working directory to time its disk, and removed.

    Example: vcelltools doctor --json > machine.json
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_doctor import show_doctor
    from vcelltools.pipelines.doctor import check_machine

    show_doctor(Output(json=json, quiet=quiet, verbose=verbose), check_machine(accelerators=accelerators))
