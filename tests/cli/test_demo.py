"""The demo: public commands, resumed where they were, honest about what it holds out."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.conftest import run_cli
from vcelltools.cli.render_demo import _verdict
from vcelltools.errors import UsageError
from vcelltools.project.demo import CONFIG, FULL, QUICK, SPLIT, DemoResult, _get_fields, make_steps, run_demo
from vcelltools.scoring.comparison import Difference


def test_every_step_is_a_public_command():
    from vcelltools.cli.main import COMMANDS

    names = set(COMMANDS)
    steps = [s.argv[0] for s in make_steps(FULL)]
    assert set(steps) <= names
    firsts = [
        steps.index(n) for n in ("simulate", "inspect", "hvg", "basis", "build-store", "train", "predict", "score")
    ]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_the_held_out_atlas_is_kept_out(sizes):
    from vcelltools.config import parse_config
    from vcelltools.sampling.splits import parse_split

    config = parse_config(CONFIG.format(**_get_fields(sizes)), where="demo")
    assert [d.name for d in config.datasets] == ["kolf", "lab_b"], "the held-out atlas has no say in the basis"
    split = parse_split(tomllib.loads(SPLIT), where="demo")
    assert split.get_part("lab_c", "line4", "anything") == "test"
    assert split.get_part("kolf", "KOLF2.1J", "anything") == "train"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="contains other files"):
        run_demo(tmp_path, quick=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def make_result(difference, ci95, mae_unclipped):
    """Return a result with this difference of the models and what ``mae_unclipped`` leaves of MAE."""

    def score(average, mae_unclipped):
        part = {"value": 0.04, "ci95": [0.03, 0.05], "score": max(mae_unclipped, 0.0), "score_unclipped": mae_unclipped}
        return {"avg_score": average, "components": {"mae": part}}

    start = {"pds": 0.6, "pearson_delta": 0.3, "mae": 0.04}
    final = {"pds": 0.65, "pearson_delta": 0.35, "mae": 0.06, "untrained": start}
    scores = {"perturbation-mean": score(0.2, -0.1), "transformer": score(0.2 + difference, mae_unclipped)}
    return DemoResult(
        dpath=Path("d"), ran=1, skipped=0, seconds=1.0, scores=scores, held_out={"transformer": final},
        difference=Difference(value=difference, ci95=ci95, n=30),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("difference", "ci95", "mae_unclipped", "says"),
    [
        (0.02, (-0.01, 0.05), -0.3, "is level with"),
        (0.02, (0.01, 0.03), 0.3, "is above"),
        (-0.02, (-0.03, -0.01), -0.3, "is below"),
    ],
)
def test_the_verdict_says_what_the_scores_bear(difference, ci95, mae_unclipped, says):
    result = make_result(difference, ci95, mae_unclipped)
    text = "\n".join(_verdict(result))
    assert says in text and "beats the mean baseline" in text
    assert f"the difference is {difference:+.3f}, and from {ci95[0]:+.3f} to {ci95[1]:+.3f}" in text
    assert ("In mae it is worse than the mean baseline" in text) == (mae_unclipped < 0)
    assert "PDS from 0.600 to 0.650, Pearson Δ from 0.300 to 0.350, MAE from 0.040 to 0.060" in text
    assert result.to_json()["level"] == (says == "is level with")
    assert result.to_json()["difference"] == {"value": difference, "ci95": list(ci95), "n": 30}


@pytest.mark.slow
def test_a_second_walk_runs_what_is_damaged_alone(tmp_path):
    dpath = tmp_path / "d"
    first = run_cli("demo", "--dir", dpath, "--quick", "--json", "-q", timeout=600)
    assert first.code == 0, first.stderr
    n = len(make_steps(QUICK))
    assert first.json["ran"] == n and first.json["skipped"] == 0
    assert (dpath / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    low, high = first.json["difference"]["ci95"]
    averages = [first.json["scores"][m]["avg_score"] for m in ("transformer", "perturbation-mean")]
    assert first.json["difference"]["value"] == pytest.approx(averages[0] - averages[1], abs=1e-9)
    assert low <= first.json["difference"]["value"] <= high
    assert set(first.json["scores"]) == {"transformer", "perturbation-mean"}
    models = {"control-mean", "perturbation-mean", "ridge", "transfer", "transformer"}
    rows = {(r["model"], r["metric"]): r for r in first.json["table"]}
    assert {m for m, _ in rows} == models and {r["groups"] for r in rows.values()} == {QUICK.perturbations}
    assert rows["control-mean", "error"]["value"] == 1 and 0 < rows["transformer", "pds"]["value"] < 1
    (dpath / "scores/perturbation-mean/score.json").write_text("{}")
    again = run_cli("demo", "--dir", dpath, "--quick", "--json", timeout=600)
    assert again.code == 0, again.stderr
    assert f"[1/{n}] $ vcelltools simulate" in again.stderr and "\\n" not in again.stderr
    assert again.json["ran"] == 1 and again.json["skipped"] == n - 1
    keep = lambda body: {k: v["avg_score"] for k, v in body["scores"].items()}  # noqa: E731
    assert keep(again.json) == keep(first.json)
    assert json.loads((dpath / "demo.json").read_text())["steps"]
