"""Full mode: rows by cell where coefficients vary over the tissue, the lasso's rows where they do not, and why."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tissues import GENES, make_tissue_adata, write_network
from tests.unit.spatial.test_fit import digest, read_summary
from vcelltools import spatial
from vcelltools.errors import DataError, UsageError
from vcelltools.spatial.blocks import make_joint_folds
from vcelltools.spatial.local import count_neighbours, estimate_bytes, judge
from vcelltools.spatial.settings import dump_toml, load_toml, make_settings

FULL = {"radius": 60.0, "mode": "full", "epochs": 30, "genes": ["Gene0", "Gene1"]}


def make_gradient(n: int = 500):
    """Return a tissue in which Tf0 acts on Gene0 more to the right, and on Gene1's TF everywhere alike."""
    adata = make_tissue_adata(n, clusters=2)
    x, at = adata.layers["imputed_count"], {g: i for i, g in enumerate(GENES)}
    rng = np.random.default_rng(5)
    slope = 0.1 + 1.8 * adata.obsm["spatial"][:, 0] / 600
    x[:, at["Gene0"]] = 2.0 + slope * x[:, at["Tf0"]] + rng.normal(0, 0.2, n)
    x[:, at["Gene1"]] = 2.0 + 0.9 * x[:, at["Tf1"]] + rng.normal(0, 0.2, n)
    x[:] = np.maximum(x, 0)
    return adata, slope


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("full")
    adata, slope = make_gradient()
    adata.write_h5ad(d / "x.h5ad")
    np.save(d / "slope.npy", slope)
    network = write_network(d)
    spatial.fit(d / "x.h5ad", d / "seed", network=network, radius=60.0, genes=FULL["genes"])
    done = spatial.fit(d / "x.h5ad", d / "run", network=network, **FULL)
    assert done.n_per_cell == 2 and any("2 of 4 models keep" in w for w in done.warnings), done.warnings
    return d


def test_gain_where_a_coefficient_varies(folder):
    rows = read_summary(folder / "run").set_index("gene").loc["Gene0"]
    assert rows.per_cell.all() and (rows.epochs > 0).all()
    assert (rows.r2_cell > rows[["r2_cluster", "r2_blind"]].max(axis=1) + rows.cell_error).all()
    assert rows.note.str.contains("one row per cell").all()
    betas = spatial.open_run(folder / "run").betas("Gene0")
    assert betas.per_cell and betas.keys.tolist() == [f"cell{i}" for i in range(500)]
    assert min(compare_with_slope(folder, folder / "run")) > 0.8


def compare_with_slope(folder: Path, run: Path) -> list[float]:
    """Return the correlation of a coefficient with the planted one in every cluster."""
    opened = spatial.open_run(run)
    betas, slope = opened.betas("Gene0"), np.load(folder / "slope.npy")
    tf0 = betas.values[:, betas.names.index("Tf0")]
    return [float(np.corrcoef(tf0[m], slope[m])[0, 1]) for m in (opened.tissue.clusters == c for c in (0, 1))]


def test_the_lasso_stays_where_nothing_varies(folder):
    rows = read_summary(folder / "run").set_index("gene").loc["Gene1"]
    assert not rows.per_cell.any() and rows.note.str.contains("one row for the cluster").all()
    name = "Gene1_betadata.feather"
    assert (folder / "run" / name).read_bytes() == (folder / "seed" / name).read_bytes()
    seed, full = read_summary(folder / "seed"), read_summary(folder / "run")
    assert "per_cell" not in seed.columns
    for column in ("r2_in", "r2_out", "gain", "kkt", "kept", "n_nonzero"):  # the lasso itself is the same
        np.testing.assert_array_equal(seed[column], full[column])


def test_processes_and_a_killed_run_change_no_byte(folder, tmp_path):
    options = {"network": folder / "mouse_network.parquet", **FULL}
    shutil.copytree(folder / "run", tmp_path / "again")
    for path in ("Gene0_betadata.feather", "summary.parquet", ".rows/Gene0.json"):  # as if killed after Gene1
        (tmp_path / "again" / path).unlink()
    done = spatial.fit(folder / "x.h5ad", tmp_path / "again", **options)
    assert (done.n_fitted, done.n_skipped) == (1, 1)
    spatial.fit(folder / "x.h5ad", tmp_path / "two", parallel=2, **options)
    assert digest(folder / "run") == digest(tmp_path / "again") == digest(tmp_path / "two")


def test_every_cluster_with_its_own_network(folder, tmp_path):
    options = {**FULL, "genes": ["Gene0"], "trunk": "own"}
    done = spatial.fit(folder / "x.h5ad", tmp_path / "run", network=folder / "mouse_network.parquet", **options)
    assert done.n_per_cell == 2
    assert min(compare_with_slope(folder, tmp_path / "run")) > 0.8
    with pytest.raises(UsageError, match="other settings"):
        spatial.fit(
            folder / "x.h5ad", tmp_path / "run", network=folder / "mouse_network.parquet", **options | {"epochs": 31}
        )


def test_a_network_that_sees_a_map(folder, tmp_path):
    options = {**FULL, "genes": ["Gene0"], "encoder": "map", "spatial_dim": 8, "epochs": 20, "lr": 0.01}
    spatial.fit(folder / "x.h5ad", tmp_path / "run", network=folder / "mouse_network.parquet", **options)
    rows = read_summary(tmp_path / "run")
    assert rows.per_cell.any() and (rows.r2_cell > rows.r2_cluster)[rows.per_cell].all()


def test_the_order_of_cells_changes_nothing(folder, tmp_path):
    adata = make_gradient()[0]
    mixed = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    options = {"network": folder / "mouse_network.parquet", **FULL, "genes": ["Gene0"], "epochs": 6}
    got = {}
    for name, data in (("plain", adata), ("mixed", mixed)):
        spatial.fit(data, tmp_path / name, **options)
        betas = spatial.open_run(tmp_path / name, data).betas("Gene0")
        order = np.argsort(betas.keys)
        assert betas.per_cell
        got[name] = betas.keys[order], betas.values[order], betas.intercept[order]
    np.testing.assert_array_equal(got["plain"][0], got["mixed"][0])
    for a, b in zip(got["plain"][1:], got["mixed"][1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_verdict_by_hand():
    sse = np.array([[10.0, 10.0, 10.0], [8.0, 9.0, 8.5], [8.0, 12.0, 7.0]])
    # the other folds choose epoch 2 (or 1) for a fold: 21, 15, 20 of folds 2+3, 1+3, 1+2 against 17.5, 16.5, 17
    v = judge(sse, None, 40)
    assert v.epochs == 1
    by_cell = np.array([8.0, 12.0, 8.5])
    assert v.r2_cluster == pytest.approx(1 - 30 / 40) and v.r2_cell == pytest.approx(1 - by_cell.sum() / 40)
    assert v.cell_gain == pytest.approx((30 - by_cell.sum()) / 40) and not v.per_cell
    assert v.cell_error == pytest.approx((10 - by_cell).std(ddof=1) * np.sqrt(3) / 40)
    better = np.array([[10.0, 10.0, 10.0], [8.0, 9.0, 8.5]])
    assert judge(better, None, 40).per_cell and judge(better, 0 * better + 10, 40).per_cell
    v = judge(better, np.array([[10.0, 10.0, 10.0], [8.2, 8.9, 8.4]]), 40)  # constant factors do as well
    assert not v.per_cell and v.cell_gain == pytest.approx(0.0) and "sees no place" in v.note
    assert "no epoch" in judge(np.array([[1.0, 1.0], [2.0, 2.0]]), None, 4).note


def test_folds_that_groups_share_keep_their_distance():
    rng = np.random.default_rng(0)
    xy, groups = rng.random((300, 2)) * 100, rng.integers(0, 3, 300)
    for fold in make_joint_folds(xy, groups, 4.0):
        far = np.sqrt(((xy[fold.train][:, None] - xy[fold.test][None]) ** 2).sum(2)).min(1)
        assert far.min() > 4.0
    for fold in make_joint_folds(xy, groups, 1e6):
        for g in range(3):
            rest = (groups == g).sum() - (groups[fold.test] == g).sum()
            assert (groups[fold.train] == g).sum() == rest - rest // 2


def test_neighbours_by_group():
    xy = np.array([[0.0, 0], [1, 0], [2, 0], [9, 0]])
    counts = count_neighbours(xy, np.array([4, 4, 7, 7]), 1.5)
    np.testing.assert_allclose(counts * 1.0, np.array([[1, 0], [1, 1], [1, 0], [0, 0]]) / 1.0)


MEASURE = """
import re, sys
from pathlib import Path
from vcelltools import spatial
path, out, mode = sys.argv[1:]
options = dict(network=path + "/mouse_network.parquet", radius=60.0, genes=["Gene0"], mode=mode)
options |= dict(epochs=2) if mode == "full" else {}
print(spatial.plan_fit(path + "/x.h5ad", **options).memory_bytes)
spatial.fit(path + "/x.h5ad", out, **options)
print(int(re.search("VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_the_plan_counts_the_memory_of_the_network(folder, tmp_path):
    planned, used = {}, {}
    for mode in ("seed", "full"):
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), str(tmp_path / mode), mode]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        planned[mode], used[mode] = map(int, lines[-2:])
    more = used["full"] - used["seed"]
    assert 0.5 * more < planned["full"] - planned["seed"] < 2 * more


@pytest.mark.parametrize(
    ("changed", "grows"),
    [({"n_columns": 900}, True), ({"n_cells": 50_000}, True), ({"n_clusters": 40}, True), ({"trunk": "own"}, False),
     ({"encoder": "map", "spatial_dim": 64}, True)],
)  # fmt: skip
def test_what_the_memory_of_the_network_depends_on(changed, grows):
    sizes = {"n_cells": 5000, "n_columns": 250, "n_clusters": 4}
    first = estimate_bytes(**sizes, settings=make_settings({"mode": "full"}))
    options = {k: v for k, v in changed.items() if k not in sizes}
    sizes |= {k: v for k, v in changed.items() if k in sizes}
    after = estimate_bytes(**sizes, settings=make_settings({"mode": "full", **options}))
    assert (after > 1.1 * first) if grows else (after < first)


def test_settings_of_the_mode(tmp_path):
    for bad, said in (
        ({"mode": "full", "epochs": 0}, "epochs is 0"),
        ({"mode": "full", "lr": 0.0}, "lr is 0"),
        ({"mode": "full", "encoder": "eye"}, "encoder 'eye'"),
        ({"mode": "full", "trunk": "none"}, "trunk 'none'"),
        ({"mode": "full", "encoder": "map", "spatial_dim": 20}, "multiple of 8"),
        ({"mode": "full", "validate": False}, "needs validate"),
        ({"epochs": 10}, "epochs is an option of training mode full"),
        ({"mode": "full", "spatial_dim": 16}, "mesh of the encoder map"),
    ):
        with pytest.raises(UsageError, match=said):
            make_settings(bad)
    path = tmp_path / "spacetravlr_run_repro.toml"
    full = make_settings({"mode": "full", "epochs": 7, "lr": 0.02, "trunk": "own", "encoder": "map"})
    path.write_text(dump_toml(full, command={}, clusters={}))
    assert "learning_rate = 0.02" in path.read_text() and make_settings({}, load_toml(path)) == full
    assert "epochs" not in dump_toml(make_settings({}), command={}, clusters={})


def test_cells_need_names_of_their_own(tmp_path):
    adata, _ = make_gradient(60)
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    with pytest.raises(DataError, match="two cells have the same name"):
        spatial.fit(adata, tmp_path / "run", network=write_network(tmp_path), **FULL)
    assert not list(Path(tmp_path / "run").glob("*.lock"))
