"""Entries that stand twice at one place: what a sum could hide or overflow is seen, in every command and layout."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

import vcelltools as vc
from tests.files import make_counts, write_sparse, write_table
from tests.fuzz.oracle import read_naively
from vcelltools.errors import DataError

LARGEST = 2**31 - 1
COUNTS = make_counts(60, 20, density=0.5)
CELL, GENE = 3, 4


def write(path: Path, layout: str, values: list[float], dtype: str) -> Path:
    """Write a file with ``values`` as the entries of one cell and gene."""
    cells, genes = np.nonzero(COUNTS)
    keep = (cells != CELL) | (genes != GENE)
    cells = np.append(cells[keep], [CELL] * len(values))
    genes = np.append(genes[keep], [GENE] * len(values))
    data = np.append(COUNTS[np.nonzero(COUNTS)][keep].astype(dtype), np.array(values, dtype))
    major, minor, n = (cells, genes, len(COUNTS)) if layout == "csr" else (genes, cells, COUNTS.shape[1])
    order = np.argsort(major, kind="stable")
    indptr = np.append(0, np.cumsum(np.bincount(major, minlength=n)))
    with h5py.File(path, "w") as f:
        write_sparse(
            f, "X", indptr=indptr, indices=minor[order], data=data[order], shape=COUNTS.shape, layout=layout
        )  # fmt: skip
        groups = ([i % 3 for i in range(60)], ["non-targeting", "A", "B"])
        write_table(f, "obs", [f"cell{i}" for i in range(60)], target_gene=groups)
        write_table(f, "var", [f"gene{j}" for j in range(20)])
    return path


def build(path: Path) -> None:
    genes = [f"gene{j}" for j in range(20)]
    how = {"pert_col": "target_gene", "control": "non-targeting"}
    vc.build_store(path, basis=genes, out=path.parent / "stores", name="s", **how)


def normalize(path: Path) -> None:
    vc.normalize(path, path.parent / "out.h5ad")


COMMANDS = {"hvg": lambda path: vc.hvg(path, top=3), "normalize": normalize, "build_store": build}


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("values", [[-3, 5], [5, -3]])
def test_a_negative_entry_is_refused_although_the_sum_is_a_count(tmp_path, command, layout, values):
    with pytest.raises(DataError, match="-3"):
        COMMANDS[command](write(tmp_path / "f.h5ad", layout, values, "int32"))


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("command", ["hvg", "build_store"])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "float64"])
def test_a_sum_beyond_the_largest_count_is_refused(tmp_path, command, layout, dtype):
    with pytest.raises(DataError, match=r"2,147,483,647"):
        COMMANDS[command](write(tmp_path / "f.h5ad", layout, [LARGEST, LARGEST, 3], dtype))


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float64"])
def test_normalize_adds_up_without_overflow(tmp_path, layout, dtype):
    normalize(write(tmp_path / "f.h5ad", layout, [LARGEST, LARGEST, 3], dtype))
    want = COUNTS.astype(np.float64)
    want[CELL, GENE] = 2.0 * LARGEST + 3
    size = want.sum(axis=1, keepdims=True)
    want = np.log1p(want * (1e4 / np.where(size > 0, size, 1)))
    got, _ = read_naively(tmp_path / "out.h5ad", "h5ad", "X", "var", largest=None)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_the_place_of_a_sum_is_named(tmp_path, layout):
    with pytest.raises(DataError, match=r"cell 3 \(cell3\), gene 4 \(gene4\) has several entries"):
        vc.hvg(write(tmp_path / "f.h5ad", layout, [LARGEST, 1], "int64"), top=3)
