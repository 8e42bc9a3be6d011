"""Read files of Cell Ranger and Space Ranger: h5 files (versions 2 and 3) and mtx folders.

Both hold features × barcodes by column, which is the same as cells × genes by row.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.formats.anndata import open_array
from vcelltools.io.hdf5.arrays import MemoryArray
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.safe import File, get_node, is_group, need_dataset, read_small
from vcelltools.io.hdf5.table import EmptyTable, to_text
from vcelltools.io.matrix import CsrMatrix, Matrix
from vcelltools.io.opened import Dataset, check_shape

if TYPE_CHECKING:
    from scipy.sparse import coo_array

_PARTS = ("data", "indices", "indptr", "shape", "barcodes")
_RENAMED = {"id": "gene_ids", "feature_type": "feature_types"}  # scanpy's names
_MAX_TEXT_BYTES = 1 << 30
_HEADS = ("barcode", "barcodes", "cell", "cell_barcode", "gene_id", "gene_ids", "id", "gene", "gene_name", "feature_id")
_BARCODES, _FEATURES = ("barcodes.tsv",), ("features.tsv", "genes.tsv")
_MTX_ENDS = (".mtx", ".mtx.gz")
_HINT = "the file is not a complete 10x matrix; copy it again"


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
    """Return the choices for ``modality`` in a 10x h5 file: genomes (version 2) or feature types; None for only one."""
    if get_node(file, "matrix/barcodes") is None:
        return list(_list_genomes(file))
    if not is_group(get_node(file, "matrix/features")):
        return [None]
    types = _read_features(file, "matrix/features", None)[1].get("feature_types")
    return [None] if types is None else list(dict.fromkeys(types))


def open_tenx(
    path: Path, file: File, source: FileBytes | None, modality: str | None, layer: str | None, genome: str | None
) -> Dataset:
    """Open a 10x h5 file.

    Parameters
    ----------
    modality, genome
        A genome of a version 2 file, under either name; for a version 3 file, the caller chooses.

    Raises
    ------
    DataError
        If parts are missing or inconsistent, or if a choice is necessary.
    """
    _need_x(path, layer)
    notes: list[str] = []
    root = "matrix"
    if get_node(file, "matrix/barcodes") is None:
        root = _choose_genome(path, _list_genomes(file), modality, genome)
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
        indices=open_array(file, get_node(file, f"{root}/indices"), source),
        data=open_array(file, get_node(file, f"{root}/data"), source),
        where=f"{path}: {root}",
    )
    obs = {}
    if (kept := get_node(file, f"{root}/filtered_barcodes")) is not None and kept.shape == (n_cells,):
        obs["filtered_barcodes"] = read_small(file, kept)
    genome = root if root != "matrix" else None
    return _make(path, "10x-h5", matrix, barcodes, obs, names, columns, genome, notes)


def _need_x(path: Path, layer: str | None) -> None:
    if layer not in (None, "X"):
        raise DataError(
            f"{path}: a 10x matrix has no layers, so there is no layer {layer!r}", hint=f"leave {spell('layer')} out"
        )


def _choose_genome(path: Path, genomes: list[str], modality: str | None, genome: str | None) -> str:
    listed = ", ".join(genomes)
    for wanted in filter(None, (genome, modality)):
        if genome is not None and wanted != genome:
            raise UsageError(
                f"{spell('modality', modality)} and {spell('genome', genome)} differ", hint="remove one of the two"
            )
        if wanted not in genomes:
            raise DataError(f"{path} has no genome {wanted!r}", hint=f"{spell('genome')}, one of: {listed}")
    if genome or modality:
        return str(genome or modality)
    if len(genomes) > 1:
        raise DataError(
            f"{path} holds {len(genomes)} genomes, each with its own matrix",
            hint=f"{spell('genome')}, one of: {listed}",
        )
    return genomes[0]


def _read_text(file: File, key: str, n: int | None) -> np.ndarray:
    values = read_small(file, need_dataset(file, key, what="it names the genes", hint=_HINT), length=n)
    if values.ndim != 1:
        raise DataError(f"{file.filename}: {key} has {values.ndim} dimensions instead of 1")
    return to_text(values)


def _read_features(file: File, root: str, n: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the names of the features and every other column with one entry per feature."""
    group = get_node(file, root)
    if not is_group(group):
        raise DataError(f"{file.filename}: {root} is missing; it names the genes", hint=_HINT)
    names = _read_text(file, f"{root}/name", n)
    columns = {}
    renamed = {**_RENAMED, "id": "probe_ids", "gene_id": "gene_ids"} if "gene_id" in group else _RENAMED
    for key in group:
        node = get_node(file, f"{root}/{key}")
        if key == "name" or node is None or is_group(node) or node.shape != (len(names),):
            if key == "feature_type":  # if it were skipped, antibodies would count as genes
                raise DataError(f"{file.filename}: {root}/{key} does not hold one entry per feature", hint=_HINT)
            continue
        values = read_small(file, node)
        columns[renamed.get(key, key)] = to_text(values) if values.dtype.kind in "OSU" else values
    if "gene_ids" not in columns:
        raise DataError(f"{file.filename}: {root}/id, which identifies the genes, is missing", hint=_HINT)
    return names, columns


def _make(
    path: Path,
    kind: str,
    matrix: Matrix,
    barcodes: np.ndarray,
    obs: dict[str, np.ndarray],
    names: np.ndarray,
    columns: dict[str, np.ndarray],
    genome: str | None,
    notes: list[str],
) -> Dataset:
    check_shape(matrix, matrix.where)
    return Dataset(
        path=path,
        kind=kind,
        modality=genome,
        layer="X",
        genome=genome,
        matrix=matrix,
        obs=EmptyTable(barcodes, where=f"{path}: barcodes", extra=obs),
        var=EmptyTable(names, where=f"{path}: features", extra=columns),
        notes=notes,
    )


def find_mtx(path: Path) -> Path | None:
    """Return the mtx file for a path: the path itself, a file in the folder, or a file in its only subfolder.

    Raises
    ------
    DataError
        If several subfolders (genomes) hold an mtx file.
    """
    if path.is_file():
        return path if path.name.endswith(_MTX_ENDS) else None
    if not path.is_dir():
        return None
    folders = [path, *sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))]
    here = _list_mtx(path)
    found = here or [m for d in folders[1:] for m in _list_mtx(d)]
    if len(found) > 1:
        which = found if here else [m.parent for m in found]
        raise DataError(f"{path} holds {len(found)} 10x matrices", hint=f"pass one of: {', '.join(map(str, which))}")
    return found[0] if found else None


def _list_mtx(folder: Path) -> list[Path]:
    """Return the matrices in a folder: those of Cell Ranger, or those prefixed with the name of a sample (GEO)."""
    own = [p for end in _MTX_ENDS if (p := folder / f"matrix{end}").is_file()]
    return own[:1] or sorted(p for end in _MTX_ENDS for p in folder.glob(f"*matrix{end}") if p.is_file())


def open_mtx(path: Path, mtx_fpath: Path, layer: str | None) -> Dataset:
    """Open a 10x mtx folder (``genes.tsv`` of version 2, ``features.tsv`` of version 3, gzipped or not), in memory.

    Raises
    ------
    DataError
        If a file is missing or damaged, or the three are inconsistent.
    """
    _need_x(path, layer)
    cells, rows = _read_tsv(mtx_fpath, *_BARCODES), _read_tsv(mtx_fpath, *_FEATURES)
    if cells[:1] and cells[0][0].lower() in _HEADS and rows[:1] and rows[0][0].lower() in _HEADS:
        cells, rows = cells[1:], rows[1:]  # header lines that a spreadsheet may have added
    barcodes = np.array([r[0] for r in cells], dtype=object)
    width = min((len(r) for r in rows), default=1)
    ids = np.array([r[0] for r in rows], dtype=object)
    names = np.array([r[1] for r in rows], dtype=object) if width > 1 else ids
    columns = {"gene_ids": ids}
    if width > 2:
        columns["feature_types"] = np.array([r[2] for r in rows], dtype=object)
    notes: list[str] = []
    coo = _read_mtx(mtx_fpath, (len(ids), len(barcodes)), notes)
    if path.is_dir() and mtx_fpath.parent != path:
        notes.append(f"{path}: using the 10x matrix in {mtx_fpath.parent.name}")
    csr = (coo if coo.shape == (len(barcodes), len(ids)) != (len(ids), len(barcodes)) else coo.T).tocsr()
    if csr.nnz != coo.nnz:
        notes.append(f"{coo.nnz - csr.nnz:,} duplicate entries of {mtx_fpath.name} are summed")
    matrix = CsrMatrix(
        shape=(len(barcodes), len(ids)),
        n_major=len(barcodes),
        indptr=csr.indptr,
        indices=MemoryArray(csr.indices),
        data=MemoryArray(csr.data),
        where=f"{mtx_fpath}",
    )
    return _make(path, "10x-mtx", matrix, barcodes, {}, names, columns, None, notes)


def _read_mtx(fpath: Path, shape: tuple[int, int], notes: list[str]) -> coo_array:
    from scipy.io import mminfo, mmread

    try:
        n_rows, n_cols, nnz, layout, field, _ = mminfo(fpath)
        if (n_rows, n_cols) == shape[::-1] != shape:  # as written by kallisto and bustools
            notes.append(f"{fpath.name} holds cells × genes instead of genes × cells, and is read accordingly")
        elif (n_rows, n_cols) != shape:
            raise DataError(
                f"{fpath} is {n_rows:,} × {n_cols:,} but there are {shape[0]:,} features and {shape[1]:,} barcodes"
            )
        if layout != "coordinate" or field not in ("integer", "real", "unsigned-integer"):
            raise DataError(
                f"{fpath} is a {layout} matrix of {field} values, but must be a coordinate matrix of integers"
            )
        # an entry takes at least 6 bytes of text, and gzip compresses by at most a factor of 1,032
        if nnz * 6 > fpath.stat().st_size * (1_032 if fpath.suffix == ".gz" else 1):
            raise DataError(
                f"{fpath}: its header states {nnz:,} entries, more than the file can hold (it may be truncated)"
            )
        _check_numbers(fpath, field, nnz)
        return mmread(fpath, spmatrix=False)
    except (OSError, EOFError, ValueError, OverflowError, TypeError, zlib.error) as e:
        raise DataError(f"{fpath} cannot be read as a Matrix Market file: {' '.join(str(e).split())}") from e


def _check_numbers(fpath: Path, field: str, nnz: int) -> None:
    """Reject entries that scipy's parser misreads silently, such as ``1e3`` among integers or more than three words."""
    allowed = b"0123456789+- \t\r\n" + (b"" if "integer" in field else b".eE")
    words, after_space = 0, True
    with gzip.open(fpath, "rb") if fpath.suffix == ".gz" else fpath.open("rb") as f:
        for line in f:
            if not line.startswith(b"%") and line.strip():  # the line of sizes; only entries follow
                break
        while block := f.read(1 << 22):
            odd = block.translate(None, delete=allowed)
            if odd:
                raise DataError(f"{fpath}: the entries of {field} values contain {odd[:1].decode('latin-1')!r}")
            space = np.frombuffer(block, np.uint8) <= ord(" ")
            words += int(np.count_nonzero(space[:-1] & ~space[1:])) + (after_space and not space[0])
            after_space = bool(space[-1])
    if words != 3 * nnz:
        raise DataError(f"{fpath}: its {nnz:,} entries hold {words:,} words instead of three each")


def list_files(mtx_fpath: Path) -> list[Path]:
    """Return the files of a matrix: the matrix, and its barcodes and features if they exist."""
    return [mtx_fpath, *filter(None, (_find_tsv(mtx_fpath, *names) for names in (_BARCODES, _FEATURES)))]


def _find_tsv(mtx_fpath: Path, *names: str) -> Path | None:
    """Return the first of the named files (or its ``.gz``) beside the matrix, with the prefix of its sample."""
    stem = mtx_fpath.name.removesuffix(".gz").removesuffix(".mtx")
    for prefix in dict.fromkeys((stem.removesuffix("matrix"), f"{stem}_", f"{stem}.", "")):
        for name in names:
            for fpath in (mtx_fpath.with_name(prefix + name), mtx_fpath.with_name(f"{prefix}{name}.gz")):
                if fpath.is_file():
                    return fpath
    return None


def _read_tsv(mtx_fpath: Path, *names: str) -> list[list[str]]:
    fpath = _find_tsv(mtx_fpath, *names)
    if fpath is None:
        sample = mtx_fpath.name.partition("matrix.mtx")
        wanted = " or ".join(f"{sample[0] if sample[1] else ''}{n}" for n in names)
        raise DataError(f"{mtx_fpath.parent}: {wanted} is missing", hint="copy all three files of the matrix")
    return _read_rows(fpath)


def _read_rows(fpath: Path) -> list[list[str]]:
    try:
        with gzip.open(fpath, "rb") if fpath.suffix == ".gz" else fpath.open("rb") as f:
            raw = f.read(_MAX_TEXT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{fpath} cannot be read: {e}") from e
    if len(raw) > _MAX_TEXT_BYTES:
        raise DataError(f"{fpath} unpacks to more than {_MAX_TEXT_BYTES:,} bytes")
    try:
        return [line.rstrip("\r").split("\t") for line in raw.decode().split("\n") if line.strip()]
    except UnicodeDecodeError as e:
        raise DataError(f"{fpath} is not UTF-8 text: {e}") from e
