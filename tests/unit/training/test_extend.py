"""A finished run goes on: to the same bits as one that was that long from the start."""

from __future__ import annotations

import json
import shutil

import pytest

import vcelltools as vc
from vcelltools.errors import DataError, InterruptedRun, UsageError
from vcelltools.training.extend import describe_schedule, read_extension
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import make_settings
from vcelltools.training.train import train


class Notes(list):
    def note(self, text):
        self.append(text)

    def __getattr__(self, _):
        return lambda *a: None


def read_evaluations(out):
    return [r for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "eval" in r]


@pytest.fixture(scope="module")
def make(store_dpath, tmp_path_factory):
    """``make(name, steps=10)``: settings of a quick run under a constant schedule."""
    from tests.unit.training.conftest import QUICK

    dpath = tmp_path_factory.mktemp("extend")
    more = {"schedule": "constant", "optimizer": "muon", "eval_every": 5, "stores": [str(store_dpath)]}
    return lambda name, **fields: make_settings({}, {**QUICK, **more, "out": str(dpath / name), **fields})


@pytest.fixture(scope="module")
def whole(make):
    return train(make("whole", steps=20))


def test_an_extension_even_an_interrupted_one_ends_as_a_longer_run(make, whole, monkeypatch):
    part = train(make("part", steps=10))
    assert part.summary["steps"] == 10
    stops = iter([None, None, "SIGTERM"])
    with monkeypatch.context() as m:
        m.setattr("vcelltools.training.train.Stop.due", lambda _: next(stops))
        with pytest.raises(InterruptedRun, match="after step 13"):
            vc.train(extend=part.out, steps=20)
    assert not (part.out / "summary.json").exists()
    assert (part.out / "checkpoints" / "step-00000013.json").exists()
    with pytest.raises(UsageError, match="is not finished, so it cannot be extended"):
        vc.train(extend=part.out, steps=25)
    notes = Notes()
    done = vc.train(extend=part.out, steps=20, progress=notes)
    assert "continuing after step 13" in notes
    assert done.summary["params_sha256"] == whole.summary["params_sha256"]
    assert done.summary["final"] == whole.summary["final"] and done.summary["steps"] == 20
    assert read_evaluations(part.out) == read_evaluations(whole.out)
    for name in ("checkpoints/step-00000020", "best/" + next((whole.out / "best").glob("*.json")).stem):
        for kind in ("safetensors", "json"):
            a, b = (d / f"{name}.{kind}" for d in (part.out, whole.out))
            assert a.read_bytes() == b.read_bytes(), a
    assert RunFolder(part.out).read_settings().steps == 20


def test_faults(make, whole, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_extension(tmp_path / "nowhere", 30)
    with pytest.raises(DataError, match="is not a run folder"):
        read_extension(tmp_path, 30)
    for steps in (1, 20):
        with pytest.raises(UsageError, match=f"has 20 steps already, so it cannot be extended to {steps}"):
            read_extension(whole.out, steps)
    with pytest.raises(UsageError, match="extend needs the number of steps"):
        read_extension(whole.out, None)
    ridge = train(make("ridge", model="ridge", optimizer="adamw"))
    with pytest.raises(UsageError, match="a run of ridge, which is fitted at once"):
        read_extension(ridge.out, 30)
    copy = tmp_path / "copy"
    shutil.copytree(whole.out, copy)
    (copy / "summary.json").write_text("{}")
    with pytest.raises(DataError, match=r"summary\.json is damaged"):
        read_extension(copy, 30)


def test_a_run_that_lost_its_checkpoints_stays_a_finished_run(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole.out, copy)
    shutil.rmtree(copy / "checkpoints")
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    with pytest.raises(DataError, match="has no checkpoint to continue from"):
        vc.train(extend=copy, steps=30)
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before


def test_a_run_that_stopped_early_counts_its_evaluations_anew(make):
    fields = {"learning_rate": 0.0, "eval_every": 2, "patience": 2, "optimizer": "adamw"}
    first = train(make("early", steps=30, **fields))
    assert first.summary["steps"] == 4
    again = vc.train(extend=first.out, steps=40)
    assert again.summary["steps"] == 8 and again.summary["config"]["steps"] == 40


@pytest.mark.parametrize(
    ("schedule", "said"),
    [("constant", []), ("linear", ["at step 100 the learning rate changes from 0 to 0.5"])],
)
def test_a_schedule_that_moves_says_so(schedule, said):
    notes = Notes()
    given = {"schedule": schedule, "warmup": 0, "learning_rate": 1.0, "steps": 200, "eval_every": 10}
    describe_schedule(make_settings({}, given), 100, 100, notes)
    assert [n.partition(": ")[2] for n in notes] == said
