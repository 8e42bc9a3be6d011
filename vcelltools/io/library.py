"""Library sizes of the whole transcriptome, which obs may hold where a file has only some of the genes.

Counts per ten thousand divide by the total of a cell. In a file of a panel or of highly variable genes, the sum of the
counts is not that total: it changes with the genes that the panel happens to hold.
"""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError, VcellError, spell
from vcelltools.io.opened import Dataset

COLUMNS = (
    "total_counts", "n_counts", "ncounts", "nCount_RNA", "n_umi", "n_umis", "nUMI", "nUMIs", "umi_count", "UMI_count",
    "total_umis", "raw_sum", "library_size", "libsize",
)  # fmt: skip
_MORE = 1.01  # times the sum of the counts, from which a total is said to be of more genes
_ROUNDING = 1e-6


def read_library(ds: Dataset, column: str) -> np.ndarray:
    """Return (n,) float64 library sizes from an obs column.

    Raises
    ------
    DataError
        If the column does not exist, or does not hold a total for every cell.
    """
    found = ds.obs.column(column)
    values = found.values
    if values is None or values.dtype.kind not in "iuf" or (found.missing is not None and found.missing.any()):
        raise DataError(f"{ds.label}: obs/{column} does not hold numbers, one for each cell")
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise DataError(f"{ds.label}: obs/{column} of cell {i:,} is {values[i]}, which is not a total of counts")
    return values.astype(np.float64)


def check_library(given_b: np.ndarray, counted_b: np.ndarray, column: str, start: int = 0) -> None:
    """Raise a :class:`DataError` if a library size is below the sum of the counts of its cell."""
    low = np.flatnonzero(given_b < counted_b * (1 - _ROUNDING * (counted_b.dtype.kind == "f")))
    if len(low):
        i = int(low[0])
        raise DataError(
            f"obs/{column} is {given_b[i]:g} for cell {start + i:,}, whose counts sum to {counted_b[i]:,.10g}",
            hint="use the column of the raw library sizes",
        )


def suggest_library(ds: Dataset, counted_n: np.ndarray) -> list[str]:
    """Return a note on a column that holds larger totals than the sums of the counts, or nothing.

    Cells whose sum is not known are NaN.
    """
    known = np.flatnonzero(~np.isnan(counted_n))
    counted_n = np.asarray(counted_n, np.float64)[known]
    for column in (c for c in COLUMNS if c in ds.obs.columns):
        try:
            given = read_library(ds, column)[known]
            check_library(given, counted_n, column)
        except VcellError:
            continue
        total = float(counted_n.sum())
        if total > 0 and float(given.sum()) > _MORE * total:
            medians = f"median {np.median(given):,.6g} and {np.median(counted_n):,.6g}"
            return [
                f"{ds.label}: obs/{column} is larger than the sums of the counts ({medians}), as where a file holds "
                f"only some of the genes. Counts were divided by their sums; {spell('library_size', column)} divides "
                "them by the whole library of the cell"
            ]
    return []
