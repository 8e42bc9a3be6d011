"""What Cell Ranger and Space Ranger write: h5 files (versions 2 and 3) and mtx folders.

Both hold features × barcodes column by column, which is cells × genes row by row. Where a file holds more than
genes (antibodies, guides), the ``Gene Expression`` features are opened unless another part is named.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.annfile import open_array
from vcelltools.io.arrays import MemoryArray
from vcelltools.io.columns import select_columns
from vcelltools.io.h5table import EmptyTable, to_text
from vcelltools.io.matrix import CsrMatrix, Matrix
from vcelltools.io.opened import Dataset, check_shape
from vcelltools.io.safe import File, get_node, is_group, need_dataset, read_small

if TYPE_CHECKING:
    from scipy.sparse import coo_array

GENES = "Gene Expression"
ALL = "all"
_PARTS = ("data", "indices", "indptr", "shape", "barcodes")
_RENAMED = {"id": "gene_ids", "feature_type": "feature_types"}  # scanpy's names
_MAX_TEXT_BYTES = 1 << 30
_HINT = "the file is not a whole 10x matrix; copy it again"


def is_tenx(file: File) -> bool:
    """Return whether an HDF5 file holds a 10x matrix (``/matrix`` or genome groups)."""
    if not isinstance(file, h5py.File):
        return False
    if is_group(get_node(file, "matrix")) and get_node(file, "matrix/barcodes") is not None:
        return True
    return get_node(file, "X") is None and get_node(file, "mod") is None and bool(_list_genomes(file))


def _list_genomes(file: File) -> list[str]:
    """Return the genome groups of a version 2 file."""
    root = get_node(file, "/")
    return [
        name
        for name in root
        if is_group(get_node(file, name))
        and all(get_node(file, f"{name}/{p}") is not None for p in ("barcodes", "genes"))
    ]


def list_parts(file: File) -> list[str | None]:
    """Return what ``modality`` can name in a 10x h5 file: genomes (version 2) or feature types; None for one alone."""
    if get_node(file, "matrix/barcodes") is None:
        return list(_list_genomes(file))
    if not is_group(get_node(file, "matrix/features")):
        return [None]
    types = _read_features(file, "matrix/features", None)[1].get("feature_types")
    return [None] if types is None else list(dict.fromkeys(types))


def open_tenx(path: Path, file: File, fd: int, modality: str | None, layer: str | None) -> Dataset:
    """Open a 10x h5 file.

    Parameters
    ----------
    modality
        A genome of a version 2 file; a feature type, a genome or ``all`` in a version 3 file.

    Raises
    ------
    DataError
        Where parts are missing or disagree, or a choice has to be made.
    """
    _need_x(path, layer)
    notes: list[str] = []
    root = "matrix"
    if get_node(file, "matrix/barcodes") is None:
        root, modality = _choose_genome(path, _list_genomes(file), modality), None
    for part in _PARTS:
        need_dataset(file, f"{root}/{part}", what="a 10x matrix needs it", hint=_HINT)
    shape = read_small(file, get_node(file, f"{root}/shape"))
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or int(shape.min()) < 0:
        raise DataError(f"{path}: {root}/shape is not two whole numbers")
    n_genes, n_cells = int(shape[0]), int(shape[1])
    barcodes = to_text(read_small(file, get_node(file, f"{root}/barcodes"), length=n_cells))
    if root == "matrix":
        names, columns = _read_features(file, "matrix/features", n_genes)
    else:
        names = _read_text(file, f"{root}/gene_names", n_genes)
        columns = {"gene_ids": _read_text(file, f"{root}/genes", n_genes)}
    matrix = CsrMatrix(
        shape=(n_cells, n_genes),
        n_major=n_cells,
        indptr=read_small(file, get_node(file, f"{root}/indptr"), length=n_cells + 1),
        indices=open_array(file, get_node(file, f"{root}/indices"), fd),
        data=open_array(file, get_node(file, f"{root}/data"), fd),
        where=f"{path}: {root}",
    )
    obs = {}
    if (kept := get_node(file, f"{root}/filtered_barcodes")) is not None and kept.shape == (n_cells,):
        obs["filtered_barcodes"] = read_small(file, kept)
    return _finish(path, "10x-h5", matrix, barcodes, obs, names, columns, modality, notes)


def _need_x(path: Path, layer: str | None) -> None:
    if layer not in (None, "X"):
        raise DataError(f"{path}: a 10x matrix has no layers, so no {layer!r}", hint="leave --layer out")


def _choose_genome(path: Path, genomes: list[str], wanted: str | None) -> str:
    listed = ", ".join(genomes)
    if wanted is not None:
        if wanted not in genomes:
            raise DataError(f"{path}: has no genome {wanted!r}", hint=f"genomes: {listed}")
        return wanted
    if len(genomes) > 1:
        raise DataError(
            f"{path}: holds {len(genomes)} genomes, each with its own matrix", hint=f"--modality, one of: {listed}"
        )
    return genomes[0]


def _read_text(file: File, key: str, n: int | None) -> np.ndarray:
    values = read_small(file, need_dataset(file, key, what="it names the genes", hint=_HINT), length=n)
    if values.ndim != 1:
        raise DataError(f"{file.filename}: {key} has {values.ndim} dimensions; 1 expected")
    return to_text(values)


def _read_features(file: File, root: str, n: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the features' names and every other column that has one entry a feature."""
    group = get_node(file, root)
    if not is_group(group):
        raise DataError(f"{file.filename}: {root} is missing: it names the genes", hint=_HINT)
    names = _read_text(file, f"{root}/name", n)
    columns = {}
    renamed = {**_RENAMED, "id": "probe_ids", "gene_id": "gene_ids"} if "gene_id" in group else _RENAMED
    for key in group:
        node = get_node(file, f"{root}/{key}")
        if key == "name" or node is None or is_group(node) or node.shape != (len(names),):
            if key == "feature_type":  # passed over, antibodies would be counted as genes
                raise DataError(f"{file.filename}: {root}/{key} does not hold one entry a feature", hint=_HINT)
            continue
        values = read_small(file, node)
        columns[renamed.get(key, key)] = to_text(values) if values.dtype.kind in "OSU" else values
    if "gene_ids" not in columns:
        raise DataError(f"{file.filename}: {root}/id is missing: it identifies the genes", hint=_HINT)
    return names, columns


def _finish(
    path: Path,
    kind: str,
    matrix: Matrix,
    barcodes: np.ndarray,
    obs: dict[str, np.ndarray],
    names: np.ndarray,
    columns: dict[str, np.ndarray],
    modality: str | None,
    notes: list[str],
) -> Dataset:
    """Choose the features and put the data set together."""
    check_shape(matrix, matrix.where)
    keep, part, note = _choose_features(path, columns, modality)
    if note:
        notes.append(note)
    if keep is not None:
        chosen = np.flatnonzero(keep)
        matrix = select_columns(matrix, chosen)
        names = names[chosen]
        columns = {k: v[chosen] for k, v in columns.items()}
    return Dataset(
        path=path,
        kind=kind,
        modality=part,
        layer="X",
        matrix=matrix,
        obs=EmptyTable(barcodes, where=f"{path}: barcodes", extra=obs),
        var=EmptyTable(names, where=f"{path}: features", extra=columns),
        notes=notes,
    )


def _choose_features(
    path: Path, columns: dict[str, np.ndarray], wanted: str | None
) -> tuple[np.ndarray | None, str | None, str | None]:
    """Return which features to keep (None for all), the part's name, and what to tell the user."""
    types, genomes = columns.get("feature_types"), columns.get("genome")
    n_each = {} if types is None else dict(zip(*np.unique(types.astype(str), return_counts=True), strict=True))
    census = ", ".join(f"{k:,} {t}" for t, k in n_each.items())
    if wanted is None:
        if len(n_each) < 2:
            return None, None, None
        if GENES not in n_each:
            raise DataError(f"{path}: holds {census} and no {GENES}", hint="--modality, one of them, or all")
        note = f"{n_each[GENES]:,} features of type {GENES} out of {census} (--modality chooses others, or all)"
        return np.asarray(types == GENES), GENES, note
    if wanted == ALL:
        return None, ALL, None
    for values in (types, genomes):
        if values is not None and (keep := np.asarray(values == wanted)).any():
            return keep, wanted, None
    known = [*n_each, *([] if genomes is None else [g for g in dict.fromkeys(genomes) if g]), ALL]
    raise DataError(f"{path}: has no feature type or genome {wanted!r}", hint=f"--modality, one of: {', '.join(known)}")


def find_mtx(path: Path) -> Path | None:
    """Return the mtx file that a path means: itself, one in the folder, or one in the folder's only subfolder.

    Raises
    ------
    DataError
        Where several subfolders (genomes) hold one.
    """
    if path.is_file():
        return path if path.name.endswith((".mtx", ".mtx.gz")) else None
    if not path.is_dir():
        return None
    if (here := _get_mtx(path)) is not None:
        return here
    below = [m for d in sorted(path.iterdir()) if d.is_dir() and not d.name.startswith(".") and (m := _get_mtx(d))]
    if len(below) > 1:
        raise DataError(
            f"{path}: holds {len(below)} 10x matrices", hint=f"pass one of: {', '.join(str(m.parent) for m in below)}"
        )
    return below[0] if below else None


def _get_mtx(folder: Path) -> Path | None:
    return next((p for n in ("matrix.mtx", "matrix.mtx.gz") if (p := folder / n).is_file()), None)


def open_mtx(path: Path, mtx_fpath: Path, modality: str | None, layer: str | None) -> Dataset:
    """Open a 10x mtx folder (``genes.tsv`` of version 2, ``features.tsv`` of version 3, gzipped or not), in memory.

    Raises
    ------
    DataError
        Where a file is missing or damaged, or the three disagree.
    """
    _need_x(path, layer)
    barcodes = np.array([r[0] for r in _read_tsv(mtx_fpath, "barcodes.tsv")], dtype=object)
    rows = _read_tsv(mtx_fpath, "features.tsv", "genes.tsv")
    width = min((len(r) for r in rows), default=1)
    ids = np.array([r[0] for r in rows], dtype=object)
    names = np.array([r[1] for r in rows], dtype=object) if width > 1 else ids
    columns = {"gene_ids": ids}
    if width > 2:
        columns["feature_types"] = np.array([r[2] for r in rows], dtype=object)
    coo = _read_mtx(mtx_fpath, (len(ids), len(barcodes)))
    notes = []
    if path.is_dir() and mtx_fpath.parent != path:
        notes.append(f"{path}: its 10x matrix in {mtx_fpath.parent.name} is read")
    csr = coo.T.tocsr()
    if csr.nnz != coo.nnz:
        notes.append(f"{coo.nnz - csr.nnz:,} entries of {mtx_fpath.name} were given twice and are summed")
    matrix = CsrMatrix(
        shape=(len(barcodes), len(ids)),
        n_major=len(barcodes),
        indptr=csr.indptr,
        indices=MemoryArray(csr.indices),
        data=MemoryArray(csr.data),
        where=f"{mtx_fpath}",
    )
    return _finish(path, "10x-mtx", matrix, barcodes, {}, names, columns, modality, notes)


def _read_mtx(fpath: Path, shape: tuple[int, int]) -> coo_array:
    from scipy.io import mminfo, mmread

    try:
        n_rows, n_cols, nnz, layout, field, _ = mminfo(fpath)
        if (n_rows, n_cols) != shape:
            raise DataError(
                f"{fpath}: is {n_rows:,} × {n_cols:,} but there are {shape[0]:,} features and {shape[1]:,} barcodes"
            )
        if layout != "coordinate" or field not in ("integer", "real", "unsigned-integer"):
            raise DataError(f"{fpath}: is a {layout} matrix of {field} values; coordinate integers expected")
        # an entry takes 6 bytes of text at least, and gzip saves at most a factor of 1,032
        if nnz * 6 > fpath.stat().st_size * (1_032 if fpath.suffix == ".gz" else 1):
            raise DataError(f"{fpath}: its header promises {nnz:,} entries, more than the file can hold (truncated?)")
        _check_numbers(fpath, field, nnz)
        return mmread(fpath, spmatrix=False)
    except (OSError, EOFError, ValueError, OverflowError, TypeError, zlib.error) as e:
        raise DataError(f"{fpath}: cannot be read as a Matrix Market file: {' '.join(str(e).split())}") from e


def _check_numbers(fpath: Path, field: str, nnz: int) -> None:
    """Refuse what scipy's parser passes over in silence: ``1e3`` among integers (it reads 1), words beyond a third."""
    allowed = b"0123456789+- \t\r\n" + (b"" if "integer" in field else b".eE")
    words, after_space = 0, True
    with gzip.open(fpath, "rb") if fpath.suffix == ".gz" else fpath.open("rb") as f:
        for line in f:
            if not line.startswith(b"%") and line.strip():  # the line of sizes; what follows is entries alone
                break
        while block := f.read(1 << 22):
            odd = block.translate(None, delete=allowed)
            if odd:
                raise DataError(f"{fpath}: {odd[:1].decode('latin-1')!r} stands among the entries of {field} values")
            space = np.frombuffer(block, np.uint8) <= ord(" ")
            words += int(np.count_nonzero(space[:-1] & ~space[1:])) + (after_space and not space[0])
            after_space = bool(space[-1])
    if words != 3 * nnz:
        raise DataError(f"{fpath}: its {nnz:,} entries hold {words:,} words; three each expected")


def _read_tsv(mtx_fpath: Path, *names: str) -> list[list[str]]:
    """Return the rows of the first of the named files (or its ``.gz``) that lies beside the matrix."""
    for name in names:
        for fpath in (mtx_fpath.with_name(name), mtx_fpath.with_name(f"{name}.gz")):
            if fpath.is_file():
                return _read_rows(fpath)
    raise DataError(f"{mtx_fpath.parent}: {' or '.join(names)} is missing", hint="copy the whole 10x folder")


def _read_rows(fpath: Path) -> list[list[str]]:
    try:
        with gzip.open(fpath, "rb") if fpath.suffix == ".gz" else fpath.open("rb") as f:
            raw = f.read(_MAX_TEXT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{fpath}: cannot be read: {e}") from e
    if len(raw) > _MAX_TEXT_BYTES:
        raise DataError(f"{fpath}: unpacks to more than {_MAX_TEXT_BYTES:,} bytes")
    try:
        return [line.rstrip("\r").split("\t") for line in raw.decode().split("\n") if line.strip()]
    except UnicodeDecodeError as e:
        raise DataError(f"{fpath}: is not UTF-8 text: {e}") from e
