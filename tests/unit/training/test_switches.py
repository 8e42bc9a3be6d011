"""Every setting has an effect on the step, the model or the sampler, and is kept in the run folder."""

from __future__ import annotations

import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.config import load_config
from vcelltools.errors import UsageError
from vcelltools.model.checkpoint import hash_params
from vcelltools.model.loss_registry import LOSSES, Loss
from vcelltools.model.step import StepConfig
from vcelltools.training.inputs import make_setup
from vcelltools.training.request import prepare
from vcelltools.training.settings import dump_toml, make_settings
from vcelltools.training.train import Trainer


def step_once(settings, **changes) -> tuple[str, float]:
    """Return the hash of the parameters after one step, and the loss."""
    trainer = Trainer(make_setup(settings(sets=2, set_size=8, warmup=0, **changes)), None)
    state, metrics = trainer.step(trainer.init_state(), trainer.data, trainer.put(trainer.host_batch(0)))
    assert np.isfinite(float(metrics["loss"]))
    return hash_params(jax.tree.map(np.asarray, state.params)), float(metrics["loss"])


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[str, float]]:
    return {}


@pytest.mark.parametrize("option", ["sinkhorn", "mse", "unbiased", "nonnegative", "batch_embedding", "identity"])
def test_a_switch_changes_the_step(settings, one_device, plain, option):
    if not plain:
        plain["default"] = step_once(settings)
    value = 0.5 if option in ("sinkhorn", "mse") else True
    changed = step_once(settings, **{option: value})
    assert changed[0] != plain["default"][0]
    if option in ("sinkhorn", "mse"):
        assert changed[1] > plain["default"][1], "its loss is added"


@pytest.mark.parametrize("kind", ["sets", "effects"])
def test_a_line_in_the_registry_is_all_that_a_loss_needs(settings, one_device, monkeypatch, kind):
    own = {
        "sets": Loss("sets", lambda s: jnp.mean(jnp.abs(s.x - s.y), axis=(1, 2))),
        "effects": Loss("effects", lambda e: jnp.mean(jnp.abs(e.effect - e.rivals[:, 0]), axis=1), rivals=True),
    }
    monkeypatch.setitem(LOSSES, "own", own[kind])
    alone = {"delta": 0.0, "pearson": 0.0, "rank": 0.0}  # so that only the new loss can ask for effects and rivals
    before = step_once(settings, **alone)
    one, two = (step_once(settings, **alone, losses={"own": w}) for w in (1.0, 2.0))
    assert one[0] != before[0] and one[1] > before[1]
    assert two[1] - before[1] == pytest.approx(2 * (one[1] - before[1]), rel=1e-3)
    text = dump_toml({"losses": {"own": 1.0}}, "train")
    assert make_settings(tomllib.loads(text)["train"], {}).losses == {"own": 1.0}


@pytest.mark.parametrize("name", ["absent", "rank"])
def test_only_further_losses_have_a_weight_by_name(name):
    with pytest.raises(UsageError, match=f"'{name}' is not the name of a further loss"):
        make_settings({}, {"losses": {name: 1.0}})
    with pytest.raises(ValueError, match=f"loss '{name}'"):
        StepConfig(losses={name: 1.0})


def test_restored_spread_is_as_long_as_in_the_prior(settings):
    setup = make_setup(settings(restore_spread=True, model="ridge"))
    rows = setup.screen.rows("test")
    pert, line = setup.screen.ids(rows)
    prior = setup.judge(pert, line)
    shared = prior["shared_kg"]
    weak = shared + 0.5 * (prior["prior_kg"] - shared)
    restored = setup.finish_effects(weak, prior["prior_kg"], pert, line)
    np.testing.assert_allclose(restored, prior["prior_kg"], atol=1e-9)
    kept = make_setup(settings(model="ridge")).finish_effects(weak, prior["prior_kg"], pert, line)
    np.testing.assert_array_equal(kept, weak)


def test_weights_reach_the_sampler(settings, store_dpath, tmp_path, monkeypatch):
    from tests.smallstore import build_small_store

    other = build_small_store(tmp_path, seed=8, name="other", basis=_get_basis(store_dpath))
    (tmp_path / "vcelltools.toml").write_text(
        '[[datasets]]\nname = "other"\nweight = 9.0\n[[datasets]]\nname = "sim"\n[train]\nmodel = "ridge"\n'
    )
    monkeypatch.chdir(tmp_path)
    assert load_config()[0].datasets[0].weight == 9.0
    options = {"stores": [store_dpath, other], "sets": 400}
    job = prepare(options, tpu=False, topology=None, dry_run=False, distributed=None)
    assert job.settings.weights == {"other": 9.0}
    share = []
    for s in (job.settings, settings(stores=job.settings.stores, sets=400)):
        sampler = make_setup(s).sampler
        names = sampler.groups["store"].to_numpy()
        share.append(np.mean([(names[sampler.batch(k).group_id] == "other").mean() for k in range(5)]))
    n = (names == "other").mean()
    assert abs(share[1] - n) < 0.05 and abs(share[0] - 9 * n / (9 * n + 1 - n)) < 0.05


def _get_basis(store_dpath) -> list[str]:
    from vcelltools.stores.store import open_store

    return [str(g) for g in open_store(store_dpath).genes]


def test_settings_survive_the_file_of_a_run(settings):
    s = settings(weights={"a b": 2.0, "c": 0.5}, stores=["x"])
    assert make_settings(tomllib.loads(dump_toml(s.to_json(), "train"))["train"], {}) == s
