"""Read and write tables as Arrow columns: feather, parquet and CSV, written atomically."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.textfile import say_missing
from vcelltools.io.write.atomic import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = (".feather", ".parquet", ".csv")


def read_frame(path: str | os.PathLike, *, what: str) -> pa.Table:
    """Read a table in the format of its file extension.

    Raises
    ------
    DataError
        If it is missing, of another format, or damaged.
    """
    import pyarrow as pa

    p = Path(path)
    if not p.exists():
        raise say_missing(p)
    if not p.is_file():
        raise DataError(f"{p} is a folder, but {what} is expected")
    if not os.access(p, os.R_OK):
        raise EnvironmentFault(f"{p}: permission denied", hint="check the mode and owner of the file")
    try:
        if p.suffix in (".feather", ".arrow"):
            with pa.OSFile(str(p)) as source:  # pyarrow.feather would load pandas
                table = pa.ipc.open_file(source).read_all()
            table.validate(full=True)  # a damaged file may claim lengths and offsets that are none
            return table
        if p.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(p, memory_map=False)
        if p.suffix == ".csv":
            from pyarrow import csv

            return csv.read_csv(p)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise DataError(f"{p} cannot be read as {what}: {' '.join(str(e).split())[:200]}") from e
    raise DataError(
        f"{p} has an unknown extension; {what} is expected", hint=f"supported extensions: {', '.join(FORMATS)}"
    )


def write_frame(path: str | os.PathLike, columns: dict[str, Any], *, force: bool = False) -> Path:
    """Write columns atomically, in the format of the extension: feather (LZ4), parquet or CSV; return the path."""
    import pyarrow as pa

    p = Path(path)
    table = pa.table(columns)
    with atomic_file(p, force=force) as tmp:
        if p.suffix == ".feather":
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            with pa.OSFile(str(tmp), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
                writer.write_table(table)
        elif p.suffix == ".csv":
            from pyarrow import csv

            csv.write_csv(table, tmp)
        else:
            from pyarrow import parquet

            parquet.write_table(table, tmp, compression="zstd")
    return p


def arrow_numbers(values: np.ndarray, nan_is_null: bool = False) -> pa.Array:
    """Return an Arrow array on the same memory; ``pa.array`` would import pandas to inspect its argument."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    kind = getattr(pa, {"f": "float", "i": "int"}[values.dtype.kind] + str(8 * values.dtype.itemsize))()
    valid = None
    if nan_is_null:
        valid = pa.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)])


def arrow_texts(values: Sequence[str]) -> pa.Array:
    """Return an Arrow array of texts, without pandas as :func:`arrow_numbers`."""
    import pyarrow as pa

    raw = [v.encode("utf-8", "backslashreplace") for v in values]
    ends = np.cumsum([0, *map(len, raw)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(raw), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))])


def load_ahead(library: str) -> None:
    """Import a library in the background: 0.1 to 0.3 s, which cost nothing while files are read and kernels run."""
    threading.Thread(target=importlib.import_module, args=(library,)).start()
