"""The tables of a scoring: scores by perturbation, their statistics, and Arrow columns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.textfile import read_columns
from vcelltools.io.write.atomic import atomic_file
from vcelltools.names import quote_cell

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

STATISTICS = ("count", "null_count", "mean", "std", "min", "25%", "50%", "75%", "max")


Statistics = dict[str, float | None]
Columns: TypeAlias = "dict[str, pa.Array]"


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """One row per perturbation (and context), one column per metric.

    Attributes
    ----------
    names
        Perturbations, sorted as text.
    columns
        Metric -> one value per perturbation; None if the perturbation has no such value.
    contexts
        The context of each row, or None if there is only one.
    """

    names: list[str]
    columns: dict[str, list[float | None]]
    contexts: list[str] | None = None

    def values(self, name: str) -> np.ndarray:
        """Return a column as float64, with NaN for null."""
        return np.array([math.nan if v is None else v for v in self.columns[name]], np.float64)

    def aggregate(self, *, skip_nan: bool = False, interpolate: bool = False) -> dict[str, Statistics]:
        """Return metric -> statistic -> value; see :func:`describe`."""
        return {k: describe(v, skip_nan=skip_nan, interpolate=interpolate) for k, v in self.columns.items()}

    def to_csv(self) -> str:
        """Return the text of ``results.csv``."""
        first = [quote_cell(n) for n in self.names]
        head = "perturbation"
        if self.contexts is not None:
            head, first = f"{head},context", [f"{n},{quote_cell(c)}" for n, c in zip(first, self.contexts, strict=True)]
        rows = [[head, *self.columns]]
        rows += [[n, *(_number(c[i]) for c in self.columns.values())] for i, n in enumerate(first)]
        return "".join(",".join(r) + "\n" for r in rows)

    def to_frame(self) -> pd.DataFrame:
        """Return a DataFrame indexed by perturbation."""
        import pandas as pd

        context = {} if self.contexts is None else {"context": self.contexts}
        columns = {k: self.values(k) for k in self.columns}
        return pd.DataFrame(context | columns, index=pd.Index(self.names, name="perturbation"))


def stack_tables(tables: dict[str, ScoreTable]) -> ScoreTable:
    """Concatenate the tables of all contexts; a column that a context lacks is null there."""
    if list(tables) == [""]:
        return tables[""]
    names = dict.fromkeys(k for t in tables.values() for k in t.columns)
    return ScoreTable(
        names=[n for t in tables.values() for n in t.names],
        columns={k: [v for t in tables.values() for v in t.columns.get(k, [None] * len(t.names))] for k in names},
        contexts=[c for c, t in tables.items() for _ in t.names],
    )


def describe(values: list[float | None], *, skip_nan: bool = False, interpolate: bool = False) -> Statistics:
    """Return the statistics of one column.

    Null is skipped. NaN counts as a value: it makes mean and standard deviation NaN, sorts last for the quantiles and
    is ignored by min and max, unless ``skip_nan`` makes it null. Quantiles use the nearest rank (as in
    polars) or, with ``interpolate``, linear interpolation.
    """
    present = [v for v in values if v is not None and not (skip_nan and math.isnan(v))]
    x = np.array(present, np.float64)
    counts = (len(x), len(values) - len(x))
    out: Statistics = dict(zip(STATISTICS, counts if interpolate else map(float, counts), strict=False))
    if len(x) == 0:
        return out | dict.fromkeys(STATISTICS[2:])
    ordered, finite = np.sort(x), x[~np.isnan(x)]
    out["mean"] = float(x.mean())
    out["std"] = float(x.std(ddof=1)) if len(x) > 1 else None
    out["min"] = float(finite.min()) if len(finite) else math.nan
    for name, q in (("25%", 0.25), ("50%", 0.5), ("75%", 0.75)):
        at = math.floor(q * (len(x) - 1) + 0.5)
        out[name] = float(np.percentile(x, 100 * q) if interpolate else ordered[at])
    out["max"] = float(finite.max()) if len(finite) else math.nan
    return out


def aggregate_csv(aggregate: dict[str, Statistics]) -> str:
    """Return the text of ``agg_results.csv``."""
    rows = [["statistic", *aggregate]]
    rows += [[s, *(_number(a[s]) for a in aggregate.values())] for s in STATISTICS]
    return "".join(",".join(r) + "\n" for r in rows)


def read_aggregate(path: str | Path, statistic: str = "mean") -> dict[str, float]:
    """Return metric -> value of one statistic of an ``agg_results.csv``; empty cells become NaN."""
    hint = "pass the agg_results.csv of an earlier score"
    found, columns = read_columns(path, first="statistic", what="a table of statistics", hint=hint, only=statistic)
    if not found:
        raise DataError(f"{path} has no row {statistic!r}", hint=hint)
    return {name: values[0] for name, values in columns.items()}


def _number(v: float | None) -> str:
    if v is None:
        return ""
    if math.isnan(v):
        return "NaN"
    return repr(v if isinstance(v, int) else float(v))


def texts(values: list[str], *, each: int = 1, times: int = 1) -> pa.Array:
    """Return an Arrow array of text without ``pa.array``; each value repeats ``each`` times, all ``times`` times."""
    import pyarrow as pa

    raw = [v.encode() for v in values]
    lengths = np.tile(np.repeat(np.array([len(r) for r in raw], np.int64), each), times)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    body = b"".join([r * each for r in raw]) * times
    return pa.Array.from_buffers(pa.large_string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(body)])


def write_arrow_csv(path: Path, tables: list[Columns], *, said: Iterable[str]) -> None:
    """Write concatenated tables with the same columns; ``said`` are all the texts in them."""
    import pyarrow as pa
    from pyarrow import csv

    plain = not any(quote_cell(t) != t for t in said)
    with atomic_file(path) as tmp, tmp.open("wb") as f:
        f.write((",".join(tables[0]) + "\n").encode())
        options = csv.WriteOptions(include_header=False, quoting_style="none" if plain else "needed")
        for columns in tables:
            csv.write_csv(pa.Table.from_arrays(list(columns.values()), names=list(columns)), f, options)
