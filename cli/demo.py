"""``vcelltools demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Dir = Annotated[Path, typer.Option("--dir", metavar="D", help="The demo's folder.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny data: shows the commands, not what a model can learn.")]
Again = Annotated[bool, typer.Option("--force", help="Run every step again, over what is there.")]


def demo(
    dir: Dir = Path("vcelltools-demo"),
    quick: Quick = False,
    force: Again = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Walk the whole road on simulated data, minutes on two cores, ending in report.html.

    Three simulated laboratories; a model is trained on two of them and predicts the third, whose perturbed cells it
    has never seen; the prediction is scored. Every step is a public command, shown as it runs. Run again, the demo
    skips the steps whose outputs are whole.

    Example: vcelltools demo --dir demo
    """
    import sys

    from vcelltools.cli.output import Output
    from vcelltools.cli.render_demo import show_demo
    from vcelltools.pipelines.demo import run_demo

    o = Output(json=json, quiet=quiet, verbose=verbose)
    to = sys.stderr if json else None  # with --json stdout holds one object: the demo's own
    result = run_demo(dir, quick=quick, force=force, say=o.note, output=to, quiet=quiet, verbose=verbose)
    show_demo(o, result)
