"""The gaming panel: every crafted trick raises its flag, an honest prediction raises none."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.scoring.gaming import Evidence, check_gaming


def make(seed: int = 0, **changed) -> Evidence:
    rng = np.random.default_rng(seed)
    control = rng.gamma(1.0, 1.0, 400)
    effect = rng.normal(0, 0.4, (12, 400))
    base = {
        "real_pg": control + effect,
        "pred_pg": control + 0.8 * effect + rng.normal(0, 0.15, effect.shape),
        "real_control_g": control,
        "pred_control_g": control,
        "real_spread_p": np.full(12, 100.0),
        "pred_spread_p": np.full(12, 90.0),
        "real_significant_p": np.full(12, 40.0),
        "pred_significant_p": np.full(12, 35.0),
        "library_ratio": 1.05,
    }
    return Evidence(**{**base, **changed})


def get_flags(e: Evidence) -> set[str]:
    checks = check_gaming(e)
    assert all(c.text.endswith(".") and len(c.text) > 20 for c in checks)
    return {c.name for c in checks if c.flagged}


def test_an_honest_prediction_has_no_flag():
    for seed in range(5):
        assert get_flags(make(seed)) == set()


E0 = make()


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"pred_spread_p": np.full(12, 30.0)}, {"cell-to-cell variance"}),
        ({"pred_spread_p": np.full(12, 300.0)}, {"cell-to-cell variance"}),
        ({"pred_spread_p": np.zeros(12)}, {"cell-to-cell variance", "collapsed to the mean"}),
        ({"pred_significant_p": np.full(12, 400.0)}, {"significant genes"}),
        ({"pred_significant_p": np.zeros(12)}, {"significant genes"}),
        ({"pred_pg": E0.real_control_g + 5 * (E0.real_pg - E0.real_control_g)}, {"effect size"}),
        ({"pred_pg": E0.real_control_g + 0.1 * (E0.real_pg - E0.real_control_g)}, {"effect size"}),
        ({"pred_pg": np.tile(E0.real_pg[0], (12, 1))}, {"one response for all"}),
        ({"library_ratio": 8.0}, {"library size"}),
    ],
)
def test_each_trick_raises_its_flag(changed, flags):
    assert get_flags(make(**changed)) == flags


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "0.024 times"),
        (283, "6.9 times"),
        (16_000, "390 times"),
        (10**6, "24,390 times"),
        (10**9, "over a million times"),
    ],
)
def test_ratios_are_said_in_plain_digits(n, said):
    (check,) = (c for c in check_gaming(make(pred_significant_p=np.full(12, n))) if c.name == "significant genes")
    assert f"The prediction calls {said} as many genes significant" in check.text
    (check,) = (c for c in check_gaming(make(pred_spread_p=np.zeros(12))) if c.name == "cell-to-cell variance")
    assert "(less than 0.01 times)" in check.text


def test_shifted_controls_are_flagged():
    assert "own controls" in get_flags(make(pred_control_g=E0.real_control_g + 0.5))


def test_a_second_log1p_is_flagged():
    e = make()
    twice = make(pred_pg=np.log1p(np.maximum(e.pred_pg, 0)), pred_control_g=np.log1p(e.real_control_g))
    assert "log1p taken twice" in get_flags(twice)


def test_what_is_not_known_is_not_judged():
    e = make(pred_control_g=None, real_spread_p=None, real_significant_p=None, library_ratio=None)
    names = {c.name for c in check_gaming(e)}
    assert names == {"effect size", "one response for all", "log1p taken twice"}


def test_one_perturbation_and_no_effect():
    control = np.ones(30)
    e = Evidence(real_pg=control[None] + 0.0, pred_pg=control[None] + 0.0, real_control_g=control)
    assert {c.name for c in check_gaming(e) if c.flagged} == set()
