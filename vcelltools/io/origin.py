"""Where a prediction comes from: the run or the stores that made it, and a fingerprint of their state.

A prediction is scored and packed long after it was made. It keeps, in ``uns/vcelltools``, the folders that it came
from and what identified them then; whatever uses it later says so where a folder has another state by now.
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

_STATE = ("manifest.json", "config.toml", "vocabulary.json", "best/step-*.json")  # what a store or a run is known by


def describe_origin(folders: Iterable[str | os.PathLike]) -> dict[str, list[str]]:
    """Return the absolute paths of runs and stores, and the fingerprint of each, as ``uns`` keeps them."""
    paths = [os.path.abspath(f) for f in folders]
    return {"origin": paths, "origin_state": [_get_state(Path(p)) or "" for p in paths]}


def find_stale(prediction: str | os.PathLike | AnnData) -> list[str]:
    """Return a warning for each run or store behind a prediction that is another one than when it was made.

    A folder that is no longer there says nothing, nor does a prediction that another program wrote.
    """
    said = [_read_uns(prediction, key) for key in ("origin", "origin_state")]
    out = []
    for path, state in zip(*said, strict=False):
        now = _get_state(Path(path))
        if now is not None and now != state:
            out.append(f"{path} has changed since the prediction was made from it: predict again to use what is there")
    return out


def _get_state(dpath: Path) -> str | None:
    """Return the fingerprint of a run or store, by the small files that state its content; None where it is none."""
    try:
        files = [p for pattern in _STATE for p in sorted(dpath.glob(pattern))]
        parts = [text for p in files for text in (p.name, p.read_text(encoding="utf-8", errors="surrogateescape"))]
    except OSError:
        return None
    return hash_text(parts) if parts else None


def _read_uns(source: str | os.PathLike | AnnData, key: str) -> list[str]:
    """Return the texts of ``uns/vcelltools/{key}``; none where there are none, or something else."""
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
    except VcellError:  # nobody asked for it, and whatever is wrong with the file is said where it is read
        return []
