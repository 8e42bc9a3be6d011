"""Screens: batches, workers and a cluster give the same tables."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tissues import make_tissue_adata, write_network
from vcelltools import spatial
from vcelltools.errors import DataError, UsageError
from vcelltools.spatial.screen import read_batch, read_genes

FIT = {"radius": 100.0, "l1_reg": 0.02, "validate": False}


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "x.h5ad"
    make_tissue_adata(80).write_h5ad(path)
    spatial.fit(path, tmp_path / "run", network=write_network(tmp_path), genes=["Gene0", "Tf1", "Lig0"], **FIT)
    return spatial.open_run(tmp_path / "run")


def read(folder):
    return {n: (folder / n).read_bytes() for n in ("effects.parquet", "scores.parquet")}


def test_a_screen_is_its_perturbations(run, tmp_path):
    import pandas as pd

    r = run.screen(["Tf0", "Lig0"], tmp_path / "s", mode="overexpress", keep_deltas=True)
    assert (r.n_done, r.n_skipped) == (2, 0) and (tmp_path / "s" / "Tf0_4n_maxx.feather").exists()
    top = float(run.tissue.expression(["Tf0"]).max())
    delta = run.perturb({"Tf0": top}).delta
    effects = pd.read_parquet(tmp_path / "s" / "effects.parquet").query("perturbation == 'Tf0' and cell_type == '1'")
    cells, genes = run.tissue.clusters == 1, run.perturb({"Tf0": top}).genes
    for row in effects.itertuples():
        np.testing.assert_allclose(row.mean_delta, delta[cells, genes.index(row.gene)].mean(), atol=1e-14)
        np.testing.assert_allclose(row.share_changed, (np.abs(delta[cells, genes.index(row.gene)]) > 1e-9).mean())
    again = run.screen(["Tf0", "Lig0"], tmp_path / "s", mode="overexpress", keep_deltas=True)
    assert (again.n_done, again.n_skipped) == (0, 2)
    with pytest.raises(UsageError, match="another screen"):
        run.screen(["Tf0"], tmp_path / "s")


def test_a_cluster_of_dask_gives_the_same_bytes(run, tmp_path):
    distributed = pytest.importorskip("distributed")
    genes = ["Tf0", "Tf1", "Lig0", "Lig1"]
    run.screen(genes, tmp_path / "one")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        run.screen(genes, tmp_path / "two", dask=cluster.scheduler_address)
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_batches(run, tmp_path):
    (tmp_path / "cells.csv").write_text("a,b\ncell0,cell5\ncell1,\n")
    (tmp_path / "b.toml").write_text(
        "genes = ['Tf0', 'Lig0']\ndesired_expr = [0, 1.5]\nn_propagation = 2\ncells_csv = 'cells.csv'\n"
        "cells_csv_columns = ['', 'a']\ncompound_genes = [['Tf0', 'Lig1']]\n"
    )
    batch = read_batch(tmp_path / "b.toml", hops=4, scale=1.0)
    assert len(batch.tasks) == 3 * 2 * 2 and {t.hops for t in batch.tasks} == {2}
    assert batch.tasks[-1].desired == {"Tf0": 1.5, "Lig1": 1.5} and batch.tasks[-1].column == "a"
    assert len({t.name for t in batch.tasks}) == len({t.file for t in batch.tasks}) == 12
    r = run.screen([], tmp_path / "s", tasks=batch.tasks, cells_csv=batch.cells_csv)
    assert r.n_done == 12
    for text, said in (("gene = []\n", "no genes"), ("genes = ['A']\nhops = 3\n", "'hops' is not known")):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(DataError, match=said):
            read_batch(tmp_path / "bad.toml", hops=4, scale=1.0)
    assert read_genes(run, "all") == sorted({g for t in run.genes for g in run.betas(t).modulators.genes})
