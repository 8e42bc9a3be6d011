"""Write ``cells.parquet``, obs in store order, without holding a whole column in memory.

Store order scatters the rows of the source, and variable-length strings cannot be read at random. Therefore obs is read
once, one range of cells at a time, and every range is distributed over spill files, one per row group of the result;
then each row group is sorted in memory and written.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.table import RANGE, Column, TableBase, get_series
from vcelltools.io.write.atomic import fsync_path
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.files import save_array

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from vcelltools.io.table import Table

GROUP_VALUES = 1 << 18  # size of a row group: its rows times its columns
MAX_GROUPS = 256  # number of spill files open at once
_ROW = "row"
_NAME = "name"


def get_group_rows(n: int, n_columns: int) -> int:
    """Return the number of rows per row group for ``n`` cells."""
    return max(1 << 10, min(1 << 16, GROUP_VALUES // max(n_columns, 1)), -(-n // MAX_GROUPS))


def write_cells(layout: Layout, dpath: Path) -> None:
    """Write obs in store order, and the row of each cell in the source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    obs, n = layout.ds.obs, layout.n
    names = obs.list_readable([])  # the plan has reported what is dropped
    heads = {name: obs.read(name, 0, 1) for name in names}
    schema = _make_schema(obs, heads)
    rows = get_group_rows(n, len(schema))
    spills = [dpath / f"cells.{g}.work" for g in range(-(-n // rows))]
    _spill(layout, names, spills, rows)
    categorical = [f.name for f in schema if pa.types.is_dictionary(f.type)]
    options: dict[str, Any] = {
        "compression": "zstd",
        "write_page_checksum": True,
        "use_dictionary": categorical,  # unchanged, because a page that overflows would lose their order
        "dictionary_pagesize_limit": 1 << 30,
    }
    path = dpath / "cells.parquet"
    with pq.ParquetWriter(path, schema, **options) as out:
        for spill in spills:
            out.write_table(_make_group(spill, schema, heads), row_group_size=rows)
            spill.unlink()
    if isinstance(obs, TableBase):
        obs.forget()
    fsync_path(path)
    save_array(dpath / "source_row.npy", layout.plan.order.source)


def _spill(layout: Layout, names: list[str], spills: list[Path], rows: int) -> None:
    """Distribute the cells that are kept over the files of their row groups."""
    import pyarrow as pa

    obs, row_of_cell = layout.ds.obs, layout.plan.order.row_of_cell
    edges = np.arange(len(spills) + 1) * rows
    step = min(RANGE, rows)
    with ExitStack() as stack:
        writers: dict[int, Any] = {}
        for a in range(0, obs.n, step):
            z = min(a + step, obs.n)
            slots = row_of_cell[a:z]
            kept = np.flatnonzero(slots >= 0)
            if not len(kept):
                continue
            kept = kept[np.argsort(slots[kept])]
            arrays = {_ROW: pa.array(slots[kept]), _NAME: pa.array(obs.names(a, z)[kept], type=pa.string())}
            for i, name in enumerate(names):
                arrays[str(i)] = to_arrow(obs.read(name, a, z)).take(pa.array(kept))
            batch = pa.RecordBatch.from_pydict(arrays)
            cuts = np.searchsorted(slots[kept], edges).tolist()
            for g, (i, j) in enumerate(itertools.pairwise(cuts)):
                if i < j:
                    if g not in writers:
                        writers[g] = stack.enter_context(pa.ipc.new_stream(str(spills[g]), batch.schema))
                    writers[g].write_batch(batch.slice(i, j - i))


def _make_group(spill: Path, schema: pa.Schema, heads: dict[str, Column]) -> pa.Table:
    """Return one row group, in store order, from its spill file."""
    import pyarrow as pa

    with pa.ipc.open_stream(str(spill)) as stream:
        table = stream.read_all()
    order = np.argsort(table.column(_ROW).to_numpy())
    table = table.take(pa.array(order))
    arrays: list[pa.Array] = []
    for i, head in enumerate(heads.values()):
        values = table.column(str(i)).combine_chunks()
        field = schema.field(len(arrays))
        if head.codes is not None:
            categories = pa.array(head.categories, type=field.type.value_type, from_pandas=True)
            values = pa.DictionaryArray.from_arrays(
                values.cast(field.type.index_type), categories, ordered=head.ordered
            )
        arrays.append(values)
    arrays.append(table.column(_NAME).combine_chunks())
    return pa.Table.from_arrays(arrays, schema=schema)


def to_arrow(col: Column) -> pa.Array:
    """Return a column as an arrow array; for a categorical, its codes as int32."""
    import pyarrow as pa

    if col.codes is not None:
        return pa.array(col.codes.astype(np.int32), mask=col.codes < 0)
    assert col.values is not None
    if col.values.dtype.kind == "O":
        return pa.array(col.values, type=pa.string())
    return pa.array(col.values, mask=col.missing, from_pandas=True)


def _make_schema(obs: Table, heads: dict[str, Column]) -> pa.Schema:
    """Return the schema of the table, with the metadata for pandas: the index, and ordered categoricals."""
    import pandas as pd
    import pyarrow as pa

    fields: list[tuple[str, pa.DataType]] = []
    frame: dict[str, pd.Series] = {}
    for name, head in heads.items():
        kind = to_arrow(head).type
        if head.codes is not None:
            assert head.categories is not None
            width = next(t for t in (np.int8, np.int16, np.int32) if len(head.categories) <= np.iinfo(t).max)
            values = pa.array(head.categories, from_pandas=True).type if len(head.categories) else pa.string()
            kind = pa.dictionary(
                pa.from_numpy_dtype(width), pa.string() if values == pa.null() else values, head.ordered
            )
        fields.append((name, kind))
        frame[name] = pd.Series([""], dtype=object) if head.kind == "string" else get_series(head)
    index = pd.Index([str(x) for x in obs.names(0, 1)], dtype=object)
    theirs = pa.Schema.from_pandas(pd.DataFrame(frame, index=pd.RangeIndex(1)).set_index(index), preserve_index=True)
    fields.append((theirs.names[-1], pa.string()))
    return pa.schema(fields, metadata=theirs.metadata)
