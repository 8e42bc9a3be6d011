"""Runs in one process: resuming, damage, disagreement, NaN, early stopping, feeds."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.smallstore import build_small_store
from vcelltools.errors import DataError, InterruptedRun, UsageError
from vcelltools.model.step import init_state, make_effect
from vcelltools.stores.store import open_store
from vcelltools.training.inputs import Setup, make_setup
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import make_settings
from vcelltools.training.train import SHARES, Stop, Trainer, load_best, predict_effects, train


class StopAfter(Stop):
    """Requests a stop at the n-th check."""

    left = 0

    def due(self):
        type(self).left -= 1
        return "SIGTERM" if self.left < 0 else None


@pytest.fixture
def stop_after(monkeypatch):
    def set_(n):
        StopAfter.left = n
        monkeypatch.setattr("vcelltools.training.train.Stop", StopAfter)

    yield set_


@pytest.fixture(scope="module")
def finished(store_dpath, tmp_path_factory):
    from tests.unit.training.conftest import QUICK

    options = {**QUICK, "out": str(tmp_path_factory.mktemp("ref") / "run"), "stores": [str(store_dpath)]}
    return train(make_settings({}, options))


def test_summary_and_files(finished):
    s = finished.summary
    assert {p.name for p in finished.out.iterdir()} == {
        "best", "checkpoints", "config.toml", "loss.png", "metrics.jsonl", "summary.json", "vocabulary.json",
    }  # fmt: skip
    assert s == json.loads((finished.out / "summary.json").read_text())
    assert {"steps", "seed", "params_sha256", "store_sha256", "config", "versions", "final", "baselines",
            "beats_baselines"} <= s.keys()  # fmt: skip
    assert set(s["baselines"]) == {"control-mean", "perturbation-mean", "ridge"}
    records = [json.loads(x) for x in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [5, 10, 15, 20, 25, 30]
    assert [r["step"] for r in records if "eval" in r] == [0, 10, 20, 30]
    assert {"excess", "cells_per_s", "data_wait_share", "grad_norm"} <= records[1].keys()
    assert len(list((finished.out / "checkpoints").glob("*.json"))) == 2


def test_a_prediction_takes_the_share_that_validation_chose(finished):
    folder = RunFolder(finished.out)
    setup = make_setup(folder.read_settings())
    model, config = setup.model_config(), setup.step_config("cpu")
    best = load_best(folder, model)
    assert finished.summary["final"]["share"] == float(best.share) and float(best.share) in SHARES
    state = folder.checkpoints().load(jax.eval_shape(lambda: init_state(model, config, 0))).state
    ids = setup.screen.ids(setup.screen.rows("val"))
    none, half, whole = predict_effects(setup, make_effect(model, config), state.ema, *ids, [0.0, 0.5, 1.0])
    np.testing.assert_allclose(half, (none + whole) / 2, atol=1e-6)
    assert np.abs(whole - none).max() > 1e-4
    logged = [json.loads(x) for x in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert all(r["eval"]["share"] in SHARES for r in logged if "eval" in r)


def test_resume_gives_the_same_bits_even_past_a_damaged_checkpoint(settings, stop_after, finished, monkeypatch):
    stop_after(16)
    with pytest.raises(InterruptedRun, match="after step 17"):
        train(settings())
    monkeypatch.undo()
    folder = Path(settings().out) / "checkpoints"
    newest = folder / "step-00000017.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 4
    newest.write_bytes(raw)
    notes = []

    class Listen:
        def note(self, text):
            notes.append(text)

        def __getattr__(self, _):
            return lambda *a: None

    result = train(settings(), progress=Listen())
    assert any("damaged" in n and "step 10 is used" in n for n in notes)
    assert result.summary["params_sha256"] == finished.summary["params_sha256"]
    a, b = ((d / "metrics.jsonl").read_text().splitlines() for d in (result.out, finished.out))
    assert [json.loads(x)["step"] for x in a] == [json.loads(x)["step"] for x in b]


def test_another_run_in_the_folder(settings, finished):
    same = {"out": str(finished.out)}
    with pytest.raises(UsageError, match="holds a finished run"):
        train(settings(**same))
    with pytest.raises(UsageError, match="holds a run"):
        train(settings(**same), resume=False)
    (finished.out / "summary.json").rename(finished.out / "away.json")
    try:
        with pytest.raises(DataError, match="seed was 0 but is now 1"):
            train(settings(**same, seed=1))
    finally:
        (finished.out / "away.json").rename(finished.out / "summary.json")


def test_a_run_of_another_store_is_refused(settings, tmp_path, finished):
    other = open_store(build_small_store(tmp_path, seed=8))
    (finished.out / "summary.json").rename(finished.out / "away.json")
    try:
        with pytest.raises(DataError, match=r"trained with stores .*, but here it is"):
            train(settings(out=str(finished.out)), stores=[other])
    finally:
        (finished.out / "away.json").rename(finished.out / "summary.json")


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_checkpoint(settings, monkeypatch):
    monkeypatch.setattr(Setup, "make_batch", _poison(Setup.make_batch, step=13))
    with pytest.raises(DataError, match=r"step 14: the loss is nan .*the batch holds .* in sim\.line"):
        train(settings())
    assert [p.name for p in sorted((Path(settings().out) / "checkpoints").glob("*.json"))] == ["step-00000010.json"]


def test_a_training_that_fails_at_once_does_not_block_the_corrected_command(settings, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Setup, "make_batch", _poison(Setup.make_batch, step=1))
        with pytest.raises(DataError, match="step 2: the loss is nan"):
            train(settings(learning_rate=9.0))
    out = Path(settings().out)
    assert (out / "best" / "step-00000000.json").exists() and not list((out / "checkpoints").glob("*"))
    assert train(settings(model="ridge")).summary["final"]["model"] == "ridge"


def _poison(make_batch, step):
    def poisoned(self, batch, share=slice(None), *, cells):
        out = make_batch(self, batch, share, cells=cells)
        if batch.step == step:
            out["target"] = np.full_like(out["target"], np.nan)
        return out

    return poisoned


def test_early_stopping(settings):
    result = train(settings(learning_rate=0.0, eval_every=5, patience=2))
    assert result.summary["steps"] == 10
    assert result.summary["final"]["best_step"] == 0


@pytest.mark.parametrize("feed", ["replicated", "sharded"])
def test_rows_on_the_devices_give_the_batches_of_the_host(settings, store, feed):
    losses = {}
    for name in ("host", feed):
        trainer = Trainer(make_setup(settings(feed=name), [store]), None)
        state = trainer.init_state()
        state, m = trainer.step(state, trainer.data, trainer.put(trainer.host_batch(0)))
        losses[name] = float(m["loss"])
    assert losses[feed] == pytest.approx(losses["host"], abs=1e-6)


@pytest.mark.parametrize("model", ["control-mean", "perturbation-mean", "ridge"])
def test_baselines_are_runs_too(settings, model):
    summary = train(settings(model=model)).summary
    final = {k: summary["final"][k] for k in ("pds", "pearson_delta", "mae")}
    assert final == {k: summary["baselines"][model][k] for k in final}
    assert summary["beats_baselines"] is False


def test_settings_are_strict(settings):
    with pytest.raises(UsageError, match="unknown key 'stepz'"):
        settings(stepz=3)
    with pytest.raises(UsageError, match="steps"):
        settings(steps="many")
    with pytest.raises(UsageError, match="weight 0"):
        settings(energy=0.0, delta=0.0, pearson=0.0, rank=0.0)


def test_a_split_under_which_nothing_trains_says_what_to_write(settings, store, tmp_path):
    split = tmp_path / "split.toml"
    split.write_text('[zeroshot]\n"sim.line1" = "test"\n')
    with pytest.raises(DataError, match=r"there are no training groups: there is no \[training\] section") as caught:
        make_setup(settings(split=str(split)), [store])
    assert 'sim = "train"' in str(caught.value.hint)


def test_summary_names_where_the_held_out_groups_lie(finished):
    assert finished.summary["held_out_stores"] == ["sim"]
    assert all(line.startswith("sim.line") for line in finished.summary["held_out_lines"])
    assert finished.summary["peak_memory_bytes"] > 1e7


def test_rivals_are_training_groups_of_the_same_line(settings, store):
    setup = make_setup(settings(), [store])
    groups = setup.sampler.groups
    batch = setup.make_batch(setup.sampler.batch(3), cells=False)
    line = groups["context_id"].to_numpy()
    assert (line[batch["rivals"] - 1] == batch["context"][:, None]).all()
    np.testing.assert_array_equal(setup.make_batch(setup.sampler.batch(3), slice(2, 5), cells=False)["rivals"],
                                  batch["rivals"][2:5])  # fmt: skip
    pert = groups["perturbation_id"].to_numpy()[batch["measured"] - 1]
    np.testing.assert_array_equal(pert, batch["pert"])
    row = setup.screen.groups.set_index(["pert_id", "line_id"]).index.get_indexer(
        list(zip(batch["pert"], batch["context"], strict=True))
    )
    np.testing.assert_array_equal(setup.effect_kg[batch["measured"]], setup.screen.effect_kg[row])


def test_with_features_some_sets_are_shown_as_unseen(settings, store, tmp_path):
    names = store.runs.loc[~store.runs["is_control"], "perturbation"].unique()
    values = np.random.default_rng(0).normal(size=(len(names), 3))
    np.savez(tmp_path / "f.npz", names=np.asarray(names, str), values=values)
    setup = make_setup(settings(features=str(tmp_path / "f.npz"), sets=64), [store])
    n = len(setup.sampler.groups)
    assert len(setup.evidence["prior"]) == 2 * n + 1
    assert (setup.evidence["cells"][n + 1 :] == 0).all()
    assert (setup.evidence["cells"][1 : n + 1] > 0).any()
    batch = setup.make_batch(setup.sampler.batch(0), cells=False)
    hidden = batch["prior"] != batch["measured"]
    assert 0 < hidden.mean() < 1
    np.testing.assert_array_equal(batch["prior"][hidden], batch["measured"][hidden] + n)
