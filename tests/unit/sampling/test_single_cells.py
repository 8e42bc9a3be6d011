"""Single cells from every kind of file: correct values, read in runs, in any process."""

from __future__ import annotations

import pickle
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vcelltools as vc
from tests.atlases import make_experiment, make_ids, write_atlas
from tests.conftest import ROOT
from vcelltools.atlas import Choice, fetch, merge, open_source
from vcelltools.errors import DataError, UsageError


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Write the same 60 cells as h5ad, batch files, compressed h5ad and store; return these and the counts."""
    d = tmp_path_factory.mktemp("cells")
    ids = make_ids(40)
    experiments = {f"SRX{k}": make_experiment(k, 20, ids if k else ids[5:]) for k in range(3)}
    empty = experiments["SRX1"].X.toarray()
    empty[2] = 0
    experiments["SRX1"].X = type(experiments["SRX1"].X)(empty)
    fetch(open_source(str(write_atlas(d / "src", experiments))), Choice(all=True), d / "a")
    merge(d / "a")
    merge(d / "a", format="batches", batch_size=2)
    (d / "basis.txt").write_text("\n".join(ids) + "\n")
    merge(d / "a", format="store", genes=d / "basis.txt")
    adata = ad.read_h5ad(d / "a" / "merged.h5ad")
    adata.write_h5ad(d / "packed.h5ad", compression="gzip")
    names = [f"{e}:{b}" for e, b in zip(adata.obs["experiment"], adata.obs["barcode"], strict=True)]
    sources = {"h5ad": d / "a" / "merged.h5ad", "packed": d / "packed.h5ad", "batches": d / "a" / "processed",
               "folder": d / "a", "store": d / "a" / "stores" / "atlas"}  # fmt: skip
    return sources, adata.X.toarray().astype(float), names, adata


KINDS = ("h5ad", "packed", "batches", "store")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["counts", "log1p", "cp10k", "log1p-cp10k"])
def test_values_of_every_kind(merged, kind, values):
    sources, X, names, adata = merged
    cells = vc.CellDataset(sources[kind], values=values)
    assert len(cells) == 60 and cells.genes == adata.var_names.tolist()
    library = X.sum(1, keepdims=True)
    scaled = np.divide(1e4 * X, library, out=np.zeros_like(X), where=library > 0)
    wanted = {"counts": X, "log1p": np.log1p(X), "cp10k": scaled, "log1p-cp10k": np.log1p(scaled)}[values]
    for i in range(60):
        x, about = cells[i]
        row = names.index(f"{about['experiment_id']}:{about['cell_id']}")
        np.testing.assert_allclose(x, wanted[row], rtol=1e-6)
        assert (
            x.dtype == np.float32 and about["umi_count"] == X[row].sum() and about["gene_count"] == (X[row] > 0).sum()
        )
        assert row == i or kind == "store"
        assert cells.starts[about["batch_idx"]] + about["local_idx"] == i


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_used_again_only_when_nothing_refers_to_it(merged, kind):
    sources = merged[0]
    cells = vc.CellDataset(sources[kind])
    fresh = [vc.CellDataset(sources[kind]).take(range(a, a + 20))[0] for a in (0, 20, 40)]
    first = cells.take(range(20))[0]
    rows = [x for x, _about in cells.__getitems__(range(20, 40))]
    last = rows[-1][5:]
    del rows[:-1]
    for _ in range(4):  # other batches, held and dropped, smaller and larger
        held = cells.take(range(40, 60))[0]
        cells.take(range(60))
        cells.take([3])
        assert np.array_equal(held, fresh[2])
    assert np.array_equal(first, fresh[0]) and np.array_equal(last, fresh[1][-1][5:])
    del first, held, rows, last
    cells.take(range(60))  # a larger one replaces those that nothing refers to
    again = cells.take(range(20))[0]
    assert np.array_equal(again, fresh[0]) and len(cells._rooms) <= 2
    at = again.__array_interface__["data"][0]
    del again
    assert cells.take(range(20, 40))[0].__array_interface__["data"][0] == at


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_is_the_cells_total_not_that_of_the_chosen_genes(merged, kind):
    sources, X, names, adata = merged
    genes = adata.var_names[[30, 3, 17]].tolist()
    cells = vc.CellDataset(sources[kind], genes=genes, values="cp10k")
    for x, about in cells.__getitems__(range(60)):
        row = names.index(f"{about['experiment_id']}:{about['cell_id']}")
        wanted = 1e4 * X[row, [30, 3, 17]] / max(X[row].sum(), 1)
        np.testing.assert_allclose(x, wanted, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(order=st.lists(st.integers(-60, 59), max_size=50))
def test_a_list_of_cells_in_any_order_is_each_cell(merged, order):
    for kind in KINDS:
        cells = vc.CellDataset(merged[0][kind])
        for i, (x, about) in zip(order, cells.__getitems__(order), strict=True):
            y, same = cells[i]
            assert np.array_equal(x, y) and about == same


def test_pickled(merged):
    cells = vc.CellDataset(merged[0]["h5ad"])
    first = cells[7][0]
    again = pickle.loads(pickle.dumps(cells))
    assert again._files == [] and np.array_equal(again[7][0], first)


FORK = """
import os, sys
import numpy as np
import vcelltools as vc

cells = vc.CellDataset(sys.argv[1])
first = cells[7][0]
pid = os.fork()
if pid == 0:
    os._exit(0 if np.array_equal(cells[7][0], first) and cells._pid == os.getpid() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_forked(merged):
    """In an interpreter of its own: this one may have the threads of other libraries, which must not be forked."""
    command = [sys.executable, "-W", "error", "-c", FORK, str(merged[0]["h5ad"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_genes_by_name_position_or_info(merged, tmp_path):
    sources, X, _, adata = merged
    by_name = vc.CellDataset(sources["h5ad"], genes=adata.var_names[[5, 2]].tolist())
    by_position = vc.CellDataset(sources["h5ad"], genes=np.array([5, 2]))
    assert np.array_equal(by_name[3][0], X[3, [5, 2]]) and np.array_equal(by_position[3][0], X[3, [5, 2]])
    for genes, error in ((["nope"], DataError), ([99], DataError), ([], UsageError), (["a", "a"], UsageError),
                         (["a", 1], UsageError), ([-1], DataError)):  # fmt: skip
        with pytest.raises(error):
            vc.CellDataset(sources["h5ad"], genes=genes)
    with pytest.raises(UsageError, match="values"):
        vc.CellDataset(sources["h5ad"], values="tpm")
    for i in (60, -61):
        with pytest.raises(IndexError):
            by_name[i]


def test_files_whose_genes_differ_in_order_and_set(tmp_path):
    """Columns are found by name and not by position, as in the batch files of public scripts."""
    ids = make_ids(12)
    parts = [make_experiment(0, 5, ids[:10]), make_experiment(1, 4, ids[2:][::-1])]
    for k, part in enumerate(parts):
        part.write_h5ad(tmp_path / f"{k}.h5ad")
    cells = vc.CellDataset([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], genes=ids)
    for i in range(9):
        part, row = (parts[0], i) if i < 5 else (parts[1], i - 5)
        wanted = part.to_df().reindex(columns=ids, fill_value=0).to_numpy()[row]
        assert np.array_equal(cells[i][0], wanted)


def test_a_file_stored_by_gene_is_refused(tmp_path):
    make_experiment(0, 5, make_ids(4), layout="csc").write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(DataError, match="gene by gene"):
        vc.CellDataset(tmp_path / "x.h5ad")
