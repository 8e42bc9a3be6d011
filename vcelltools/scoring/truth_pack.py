"""Read and write truth packs: everything that scoring needs from the truth, in a small file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.io import open_dataset
from vcelltools.io.fingerprint import identify
from vcelltools.scoring.pack_format import read_packfile, write_packfile
from vcelltools.scoring.rule_set import RuleSet

if TYPE_CHECKING:
    from anndata import AnnData


def write_pack(
    path: str | os.PathLike,
    rules: RuleSet,
    truths: Sequence[Any],
    source: str | os.PathLike | AnnData,
    *,
    layer: str | None = None,
    force: bool = False,
) -> Path:
    """Write the truths of all contexts, with the identity of their source."""
    with open_dataset(source, layer=layer, name="truth") as data:
        made_of = identify(data)
    return write_packfile(
        path, rules.magic, rules.settings, [rules.pack(t) for t in truths], truth=made_of, force=force
    )


def read_pack(
    path: str | os.PathLike,
    rules: RuleSet,
    source: str | os.PathLike | AnnData | None = None,
    *,
    layer: str | None = None,
) -> list[Any]:
    """Return the truths in a pack; if ``source`` is given, the pack must have been made from it.

    Raises
    ------
    DataError
        If the file is not such a pack, or is damaged.
    UsageError
        If it was made with other settings, or from another truth.
    """
    with nullcontext() if source is None else open_dataset(source, layer=layer, name="truth") as truth:
        return read_packfile(path, rules.magic, rules.settings, rules.unpack, truth=truth)
