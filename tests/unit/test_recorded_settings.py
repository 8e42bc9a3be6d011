"""Recorded settings had an effect: an option that another one makes idle is left out, or refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vcelltools as vc
from tests.screens import BUILD, make_screen, write
from vcelltools.errors import UsageError
from vcelltools.io.textfile import parse_toml
from vcelltools.selection.hvg import compute_hvg
from vcelltools.training.settings import TrainSettings, make_settings

SCORE = {"pert_col": "target", "control": "non-targeting"}


@pytest.fixture(scope="module")
def counts():
    return make_screen(240, 40)


@pytest.fixture(scope="module")
def logs(counts):
    adata = counts.copy()
    dense = adata.X.toarray().astype(np.float64)
    adata.X = np.log1p(1e4 * dense / np.maximum(dense.sum(1, keepdims=True), 1)).astype(np.float32)
    return adata


def test_rounding_is_recorded_where_a_count_was_rounded(counts):
    whole = compute_hvg(counts, top=5, non_integer="round", seed=3)
    assert not {"non_integer", "seed"} & set(whole.settings) and not any("rounded" in w for w in whole.warnings)
    some = counts.copy()
    some.X = some.X.astype(np.float32)
    some.X.data[0] += 0.5
    rounded = compute_hvg(some, top=5, non_integer="round", seed=3)
    assert rounded.settings["non_integer"] == "round" and rounded.settings["seed"] == 3


@pytest.mark.parametrize(
    ("flavor", "own"),
    [("seurat_v3", {"span"}), ("dispersion", {"min_share"}), ("pearson_residuals", {"theta"}), ("seurat", set())],
)
def test_a_flavor_records_its_own_options(counts, flavor, own):
    result = compute_hvg(counts, top=5, flavor=flavor, seed=8)
    assert set(result.settings) == {"flavor", "top", "batch_key", "modality", "layer", "feature_type", "genome", *own}


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({"profile": "pds", "skip": ("mae",)}, {"skip_metrics": []}),
        ({"profile": "minimal", "skip": ("mae", "clustering_agreement")}, {"skip_metrics": ["mae"]}),
        ({"profile": "pds", "ceiling_seed": 5}, {"ceiling_seed": None}),
        ({"profile": "pds", "allow_discrete": True}, {"allow_discrete": False}),
    ],
)
def test_score_records_what_it_used(logs, given, recorded):
    settings = vc.score(logs, logs, **SCORE, **given).to_json()["settings"]
    assert {k: settings[k] for k in recorded} == recorded


@pytest.mark.parametrize("given", [{"epsilon": 0.5}, {"cpm_filter": 2.0}])
def test_score_refuses_what_a_profile_does_not_read(logs, given):
    with pytest.raises(UsageError, match="cannot be used with profile='pds', which has no table of fold changes"):
        vc.score(logs, logs, **SCORE, profile="pds", **given)


def test_a_basis_of_one_data_set_records_no_rule(tmp_path, counts):
    paths = [write(counts, tmp_path / f"{x}.h5ad") for x in "ab"]
    one, two = (vc.basis(paths[:n], top=5).to_json() for n in (1, 2))
    assert not {"rule", "weights"} & set(one["settings"]) and {"rule", "weights"} <= set(two["settings"])
    assert all("top" not in s["settings"] for s in two["sources"])


@pytest.mark.parametrize("test", ["welch", "wilcoxon", "nb"])
def test_a_test_of_expression_records_its_own_options(counts, test):
    settings = vc.de(counts, **SCORE, test=test).settings
    own = {"continuity", "exact"} if test == "wilcoxon" else set()
    assert set(settings) == {"test", "pert_col", "control", "keep", "epsilon", "min_cpm", *own}


@pytest.mark.parametrize(
    ("model", "reads", "idle"),
    [
        ("ridge", {"objective", "seed", "split"}, {"steps", "learning_rate", "prior", "energy", "size", "weights"}),
        ("transformer", {"steps", "prior", "energy", "weights", "restore_spread"}, {"objective"}),
        ("diffusion", {"steps", "size", "ema"}, {"prior", "energy", "set_size", "split", "objective", "eval_sets"}),
    ],
)
def test_a_run_records_what_its_model_reads(model, reads, idle):
    said = set(make_settings({"model": model}, {}).to_json())
    assert reads <= said and not idle & said and said <= set(TrainSettings.__struct_fields__)


def test_a_run_folder_holds_those_and_is_read_again(tmp_path, counts):
    write(counts, tmp_path / "x.h5ad")
    vc.build_store(tmp_path / "x.h5ad", basis=[f"GENE{i}" for i in range(20)], out=tmp_path, name="s", **BUILD)
    vc.train(tmp_path / "run", stores=[tmp_path / "s"], model="perturbation-mean", steps=7, learning_rate=0.5)
    table = parse_toml((tmp_path / "run" / "config.toml").read_text(), where="config.toml")["train"]
    config = json.loads((tmp_path / "run" / "summary.json").read_text())["config"]
    assert not {"steps", "learning_rate", "warmup"} & (set(table) | set(config))
    assert vc.predict(tmp_path / "run", tmp_path / "p.h5ad", basis_only=True).n_cells > 0
