"""No information of test groups leaks, no cells are in two stores, and later stores do not affect a run."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import vcelltools as vc
from tests.smallstore import build_small_store
from tests.unit.training.conftest import QUICK
from vcelltools.errors import DataError, UsageError
from vcelltools.prediction.predict import predict
from vcelltools.stores.store import open_store
from vcelltools.training.inputs import make_setup
from vcelltools.training.settings import make_settings
from vcelltools.training.train import train

FEW = {**QUICK, "steps": 4, "eval_every": 2, "sets": 2, "set_size": 8}
OPTIONS = {"pert_col": "target_gene", "control": ["non-targeting"], "cell_line_col": "cell_line", "group_by": ["batch"],
           "gene_name_col": "index"}  # fmt: skip


@pytest.fixture(scope="module")
def one_line(tmp_path_factory):
    """Write the cells of one line; return them, their basis and a folder."""
    d = tmp_path_factory.mktemp("one")
    store = open_store(build_small_store(d, seed=5))
    adata = ad.read_h5ad(d / "sim.h5ad")
    return d, adata[adata.obs["cell_line"] == adata.obs["cell_line"].iloc[0]].copy(), list(store.genes)


def build(source, d, name, basis):
    return vc.build_store(source, basis=basis, out=d, name=name, **OPTIONS).path


@pytest.mark.parametrize("model", ["ridge", "transformer"])
def test_poisoned_test_cells_change_no_prediction(one_line, tmp_path, model, one_device):
    _, adata, basis = one_line
    perts = sorted(set(adata.obs["target_gene"]) - {"non-targeting"})
    line = adata.obs["cell_line"].iloc[0]
    (tmp_path / "split.toml").write_text(f'[training]\ns = "train"\n[fewshot."s.{line}"]\ntest = {perts[:3]}\n')
    predicted = []
    for kind in ("clean", "poisoned"):
        cells = adata.copy()
        if kind == "poisoned":
            test = np.flatnonzero(cells.obs["target_gene"].isin(perts[:3]).to_numpy())
            X = cells.X.tolil()
            X[test] = X[test][:, ::-1].multiply(7)
            cells.X = X.tocsr()
        path = build(cells, tmp_path / kind, "s", basis)
        out = tmp_path / f"{kind}-run"
        notes = []
        progress = type("Notes", (), {k: staticmethod(lambda *_: None) for k in ("start", "advance", "finish")})()
        progress.note = notes.append
        options = {**FEW, "model": model, "out": str(out), "stores": [str(path)], "split": str(tmp_path / "split.toml")}
        result = train(make_settings({}, options), progress=progress)
        assert result.summary["final"]["part"] == "test" and result.summary["groups"]["val"] >= 3
        assert any("names no validation groups, so 3 of the 9 training groups" in n for n in notes)
        predict(out, tmp_path / f"{kind}.h5ad", basis_only=True)
        predicted.append(ad.read_h5ad(tmp_path / f"{kind}.h5ad"))
    assert (predicted[0].X != predicted[1].X).nnz == 0 and predicted[0].n_obs > 100
    assert (predicted[0].obs == predicted[1].obs).all(axis=None)


def test_one_sample_in_two_stores_is_refused(one_line, tmp_path):
    d, adata, basis = one_line
    a = build(d / "sim.h5ad", tmp_path, "a", basis)
    again = build(d / "sim.h5ad", tmp_path, "b", basis)
    with pytest.raises(DataError, match=r"stores a \(.*sim\.h5ad\) and b \(.*sim\.h5ad\) hold the same cells"):
        make_setup(make_settings({}, {"stores": [str(a), str(again)]}))
    part = adata[np.random.default_rng(0).permutation(adata.n_obs)[: adata.n_obs // 2]].copy()
    part.obs_names = [f"other_{i}" for i in range(part.n_obs)]
    part = build(part, tmp_path, "c", basis)
    with pytest.raises(DataError, match=r"stores a \(.*\) and c \(an AnnData\) hold the same cells"):
        make_setup(make_settings({}, {"stores": [str(a), str(part)]}))
    lines = sorted(set(ad.read_h5ad(d / "sim.h5ad").obs["cell_line"]))
    halves = []
    for k, line in enumerate(lines[:2]):  # other cells of the same file are not repeated cells
        cells = ad.read_h5ad(d / "sim.h5ad")
        cells.obs["wanted"] = cells.obs["cell_line"] == line
        cells.write_h5ad(tmp_path / "lines.h5ad")
        done = vc.build_store(
            tmp_path / "lines.h5ad", basis=basis, out=tmp_path, name=f"h{k}", keep=["wanted"], **OPTIONS
        )
        halves.append(str(done.path))
    assert len(make_setup(make_settings({}, {"stores": halves})).stores) == 2


def test_a_perturbation_of_no_store_gets_the_mean_effect_also_where_nothing_is_perturbed(one_line, tmp_path):
    d, _, basis = one_line
    a = build(d / "sim.h5ad", tmp_path, "a", basis)
    controls = vc.simulate(out=tmp_path / "o.h5ad", cells=600, genes=200, perturbations=12, cell_lines=1, seed=99)
    other = ad.read_h5ad(controls.out)
    other = other[other.obs["target_gene"] == "non-targeting"].copy()
    other.obs["cell_line"] = "new"
    other.write_h5ad(tmp_path / "new.h5ad")
    new = build(tmp_path / "new.h5ad", tmp_path, "new", basis)
    options = {"model": "perturbation-mean", "out": str(tmp_path / "run"), "stores": [str(a), str(new)]}
    train(make_settings({}, options))
    (tmp_path / "wanted.csv").write_text("target_gene,n_cells\nNOBODY,50\n")
    result = predict(
        tmp_path / "run", tmp_path / "p.h5ad", perturbations=tmp_path / "wanted.csv", lines=["new"], basis_only=True
    )
    assert any("1 perturbation is in no store (NOBODY)" in w for w in result.warnings)
    p = ad.read_h5ad(tmp_path / "p.h5ad")
    setup = make_setup(make_settings({}, options))
    mean = p[p.obs["target_gene"] == "NOBODY"].X.toarray().mean(axis=0)
    control = p[p.obs["target_gene"] != "NOBODY"].X.toarray().mean(axis=0)
    wanted = setup.effects.effect_kg.mean(axis=0)
    assert np.abs(wanted).max() > 0.1
    assert np.abs(mean - np.maximum(control + wanted, 0.0)).mean() < 0.1 * np.abs(wanted).mean() + 0.02


def test_a_store_that_is_built_later_is_no_part_of_a_run(one_line, tmp_path, monkeypatch):
    d, _, basis = one_line
    monkeypatch.chdir(tmp_path)
    build(d / "sim.h5ad", tmp_path / "stores", "a", basis)
    train(make_settings({}, {"model": "ridge", "out": "run"}))
    vc.simulate(out="b.h5ad", cells=2000, genes=200, perturbations=12, cell_lines=2, seed=77)
    build("b.h5ad", tmp_path / "stores", "b", basis)
    assert predict("run", "p.h5ad", basis_only=True).n_cells > 0
    (tmp_path / "stores").rename(tmp_path / "moved")
    (tmp_path / "vcelltools.toml").write_text('[store]\npath = "moved"\n')
    assert predict("run", "q.h5ad", basis_only=True).n_cells > 0


def test_a_train_that_failed_does_not_block_the_next(one_line, tmp_path):
    d, _, basis = one_line
    a = build(d / "sim.h5ad", tmp_path, "a", basis)
    options = {**FEW, "out": str(tmp_path / "run"), "stores": [str(a)]}
    with pytest.raises(DataError, match="cannot be divided"):
        train(make_settings({}, {**options, "sets": 8, "accumulate": 3}))
    assert train(make_settings({}, {**options, "sets": 8})).summary["steps"] == 4
    with pytest.raises(UsageError, match="finished run"):
        train(make_settings({}, {**options, "sets": 8}))


def test_what_cannot_be_held_out_is_said_without_a_split(one_line, tmp_path):
    _, adata, basis = one_line
    first = sorted(set(adata.obs["target_gene"]) - {"non-targeting"})[:2]
    two = build(adata[adata.obs["target_gene"].isin(["non-targeting", *first])].copy(), tmp_path, "two", basis)
    assert train(make_settings({}, {"model": "ridge", "out": str(tmp_path / "r"), "stores": [str(two)]})).summary
    one = build(adata[adata.obs["target_gene"].isin(["non-targeting", first[0]])].copy(), tmp_path, "one", basis)
    with pytest.raises(DataError, match="1 perturbation is too few to hold out some"):
        train(make_settings({}, {"model": "ridge", "out": str(tmp_path / "s"), "stores": [str(one)]}))
