"""The demo: public commands, resumed where they were, honest about what it holds out."""

from __future__ import annotations

import json
import tomllib

import pytest

from tests.conftest import run_cli
from vcelltools.errors import UsageError
from vcelltools.pipelines.demo import CONFIG, FULL, QUICK, SPLIT, _get_fields, make_road, run_demo


def test_every_step_is_a_public_command():
    from vcelltools.cli.main import COMMANDS

    names = set(COMMANDS)
    road = [s.argv[0] for s in make_road(FULL)]
    assert set(road) <= names
    firsts = [
        road.index(n) for n in ("simulate", "inspect", "hvg", "basis", "build-store", "train", "predict", "score")
    ]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_the_held_out_atlas_is_kept_out(sizes):
    from vcelltools.config import parse_config
    from vcelltools.pipelines.splits import parse_split

    config = parse_config(CONFIG.format(**_get_fields(sizes)), where="demo")
    assert [d.name for d in config.datasets] == ["kolf", "lab_b"], "the held-out atlas has no say in the basis"
    split = parse_split(tomllib.loads(SPLIT), where="demo")
    assert split.get_part("lab_c", "line4", "anything") == "test"
    assert split.get_part("kolf", "KOLF2.1J", "anything") == "train"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        run_demo(tmp_path, quick=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_second_walk_runs_what_is_damaged_alone(tmp_path):
    dpath = tmp_path / "d"
    first = run_cli("demo", "--dir", dpath, "--quick", "--json", "-q", timeout=600)
    assert first.code == 0, first.stderr
    n = len(make_road(QUICK))
    assert first.json["ran"] == n and first.json["skipped"] == 0
    assert (dpath / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert set(first.json["scores"]) == {"transformer", "perturbation-mean"}
    (dpath / "scores/perturbation-mean/score.json").write_text("{}")
    again = run_cli("demo", "--dir", dpath, "--quick", "--json", "-q", timeout=600)
    assert again.code == 0, again.stderr
    assert again.json["ran"] == 1 and again.json["skipped"] == n - 1
    keep = lambda body: {k: v["avg_score"] for k, v in body["scores"].items()}  # noqa: E731
    assert keep(again.json) == keep(first.json)
    assert json.loads((dpath / "demo.json").read_text())["steps"]
