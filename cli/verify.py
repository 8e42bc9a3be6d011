"""``vcelltools verify``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Json, Quiet, Verbose

Stores = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="STORE", show_default=False,
        help="Stores to check, or one folder that atlas fetch wrote [default: all stores in the configured folder].",
    ),
]  # fmt: skip


def verify(stores: Stores = None, json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> int:
    """Check every byte of a store: checksums, schema, counts, and the values against the counts.

    A fetched atlas is hashed again and compared with its manifest. Each problem is printed on one line, and the exit
    code is 3 if there is any.

    Example: vcelltools verify stores/kolf
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    start()
    from vcelltools.cli.render_store import show_verified
    from vcelltools.stores.store import find_stores
    from vcelltools.stores.verify import verify_store

    o = Output(json=json, quiet=quiet, verbose=verbose)
    if stores and len(stores) == 1 and os.path.isdir(stores[0] / "raw"):
        from vcelltools.atlas import verify_folder
        from vcelltools.cli.render_atlas import show_folder_verified

        return show_folder_verified(o, verify_folder(stores[0], progress=o.progress))
    found = [verify_store(p, progress=o.progress) for p in (stores or find_stores())]
    return show_verified(o, found)
