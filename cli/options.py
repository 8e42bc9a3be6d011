"""The options that every command shares, spelt and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing output.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Worker threads, 64 at most [default: VCELLTOOLS_THREADS, or the usable cores].",
        show_default=False,
    ),
]
Modality = Annotated[
    str | None,
    typer.Option("--modality", metavar="M", help="Modality of an h5mu [default: the one that holds the counts]."),
]
Layer = Annotated[str | None, typer.Option("--layer", metavar="L", help="X, raw, or a layer's name [default: X].")]
InFile = Annotated[
    Path,
    typer.Argument(metavar="FILE", show_default=False, help="h5ad, h5mu, 10x h5, 10x mtx folder or zarr store."),
]


def refuse(given: dict[str, object], what: str, *, hint: str = "leave one of the two out") -> None:
    """Raise a :class:`UsageError` where an option was given that does nothing with ``what``."""
    from vcelltools.errors import UsageError

    names = [k for k, v in given.items() if v]
    if names:
        raise UsageError(f"{', '.join(names)}: not with {what}", hint=hint)


def refuse_same(first: tuple[str, Path | None], second: tuple[str, Path | None]) -> None:
    """Raise a :class:`UsageError` where two outputs have one name."""
    from vcelltools.errors import UsageError

    (a, one), (b, other) = first, second
    if one is not None and other is not None and one.absolute() == other.absolute():
        raise UsageError(f"{a} and {b} are both {one}", hint="choose two names")
