"""Two predictions compared perturbation by perturbation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vcelltools.errors import DataError
from vcelltools.scoring.comparison import compare_scores


def write(folder, names, baselines, **columns):
    """Write what the comparison reads of a score."""
    folder.mkdir()
    text = ["perturbation," + ",".join(columns)]
    text += [",".join([n, *("" if np.isnan(c[i]) else repr(float(c[i])) for c in columns.values())])
             for i, n in enumerate(names)]  # fmt: skip
    (folder / "results.csv").write_text("\n".join(text) + "\n")
    components = {m: {"value": 0.0, "baseline": b} for m, b in baselines.items()}
    (folder / "score.json").write_text(json.dumps({"components": components}))
    return folder


NAMES = [f"P{i:02d}" for i in range(40)]
BASE = {"pearson_delta": 0.2, "mae": 0.05}


def test_the_difference_is_that_of_the_average_scores(tmp_path):
    a = write(tmp_path / "a", ["x", "y"], BASE, pearson_delta=[0.4, 0.6], mae=[0.02, 0.04])
    b = write(tmp_path / "b", ["y", "x"], BASE, pearson_delta=[0.2, 0.4], mae=[0.07, 0.05])
    d = compare_scores(a, b)
    # pearson: (0.5 - 0.2)/0.8 and (0.3 - 0.2)/0.8; mae: 1 - 0.03/0.05, and 1 - 0.06/0.05 counts as 0
    assert d.value == pytest.approx(((0.3 - 0.1) / 0.8 + 0.4) / 2)
    assert d.n == 2
    # resamples of two: (x, x), (x, y), (y, x), (y, y); by hand the least and the largest difference
    assert d.ci95 == pytest.approx((((0.4 - 0.4) / 0.8 + 0.6) / 2, ((0.6 - 0.2) / 0.8 + 0.2) / 2))


def test_a_small_steady_gain_is_no_tie_however_much_perturbations_differ(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.9, 40)
    bar = write(tmp_path / "bar", NAMES, BASE, pearson_delta=hard)
    better = write(tmp_path / "better", NAMES, BASE, pearson_delta=hard + 0.02 + rng.normal(0, 0.005, 40))
    d = compare_scores(better, bar)
    assert not d.level and d.value == pytest.approx(0.02 / 0.8, abs=0.003)
    assert compare_scores(bar, better).value == pytest.approx(-d.value)
    assert compare_scores(bar, bar).level and compare_scores(bar, bar).ci95 == (0, 0)


def test_the_seed_decides_the_interval(tmp_path):
    rng = np.random.default_rng(1)
    a = write(tmp_path / "a", NAMES, BASE, pearson_delta=rng.uniform(0.3, 0.6, 40))
    b = write(tmp_path / "b", NAMES, BASE, pearson_delta=rng.uniform(0.3, 0.6, 40))
    assert compare_scores(a, b) == compare_scores(a, b)
    assert compare_scores(a, b).ci95 != compare_scores(a, b, seed=1).ci95
    assert compare_scores(a, b).level


def test_the_share_of_intervals_without_zero_is_the_level_where_there_is_no_difference(tmp_path):
    rng = np.random.default_rng(2)
    hits = 0
    for k in range(100):
        hard = rng.uniform(0.3, 0.7, 40)
        a = write(tmp_path / f"a{k}", NAMES, BASE, pearson_delta=hard + rng.normal(0, 0.02, 40))
        b = write(tmp_path / f"b{k}", NAMES, BASE, pearson_delta=hard + rng.normal(0, 0.02, 40))
        hits += not compare_scores(a, b, n_bootstrap=300).level
    assert hits <= 14


def test_values_that_are_missing_are_left_out_of_the_mean(tmp_path):
    a = write(tmp_path / "a", ["x", "y", "z"], BASE, pearson_delta=[0.4, 0.6, np.nan])
    b = write(tmp_path / "b", ["x", "y", "z"], BASE, pearson_delta=[0.2, 0.2, 0.2])
    assert compare_scores(a, b).value == pytest.approx(0.3 / 0.8)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
    a = write(tmp_path / "a", NAMES, BASE, pearson_delta=np.ones(40))
    other = write(tmp_path / "other", ["A", "B"], BASE, pearson_delta=np.ones(2))
    with pytest.raises(DataError, match="share 1 metrics and 0 perturbations"):
        compare_scores(a, other)
    (other / "results.csv").write_text("perturbation,pearson_delta\nA,high\n")
    with pytest.raises(DataError, match=r"other/results\.csv: row 'A' does not consist of 1 numbers"):
        compare_scores(a, other)
    with pytest.raises(DataError, match=r"nowhere/results\.csv"):
        compare_scores(a, tmp_path / "nowhere")
