"""The direction of perturbations in a store, and what it is good for."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.screens import BUILD, CONTROL, make_screen
from vcelltools.config import DatasetConfig
from vcelltools.errors import DataError, UsageError
from vcelltools.presets import PRESETS, resolve_preset
from vcelltools.stores.directions import DIRECTIONS, SENSES, get_senses, parse_direction

BASIS = [f"GENE{i}" for i in range(20)]
COLUMNS = ("--pert-col", "target_gene", "--control", "non-targeting", "--cell-line-col", "cell_line")


def build(adata, d, name="s", **options):
    return vc.build_store(adata, basis=BASIS, out=d, name=name, **BUILD, **options).path


@pytest.mark.parametrize(
    ("text", "name"),
    [("CRISPRi", "crispri"), ("CRISPR-a", "crispra"), ("KO", "knockout"), ("Knock-Out", "knockout"),
     ("ORF", "overexpression"), ("drug", "treatment"), ("unknown", "unknown")],
)  # fmt: skip
def test_names_of_directions(text, name):
    assert parse_direction(text, where="x") == name


def test_an_unknown_direction_names_those_that_exist():
    with pytest.raises(DataError, match=r"obs/d: 'crsipri' is not a direction .*did you mean 'crispri'"):
        parse_direction("crsipri", where="obs/d")
    assert set(DIRECTIONS.values()) == set(SENSES)
    assert get_senses(np.array(["crispri", "knockout", "crispra", "unknown"])).tolist() == [0, 0, 1, -1]


def test_a_store_without_directions_has_the_bytes_that_it_always_had(tmp_path):
    adata = make_screen()
    plain = build(adata, tmp_path / "a")
    again = build(adata, tmp_path / "b", direction="crispri")
    store, directed = vc.open_store(plain), vc.open_store(again)
    assert "direction" not in store.runs and set(store.directions) == {"unknown"}
    assert not {"direction", "direction_col"} & set(store.manifest["labels"])
    assert set(directed.directions) == {"crispri"} and directed.manifest["labels"]["direction"] == "crispri"
    files = store.manifest["files"], directed.manifest["files"]
    assert {k for k in files[0] if files[0][k] != files[1][k]} == {"runs.parquet"}
    pd.testing.assert_frame_equal(directed.runs.drop(columns="direction"), store.runs)


def test_a_column_of_directions_is_one_of_the_groups(tmp_path):
    adata = make_screen()
    raised = (adata.obs["line"] == "L1") & (adata.obs["target"] != CONTROL)
    adata.obs["how"] = np.where(raised, "CRISPRa", "CRISPRi")
    adata.obs.loc[(adata.obs["target"] == "P1") & (adata.obs["line"] == "L0"), "how"] = np.nan
    store = vc.open_store(build(adata, tmp_path, direction_col="how"))
    runs = store.runs[~store.runs["is_control"]]
    want = np.where(runs["cell_line"] == "L1", "crispra", np.where(runs["perturbation"] == "P1", "unknown", "crispri"))
    assert runs["direction"].tolist() == want.tolist()
    assert set(store.runs.loc[store.runs["is_control"], "direction"]) == {"crispri"}
    adata.obs["how"] = np.where(np.arange(adata.n_obs) % 2, "crispri", "crispra")
    with pytest.raises(DataError, match=r"obs/how: 'P\d' has cells of two directions in 'L\d'"):
        build(adata, tmp_path, name="mixed", direction_col="how")
    adata.obs["how"] = "sideways"
    with pytest.raises(DataError, match="'sideways' is not a direction"):
        build(adata, tmp_path, name="wrong", direction_col="how")
    with pytest.raises(UsageError, match="both given"):
        build(adata, tmp_path, name="two", direction_col="how", direction="crispri")


def test_controls_of_two_directions_have_none(tmp_path):
    adata = make_screen(perts=4)
    raised = adata.obs["target"].isin(["P0", "P1"]) | ((adata.obs["target"] == CONTROL) & adata.obs["ok"])
    adata.obs["how"] = np.where(raised, "crispra", "crispri")
    runs = vc.open_store(build(adata, tmp_path, direction_col="how")).runs
    assert set(runs.loc[runs["is_control"], "direction"]) == {"unknown"}
    assert set(runs.loc[runs["perturbation"] == "P0", "direction"]) == {"crispra"}


def test_presets_know_the_direction_of_their_atlas():
    of = {name: resolve_preset(DatasetConfig(name="x", preset=name)).direction for name in PRESETS}
    assert of["replogle-rpe1"] == of["vcc-2025"] == "crispri" and of["yao"] == "knockout"
    assert all(d in DIRECTIONS for d in of.values())
    own = resolve_preset(DatasetConfig(name="x", preset="kolf", direction_col="how"))
    assert own.direction is None and own.direction_col == "how"


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """A screen of three CRISPRi and two CRISPRa lines, with the split of the first, built with and without."""
    d = tmp_path_factory.mktemp("directions")
    vc.simulate(
        d / "s.h5ad", cells=5000, genes=200, perturbations=16, cell_lines=5, activated=2, inert=0.0, depth=3000,
        shared=0.9, seed=4,
    )  # fmt: skip
    names = ad.read_h5ad(d / "s.h5ad").var_names
    (d / "basis.txt").write_text("\n".join(names) + "\n")
    for name, more in (("without", ()), ("with", ("--direction-col", "direction"))):
        done = run_cli("build-store", "s.h5ad", "--basis", "basis.txt", *COLUMNS, *more, "--out", name, cwd=d)
        assert done.code == 0, done.stderr
    return d


def test_the_score_with_directions_beats_the_score_without(screens):
    means = {}
    for name in ("with", "without"):
        found = vc.evaluate(
            ["ridge"], ["leave-one-context-out"], screens / f"{name}-scores", stores=[screens / name / "s"]
        )
        table = found.table.set_index(["model", "metric"])
        means[name] = table["value"]
        if name == "with":
            assert table.loc[("ridge", "pearson_delta"), "value"] > 0.3
    for model in ("perturbation-mean", "ridge"):
        assert means["with"][model, "pearson_delta"] > means["without"][model, "pearson_delta"] + 0.3
        assert means["with"][model, "pds"] > means["without"][model, "pds"] + 0.1
        assert means["with"][model, "error"] < 0.8 * means["without"][model, "error"]


@pytest.mark.parametrize("model", ["ridge", "transformer"])
def test_a_perturbation_of_the_other_direction_is_borrowed_with_its_sign(screens, model, tmp_path):
    store = vc.open_store(screens / "with" / "s")
    names = sorted(set(store.runs["perturbation"]) - {CONTROL})
    away = "".join(f'[fewshot."s.line{i}"]\ntest = {names[:4]}\n' for i in (1, 2, 3))
    (tmp_path / "split.toml").write_text(f'[training]\ns = "train"\n{away}')
    more = {"size": "tiny", "steps": 4, "eval_every": 4, "sets": 8, "set_size": 8} if model == "transformer" else {}
    run = vc.train(tmp_path / "run", stores=[store], split=tmp_path / "split.toml", model=model, **more)
    assert run.summary["final"]["pearson_delta"] > 0.1
    rows = pd.DataFrame({"target_gene": [*names[:4], "NOBODY"], "n_cells": 300})
    rows.to_csv(tmp_path / "wanted.csv", index=False)
    effects = {}
    for direction, evidence in (("crispri", "other direction"), ("CRISPRa", "measured"), ("drug", "no effect")):
        done = run_cli(
            "predict", "--run", "run", "--out", "p.h5ad", "--basis-only", "--no-fit-emission", "--line", "line1",
            "--perturbations", "wanted.csv", "--direction", direction, "--force", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.stderr
        p = ad.read_h5ad(tmp_path / "p.h5ad")
        label = p.obs["target_gene"].astype(str)
        said = p.obs["evidence"].astype(str).groupby(label).first() if "evidence" in p.obs else {}
        assert {said[n] for n in names[:4]} == {evidence}
        assert said["NOBODY"] == ("no effect" if direction == "drug" else "mean effect")
        mean = {n: p.X.toarray()[label == n].mean(axis=0) for n in [*names[:4], CONTROL]}
        effects[direction] = np.concatenate([mean[n] - mean[CONTROL] for n in names[:4]])
        if direction == "crispri":
            assert "predicted from the other direction" in done.stderr
            assert "4 perturbations are not measured in the requested direction" in done.stderr
    assert np.corrcoef(effects["crispri"], effects["CRISPRa"])[0, 1] < -0.2
    assert np.abs(effects["drug"]).max() < 1e-4


def test_a_direction_that_no_store_records_is_refused(screens, tmp_path):
    run = vc.train(tmp_path / "run", stores=[screens / "without" / "s"], model="perturbation-mean").out
    for text, said in (("crispri", "no store records"), ("up", "is not a direction")):
        done = run_cli("predict", "--run", run, "--out", "p.h5ad", "--direction", text, cwd=tmp_path)
        assert done.code == 2 and "--direction" in done.stderr and said in done.stderr
