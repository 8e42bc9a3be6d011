"""The layouts of anndata and mudata (``X``, ``layers``, ``raw``, ``mod/<name>``), in HDF5 and in zarr."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from vcelltools.errors import DataError, NotCountsError, VcellError, spell
from vcelltools.io.features import ALL, list_types
from vcelltools.io.formats.zarr import ZarrArray, ZarrDense
from vcelltools.io.hdf5.arrays import Array1D, Hdf5Array, Hdf5Dense
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.limits import reading
from vcelltools.io.hdf5.safe import File, Node, get_node, is_group, need_dataset, read_small
from vcelltools.io.hdf5.table import JoinedTable, PickedTable, open_table, read_values
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from vcelltools.io.opened import Dataset, check_shape

RNA_NAMES = ("rna", "gex", "gene", "genes", "gene expression", "expression", "transcriptome")


def open_annotated(
    path: Path, file: File, source: FileBytes | None, modality: str | None, layer: str, feature_type: str | None
) -> Dataset:
    """Open an h5ad or h5mu file, or a zarr store of either layout; a feature type chooses among modalities."""
    if get_node(file, "mod") is not None:
        return _open_h5mu(path, file, source, modality, layer, feature_type)
    matrix, obs, var = _open_anndata_group(file, source, "", layer)
    kind = "h5ad" if isinstance(file, h5py.File) else "zarr"
    return Dataset(
        path=path, kind=kind, modality=None, layer=layer, matrix=matrix, obs=obs, var=var,
        stated_base=_read_stated_base(file, ""),
    )  # fmt: skip


def _read_stated_base(file: File, root: str) -> float | None:
    """Return ``uns/log1p/base``, or None if it is missing, null or not a number (which is not yet an error)."""
    try:
        node = get_node(file, f"{root}uns/log1p/base")
        return None if node is None or is_group(node) else float(node[()])
    except (VcellError, OSError, RuntimeError, LookupError, ValueError, TypeError):
        return None


def _open_h5mu(
    path: Path, file: File, source: FileBytes | None, modality: str | None, layer: str, feature_type: str | None
) -> Dataset:
    mod = get_node(file, "mod")
    if not is_group(mod):
        raise DataError(
            f"{path}: mod, which should be the group of modalities, is an array", hint="copy the file again"
        )
    names = list(mod)
    notes = []
    if not names:
        raise DataError(f"{path} has no modalities")
    if modality is None and feature_type not in (None, ALL):
        modality = _find_type(path, file, source, names, layer, str(feature_type))
        notes.append(f"modality {modality!r} of {', '.join(names)}: it holds features of type {feature_type}")
    if modality is None:
        modality, note = _choose_modality(path, file, source, names, layer)
        notes.append(note)
    if modality not in names:
        raise DataError(f"{path} has no modality {modality!r}", hint=f"modalities: {', '.join(names) or 'none'}")
    root = f"mod/{modality}/"
    matrix, obs, var = _open_anndata_group(file, source, root, layer)
    if get_node(file, "obs") is not None and get_node(file, f"obsmap/{modality}") is not None:
        outer_rows, _ = read_values(file, f"obsmap/{modality}")
        outer = open_table(file, "obs", len(outer_rows))
        rows = np.full(matrix.shape[0], -1, np.int64)
        present = np.flatnonzero(outer_rows > 0)
        target = outer_rows[present].astype(np.int64) - 1
        if len(target) == matrix.shape[0] and len(target) and int(target.max()) < matrix.shape[0]:
            rows[target] = present
            if not (rows < 0).any():
                obs = JoinedTable(obs, PickedTable(outer, rows))
    kind = "h5mu" if isinstance(file, h5py.File) else "zarr"
    return Dataset(
        path=path, kind=kind, modality=modality, layer=layer, matrix=matrix, obs=obs, var=var, notes=notes,
        stated_base=_read_stated_base(file, root), root=root,
    )  # fmt: skip


def _choose_modality(path: Path, file: File, source: FileBytes | None, names: list[str], layer: str) -> tuple[str, str]:
    """Choose the modality of the transcriptome by its name and its values; return it and the reason."""
    from vcelltools.io.counts import get_count_evidence

    others = f" of {', '.join(names)}" if len(names) > 1 else ""
    candidates = [m for m in names if m.lower() in RNA_NAMES] or names
    found = {}
    for m in candidates:
        if get_node(file, _get_matrix_keys(file, f"mod/{m}/", layer)[0]) is None:
            continue
        try:
            evidence = get_count_evidence(_open_anndata_group(file, source, f"mod/{m}/", layer)[0])
        except NotCountsError:
            continue
        if evidence.is_counts:
            found[m] = evidence.describe()
    if len(candidates) == 1:
        return candidates[0], f"modality {candidates[0]!r}{others}: {found.get(candidates[0], 'by its name')}"
    if len(found) == 1:
        m, why = next(iter(found.items()))
        return m, f"modality {m!r}{others}: {why}"
    which = f"{', '.join(found)} all hold counts" if found else f"none of them holds counts in {layer}"
    raise DataError(
        f"{path}: it is not clear which modality is the transcriptome; {which}",
        hint=f"{spell('modality')}, one of: {', '.join(names)}",
    )


def _find_type(
    path: Path, file: File, source: FileBytes | None, names: list[str], layer: str, feature_type: str
) -> str:
    """Return the modality whose var has features of a type."""
    types: dict[str, list[str]] = {}
    for m in names:
        if get_node(file, _get_matrix_keys(file, f"mod/{m}/", layer)[0]) is not None:
            types[m] = list_types(_open_anndata_group(file, source, f"mod/{m}/", layer)[2])
    found = [m for m, of in types.items() if feature_type in of]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{path}: {', '.join(found)} hold features of type {feature_type!r}",
            hint=f"{spell('modality')}, one of them",
        )
    known = list(dict.fromkeys(t for of in types.values() for t in of))
    raise DataError(
        f"{path}: no modality holds features of type {feature_type!r}",
        hint=f"{spell('feature_type')}, one of: {', '.join(known)}"
        if known
        else f"{spell('modality')}, one of: {', '.join(names)}",
    )


def _get_matrix_keys(file: File, root: str, layer: str) -> tuple[str, str]:
    """Return the keys of the matrix and of its var, for ``X``, ``raw`` or the name of a layer."""
    if layer == "X":
        return f"{root}X", f"{root}var"
    if layer == "raw":
        if get_node(file, f"{root}raw/X") is None and get_node(file, f"{root}raw.X") is not None:  # anndata 0.6
            return f"{root}raw.X", f"{root}raw.var"
        return f"{root}raw/X", f"{root}raw/var"
    return f"{root}layers/{layer}", f"{root}var"


def _open_anndata_group(file: File, source: FileBytes | None, root: str, layer: str):
    """Return (matrix, obs, var) of the AnnData at ``root`` (``""`` or ``"mod/<name>/"``)."""
    key, var_key = _get_matrix_keys(file, root, layer)
    if get_node(file, key) is None:
        have = list_matrices(file, root)
        choose = f"; choose one with {spell('layer')}" if have else ""
        raise DataError(f"{file.filename}: {key} is missing", hint=f"matrices: {', '.join(have) or 'none'}{choose}")
    matrix = open_matrix(file, source, key)
    check_shape(matrix, f"{file.filename}: {key}")
    obs = open_table(file, f"{root}obs", matrix.shape[0], uns_key=f"{root}uns")
    var = open_table(file, var_key, matrix.shape[1], uns_key=f"{root}uns")
    return matrix, obs, var


def list_matrices(file: File, root: str = "") -> list[str]:
    """Return the available layers: ``X``, ``raw``, and the names under ``layers``."""
    out = []
    if get_node(file, f"{root}X") is not None:
        out.append("X")
    layers = get_node(file, f"{root}layers")
    if is_group(layers):
        out += list(layers)
    if get_node(file, f"{root}raw/X") is not None or get_node(file, f"{root}raw.X") is not None:
        out.append("raw")
    return out


def open_matrix(file: File, source: FileBytes | None, key: str) -> Matrix:
    """Open the matrix at ``key``: an anndata sparse group (current or legacy attributes) or a dense dataset."""
    where = f"{file.filename}: {key}"
    node = get_node(file, key)
    with reading(file.filename, key):
        if not is_group(node):
            if node.ndim != 2:
                raise DataError(f"{where} has {node.ndim} dimensions instead of 2")
            return DenseMatrix(_open_dense(file, node, source), where=where)
        kind, shape = _sparse_attrs(node, where)
        parts = {
            k: need_dataset(
                file,
                f"{key}/{k}",
                what="a sparse matrix needs indptr, indices and data",
                hint="write the file again",
            )
            for k in ("indptr", "indices", "data")
        }
        n_major = shape[0] if kind == "csr" else shape[1]
        indptr = read_small(file, parts["indptr"], length=n_major + 1)
        indices = open_array(file, parts["indices"], source)
        data = open_array(file, parts["data"], source)
    cls = CsrMatrix if kind == "csr" else CscMatrix
    return cls(shape=shape, n_major=n_major, indptr=indptr, indices=indices, data=data, where=where)


def _sparse_attrs(group: Node, where: str) -> tuple[str, tuple[int, int]]:
    encoding = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format"))
    encoding = encoding.decode() if isinstance(encoding, bytes) else str(encoding)
    kind = encoding.removesuffix("_matrix")
    if kind not in ("csr", "csc"):
        raise DataError(f"{where}: encoding {encoding!r} is not a matrix (csr_matrix, csc_matrix or a dense array)")
    shape = group.attrs.get("shape", group.attrs.get("h5sparse_shape"))
    if shape is None or len(shape) != 2 or min(int(s) for s in shape) < 0:
        raise DataError(f"{where}: its shape attribute is missing or wrong ({shape})")
    return kind, (int(shape[0]), int(shape[1]))


def open_array(file: File, node: Node, source: FileBytes | None) -> Array1D:
    """Open a one-dimensional array of an HDF5 file or a zarr store."""
    return ZarrArray(file, node) if source is None else Hdf5Array(file, node, source)


def _open_dense(file: File, node: Node, source: FileBytes | None) -> Hdf5Dense | ZarrDense:
    return ZarrDense(file, node) if source is None else Hdf5Dense(file, node, source)
