"""``vcelltools demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Dir = Annotated[Path, typer.Option("--dir", metavar="D", help="Folder to write the demo to.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Use tiny data, which shows the commands but not what a model can learn.")
]
Again = Annotated[
    bool, typer.Option("--force", help="Run every step again, and replace the results of an earlier demo.")
]


def demo(
    dir: Dir = Path("vcelltools-demo"),
    quick: Quick = False,
    force: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole workflow on simulated data, in minutes on two cores, and write report.html.

    The demo simulates three laboratories. A model is trained on two of them and predicts the third, whose perturbed
    cells it has never seen; then the prediction is scored. Every step is a public command, printed as it runs. A second
    run skips the steps whose outputs are complete.

    Example: vcelltools demo --dir demo
    """
    import sys

    from vcelltools.cli.output import Output
    from vcelltools.cli.render_demo import show_demo
    from vcelltools.project.demo import run_demo

    o = Output(json=json, quiet=quiet, verbose=verbose)
    to = sys.stderr if json else None  # with --json, stdout holds a single object, which belongs to the demo
    result = run_demo(dir, quick=quick, force=force, say=o.note, output=to, quiet=quiet, verbose=verbose)
    show_demo(o, result)
