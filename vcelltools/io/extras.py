"""obsm, obsp, varm, varp and uns carried from one file to another as they are; what cannot be is told."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.encode import write_table, write_value
from vcelltools.io.h5table import open_table
from vcelltools.io.opened import Dataset
from vcelltools.io.safe import File, Node, get_node, is_group, read_small
from vcelltools.io.write import AnnDataPart

_STR = h5py.string_dtype("utf-8")
_MAX_DEPTH = 24
_CARRIED = ("obsm", "varm", "uns", "obsp", "varp")


def carry_extras(ds: Dataset, part: AnnDataPart, notes: list[str], *, rows: np.ndarray | None = None) -> None:
    """Have ``part`` carry obsm, obsp, varm, varp and uns of ``ds`` when it is finished; ``rows`` picks cells.

    What a file of another kind has no place for, or what has an unknown encoding, is added to ``notes``.
    """
    if ds.path is None:
        part.later.append(lambda group: _carry_memory(ds, group, rows, notes))
    elif ds.kind in ("h5ad", "h5mu", "zarr"):
        part.later.append(lambda group: _carry_file(ds, group, rows, notes))


def _get_carried(ds: Dataset) -> tuple[str, ...]:
    """Return what can be carried: ``raw`` has genes of its own, to which varm and varp do not belong."""
    return tuple(k for k in _CARRIED if not (k in ("varm", "varp") and ds.layer == "raw"))


def _carry_memory(ds: Dataset, group: h5py.Group, rows: np.ndarray | None, notes: list[str]) -> None:
    for name in _get_carried(ds):
        for key, value in getattr(ds.source, name).items():
            if key in group[name]:
                continue
            picked = value
            if rows is not None and name in ("obsm", "obsp"):
                picked = value.iloc[rows] if hasattr(value, "iloc") else value[rows]
                picked = picked[:, rows] if name == "obsp" else picked
            try:
                write_value(group[name], key, picked)
            except (DataError, TypeError) as e:
                if key in group[name]:
                    del group[name][key]
                notes.append(f"{name}/{key} was not carried over: {e}")


def _carry_file(ds: Dataset, group: h5py.Group, rows: np.ndarray | None, notes: list[str]) -> None:
    from vcelltools.io.dataset import open_container

    assert ds.path is not None
    root = "" if ds.modality is None else f"mod/{ds.modality}/"
    file, close = open_container(ds.path)
    try:
        for name in _get_carried(ds):
            node = get_node(file, f"{root}{name}")
            if not is_group(node):
                continue
            for key in sorted(node):
                if key in group[name]:
                    continue
                try:
                    _copy(
                        file,
                        f"{root}{name}/{key}",
                        group[name],
                        key,
                        rows if name in ("obsm", "obsp") else None,
                        ds.n_cells,
                        0,
                    )
                except (DataError, TypeError, ValueError) as e:
                    if key in group[name]:
                        del group[name][key]
                    notes.append(f"{name}/{key} was not carried over: {e}")
    finally:
        close()


def _copy(file: File, key: str, parent: h5py.Group, name: str, rows: np.ndarray | None, n: int, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise DataError(f"{file.filename}: {key} is nested too deeply")
    node = get_node(file, key)
    if node is None:
        raise DataError(f"{file.filename}: {key} cannot be opened")
    if not is_group(node):
        _copy_array(file, node, parent, name, rows)
        return
    kind = _get_kind(node)
    if rows is not None and kind == "dataframe":
        write_table(parent, name, open_table(file, key, n), rows)
        return
    if rows is not None and kind in ("csr_matrix", "csc_matrix"):
        part = _read_sparse(file, key, kind, node)[rows]
        write_value(parent, name, part[:, rows] if _is_pairwise(key) else part)
        return
    if rows is not None:
        raise DataError(f"cells of a {kind or 'group'} cannot be picked")
    group = parent.create_group(name)
    _copy_attrs(node, group)
    for child in sorted(node):
        _copy(file, f"{key}/{child}", group, child, None, n, depth + 1)


def _is_pairwise(key: str) -> bool:
    """Return whether an array lies in obsp: cells × cells."""
    return key.strip("/").split("/")[-2] == "obsp"


def _get_kind(node: Node) -> str:
    value = node.attrs.get("encoding-type", "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _copy_array(file: File, node: Node, parent: h5py.Group, name: str, rows: np.ndarray | None) -> None:
    if node.shape is None or _get_kind(node) == "null":
        dset = parent.create_dataset(name, data=h5py.Empty("f"))
    else:
        values = read_small(file, node)
        if rows is not None:
            values = values[rows][:, rows] if _is_pairwise(node.name) else values[rows]
        text = values.dtype.kind in "OUT"
        data: Any = np.asarray(values, dtype=object) if text and values.ndim else values
        dset = parent.create_dataset(name, data=data if values.ndim else values[()], dtype=_STR if text else None)
    _copy_attrs(node, dset)


def _copy_attrs(source: Node, target: h5py.Group | h5py.Dataset) -> None:
    for key, value in dict(source.attrs).items():
        if isinstance(value, str | bytes):
            target.attrs[key] = value
        elif isinstance(value, list | np.ndarray) and np.asarray(value).dtype.kind in "OU":
            target.attrs.create(key, np.asarray(value, dtype=object), dtype=_STR)
        else:
            target.attrs[key] = value


def _read_sparse(file: File, key: str, kind: str, node: Node) -> Any:
    from scipy import sparse

    parts = [read_small(file, get_node(file, f"{key}/{k}")) for k in ("data", "indices", "indptr")]
    cls = sparse.csr_matrix if kind == "csr_matrix" else sparse.csc_matrix
    matrix = cls(tuple(parts), shape=tuple(int(v) for v in node.attrs["shape"]))
    matrix.check_format(full_check=True)
    return matrix.tocsr()
