"""Loom files and tables of text, against what anndata reads of them."""

from __future__ import annotations

import gzip

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from vcelltools.errors import DataError
from vcelltools.files.inspect import inspect
from vcelltools.io import open_dataset, read_columns

CELLS = ["AAACCTGAGAAACCAT-1", "AAACCTGAGAAACCGC-1", "AAACCTGAGAAACCTA-1", "AAACCTGAGAAACGAG-1"]
GENES = ["ACTB", "GAPDH", "TP53", "MYC", "MALAT1"]
X = np.random.default_rng(0).poisson(1.5, (4, 5))


def get_values(ds):
    return read_columns(ds.matrix, np.arange(ds.n_genes))


def write_loom(path, **storage):
    with h5py.File(path, "w") as f:
        f.create_dataset("matrix", data=X.T.astype("float32"), **storage)
        f["layers/spliced"] = (X.T * 2).astype("int32")
        f["row_attrs/Gene"] = np.array(GENES, "S")
        f["row_attrs/Accession"] = np.array([f"ENSG{i:011d}" for i in range(5)], "S")
        f["col_attrs/CellID"] = np.array(CELLS, "S")
        f["col_attrs/line"] = np.array(["a", "a", "b", "b"], "S")
        f.create_group("row_graphs")


@pytest.mark.parametrize("storage", [{}, {"chunks": (2, 3)}, {"chunks": (5, 1), "compression": "gzip"}])
def test_a_loom_file_is_read(tmp_path, storage):
    write_loom(tmp_path / "x.loom", **storage)
    with open_dataset(tmp_path / "x.loom") as ds:
        np.testing.assert_array_equal(get_values(ds), X)
        assert ds.kind == "loom" and ds.obs.index.tolist() == CELLS and ds.var.index.tolist() == GENES
        assert ds.obs.column("line").labels().tolist() == ["a", "a", "b", "b"]
        assert ds.var.column("gene_ids").labels()[0] == "ENSG00000000000"
    with open_dataset(tmp_path / "x.loom", layer="spliced") as ds:
        np.testing.assert_array_equal(get_values(ds), X * 2)
    with pytest.raises(DataError, match="no layer 'zz'"):
        open_dataset(tmp_path / "x.loom", layer="zz")
    vc.convert(tmp_path / "x.loom", tmp_path / "x.h5ad", layout="csr")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(back.X.toarray(), X)
    assert [m.layer for m in inspect(tmp_path / "x.loom").matrices] == ["X", "spliced"]


def test_a_loom_file_whose_attributes_do_not_fit_is_refused(tmp_path):
    write_loom(tmp_path / "x.loom")
    with h5py.File(tmp_path / "x.loom", "a") as f:
        del f["col_attrs/CellID"]
        f["col_attrs/CellID"] = np.array(CELLS[:2], "S")
    with pytest.raises(DataError, match="col_attrs/CellID has 2 entries; 4 expected"):
        open_dataset(tmp_path / "x.loom")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("end", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".txt.gz", "\t")])
def test_a_table_of_text_is_read_either_way_round(tmp_path, turned, end, delimiter):
    frame = pd.DataFrame(X, CELLS, GENES)
    text = (frame.T if turned else frame).to_csv(sep=delimiter)
    path = tmp_path / f"counts{end}"
    path.write_bytes(gzip.compress(text.encode()) if end.endswith("gz") else text.encode())
    with open_dataset(path) as ds:
        np.testing.assert_array_equal(get_values(ds), X)
        assert ds.obs.index.tolist() == CELLS and ds.var.index.tolist() == GENES
        assert any("rows are genes" in n for n in ds.notes) == turned
    assert len(vc.hvg(path, top=2)) == 5


def test_a_line_of_names_as_r_writes_it_is_understood(tmp_path):
    body = "".join(f'"{g}"\t' + "\t".join(map(str, X[:, j])) + "\n" for j, g in enumerate(GENES))
    (tmp_path / "r.txt").write_text("\t".join(f'"{c}"' for c in CELLS) + "\n" + body)
    with open_dataset(tmp_path / "r.txt") as ds:
        np.testing.assert_array_equal(get_values(ds), X)
        assert ds.obs.index.tolist() == CELLS


def test_where_names_say_nothing_rows_are_cells_and_that_is_said(tmp_path):
    pd.DataFrame(X, list("abcd"), list("vwxyz")).to_csv(tmp_path / "x.csv")
    with open_dataset(tmp_path / "x.csv") as ds:
        assert ds.matrix.shape == (4, 5) and any("rows were taken for cells" in n for n in ds.notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [("g,a,b\nTP53,1,x\n", "cannot be read as a table of counts"), ("g,a,b\nTP53,1\n", "cannot be read"),
     ("g,a,b\nTP53,1,\n", "empty or infinite"), ("g,a,b\n", "has no")],
)  # fmt: skip
def test_anything_but_numbers_is_refused(tmp_path, text, says):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        open_dataset(tmp_path / "x.csv")
    done = run_cli("inspect", "x.csv", cwd=tmp_path)
    assert done.code == 3, done.stderr
