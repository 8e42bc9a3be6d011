"""Raise errors for the faults that kernels find, with the cell, the gene and the value."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from vcelltools.errors import DataError, NotCountsError, spell
from vcelltools.io.chunks import Chunk
from vcelltools.io.opened import Dataset
from vcelltools.kernels.faults import MAX_COUNT, Fault

_DAMAGED = "the file is damaged; write it again"


def raise_fault(fault: int, chunk: Chunk, position: int, dataset: Dataset, *, hint: str | None = None) -> NoReturn:
    """Raise the error for a fault at a position in ``chunk.values``; other arguments as in :func:`raise_fault_at`."""
    cell, gene = chunk.locate(int(position))
    raise_fault_at(fault, cell, gene, chunk.values[position], dataset, hint=hint)


def raise_fault_at(
    fault: int, cell: int, gene: int, value: Any, dataset: Dataset, *, hint: str | None = None
) -> NoReturn:
    """Raise the error for the fault of a kernel.

    Parameters
    ----------
    fault
        A :class:`vcelltools.kernels.faults.Fault` other than OK.
    cell, gene
        The position; either may be out of range for ``BAD_INDEX``.
    value
        The stored value.
    hint
        What to do about a value that is not a count, if the usual advice does not apply.

    Raises
    ------
    NotCountsError
        For values that are not whole numbers.
    DataError
        For everything else.
    """
    where = dataset.matrix.where
    if fault == Fault.BAD_INDEX and dataset.matrix.index_dtype == np.uint64:  # read as int64
        cell, gene = (i + 2**64 if i < 0 else i for i in (cell, gene))
    if fault == Fault.BAD_INDEX:
        if 0 <= cell < dataset.n_cells:
            text = f"cell {cell:,} has the gene index {gene:,}, but there are only {dataset.n_genes:,} genes"
        else:
            text = f"gene {gene:,} has the cell index {cell:,}, but there are only {dataset.n_cells:,} cells"
        raise DataError(f"{where}/indices: {text}", hint=_DAMAGED)
    counts = f"select the counts with {spell('layer')} or {spell('modality')}"
    name = dataset.obs.names(cell, cell + 1)[0]
    place = f"{where}: cell {cell:,} ({name}), gene {gene:,} ({dataset.var.index[gene]})"
    match fault:
        case Fault.NOT_WHOLE:
            text = f"{place} holds {float(value):.6g}, not a whole number: this is not a matrix of counts"
            raise NotCountsError(text, hint=hint or counts)
        case Fault.NEGATIVE if dataset.matrix.dtype.kind == "u":  # read as int64
            raise DataError(
                f"{place} holds {int(value) + 2**64:,}: values above the largest count, {MAX_COUNT:,}, are refused"
            )
        case Fault.NEGATIVE:
            raise DataError(f"{place} holds {value}, which is negative", hint=hint or counts)
        case Fault.NOT_FINITE:
            raise DataError(f"{place} holds {value}", hint="repair the matrix; no value may be NaN or infinite")
        case Fault.TOO_LARGE if value > MAX_COUNT:
            raise DataError(
                f"{place} holds {float(value):.6g}: values above the largest count, {MAX_COUNT:,}, are not supported"
            )
        case Fault.TOO_LARGE:
            text = f"{place} has several entries, whose sum exceeds {MAX_COUNT:,}, the largest count"
            raise DataError(text, hint=_DAMAGED)
        case Fault.DUPLICATE:
            raise DataError(f"{place} has several entries", hint="sum them with adata.X.sum_duplicates()")
    raise AssertionError(f"{place}: {Fault(fault).name}")
