"""One list of faults: what counts as a count, and how every layout says the same of the same entry."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from tests.make import make_adata
from vcelltools.errors import DataError, NotCountsError
from vcelltools.io import open_dataset
from vcelltools.io.faults import raise_fault
from vcelltools.kernels._jit import kernel
from vcelltools.kernels.checks import check_count, check_entry
from vcelltools.kernels.faults import MAX_COUNT, Fault


@kernel()
def check(value, largest):
    return check_count(value, largest)


@kernel()
def look(index, value, n_minor):
    return check_entry(index, value, n_minor, MAX_COUNT)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (0.0, Fault.OK), (3.0, Fault.OK), (float(MAX_COUNT), Fault.OK), (-0.0, Fault.OK),
        (np.nan, Fault.NOT_FINITE), (np.inf, Fault.NOT_FINITE), (-np.inf, Fault.NOT_FINITE),
        (-1.0, Fault.NEGATIVE), (-0.5, Fault.NEGATIVE), (0.5, Fault.NOT_WHOLE), (2.0**31, Fault.TOO_LARGE),
        (1e301, Fault.TOO_LARGE),
    ],
)  # fmt: skip
def test_a_value_as_a_count(value, fault):
    assert check(value, MAX_COUNT) == fault
    assert check(np.float32(value) if abs(value) < 1e30 and value != MAX_COUNT else value, MAX_COUNT) == fault


@pytest.mark.parametrize(("value", "fault"), [(0, Fault.OK), (-1, Fault.NEGATIVE), (MAX_COUNT + 1, Fault.TOO_LARGE)])
def test_an_integer_as_a_count(value, fault):
    assert check(np.int64(value), MAX_COUNT) == fault


def test_the_index_comes_first():
    assert look(-1, np.nan, 5) == look(5, 1.0, 5) == Fault.BAD_INDEX
    assert look(4, 1.0, 5) == Fault.OK and look(0, -1.0, 5) == Fault.NEGATIVE


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (Fault.NEGATIVE, DataError, "which is negative"),
        (Fault.NOT_WHOLE, NotCountsError, "not a whole number"),
        (Fault.NOT_FINITE, DataError, "NaN or infinite"),
        (Fault.TOO_LARGE, DataError, "has several entries"),
        (Fault.DUPLICATE, DataError, "has several entries"),
    ],
)
def test_every_layout_names_the_cell_the_gene_and_the_value(layout, fault, kind, text):
    X = np.zeros((6, 4), np.float32)
    X[4, 2], X[1, 3], X[5, 0] = 7, 1, 2
    adata = make_adata(X if layout == "dense" else getattr(sparse, f"{layout}_matrix")(X))
    with open_dataset(adata) as ds:
        chunk = ds.matrix.read(ds.matrix.plan()[0])
        at = int(np.flatnonzero(chunk.values == 7)[0])
        assert chunk.locate(at) == (4, 2)
        cell, gene = adata.obs_names[4], adata.var_names[2]
        with pytest.raises(kind, match=rf"cell 4 \({cell}\), gene 2 \({gene}\)") as caught:
            raise_fault(fault, chunk, at, ds)
        assert text in str(caught.value)
