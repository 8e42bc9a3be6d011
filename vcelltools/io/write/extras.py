"""Copy obsm, obsp, varm, varp and uns from one file to another, with a note for each part that cannot be copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.limits import reading
from vcelltools.io.hdf5.safe import File, Node, get_node, is_group, read_small
from vcelltools.io.hdf5.table import PickedTable, open_table
from vcelltools.io.opened import Dataset
from vcelltools.io.table import Table
from vcelltools.io.write.encode import write_dict, write_table, write_value
from vcelltools.io.write.h5ad import AnnDataPart

_STR = h5py.string_dtype("utf-8")
_MAX_DEPTH = 24
_CARRIED = ("obsm", "varm", "uns", "obsp", "varp")


def carry_extras(ds: Dataset, part: AnnDataPart, *, rows: np.ndarray | None = None) -> None:
    """Copy obsm, obsp, varm, varp and uns of ``ds`` to ``part`` when it is finished; ``rows`` selects cells.

    Elements that the other format does not support, or with an unknown encoding, are listed in the notes of the part.
    """
    if ds.path is None:
        part.later.append(lambda group: _carry_memory(ds, group, rows, part.notes))
    elif ds.kind in ("h5ad", "h5mu", "zarr"):
        part.later.append(lambda group: _carry_file(ds, group, rows, part.notes))


def _get_carried(ds: Dataset) -> tuple[str, ...]:
    """Return the elements to copy: for ``raw``, which has its own genes, varm and varp are excluded."""
    return tuple(k for k in _CARRIED if not (k in ("varm", "varp") and ds.layer == "raw"))


@contextmanager
def _noting(parent: h5py.Group, key: str, notes: list[str]) -> Iterator[None]:
    """Add a note on why an element cannot be written, and remove its written parts."""
    try:
        yield
    except (DataError, TypeError, ValueError, AttributeError) as e:
        if key in parent:
            del parent[key]
        notes.append(f"{parent.name.lstrip('/')}/{key} was not carried over: {e}")


def _get_axes(ds: Dataset, name: str, rows: np.ndarray | None) -> tuple[Table | None, np.ndarray | None]:
    """Return the table that names the rows of obsm, varm and so on (None for uns), and the positions to keep."""
    if name in ("obsm", "obsp"):
        return ds.obs, rows
    if name in ("varm", "varp"):
        return (ds.var.whole if isinstance(ds.var, PickedTable) else ds.var), ds.var_rows
    return None, None


def _carry_memory(ds: Dataset, group: h5py.Group, rows: np.ndarray | None, notes: list[str]) -> None:
    for name in _get_carried(ds):
        picked = _get_axes(ds, name, rows)[1]
        for key, value in getattr(ds.source, name).items():
            if key in group[name]:
                continue
            with _noting(group[name], key, notes):
                if picked is not None:
                    value = value.iloc[picked] if hasattr(value, "iloc") else value[picked]  # noqa: PLW2901
                    value = value[:, picked] if name.endswith("p") else value  # noqa: PLW2901
                _write(group[name], key, value, 0, notes)


def _write(parent: h5py.Group, name: str, value: Any, depth: int, notes: list[str]) -> None:
    """Write a value of an AnnData; what cannot be written inside a dictionary or data frame is left out with a note."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{name} is nested too deeply")
    if isinstance(value, dict):
        group = write_dict(parent, name, {})
        for key, part in value.items():
            with _noting(group, str(key), notes):
                _write(group, str(key), part, depth + 1, notes)
    elif hasattr(value, "columns"):
        write_table(parent, name, value, notes=notes)
    else:
        write_value(parent, name, value)


def _carry_file(ds: Dataset, group: h5py.Group, rows: np.ndarray | None, notes: list[str]) -> None:
    from vcelltools.io.dataset import open_container

    assert ds.path is not None
    file, close = open_container(ds.path)
    try:
        for name in _get_carried(ds):
            axis, picked = _get_axes(ds, name, rows)
            keys: list[str] = []
            with _noting(group[name], "*", notes):
                node = get_node(file, f"{ds.root}{name}")
                keys = sorted(node) if is_group(node) else []
            for key in keys:
                if key in group[name]:
                    continue
                with _noting(group[name], key, notes):
                    where = f"{ds.root}{name}/{key}"
                    if axis is not None and _get_kind(get_node(file, where)) == "dataframe":
                        _copy_frame(file, where, group[name], key, picked, axis, notes)
                    else:
                        _copy(file, where, group[name], key, picked, 0, notes)
    finally:
        close()


def _copy_frame(
    file: File, key: str, parent: h5py.Group, name: str, rows: np.ndarray | None, axis: Table, notes: list[str]
) -> None:
    """Copy a data frame of cells or genes, with row names of the axis, which anndata requires."""
    table, index = open_table(file, key, axis.n), axis.index
    if not np.array_equal(table.index, index):
        notes.append(f"{key}: its row names ({table.index[0]!r}, …) are replaced with the names of the cells or genes")
    write_table(parent, name, table, rows, index=index, notes=notes)


def _copy(
    file: File, key: str, parent: h5py.Group, name: str, rows: np.ndarray | None, depth: int, notes: list[str]
) -> None:
    if depth > _MAX_DEPTH:
        raise DataError(f"{file.filename}: {key} is nested too deeply")
    node = get_node(file, key)
    if node is None:
        raise DataError(f"{file.filename}: {key} cannot be opened")
    if not is_group(node):
        _copy_array(file, node, parent, name, rows)
        return
    kind = _get_kind(node)
    if rows is not None and kind in ("csr_matrix", "csc_matrix"):
        part = _read_sparse(file, key, kind, node)[rows]
        write_value(parent, name, part[:, rows] if _is_pairwise(key) else part)
        return
    if rows is not None:
        raise DataError(f"cells of a {kind or 'group'} cannot be selected")
    group = parent.create_group(name)
    _copy_attrs(node, group)
    for child in sorted(node):
        loose = kind in ("", "dict")  # a partial dictionary is still a dictionary, but a partial matrix is damaged
        with _noting(group, child, notes) if loose else nullcontext():
            _copy(file, f"{key}/{child}", group, child, None, depth + 1, notes)


def _is_pairwise(key: str) -> bool:
    """Return whether an array is in obsp or varp (cells × cells or genes × genes)."""
    return key.strip("/").split("/")[-2] in ("obsp", "varp")


def _get_kind(node: Node) -> str:
    value = getattr(node, "attrs", {}).get("encoding-type", "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _copy_array(file: File, node: Node, parent: h5py.Group, name: str, rows: np.ndarray | None) -> None:
    if node.shape is None or _get_kind(node) == "null":
        dset = parent.create_dataset(name, data=h5py.Empty("f"))
    elif rows is None and isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype) is None:
        if _has_references(node.dtype):
            raise DataError("it holds references to objects in its file")
        with reading(file.filename, node.name):
            node.file.copy(
                node, parent, name, without_attrs=True
            )  # copies records, complex numbers and chunks unchanged
        dset = parent[name]
    else:
        values = read_small(file, node)
        if rows is not None:
            values = values[rows][:, rows] if _is_pairwise(node.name) else values[rows]
        text = values.dtype.kind in "OUT"
        data: Any = np.asarray(values, dtype=object) if text and values.ndim else values
        dset = parent.create_dataset(name, data=data if values.ndim else values[()], dtype=_STR if text else None)
    _copy_attrs(node, dset)


def _has_references(dtype: np.dtype) -> bool:
    fields = [f[0] for f in (dtype.fields or {}).values()]
    return h5py.check_ref_dtype(dtype) is not None or any(map(_has_references, fields))


def _copy_attrs(source: Node, target: h5py.Group | h5py.Dataset) -> None:
    for key, value in dict(source.attrs).items():
        if isinstance(value, str | bytes):
            target.attrs[key] = value
        elif isinstance(value, list | np.ndarray) and np.asarray(value).dtype.kind in "OU":
            if not _has_references(np.asarray(value).dtype):
                target.attrs.create(key, np.asarray(value, dtype=object), dtype=_STR)
        elif not isinstance(value, h5py.Reference | h5py.RegionReference):
            target.attrs[key] = value


def _read_sparse(file: File, key: str, kind: str, node: Node) -> Any:
    from scipy import sparse

    parts = [read_small(file, get_node(file, f"{key}/{k}")) for k in ("data", "indices", "indptr")]
    cls = sparse.csr_matrix if kind == "csr_matrix" else sparse.csc_matrix
    matrix = cls(tuple(parts), shape=tuple(int(v) for v in node.attrs["shape"]))
    matrix.check_format(full_check=True)
    return matrix.tocsr()
