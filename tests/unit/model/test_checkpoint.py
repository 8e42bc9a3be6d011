"""Checkpoints: bitwise round trips, detection of damage, and refusal of other models."""

from __future__ import annotations

import json
import resource

import jax
import numpy as np
import pytest

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.write.atomic import atomic_file
from vcelltools.model.checkpoint import Checkpointer, flatten, hash_params, read_manifest
from vcelltools.model.network import make_config
from vcelltools.model.step import StepConfig, init_state


def make_state(seed: int = 0, hidden: int = 8):
    config = make_config("tiny", genes=10, perturbations=3, hidden=hidden, ff=8, layers=1, heads=2)
    return init_state(config, StepConfig(), seed)


@pytest.fixture
def saved(tmp_path):
    keeper = Checkpointer(tmp_path / "checkpoints", atomic_file)
    for step in (10, 20, 30):
        keeper.save(step, make_state(step), {"seed": step})
    return keeper


def test_round_trip_and_the_last_two(saved):
    assert saved.steps() == [20, 30]
    assert len(list(saved.dpath.iterdir())) == 4
    found = saved.load(make_state())
    assert (found.step, found.meta, found.skipped) == (30, {"seed": 30}, ())
    want = flatten(make_state(30))
    for name, a in flatten(found.state).items():
        assert a.dtype == want[name].dtype
        assert a.tobytes() == want[name].tobytes()
    assert found.params_sha256 == hash_params(make_state(30).params)
    assert hash_params(make_state(30).params) != hash_params(make_state(20).params)


def test_a_flipped_bit_falls_back_to_the_one_before(saved):
    fpath = saved.dpath / "step-00000030.safetensors"
    raw = bytearray(fpath.read_bytes())
    raw[len(raw) // 2] ^= 1
    fpath.write_bytes(raw)
    found = saved.load(make_state())
    assert found.step == 20
    assert "step-00000030.safetensors is damaged" in found.skipped[0]


def test_any_flipped_bit_of_a_manifest_is_noticed(saved):
    """Otherwise the manifest has the same content, for example if one white space replaced another."""
    fpath = saved.dpath / "step-00000030.json"
    whole = fpath.read_bytes()
    for at in range(len(whole)):
        fpath.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert read_manifest(fpath) == json.loads(whole)
        except DataError:
            pass
    fpath.write_bytes(whole.replace(b'"seed": 30', b'"seed": 31'))
    found = saved.load(make_state())
    assert found.step == 20
    assert "step-00000030.json is damaged" in found.skipped[0]


@pytest.mark.parametrize("damage", ["truncate", "missing", "manifest"])
def test_other_damage_falls_back_too(saved, damage):
    fpath = saved.dpath / "step-00000030.safetensors"
    if damage == "truncate":
        fpath.write_bytes(fpath.read_bytes()[:-1])
    elif damage == "missing":
        fpath.unlink()
    else:
        fpath.with_suffix(".json").write_text("{")
    assert saved.load(make_state()).step == 20


def test_when_all_are_damaged_it_says_so(saved):
    for fpath in saved.dpath.glob("*.safetensors"):
        fpath.write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        saved.load(make_state())


def test_an_empty_folder_has_none(tmp_path):
    assert Checkpointer(tmp_path, atomic_file).load(make_state()) is None


def test_another_models_checkpoint_is_refused(saved):
    with pytest.raises(DataError, match=r"cell/0/b is float32\[8\], but the model has float32\[4\]"):
        saved.load(jax.eval_shape(lambda: make_state(hidden=4)))


def test_a_manifest_without_its_tensors_is_never_left(tmp_path):
    keeper = Checkpointer(tmp_path, atomic_file, keep=1)
    keeper.save(1, make_state(), {})
    keeper.save(2, make_state(), {})
    manifest = json.loads((tmp_path / "step-00000002.json").read_text())
    assert manifest["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.json", "step-00000002.safetensors"]


def test_numpy_state_hashes_as_the_device_state():
    state = make_state()
    assert hash_params(jax.tree.map(np.asarray, state.params)) == hash_params(state.params)


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(saved):
    keeper = saved
    before = {p.name: p.read_bytes() for p in keeper.dpath.iterdir() if not p.name.startswith(".")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(EnvironmentFault, match="the disk is full"):
            keeper.save(99, make_state(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in keeper.dpath.iterdir() if not p.name.startswith(".")} == before
