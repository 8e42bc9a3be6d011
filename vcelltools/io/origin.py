"""Record the run or the stores from which a prediction was made, with a fingerprint of their state.

A prediction may be scored and packed long after it was made. Its ``uns/vcelltools`` holds these folders and their
fingerprints, so that later commands can warn that a folder has changed since.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import VcellError
from vcelltools.io.dataset import open_container
from vcelltools.io.fingerprint import hash_text
from vcelltools.io.hdf5.safe import get_node
from vcelltools.io.hdf5.table import read_values

if TYPE_CHECKING:
    from anndata import AnnData

# small files that identify a store or a run
_STATE = ("manifest.json", "config.toml", "vocabulary.json", "best/step-*.json")


def describe_origin(folders: Iterable[str | os.PathLike]) -> dict[str, list[str]]:
    """Return the absolute paths and fingerprints of runs and stores, in the form that ``uns`` holds."""
    paths = [os.path.abspath(f) for f in folders]
    return {"origin": paths, "origin_state": [_get_state(Path(p)) or "" for p in paths]}


def find_stale(prediction: str | os.PathLike | AnnData) -> list[str]:
    """Return a warning for each run or store that has changed since the prediction was made from it.

    There is no warning about a folder that no longer exists, or about a prediction of another program.
    """
    said = [_read_uns(prediction, key) for key in ("origin", "origin_state")]
    out = []
    for path, state in zip(*said, strict=False):
        now = _get_state(Path(path))
        if now is not None and now != state:
            out.append(
                f"{path} has changed since the prediction was made from it: predict again to use its present state"
            )
    return out


def _get_state(dpath: Path) -> str | None:
    """Return the fingerprint of a run or store, from the small files that describe it, or None for other folders."""
    try:
        files = [p for pattern in _STATE for p in sorted(dpath.glob(pattern))]
        parts = [text for p in files for text in (p.name, p.read_text(encoding="utf-8", errors="surrogateescape"))]
    except OSError:
        return None
    return hash_text(parts) if parts else None


def _read_uns(source: str | os.PathLike | AnnData, key: str) -> list[str]:
    """Return the texts of ``uns/vcelltools/{key}``, or an empty list if it holds no texts."""
    if not isinstance(source, str | os.PathLike):
        found: Any = getattr(source, "uns", {}).get("vcelltools")
        values = found.get(key, ()) if hasattr(found, "get") else ()
        return [str(v) for v in values] if np.ndim(values) == 1 else []
    try:
        file, close = open_container(Path(source))
        try:
            place = f"uns/vcelltools/{key}"
            node = get_node(file, place)
            return [] if node is None else [str(v) for v in read_values(file, place, node=node)[0].ravel()]
        finally:
            close()
    except VcellError:  # the reader of the file itself reports what is wrong with it
        return []
