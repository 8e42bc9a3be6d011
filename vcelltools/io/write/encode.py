"""Write obs, var and uns in anndata's current on-disk encodings, column by column, without pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.table import Column, MemoryTable, Table, decode

if TYPE_CHECKING:
    import pandas as pd

_STR = h5py.string_dtype("utf-8")


def set_encoding(node: h5py.Group | h5py.Dataset, kind: str, version: str) -> None:
    """Set anndata's two encoding attributes."""
    node.attrs["encoding-type"] = kind
    node.attrs["encoding-version"] = version


def write_dict(parent: h5py.Group, name: str, values: dict[str, Any] | None = None) -> h5py.Group:
    """Write a mapping of :func:`write_value` values."""
    group = parent.create_group(name)
    set_encoding(group, "dict", "0.1.0")
    for key, value in (values or {}).items():
        write_value(group, str(key), value)
    return group


def write_value(parent: h5py.Group, name: str, value: Any) -> None:
    """Write None, a dict, string, number, bool, array, list, data frame, table or scipy sparse matrix.

    Raises
    ------
    DataError
        For a value that has no encoding here.
    """
    if isinstance(value, dict):
        write_dict(parent, name, value)
    elif value is None:
        set_encoding(parent.create_dataset(name, data=h5py.Empty("f")), "null", "0.1.0")
    elif isinstance(value, str):
        set_encoding(parent.create_dataset(name, data=value, dtype=_STR), "string", "0.2.0")
    elif isinstance(value, bool | int | float | np.generic):
        set_encoding(parent.create_dataset(name, data=value), "numeric-scalar", "0.2.0")
    elif hasattr(value, "tocsr") and hasattr(value, "indptr"):
        _write_sparse(parent, name, value)
    elif hasattr(value, "columns"):
        write_table(parent, name, value)
    else:
        write_array(parent, name, np.asarray(value))


def write_array(parent: h5py.Group, name: str, values: np.ndarray) -> None:
    """Write a numeric, boolean or string array."""
    if values.dtype.kind in "OUT":
        text = np.asarray(values, dtype=object)
        if not all(issubclass(t, str) for t in set(map(type, text.reshape(-1).tolist()))):
            raise DataError(f"{name}: arrays of mixed values cannot be written", hint="convert all values to strings")
        set_encoding(parent.create_dataset(name, data=text, dtype=_STR), "string-array", "0.2.0")
    elif values.dtype.kind in "biuf":
        set_encoding(parent.create_dataset(name, data=values), "array", "0.2.0")
    else:
        raise DataError(
            f"{name}: values of type {values.dtype} cannot be written", hint="use numbers, booleans or strings"
        )


def _write_sparse(parent: h5py.Group, name: str, matrix: Any) -> None:
    if matrix.format not in ("csr", "csc"):
        matrix = matrix.tocsr()
    group = parent.create_group(name)
    set_encoding(group, f"{matrix.format}_matrix", "0.1.0")
    group.attrs["shape"] = np.asarray(matrix.shape, np.int64)
    for part in ("data", "indices", "indptr"):
        group.create_dataset(part, data=getattr(matrix, part))


def write_table(
    parent: h5py.Group,
    name: str,
    table: Table | pd.DataFrame,
    rows: np.ndarray | None = None,
    *,
    index: np.ndarray | None = None,
    notes: list[str] | None = None,
) -> None:
    """Write obs or var as an anndata data frame.

    Parameters
    ----------
    table
        A table of a reader, or a DataFrame.
    rows
        (m,) positions of the rows to keep, in their new order; by default all.
    index
        (n,) row names that replace those of the table.
    notes
        A list that receives a note about each column that cannot be written; without it, this is an error.
    """
    source: Table = table if hasattr(table, "column") else MemoryTable(table, where=f"the new file's {name}")  # type: ignore[arg-type,assignment]
    keep = slice(None) if rows is None else rows
    group = parent.create_group(name)
    set_encoding(group, "dataframe", "0.2.0")
    columns = source.columns
    own, names = source.index_name, source.index if index is None else index
    shared = own in columns and index is None and np.array_equal(source.column(own).labels(exact=True), names)  # type: ignore[arg-type]
    key = own if own and "/" not in own and (shared or own not in columns) else "_index"
    while key in columns and not shared:
        key += "_"
    group.attrs["_index"] = key
    write_array(group, key, names[keep])
    order = []
    for column in columns:
        try:
            if not (shared and column == key):
                _write_column(group, column, source.column(column), keep)
            order.append(column)
        except (DataError, ValueError, TypeError) as e:
            if notes is None:
                raise
            if column in group:
                del group[column]
            notes.append(f"{name}/{column} was not copied: {e}")
    group.attrs.create("column-order", np.array(order, dtype=object), dtype=_STR)


def _write_column(group: h5py.Group, name: str, col: Column, keep: slice | np.ndarray) -> None:
    if col.codes is not None:
        assert col.categories is not None
        _write_categorical(group, name, col.codes[keep], col.categories, col.ordered)
        return
    assert col.values is not None
    values = col.values[keep]
    if col.missing is not None and values.dtype.kind == "f":  # anndata has no encoding for nullable values of this type
        write_array(group, name, np.where(col.missing[keep], values.dtype.type(np.nan), values))
    elif col.missing is not None:
        sub = group.create_group(name)
        set_encoding(sub, "nullable-boolean" if values.dtype.kind == "b" else "nullable-integer", "0.1.0")
        write_array(sub, "values", values)
        write_array(sub, "mask", col.missing[keep])
    elif values.dtype.kind in "OU":
        lacking = np.array([v is None for v in values], bool)
        if lacking.any():  # string arrays have no missing values, but categoricals do
            levels, inverse = np.unique(values[~lacking].astype(str), return_inverse=True)
            codes = np.full(len(values), -1, np.int64)
            codes[~lacking] = inverse
            _write_categorical(group, name, codes, levels.astype(object), False)
        else:
            write_array(group, name, values)
    elif values.dtype.kind == "M":
        write_array(group, name, np.datetime_as_string(values).astype(object))
    else:
        write_array(group, name, values)


def _write_categorical(group: h5py.Group, name: str, codes: np.ndarray, categories: np.ndarray, ordered: bool) -> None:
    sub = group.create_group(name)
    set_encoding(sub, "categorical", "0.2.0")
    sub.attrs["ordered"] = bool(ordered)
    width = next(t for t in (np.int8, np.int16, np.int32, np.int64) if len(categories) <= np.iinfo(t).max)
    write_array(sub, "codes", np.asarray(codes).astype(width))
    cats = np.asarray(categories)
    if cats.dtype.kind in "SOM":
        cats = np.array([decode(c) if isinstance(c, bytes) else str(c) for c in cats], dtype=object)
    write_array(sub, "categories", cats)
