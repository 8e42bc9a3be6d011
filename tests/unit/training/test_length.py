"""The number of steps that follows from the data, and the end of a training that validation no longer improves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from vcelltools.errors import InterruptedRun
from vcelltools.io.textfile import parse_toml
from vcelltools.training import length
from vcelltools.training.inputs import make_setup
from vcelltools.training.length import LONGEST, PASSES, SHORTEST, choose_steps, set_length
from vcelltools.training.settings import make_settings
from vcelltools.training.train import Trainer, train


class Notes(list):
    """A progress that keeps the notes, and counts the steps of each training."""

    def __init__(self):
        self.trained = []

    def start(self, phase, total, unit):
        self.phase = phase
        self.trained += [[total, 0]] if phase == "train" else []

    def advance(self, n):
        if self.phase == "train":
            self.trained[-1][1] += n

    def note(self, text):
        self.append(text)

    def __getattr__(self, _):
        return lambda *a: None


def test_the_rule_by_hand():
    assert choose_steps(204_800, 2048) == 1000, "10 passes over 100 batches"
    assert choose_steps(204_801, 2048) == 1001
    assert choose_steps(2048, 2048) == SHORTEST == 500
    assert choose_steps(10**9, 2048) == LONGEST == 5000
    assert choose_steps(2048, 64, warmup=1000) == 2000 and choose_steps(2048, 64, warmup=9000) == LONGEST
    assert PASSES == 10


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, (1000, 50)),
        ({"eval_every": 7}, (1000, 7)),
        ({"steps": 40}, (40, 250)),
        ({"steps": 40, "eval_every": 8}, (40, 8)),
    ],
)
def test_what_is_given_stays(given, want):
    notes = Notes()
    assert set_length(make_settings({}, given), 204_800, 2048, notes).length == want
    assert len(notes) == ("steps" not in given)


@pytest.fixture
def short(monkeypatch):
    """Bounds that let a test choose a number of steps and train that long."""
    monkeypatch.setattr(length, "SHORTEST", 20)
    monkeypatch.setattr(length, "PASSES", 2)


def test_a_run_records_the_chosen_number_and_resumes_with_it(settings, short, monkeypatch):
    chosen = settings(steps=None, eval_every=None, patience=3)
    setup = make_setup(chosen)
    cells = int(setup.screen.groups["cells"].to_numpy()[setup.screen.rows("train")].sum())
    steps = max(20, math.ceil(2 * cells / (8 * 16)))
    assert setup.settings.length == (steps, -(-steps // 20))
    notes = Notes()
    stops = iter([None] * 4 + ["SIGTERM"])
    with monkeypatch.context() as m:
        m.setattr("vcelltools.training.train.Stop.due", lambda _: next(stops))
        with pytest.raises(InterruptedRun, match="after step 5"):
            train(chosen, progress=notes)
    said = [n for n in notes if n.startswith("training takes")]
    assert len(said) == 1
    assert re.search(rf"{steps} steps or fewer, .*: each of the {cells:,} training cells is drawn 2.0 times", said[0])
    table = parse_toml((Path(chosen.out) / "config.toml").read_text(), where="run")["train"]
    assert (table["steps"], table["eval_every"]) == setup.settings.length
    monkeypatch.setattr(length, "PASSES", 3)  # a later rule does not change a run that has begun
    notes.clear()
    summary = train(chosen, progress=notes).summary
    assert summary["config"]["steps"] == steps
    assert notes.trained == [[steps, 5], [steps - 5, summary["steps"] - 5]], "every step is reported once"
    assert any("continuing after step 5" in n for n in notes) and not any("training takes" in n for n in notes)


def test_a_training_without_progress_stops_early_by_default(settings, short):
    result = train(settings(steps=None, eval_every=None, patience=10, learning_rate=0.0))
    steps, every = result.summary["config"]["steps"], result.summary["config"]["eval_every"]
    assert result.summary["steps"] == 10 * every < steps
    logged = [json.loads(x) for x in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "eval" in r] == [every * k for k in range(11)]


def test_a_sanity_mode_has_a_length_too(settings, short):
    setup = make_setup(settings(steps=None, eval_every=None), sanity="permutation")
    assert Trainer(setup, None).config.steps == setup.settings.length[0] >= 20
