"""A training starts from the weights of a run: what both know by name is carried over, and the rest is new."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from tests.smallstore import build_small_store
from vcelltools.errors import DataError, UsageError
from vcelltools.model.network import init_params
from vcelltools.stores.store import open_store
from vcelltools.training.inherit import inherit
from vcelltools.training.inputs import make_setup
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import make_settings
from vcelltools.training.train import load_best, train


class Notes(list):
    def note(self, text):
        self.append(text)

    def __getattr__(self, _):
        return lambda *a: None


@pytest.fixture(scope="module")
def make(store_dpath, tmp_path_factory):
    """``make(name)``: settings of a quick run with embeddings of perturbations and lines."""
    from tests.unit.training.conftest import QUICK

    dpath = tmp_path_factory.mktemp("inherit")
    more = {"identity": True, "batch_embedding": True, "steps": 4, "eval_every": 2, "stores": [str(store_dpath)]}
    return lambda name, **fields: make_settings({}, {**QUICK, **more, "out": str(dpath / name), **fields})


@pytest.fixture(scope="module")
def source(make):
    return train(make("source"))


@pytest.fixture(scope="module")
def other(tmp_path_factory, store_dpath):
    """A store of other perturbations in lines of the same names, with the genes in another order."""
    genes = open_store(store_dpath).genes.tolist()
    return build_small_store(tmp_path_factory.mktemp("other"), seed=5, name="other", basis=genes[::-1])


def start(settings, run, notes=None):
    """Return (setup, fresh parameters, inherited parameters, where they come from)."""
    setup = make_setup(settings)
    fresh = init_params(setup.model_config(), jax.random.key(9))
    found = inherit(run, setup, setup.model_config(), fresh, Notes() if notes is None else notes)
    return setup, jax.tree.map(np.asarray, fresh), *found


def test_without_learning_the_weights_stay_those_of_the_run(make, source):
    tuned = train(make("same", from_run=str(source.out), learning_rate=0.0, seed=0))
    said = tuned.summary["start"]
    best = json.loads(next((source.out / "best").glob("*.json")).read_text())
    assert said == {"run": str(source.out), "step": best["step"], "params_sha256": best["params_sha256"]}
    assert tuned.summary["params_sha256"] == said["params_sha256"]
    assert tuned.summary["config"]["from_run"] == str(source.out)


def test_names_carry_the_embeddings_over(make, source, other):
    notes = Notes()
    setup, fresh, params, _ = start(make("x", stores=[str(other)]), source.out, notes)
    old_setup = make_setup(RunFolder(source.out).read_settings())
    old = load_best(RunFolder(source.out), old_setup.model_config()).params
    assert setup.genes == old_setup.genes[::-1] != old_setup.genes
    for i, gene in enumerate(setup.genes):
        j = old_setup.genes.index(gene)
        np.testing.assert_array_equal(params["cell"][0]["w"][i], old["cell"][0]["w"][j])
        np.testing.assert_array_equal(params["prior"][i], old["prior"][j])
        np.testing.assert_array_equal(params["decoder"][-1]["w"][:, i], old["decoder"][-1]["w"][:, j])
        assert params["decoder"][-1]["b"][i] == old["decoder"][-1]["b"][j]
    here, there = setup.sampler.perturbations, old_setup.sampler.perturbations
    known = [p for p in here if p in there]
    assert 1 <= len(known) < len(here), "some are known, and some are not"
    for i, p in enumerate(here):
        want = old["identity"][0 if i == 0 else there.index(p)] if i == 0 or p in there else fresh["identity"][i]
        np.testing.assert_array_equal(params["identity"][i], want)
    for i, line in enumerate(setup.screen.lines):
        j = old_setup.screen.lines.index(line.replace("other.", "sim."))
        np.testing.assert_array_equal(params["context"][i], old["context"][j])
    for key in ("layers", "judge", "gate", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params[key], old[key])
    n = len([p for p in here[1:] if p in there])
    assert notes[-1].endswith(f"with {n} of {len(here) - 1} perturbations, with 3 of 3 lines"), notes


def test_it_trains_on_other_stores_and_resumes(make, source, other, monkeypatch):
    from vcelltools.errors import InterruptedRun

    fields = {"stores": [str(other)], "from_run": str(source.out), "eval_every": 9}
    stops = iter([None, None, "SIGTERM"])
    with monkeypatch.context() as m:
        m.setattr("vcelltools.training.train.Stop.due", lambda _: next(stops))
        with pytest.raises(InterruptedRun):
            train(make("tuned", **fields))
    shutil.move(source.out, source.out.with_name("away"))  # a run that has begun no longer needs it
    try:
        done = train(make("tuned", **fields))
    finally:
        shutil.move(source.out.with_name("away"), source.out)
    start = done.summary["start"]
    assert start["run"] == str(source.out) and done.summary["params_sha256"] != start["params_sha256"]
    assert done.summary["store_sha256"] == open_store(other).sha256


def test_held_out_groups_that_the_run_has_seen_are_named(make, source, tmp_path):
    split = tmp_path / "split.toml"
    split.write_text('[training]\nsim = "train"\n\n[zeroshot]\n"sim.line1" = "test"\n')
    notes = Notes()
    start(make("x", split=str(split)), source.out, notes)
    assert "was trained on" in notes[-1] and "sim.line1; their scores" in notes[-1]
    plain = Notes()
    start(make("x"), source.out, plain)
    assert not any("was trained on" in n for n in plain)


def test_faults(make, source, other, store_dpath, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        start(make("x"), tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has the size tiny, but here it is rn"):
        start(make("x", size="rn"), source.out)
    with pytest.raises(UsageError, match="has embeddings of perturbations, but this training has none") as caught:
        start(make("x", identity=False), source.out)
    assert caught.value.hint == "identity=True"
    with pytest.raises(UsageError, match="has embeddings of lines, but this training has none"):
        start(make("x", batch_embedding=False), source.out)
    names = np.array(open_store(store_dpath).runs["perturbation"].unique().tolist())
    np.savez(tmp_path / "f.npz", names=names, values=np.random.default_rng(0).normal(size=(len(names), 3)))
    with pytest.raises(UsageError, match="reads 0 features of perturbations, but here there are 3"):
        start(make("x", features=str(tmp_path / "f.npz")), source.out)
    genes = open_store(store_dpath).genes.tolist()
    few = build_small_store(tmp_path, seed=5, name="few", basis=genes[1:])
    with pytest.raises(DataError, match=f"trained on other genes .*: 1 are missing here, such as {genes[0]}"):
        start(make("x", stores=[str(few)]), source.out)
    ridge = train(make("ridge", model="ridge"))
    with pytest.raises(UsageError, match="is a run of ridge, but from_run needs one of a transformer"):
        start(make("x"), ridge.out)
    copy = tmp_path / "copy"
    shutil.copytree(source.out, copy)
    (copy / "summary.json").unlink()
    with pytest.raises(UsageError, match="is not finished"):
        start(make("x"), copy)
    with pytest.raises(UsageError, match="from_run applies to a transformer or a diffusion model, not to ridge"):
        make("x", model="ridge", from_run=str(source.out))
