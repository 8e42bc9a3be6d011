"""Fits: planted coefficients are recovered, scores are correct, and nothing depends on order, threads or processes."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import need_data
from tests.tissues import GENES, make_tissue_adata, receive, write_network
from vcelltools import spatial
from vcelltools.spatial.blocks import cut_blocks, make_folds
from vcelltools.spatial.honesty import adjust, get_p_values, rearrange
from vcelltools.spatial.regress import HeldOut
from vcelltools.spatial.task_queue import Queue

FIT = {"radius": 100.0, "network_dir": None}


@pytest.fixture
def network(tmp_path):
    return write_network(tmp_path)


def read_summary(folder: Path):
    import pandas as pd

    return pd.read_parquet(folder / "summary.parquet")


def test_planted_coefficients_come_back(network, tmp_path):
    adata = make_tissue_adata(150)
    x = adata.layers["imputed_count"]
    W = receive(adata.obsm["spatial"], x, 100.0)
    tf, ligand, receptor, gene = (GENES.index(g) for g in ("Tf0", "Lig0", "Rec0", "Gene0"))
    x[:, gene] = 0.5 + 0.8 * x[:, tf] + 3.0 * W[:, ligand] * x[:, receptor]
    spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], radius=100.0, l1_reg=1e-6)
    betas = spatial.open_run(tmp_path / "run", adata).betas("Gene0")
    for name, planted in (("Tf0", 0.8), ("Lig0$Rec0", 3.0)):
        np.testing.assert_allclose(betas.values[:, betas.names.index(name)], planted, rtol=0.01)
    np.testing.assert_allclose(betas.intercept, 0.5, rtol=0.05)
    row = read_summary(tmp_path / "run").iloc[0]
    assert row.r2_in >= row.r2_out > 0.9 and row.gain > 0.05 and row.kept


def test_columns_of_the_model_written_out(network, tmp_path):
    """The penalised objective is at its minimum, on columns built by the definition."""
    adata = make_tissue_adata(150, clusters=1)
    l1, group = 0.02, 0.01
    spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], radius=100.0, l1_reg=l1, group_reg=group,
                min_nonzero=0, validate=False)  # fmt: skip
    run = spatial.open_run(tmp_path / "run", adata)
    m = spatial.check(adata, network=network, radius=100.0, genes=["Gene0"]).modulators["Gene0"]
    x = dict(zip(GENES, run.tissue.expression(GENES).T, strict=True))
    W = dict(zip(GENES, receive(run.tissue.xy, run.tissue.expression(GENES), 100.0).T, strict=True))
    names = [*m["tf"], *m["lr"], *m["tfl"]]
    columns = [x[n] for n in m["tf"]]
    columns += [W[p.split("$")[0]] * x[p.split("$")[1]] for p in m["lr"]]
    columns += [W[p.split("#")[0]] * x[p.split("#")[1]] for p in m["tfl"]]
    X = np.column_stack(columns)
    betas = run.betas("Gene0")
    w = np.array([betas.values[0, betas.names.index(n)] if n in betas.names else 0.0 for n in names])
    y = x["Gene0"]
    residual = y - betas.intercept[0] - X @ w
    assert abs(residual.mean()) < 1e-10
    gradient = (X - X.mean(0)).T @ residual / len(y)
    top = np.abs((X - X.mean(0)).T @ (y - y.mean()) / len(y)).max()
    ends = np.cumsum([0, *(len(m[k]) for k in ("tf", "lr", "tfl"))])
    for a, b in pairwise(ends):
        part, g = w[a:b], gradient[a:b]
        norm, lam = np.linalg.norm(part), group * np.sqrt(b - a)
        if norm == 0:
            assert np.linalg.norm(np.maximum(np.abs(g) - l1, 0)) <= lam + 1e-6 * top
            continue
        on = part != 0
        assert np.all(np.abs(g[on] - l1 * np.sign(part[on]) - lam * part[on] / norm) <= 1e-6 * top)
        assert np.all(np.abs(g[~on]) <= l1 + 1e-6 * top)


def test_a_tolerance_that_is_not_reached_is_said(network, tmp_path):
    options = {"network": network, "genes": ["Gene0"], "radius": 100.0, "l1_reg": 0.02, "validate": False}
    done = spatial.fit(make_tissue_adata(150), tmp_path / "good", **options)
    assert done.largest_kkt <= 1e-6 and not any("tolerance" in w for w in done.warnings)
    done = spatial.fit(make_tissue_adata(150), tmp_path / "run", tol=1e-30, **options)
    assert any("did not reach the tolerance 1e-30" in w and "Gene0" in w for w in done.warnings), done.warnings
    rows = read_summary(tmp_path / "run")
    assert rows.note[rows.kkt > 1e-30].str.contains("the optimality conditions hold only to").all()


def test_order_rotation_and_units_change_nothing(network, tmp_path):
    adata = make_tissue_adata(150)
    turned = adata.copy()
    angle = 0.7
    turned.obsm["spatial"] = (
        3.0 * adata.obsm["spatial"] @ [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    shuffled = adata[np.random.default_rng(3).permutation(150)].copy()
    got = {}
    for name, data, radius in (("plain", adata, 100.0), ("turned", turned, 300.0), ("shuffled", shuffled, 100.0)):
        kept = {"l1_reg": 0.02, "validate": name != "turned"}  # blocks are cut along the axes
        spatial.fit(data, tmp_path / name, network=network, genes=["Gene0"], radius=radius, score_threshold=-9, **kept)
        got[name] = spatial.open_run(tmp_path / name, data).betas("Gene0")
    for other in ("turned", "shuffled"):
        assert got[other].names == got["plain"].names
        np.testing.assert_allclose(got[other].values, got["plain"].values, rtol=1e-6, atol=1e-9)
    a, b = (read_summary(tmp_path / n) for n in ("plain", "shuffled"))
    np.testing.assert_allclose(a.r2_out, b.r2_out, rtol=1e-6)


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_processes_and_batches_change_no_byte(network, tmp_path, monkeypatch):
    path = tmp_path / "x.h5ad"
    make_tissue_adata(120).write_h5ad(path)
    options = {"network": network, "radius": 100.0, "null": 3, "stability": 4, "threads": 1}
    spatial.fit(path, tmp_path / "one", **options)
    spatial.fit(path, tmp_path / "two", parallel=2, **options)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert not list((tmp_path / "two").glob("*.lock"))
    monkeypatch.setattr("vcelltools.spatial._fit._MOST", 1)
    spatial.fit(path, tmp_path / "three", **options)
    assert digest(tmp_path / "one") == digest(tmp_path / "three")


def test_a_dead_owner_is_relieved_and_a_living_one_is_not(tmp_path):
    import json
    import os
    import socket

    queue = Queue(tmp_path, ["a", "b", "c"], lambda n: (tmp_path / n).exists())
    dead = {"host": socket.gethostname(), "pid": 2**22 + 5, "start": None, "time": 0}
    (tmp_path / "a.lock").write_text(json.dumps(dead))
    (tmp_path / "b.lock").write_text(json.dumps({**dead, "pid": os.getppid()}))
    (tmp_path / "c").touch()
    assert queue.claim(5) == ["a"]
    assert Queue(tmp_path, ["a"], lambda n: False).claim(1) == [], "this process holds it"
    (tmp_path / "b.lock").write_text(json.dumps({**dead, "host": "elsewhere"}))
    assert queue.claim(5) == []
    os.utime(tmp_path / "b.lock", (0, 0))
    assert queue.claim(5) == ["b"]


def test_a_queue_does_not_ask_again_for_what_is_done(tmp_path):
    asked = []

    def is_done(name: str) -> bool:
        asked.append(name)
        return (tmp_path / name).exists()

    names = [f"task{i}" for i in range(100)]
    queue = Queue(tmp_path, names, is_done)
    for name in names:
        assert queue.claim(1) == [name]
        (tmp_path / name).touch()
        queue.release(name)
    assert queue.claim(1) == [] and not queue.wait() and len(asked) < 500


def test_blocks_hold_together_and_buffers_stay_out():
    xy = np.random.default_rng(0).random((240, 2)) * 100
    block = cut_blocks(xy)
    assert np.bincount(block).tolist() == [40] * 6
    order = np.random.default_rng(1).permutation(240)
    np.testing.assert_array_equal(cut_blocks(xy[order]), block[order])
    for fold in make_folds(xy, 5.0):
        far = np.sqrt(((xy[fold.train][:, None] - xy[fold.test][None]) ** 2).sum(2)).min(1)
        assert far.min() > 5.0 and len(fold.train) >= 100
    for fold in make_folds(xy, 1e6):
        assert len(fold.train) == 100, "at most half of the others is left out"


def test_the_penalty_is_chosen_by_one_standard_error():
    held = HeldOut(np.array([[14.0, 10.0], [9.0, 11.0], [10.0, 9.0]]), np.array([10.0, 10.0]))
    assert held.choose() == 1  # the minimum is 19/20, and 1.0 is one standard error above it
    single = HeldOut(np.array([[5.0, 5.0]]), np.array([10.0, 10.0]))
    assert single.r2(20.0) == pytest.approx(0.5)
    assert np.isnan(single.r2(0.0))
    better = HeldOut(np.array([[2.0, 4.0]]), np.array([10.0, 10.0]))  # by 3 and 1: on average 2, with an error of 1
    assert better.compare(single, 20.0) == pytest.approx(2 * 1.0 / 20)
    assert np.isnan(better.compare(single, 0.0))


def test_p_values_and_their_adjustment():
    from scipy.stats import false_discovery_control

    p = get_p_values(np.array([1.0, 0.0, np.nan]), np.array([[0.5, 0.1, 0.0], [1.0, -1.0, 0.0], [0.0, 0.2, 0.0]]))
    np.testing.assert_allclose(p, [2 / 4, 3 / 4, np.nan])
    p = np.random.default_rng(0).random(40)
    np.testing.assert_allclose(adjust(p), false_discovery_control(p))
    assert np.isnan(adjust(np.array([0.1, np.nan])))[1]


def test_rearranged_senders_keep_distances_on_the_torus():
    xy = np.random.default_rng(0).random((50, 2)) * [100, 80]
    side = np.ptp(xy, axis=0)

    def on_torus(p):
        d = np.abs(p[:, None] - p[None]) / side
        return np.sort(np.minimum(d, 1 - d).sum(2).ravel())

    for seed in range(5):
        moved = rearrange(xy, np.random.default_rng(seed))
        assert not np.allclose(moved, xy) and np.all(moved >= xy.min(0)) and np.all(moved <= xy.max(0) + 1e-9)
        np.testing.assert_allclose(on_torus(moved), on_torus(xy), atol=1e-9)


def test_conditions_are_fitted_on_their_own(network, tmp_path):
    adata = make_tissue_adata(200)
    r = spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], condition="half", radius=100.0)
    assert r.conditions == ("left", "right")
    left = adata[adata.obs["half"] == "left"].copy()
    spatial.fit(left, tmp_path / "left", network=network, genes=["Gene0"], radius=100.0)
    a, b = (read_summary(p) for p in (tmp_path / "run" / "conditions" / "left", tmp_path / "left"))
    np.testing.assert_allclose(a.r2_out, b.r2_out)
    opened = spatial.open_run(tmp_path / "run" / "conditions" / "left", adata)
    assert opened.tissue.n_cells == len(left)


@pytest.mark.slow
def test_olfactory_bulb_is_honest(tmp_path):
    """Least squares has an R² of 1.00 in the sample, and far below zero on held-out tissue."""
    from vcelltools.files.normalize import normalize

    source = need_data("mouse_olfactory_bulb_spatial/mOB_262x15928.h5ad")
    network = need_data("spatial_network/mouse_network.parquet")
    normalize(source, tmp_path / "x.h5ad")
    genes = ["Mbp", "Fabp7", "Apoe"]
    options = {"genes": genes, "layer": "X", "cluster_annot": "none", "radius": 2.0, "network": network}
    spatial.fit(tmp_path / "x.h5ad", tmp_path / "cv", **options)
    chosen = read_summary(tmp_path / "cv")
    assert chosen.r2_out.median() > 0.1 and (chosen.r2_in < 0.9).all() and (chosen.kkt <= 1e-6).all()
    r = spatial.fit(
        tmp_path / "x.h5ad", tmp_path / "ls", l1_reg=1e-9, group_reg=1e-9, **{**options, "genes": genes[:1]}
    )
    least = read_summary(tmp_path / "ls")
    assert (least.r2_in > 0.99).all() and (least.r2_out < 0).all() and "least squares" in r.warnings[0]
