"""``vcelltools verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Stores = Annotated[
    list[Path] | None,
    typer.Argument(metavar="STORE", show_default=False, help="Stores [default: all under the configured folder]."),
]


def verify(stores: Stores = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> int:
    """Check every byte of a store: checksums, schema, counts, and that the values follow from the counts.

    Exit code 3 where anything is wrong; each problem is one line.

    Example: vcelltools verify stores/kolf
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    start()
    from vcelltools.cli.render_store import show_verified
    from vcelltools.pipelines.store import find_stores, verify_store

    o = Output(json=json, quiet=quiet, verbose=verbose)
    found = [verify_store(p, progress=o.progress) for p in (stores or find_stores())]
    return show_verified(o, found)
