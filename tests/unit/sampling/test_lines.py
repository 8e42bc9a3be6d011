"""A line of a store has one spelling, ``STORE.LINE``; files with the older one are still read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import anndata as ad
import pandas as pd
import pytest

import vcelltools as vc
from tests.smallstore import build_small_store
from vcelltools.errors import DataError
from vcelltools.evaluation.external import read_effects
from vcelltools.io.fingerprint import hash_text
from vcelltools.sampling.lines import find_line, list_lines
from vcelltools.training.inputs import make_setup
from vcelltools.training.run_folder import RunFolder


def fake(name, *lines):
    return SimpleNamespace(name=name, runs=pd.DataFrame({"cell_line": list(lines)}))


def test_a_line_is_found_by_its_name_and_alone_where_one_store_has_it():
    lines = list_lines([fake("b", "K562", "x"), fake("a", "K562", "a.b / c")])
    assert list(lines) == ["a.K562", "a.a.b / c", "b.K562", "b.x"]
    assert lines["a.K562"] == (1, "K562") and lines["b.x"] == (0, "x")
    assert find_line(lines, "x") == find_line(lines, "b.x") == "b.x"
    for name, said in (("K562", "2 lines are named 'K562'"), ("b / x", "no line is named 'b / x'")):
        with pytest.raises(DataError, match=said):
            find_line(lines, name)


def test_two_lines_of_one_name_are_refused():
    with pytest.raises(DataError, match=r"stores a and a\.b both have a cell line a\.b\.c"):
        list_lines([fake("a", "b.c"), fake("a.b", "c")])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("lines")
    store = build_small_store(d)
    (d / "split.toml").write_text('[training]\nsim = "train"\n[zeroshot]\n"sim.line3" = "test"\n')
    train = {"stores": [str(store)], "split": str(d / "split.toml")}
    result = vc.train(out=d / "run", model="perturbation-mean", **train)
    return d, result.summary


def test_what_is_printed_is_what_a_split_and_an_option_take(made):
    d, summary = made
    assert summary["held_out_lines"] == ["sim.line3"]
    said = json.loads((d / "run" / "vocabulary.json").read_text())
    assert said["lines"] == ["sim.line1", "sim.line2", "sim.line3"]
    assert all(" in sim.line" in x for x in said["split"])
    for name in ("sim.line2", "line2"):
        result = vc.predict(d / "run", d / "p.h5ad", perturbations=write_table(d), lines=[name], force=True)
        assert result.lines == ("sim.line2",)


def write_table(d):
    pert = sorted(set(ad.read_h5ad(d / "sim.h5ad", backed="r").obs["target_gene"]) - {"non-targeting"})[0]
    (d / "perts.csv").write_text(f"target_gene,n_cells\n{pert},5\n")
    return d / "perts.csv"


def test_a_run_and_a_prediction_with_the_older_spelling_are_read(made):
    d, _ = made
    fpath = d / "run" / "vocabulary.json"
    before = fpath.read_text()
    old = json.loads(before.replace("sim.line", "sim / line"))
    old["identity"] |= {key: hash_text(old[key]) for key in ("lines", "split")}
    try:
        fpath.write_text(json.dumps(old))
        assert vc.predict(d / "run", d / "old.h5ad", basis_only=True, force=True).lines == ("sim.line3",)
        old["split"][0] = old["split"][0].replace("train", "val")
        old["identity"]["split"] = hash_text(old["split"])
        fpath.write_text(json.dumps(old))
        with pytest.raises(DataError, match="trained with other split"):
            vc.predict(d / "run", d / "old.h5ad", basis_only=True, force=True)
    finally:
        fpath.write_text(before)
    setup = make_setup(RunFolder(d / "run").read_settings())
    pred = ad.read_h5ad(d / "old.h5ad")
    found = []
    for label in ("sim / line3", "sim.line3", "line3"):
        pred.obs["context"] = pd.Categorical([label] * pred.n_obs)
        pred.write_h5ad(d / "labelled.h5ad")
        columns = {"pert_col": "target_gene", "control": None, "context_col": "context"}
        found.append(pd.DataFrame(read_effects(d / "labelled.h5ad", setup.screen, **columns)))
    assert found[0].notna().any(axis=None) and found[0].equals(found[1]) and found[1].equals(found[2])
