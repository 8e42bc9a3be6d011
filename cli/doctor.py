"""``vcelltools doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Accelerators = Annotated[bool, typer.Option("--accelerators/--no-accelerators", help="Start JAX and list its devices.")]


def doctor(
    accelerators: Accelerators = True, json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Check this machine: versions, threads, caches, HDF5 filters, disk and accelerators.

    Each problem is listed with a remedy. The disk is timed by writing 64 MB to the working directory; the file is then
    removed.

    Example: vcelltools doctor --json > machine.json
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_doctor import show_doctor
    from vcelltools.project.doctor import check_machine

    show_doctor(Output(json=json, quiet=quiet, verbose=verbose), check_machine(accelerators=accelerators))
