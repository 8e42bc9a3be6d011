"""The training step: equal on any number of devices and any feed; invalid batches, accumulation, EMA, schedule."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcelltools.errors import UsageError
from vcelltools.model import step as step_module
from vcelltools.model.mesh import choose_feed, feed, local_share, make_mesh, place_rows, replicate
from vcelltools.model.network import make_config
from vcelltools.model.step import METRICS, StepConfig, init_state, make_data, make_schedule, make_step

G, COLUMNS, ROWS, SETS, S = 60, 128, 403, 16, 8
MODEL = make_config("tiny", genes=G, perturbations=5, hidden=16, ff=32)


def make_rows() -> np.ndarray:
    rows = np.zeros((ROWS, COLUMNS), np.float16)
    rows[:, :G] = np.random.default_rng(0).gamma(1.0, 1.0, (ROWS, G))
    return rows


def make_batch(step: int, rows: np.ndarray | None = None, share: slice = slice(None)) -> dict[str, np.ndarray]:
    """Return row numbers, or the cells themselves if ``rows`` is given."""
    r = np.random.default_rng(step)
    batch = {
        "control": r.integers(0, 200, (SETS, S), dtype=np.int32),
        "target": r.integers(200, ROWS, (SETS, S), dtype=np.int32),
        "pert": r.integers(0, 5, SETS, dtype=np.int32),
        "context": np.zeros(SETS, np.int32),
        "prior": r.integers(0, 6, SETS, dtype=np.int32),
        "dataset": np.zeros(SETS, np.int32),
        "rivals": r.integers(1, 6, (SETS, 3), dtype=np.int32),
    }
    batch["measured"] = batch["prior"]
    if rows is not None:
        batch |= {"control": rows[batch["control"]], "target": rows[batch["target"]]}
    return {k: v[share] for k, v in batch.items()}


def train(mesh, how: str, n_steps: int = 10, **fields) -> tuple[list[float], object]:
    config = StepConfig(steps=20, warmup=2, **{"delta": 0.3, "pearson": 1.0, "rank": 0.3, **fields})
    rows = make_rows()
    prior, effect = np.random.default_rng(1).normal(0, 0.1, (2, 6, G))
    data = replicate(mesh, make_data(prior, np.ones((1, G)), effect_kg=effect))
    if how != "host":
        data["rows"] = place_rows(mesh, [rows[:100], rows[100:]], how)
    step = make_step(MODEL, config, mesh, how)
    state = replicate(mesh, init_state(MODEL, config, 0))
    losses, share = [], local_share(mesh, SETS)
    for i in range(n_steps):
        batch = make_batch(i, rows if how == "host" else None, share)
        state, metrics = step(state, data, feed(mesh, batch, SETS))
        losses.append(float(metrics["loss"]))
    assert set(metrics) == set(METRICS)
    return losses, state


@pytest.fixture(scope="module")
def alone():
    return train(make_mesh(jax.devices()[:1]), "replicated")


@pytest.mark.parametrize("how", ["replicated", "sharded", "host"])
def test_eight_devices_equal_one(alone, how):
    losses, state = train(make_mesh(), how)
    np.testing.assert_allclose(losses, alone[0], atol=1e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # Adam divides rounding errors by the roots of tiny squares


def test_two_processes_of_four_devices_equal_one(alone):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.unit.model.test_step"]
    root = Path(__file__).resolve().parents[3]
    running = [
        subprocess.Popen([*command, f"127.0.0.1:{port},2,{i}"], cwd=root, env=env, stdout=-1, stderr=-1, text=True)
        for i in range(2)
    ]
    outputs = [p.communicate(timeout=240) for p in running]
    assert [p.returncode for p in running] == [0, 0], outputs
    for stdout, _ in outputs:
        np.testing.assert_allclose(json.loads(stdout.splitlines()[-1]), alone[0], atol=1e-6)


def test_the_state_is_donated_and_one_batch_can_be_learnt():
    mesh = make_mesh(jax.devices()[:1])
    config = StepConfig(steps=60, learning_rate=3e-3, warmup=1)
    first = state = replicate(mesh, init_state(MODEL, config, 0))
    data = replicate(mesh, make_data(np.zeros((6, G)), np.ones((1, G))))
    step, batch = make_step(MODEL, config, mesh, "host"), feed(mesh, make_batch(0, make_rows()), SETS)
    losses = []
    for _ in range(40):
        state, metrics = step(state, data, batch)
        losses.append(float(metrics["excess"]))
    assert first.params["norm"].is_deleted()
    assert losses[-1] < losses[0] - 0.1


def test_accumulation_equals_one_large_batch(alone):
    losses, _ = train(make_mesh(jax.devices()[:1]), "replicated", n_steps=4, accumulate=4)
    np.testing.assert_allclose(losses, alone[0][:4], atol=2e-6)


def test_a_cpu_computes_in_microbatches_that_fit_its_caches(alone, monkeypatch):
    chosen = [step_module.choose_microbatches(b, s) for b, s in ((32, 64), (16, 32), (6, 64), (8, 300), (1, 8))]
    assert chosen == [8, 2, 2, 8, 1]
    monkeypatch.setattr(step_module, "_CPU_CELLS", 4 * S)
    sizes = []
    choose = step_module.choose_microbatches
    monkeypatch.setattr(step_module, "choose_microbatches", lambda b, s: sizes.append(choose(b, s)) or sizes[-1])
    losses, _ = train(make_mesh(jax.devices()[:1]), "replicated", n_steps=4)
    assert set(sizes) == {4}
    np.testing.assert_allclose(losses, alone[0][:4], atol=2e-6)


def test_ema_trails_the_parameters():
    _, state = train(make_mesh(jax.devices()[:1]), "host", n_steps=3, ema=0.5)
    gap = float(np.abs(np.asarray(state.ema["norm"]) - np.asarray(state.params["norm"])).max())
    moved = float(np.abs(np.asarray(state.params["norm"]) - 1).max())
    assert 0 < gap < moved


def test_genes_outside_the_mask_bring_no_gradient():
    mesh = make_mesh(jax.devices()[:1])
    config = StepConfig(steps=20, weight_decay=0.0)
    mask = np.ones((1, G))
    mask[0, 10:] = 0
    data = replicate(mesh, make_data(np.zeros((6, G)), mask))
    state, _ = make_step(MODEL, config, mesh, "host")(
        replicate(mesh, init_state(MODEL, config, 0)), data, feed(mesh, make_batch(0, make_rows()), SETS)
    )
    bias = np.asarray(state.params["decoder"][-1]["b"])
    assert np.abs(bias[:10]).min() > 0
    assert np.abs(bias[10:]).max() == 0


def test_losses_of_effects_teach_the_judge_and_those_of_cells_the_rest():
    prior, effect = np.random.default_rng(1).normal(0, 0.1, (2, 6, G))
    data = make_data(prior, np.ones((1, G)), effect_kg=effect) | {"rows": make_rows()}
    params = init_state(MODEL, StepConfig(), 0).params

    def get_gradient(**weights):
        loss = step_module.make_loss(MODEL, StepConfig(**weights), "replicated")
        g, _ = jax.grad(loss, has_aux=True)(params, jax.tree.map(jnp.asarray, data), make_batch(0))
        judge = g.pop("judge")
        return jax.tree.leaves(judge), jax.tree.leaves(g)

    both, cells = get_gradient(energy=1.0, pearson=1.0), get_gradient(energy=1.0)
    effects = get_gradient(energy=0.0, pearson=1.0)
    for a, b in zip(both[0], effects[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for a, b in zip(both[1], cells[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not any(np.any(g) for g in effects[1]) and any(np.any(g) for g in both[1])
    assert any(np.any(g) for g in cells[0]), "where no loss of effects is asked for, the cells teach the judge too"


def test_schedules():
    peak = StepConfig(steps=100, warmup=10, learning_rate=0.5)
    rate = make_schedule(peak)
    assert float(rate(0)) == pytest.approx(0.05)
    assert float(rate(10)) == pytest.approx(0.5)
    assert float(rate(100)) == pytest.approx(0.05)
    assert float(make_schedule(StepConfig(steps=100, warmup=0, schedule="constant"))(70)) == pytest.approx(1e-3)
    assert float(make_schedule(StepConfig(steps=100, warmup=10, schedule="linear"))(100)) == pytest.approx(0.0)


@pytest.mark.parametrize("fields", [{"schedule": "step"}, {"ema": 1.0}, {"energy": 0.0}])
def test_bad_settings_are_refused(fields):
    with pytest.raises(ValueError, match=r"schedule|ema|weight"):
        StepConfig(**fields)


def test_the_feed_is_chosen_by_memory():
    gib = 1 << 30
    assert choose_feed(1000, 2048, 1, None) == "host"
    assert choose_feed(200_000, 2048, 16, 16 * gib) == "replicated"
    assert choose_feed(10_000_000, 2048, 16, 16 * gib) == "sharded"
    assert choose_feed(100_000_000, 2048, 16, 16 * gib) == "host"


def test_sets_must_divide_over_the_devices():
    with pytest.raises(UsageError, match="12 sets per step do not divide evenly over 8 devices"):
        local_share(make_mesh(), 12)


if __name__ == "__main__":  # a process of the test with two processes
    jax.config.update("jax_num_cpu_devices", 4)
    from vcelltools.model.mesh import start_processes

    start_processes(sys.argv[1])
    sys.stdout.write(json.dumps(train(make_mesh(), "sharded")[0]) + "\n")
