"""The tables that are written: per perturbation, aggregated, and differential expression, as cell-eval has them."""

from __future__ import annotations

import importlib
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.atomic import atomic_file
from vcelltools.scoring.effects import Effects
from vcelltools.textfile import read_columns

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS = ("count", "null_count", "mean", "std", "min", "25%", "50%", "75%", "max")


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """One row a perturbation, one column a metric.

    Attributes
    ----------
    names
        Perturbations, sorted as text.
    columns
        Metric -> one value a perturbation; None where the perturbation has no such number.
    """

    names: list[str]
    columns: dict[str, list[float | None]]

    def values(self, name: str) -> np.ndarray:
        """Return a column as float64, null as NaN."""
        return np.array([math.nan if v is None else v for v in self.columns[name]])

    def aggregate(self, *, skip_nan: bool = False) -> dict[str, dict[str, float | None]]:
        """Return metric -> statistic -> value.

        Null is skipped. NaN counts as a value: it makes mean and standard deviation NaN, sorts last for the
        quantiles (nearest rank) and is passed over by min and max, unless ``skip_nan`` makes it null.
        """
        return {name: describe(values, skip_nan=skip_nan) for name, values in self.columns.items()}

    def to_csv(self) -> str:
        """Return the text of ``results.csv``."""
        rows = [["perturbation", *self.columns]]
        rows += [[_quote(n), *(_number(c[i]) for c in self.columns.values())] for i, n in enumerate(self.names)]
        return "".join(",".join(r) + "\n" for r in rows)


def describe(values: list[float | None], *, skip_nan: bool = False) -> dict[str, float | None]:
    """Return the statistics of one column; see :meth:`ScoreTable.aggregate`."""
    present = [v for v in values if v is not None and not (skip_nan and math.isnan(v))]
    x = np.array(present, np.float64)
    out: dict[str, float | None] = {"count": float(len(x)), "null_count": float(len(values) - len(x))}
    if len(x) == 0:
        return out | dict.fromkeys(STATISTICS[2:])
    ordered, finite = np.sort(x), x[~np.isnan(x)]
    out["mean"] = float(x.mean())
    out["std"] = float(x.std(ddof=1)) if len(x) > 1 else None
    out["min"] = float(finite.min()) if len(finite) else math.nan
    for name, q in (("25%", 0.25), ("50%", 0.5), ("75%", 0.75)):
        out[name] = float(ordered[math.floor(q * (len(x) - 1) + 0.5)])
    out["max"] = float(finite.max()) if len(finite) else math.nan
    return out


def aggregate_csv(aggregate: dict[str, dict[str, float | None]]) -> str:
    """Return the text of ``agg_results.csv``."""
    rows = [["statistic", *aggregate]]
    rows += [[s, *(_number(a[s]) for a in aggregate.values())] for s in STATISTICS]
    return "".join(",".join(r) + "\n" for r in rows)


def read_aggregate(path: str | Path, statistic: str = "mean") -> dict[str, float]:
    """Return metric -> value of one statistic of an ``agg_results.csv``; empty cells become NaN."""
    hint = "pass the agg_results.csv of an earlier score"
    found, columns = read_columns(path, first="statistic", what="a table of statistics", hint=hint, only=statistic)
    if not found:
        raise DataError(f"{path}: has no row {statistic!r}", hint=hint)
    return {name: values[0] for name, values in columns.items()}


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def _number(v: float | None) -> str:
    if v is None:
        return ""
    if math.isnan(v):
        return "NaN"
    return repr(float(v))


def numbers(values: np.ndarray, nan_is_null: bool = False) -> pa.Array:
    """Return an Arrow array over the same memory; ``pa.array`` would import pandas to look at its argument."""
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    kind = getattr(pa, {"f": "float", "i": "int"}[values.dtype.kind] + str(8 * values.dtype.itemsize))()
    valid = None
    if nan_is_null:
        valid = pa.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(values)])


def texts(values: list[str], *, each: int = 1, times: int = 1) -> pa.Array:
    """Return an Arrow array of text without ``pa.array``: every value ``each`` times, all of that ``times`` times."""
    import pyarrow as pa

    raw = [v.encode() for v in values]
    lengths = np.tile(np.repeat(np.array([len(r) for r in raw], np.int64), each), times)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    body = b"".join([r * each for r in raw]) * times
    return pa.Array.from_buffers(pa.large_string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(body)])


def load_ahead() -> None:
    """Load what the tables are written with in the background: it takes 0.1 s, and kernels hold no lock meanwhile."""
    threading.Thread(target=importlib.import_module, args=("pyarrow.csv",)).start()


def write_de_csv(
    path: Path,
    table: Effects,
    genes: np.ndarray,
    *,
    order: tuple[str, ...],
    sizes: dict[str, int],
    control: str,
    dtype: np.dtype,
) -> None:
    """Write a differential expression table: perturbations in the file's category order, genes in its own order.

    Its columns are pdex's: of 0.3, or of 0.1 where the rule set works with fold changes.
    """
    position = {n: i for i, n in enumerate(table.names)}
    rows = np.array([position[n] for n in order if n in position], np.int64)
    keep = None if table.keep_pg is None else table.keep_pg[rows].ravel()
    n_g = len(genes)
    names = [table.names[i] for i in rows]
    features = [str(g) for g in genes]
    kind = np.float32 if dtype == np.float32 else np.float64

    def flat(x: np.ndarray, nan_is_null: bool = False) -> pa.Array:
        values = np.ascontiguousarray(x[rows]).ravel()
        return numbers(values if keep is None else values[keep], nan_is_null)

    def repeated(values: pa.Array) -> pa.Array:
        index = np.repeat(np.arange(len(values), dtype=np.int32), n_g)
        return values.take(numbers(index if keep is None else index[keep]))

    def tiled(values: pa.Array) -> pa.Array:
        index = np.tile(np.arange(len(values), dtype=np.int32), len(rows))
        return values.take(numbers(index if keep is None else index[keep]))

    columns: dict[str, pa.Array] = {"target": repeated(texts(names))}
    means = {
        "target_mean": flat(table.mean_pg.astype(kind)),
        ("reference_mean" if table.ratio_pg is not None else "ref_mean"): tiled(
            numbers(table.control_mean_g.astype(kind))
        ),
    }
    if table.ratio_pg is not None:
        columns |= {"reference": repeated(texts([control] * len(rows))), "feature": tiled(texts(features)), **means}
        columns |= {"percent_change": flat(table.percent_pg, True), "fold_change": flat(table.ratio_pg)}
        columns |= {"p_value": flat(table.p_pg), "statistic": flat(table.u_pg), "fdr": flat(table.fdr_pg)}
    else:
        columns |= {"feature": tiled(texts(features)), **means}
        columns["target_membership"] = repeated(numbers(np.array([sizes[n] for n in names], np.int64)))
        columns["ref_membership"] = repeated(numbers(np.full(len(rows), sizes[control], np.int64)))
        columns |= {"log2_fold_change": flat(table.log2fc_pg), "percent_change": flat(table.percent_pg)}
        columns |= {"p_value": flat(table.p_pg), "statistic": flat(table.u_pg), "fdr": flat(table.fdr_pg)}
    plain = is_plain([*names, *features, control])
    write_arrow_csv(path, [columns], plain=plain)


def is_plain(values: list[str]) -> bool:
    """Tell whether no text needs quotes in a CSV."""
    return not any(_quote(t) != t for t in values)


def write_arrow_csv(path: Path, tables: list[dict[str, pa.Array]], *, plain: bool) -> None:
    """Write tables of the same columns one below the other; ``plain`` where no text needs quotes."""
    import pyarrow as pa
    from pyarrow import csv

    with atomic_file(path) as tmp, tmp.open("wb") as f:
        f.write((",".join(tables[0]) + "\n").encode())
        options = csv.WriteOptions(include_header=False, quoting_style="none" if plain else "needed")
        for columns in tables:
            csv.write_csv(pa.Table.from_arrays(list(columns.values()), names=list(columns)), f, options)
