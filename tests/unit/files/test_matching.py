"""sample --matching: the cells of what another file has, in its own cell lines."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.make import make_counts
from vcelltools.files.convert import sample


def make(lines, perts, column="cell_line"):
    n = len(lines)
    obs = pd.DataFrame({"target_gene": perts}, index=[f"c{i}" for i in range(n)])
    if column:
        obs[column] = lines
    return ad.AnnData(make_counts(n, 6).astype("float32"), obs, pd.DataFrame(index=[f"g{i}" for i in range(6)]))


LINES = np.array(["A", "A", "A", "B", "B", "B", "C", "C"])
PERTS = np.array(["x", "y", "ctrl", "x", "y", "ctrl", "x", "ctrl"])


@pytest.mark.parametrize("column", ["cell_line", "context", "cell_type"])
def test_lines_are_not_pooled(tmp_path, column):
    pred = make(["B", "B", "A"], ["x", "ctrl", "y"], column)
    result = sample(make(LINES, PERTS), tmp_path / "o.h5ad", by="target_gene", matching=pred)
    assert ad.read_h5ad(tmp_path / "o.h5ad").obs_names.tolist() == ["c1", "c3", "c5"]
    assert any("matched in target_gene and cell_line" in n for n in result.notes)


def test_what_cannot_be_told_apart_is_said(tmp_path):
    pred = make(["B"] * 2, ["x", "ctrl"], None)
    source = make(LINES, PERTS)
    result = sample(source, tmp_path / "o.h5ad", by="target_gene", matching=pred)
    assert result.n_cells == 6
    assert any("3 labels of cell_line are pooled (A, B, C, …)" in n for n in result.notes)
    chosen = sample(
        source, tmp_path / "p.h5ad", by="target_gene", matching=pred, where={"cell_line": ["B"]}, force=True
    )
    assert chosen.n_cells == 2 and not any("pooled" in n for n in chosen.notes)
    other = make(["elsewhere"] * 2, ["x", "ctrl"])
    assert any("pooled" in n for n in sample(source, tmp_path / "q.h5ad", by="target_gene", matching=other).notes)
