"""TensorBoard files and an offline run of W&B, beside the metrics of a run."""

from __future__ import annotations

import importlib.util
import json

import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.smallstore import build_small_store
from tests.unit.training.conftest import QUICK
from vcelltools.errors import EnvironmentFault
from vcelltools.training.boards import Boards
from vcelltools.training.settings import make_settings

FEW = {**QUICK, "steps": 4, "eval_every": 2, "log_every": 2, "sets": 8, "set_size": 8}
HAS_WANDB = importlib.util.find_spec("wandb") is not None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_small_store(tmp_path_factory.mktemp("boards"))


def test_both_viewers_get_every_record(store, tmp_path):
    added = []
    boards = Boards()
    boards._add.append(lambda step, values: added.append((step, values)))
    boards.add(3, {"step": 3, "loss": 0.5, "part": "val"})
    boards.add(3, {"pds": 1, "part": "val"}, "eval/")
    assert added == [(3, {"loss": 0.5}), (3, {"eval/pds": 1.0})]


def test_tensorboard_files_are_written(store, tmp_path):
    vc.train(tmp_path / "run", stores=[store], tensorboard=True, **FEW)
    (written,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = written.read_bytes()
    assert b"loss" in content and b"eval/pds" in content


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_a_missing_wandb_is_named_with_its_extra(store, tmp_path):
    words = ("train", "--store", store, "--out", "run", "--wandb", "--steps", 2, "--sets", 8, "--set-size", 8)
    done = run_cli(*words, "--size", "tiny", cwd=tmp_path)
    assert done.code == 4 and "pip install 'vcelltools[wandb]'" in done.stderr
    with pytest.raises(EnvironmentFault):
        Boards().open(make_settings({}, {"wandb": True}), tmp_path)


@pytest.mark.skipif(not HAS_WANDB, reason="wandb is not installed")
def test_wandb_writes_an_offline_run(store, tmp_path):
    words = ("train", "--store", store, "--out", "run", "--wandb", "--steps", 4, "--sets", 8, "--set-size", 8)
    done = run_cli(*words, "--size", "tiny", "--json", cwd=tmp_path)
    assert done.code == 0 and json.loads(done.stdout)["final"], done.stderr
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"loss" in content and b"eval/pds" in content and "wandb" not in done.stderr
