"""Coordinates and embeddings: the numeric arrays in ``obsm`` of a file or of an AnnData in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.dataset import open_container
from vcelltools.io.hdf5.limits import reading
from vcelltools.io.hdf5.safe import get_node, is_group, read_small

if TYPE_CHECKING:
    from anndata import AnnData


def list_obsm(source: str | os.PathLike | AnnData, place: str = "obsm") -> list[str]:
    """Return the names of the arrays in ``obsm`` (or ``varm``); none where the file has none."""
    if not isinstance(source, str | os.PathLike):
        return list(getattr(source, place))
    file, close = open_container(Path(source))
    try:
        with reading(Path(source), place):
            node = get_node(file, place)
            return list(node) if is_group(node) else []
    finally:
        close()


def read_obsm(source: str | os.PathLike | AnnData, key: str, n: int, place: str = "obsm") -> np.ndarray:
    """Return one array of ``obsm`` (or ``varm``) as (n, d) float64.

    Raises
    ------
    DataError
        If it is missing (the message lists the names), not numeric, or does not have one row per cell.
    """
    where = "AnnData" if not isinstance(source, str | os.PathLike) else str(source)
    values: Any
    if not isinstance(source, str | os.PathLike):
        arrays = getattr(source, place)
        if key not in arrays:
            raise _say_absent(where, place, key, list(arrays))
        values = np.asarray(arrays[key])
    else:
        file, close = open_container(Path(source))
        try:
            node = get_node(file, f"{place}/{key}")
            if node is None:
                raise _say_absent(where, place, key, list_obsm(source, place))
            if is_group(node):
                values = _read_frame(file, f"{place}/{key}", node)
            else:
                values = read_small(file, node)
        finally:
            close()
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(f"{where}: {place}/{key} is not a table of numbers ({values.dtype}, shape {values.shape})")
    if len(values) != n:
        what = "cells" if place == "obsm" else "genes"
        raise DataError(f"{where}: {place}/{key} has {len(values):,} rows; the data has {n:,} {what}")
    return np.ascontiguousarray(values, np.float64)


def _say_absent(where: str, place: str, key: str, have: list[str]) -> DataError:
    return DataError(f"{where}: {place} has no {key!r}", hint=f"arrays in {place}: {', '.join(have) or 'none'}")


def _read_frame(file: Any, key: str, group: Any) -> np.ndarray:
    """Return the columns of a data frame, side by side."""
    order = [c.decode() if isinstance(c, bytes) else str(c) for c in group.attrs.get("column-order", [])]
    columns = [get_node(file, f"{key}/{name}") for name in order]
    if not columns or any(c is None or is_group(c) for c in columns):
        raise DataError(f"{file.filename}: {key} is a group, and not a table of numbers")
    return np.column_stack([read_small(file, c) for c in columns])
