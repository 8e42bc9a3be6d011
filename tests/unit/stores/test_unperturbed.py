"""Stores of cells without perturbations: every cell is a control, grouped by context."""

from __future__ import annotations

import numpy as np
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.make import as_layout, make_adata, make_counts
from vcelltools.errors import UsageError


@pytest.fixture
def plain(tmp_path):
    adata = make_adata(as_layout(make_counts(60, 30), "csr"), batches=3)
    adata.write_h5ad(tmp_path / "plain.h5ad")
    return adata, tmp_path / "plain.h5ad"


def test_every_cell_is_a_control_and_groups_are_runs(plain, tmp_path):
    adata, path = plain
    basis = [f"g{j}" for j in range(10)]
    vc.build_store(path, basis=basis, out=tmp_path, name="s", unperturbed=True, group_by=["batch"])
    store = vc.open_store(tmp_path / "s")
    assert store.runs["is_control"].all() and store.n_cells == 60
    assert sorted(store.runs["length"]) == sorted(adata.obs["batch"].value_counts())
    assert np.array_equal(store.counts().toarray(), adata[store.obs.index, basis].X.toarray())
    assert vc.verify_store(tmp_path / "s").ok


def test_a_perturbation_column_beside_it_is_refused(plain, tmp_path):
    with pytest.raises(UsageError, match="unperturbed"):
        vc.build_store(plain[1], basis=["g1"], out=tmp_path, name="s", unperturbed=True, pert_col="batch")


def test_the_command_line_builds_one(plain, tmp_path):
    (tmp_path / "basis.txt").write_text("g1\ng2\n")
    done = run_cli("build-store", "plain.h5ad", "--basis", "basis.txt", "--unperturbed", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert vc.open_store(tmp_path / "stores" / "plain").n_cells == 60
