"""A training stops once its predictions no longer change, also if it was interrupted in between."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vcelltools as vc
from vcelltools.errors import InterruptedRun
from vcelltools.training.stability import Stability
from vcelltools.training.train import train


def test_changes_by_hand():
    found = Stability(0.1)
    e = np.array([[3.0, 4.0]])
    assert found.add(e, 0) is None
    assert found.add(e * 2, 5) == pytest.approx(0.5) and found.count == 0
    assert found.add(e * 2.1, 10) == pytest.approx(0.1 / 2.1) and found.count == 1 and not found.reached
    assert found.add(e * 2.1, 15) == 0 and found.reached
    assert found.add(-e, 20) == pytest.approx(3.1) and not found.reached
    nothing = Stability(0.1)
    assert nothing.add(0 * e, 0) is None and nothing.add(0 * e, 5) == 0
    off = Stability(0.0)
    assert [off.add(e, k) for k in range(4)] == [None, 0, 0, 0] and not off.reached


def test_evaluations_in_the_warm_up_are_not_compared():
    found = Stability(0.1, warmup=10)
    e = np.ones((2, 2))
    assert [found.add(e, k) for k in (0, 5, 10, 15)] == [None, None, None, 0.0] and found.count == 1


def test_only_the_effects_of_the_same_evaluation_are_read_again(tmp_path):
    found = Stability(0.1)
    for k in (0, 5):
        found.add(np.ones((2, 2)), k)
    found.save(tmp_path / "s.npz")
    same, other, damaged, none = (Stability(0.1) for _ in range(4))
    same.load(tmp_path / "s.npz", 5)
    assert same.count == 1 and same.add(np.ones((2, 2)), 10) == 0 and same.reached
    other.load(tmp_path / "s.npz", 10)
    assert other.add(np.ones((2, 2)), 15) is None
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:50])
    damaged.load(tmp_path / "s.npz", 5)
    none.load(tmp_path / "nowhere.npz", 5)
    assert damaged.count == none.count == 0


def test_a_training_stops_and_can_be_interrupted_and_extended(settings, monkeypatch):
    chosen = settings(steps=20, learning_rate=0.0, warmup=0, eval_every=2, patience=0, stability=0.01)
    stops = iter([None, None, "SIGTERM"])
    with monkeypatch.context() as m:
        m.setattr("vcelltools.training.train.Stop.due", lambda _: next(stops))
        with pytest.raises(InterruptedRun, match="after step 3"):
            train(chosen)
    result = train(chosen)
    assert result.summary["steps"] == 4, "the evaluations at 0, 2 and 4 are equal"
    records = [json.loads(x) for x in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [r["eval"]["change"] for r in records if "eval" in r] == [None, 0, 0]
    assert vc.train(extend=result.out, steps=30).summary["steps"] == 8
