"""Read tables of counts (CSV or TSV, plain or gzipped, cells × genes or genes × cells) into memory."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError, EnvironmentFault, spell
from vcelltools.io.hdf5.arrays import MemoryArray
from vcelltools.io.hdf5.table import EmptyTable
from vcelltools.io.matrix import CsrMatrix
from vcelltools.io.opened import Dataset, check_shape

_LARGEST = 8 << 30
_ENDS = (".csv", ".tsv", ".txt", ".tab")
_ENSEMBL = re.compile(r"^ENS[A-Z]{0,6}G\d{6,}")
_COMMON = frozenset({"ACTB", "GAPDH", "MALAT1", "B2M", "RPLP0", "EEF1A1", "FTL", "TP53", "MYC"})


def is_text(path: Path) -> bool:
    """Return whether a file is a text table, from the end of its name and its first bytes."""
    if not path.is_file() or not path.name.lower().removesuffix(".gz").endswith(_ENDS):
        return False
    try:
        with path.open("rb") as f:
            head = f.read(4096)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as zipped:
                head = zipped.read(4096)
    except (OSError, EOFError, zlib.error):
        return False
    return b"\0" not in head and (b"," in head or b"\t" in head)


def open_text(path: Path, layer: str | None) -> Dataset:
    """Open a table whose first line and first column are names.

    Genes are recognised by Ensembl ids or by genes that every transcriptome has; without either, rows are cells. The
    first line may be one name shorter than the others, as R writes it.

    Raises
    ------
    DataError
        If the table is damaged or holds values that are not numbers.
    """
    import pyarrow as pa
    from pyarrow import csv

    if layer not in (None, "X"):
        raise DataError(f"{path}: a table of text has no layers, so no {layer!r}", hint=f"leave {spell('layer')} out")
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path}: is too large to be held in memory as text", hint="write it as an h5ad")
        first, second = _read_two_lines(path)
        delimiter = "\t" if first.count("\t") >= first.count(",") else ","
        short = first.count(delimiter) + 1 == second.count(delimiter)
        head = [c.strip().strip('"') for c in first.split(delimiter)]
        names = head if short else head[1:]
        columns = [f"c{i}" for i in range(len(names) + 1)]
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=columns, skip_rows=1),
            parse_options=csv.ParseOptions(delimiter=delimiter),
            convert_options=csv.ConvertOptions(
                column_types={"c0": pa.string(), **dict.fromkeys(columns[1:], pa.float64())}
            ),
        )
    except PermissionError as e:
        raise EnvironmentFault(f"{path}: permission denied", hint="check the file's mode and owner") from e
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error) as e:
        said = " ".join(str(e).split())[:160]
        hint = "its first line and first column are names, all else numbers"
        raise DataError(f"{path}: cannot be read as a table of counts: {said}", hint=hint) from e
    rows = np.array(table.column("c0").to_pylist(), dtype=object)
    values = np.empty((len(rows), len(names)))
    for j in range(len(names)):
        values[:, j] = table.column(j + 1).to_numpy()
    return _make(path, rows, np.array(names, dtype=object), values)


def _read_two_lines(path: Path) -> tuple[str, str]:
    with path.open("rb") as f:
        zipped = f.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as f:
        return f.readline().rstrip("\r\n"), f.readline().rstrip("\r\n")


def _make(path: Path, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> Dataset:
    from scipy import sparse

    notes = []
    by_row, by_column = _look_like_genes(rows), _look_like_genes(columns)
    if by_row > by_column:
        rows, columns, values = columns, rows, values.T
        notes.append(f"{path.name}: its rows are genes and its columns cells, by their names")
    elif by_row == by_column:
        notes.append(
            f"{path.name}: its names do not say which are genes; its rows were taken for cells ({len(rows):,} cells)"
        )
    check_shape_of = f"{path}: the table"
    csr = sparse.csr_matrix(values)
    if not np.isfinite(csr.data).all():
        raise DataError(f"{check_shape_of} has empty or infinite entries", hint="every cell of it is a number")
    whole = bool((csr.data == np.rint(csr.data)).all() and np.abs(csr.data).max(initial=0) < 2**31)
    matrix = CsrMatrix(
        shape=csr.shape,
        n_major=csr.shape[0],
        indptr=csr.indptr,
        indices=MemoryArray(csr.indices),
        data=MemoryArray(csr.data.astype(np.int32) if whole else csr.data),
        where=str(path),
    )
    check_shape(matrix, check_shape_of)
    return Dataset(
        path=path, kind="text", modality=None, layer="X", matrix=matrix,
        obs=EmptyTable(rows, where=f"{path}: cells"), var=EmptyTable(columns, where=f"{path}: genes"), notes=notes,
    )  # fmt: skip


def _look_like_genes(names: np.ndarray) -> float:
    """Return the share of names that are Ensembl ids, or the share of common genes among them, if that is larger."""
    found = sum(1 for v in names.tolist() if v is not None and _ENSEMBL.match(v)) / max(len(names), 1)
    common = len(_COMMON & {str(v).upper() for v in names.tolist()}) / len(_COMMON)
    return max(found, common)
