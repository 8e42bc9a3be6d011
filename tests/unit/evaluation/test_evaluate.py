"""``evaluate``: the table, resuming, predictions of other tools, and the comparison of two runs."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.smallstore import build_small_store
from vcelltools.errors import DataError
from vcelltools.evaluation.evaluate import evaluate
from vcelltools.evaluation.pair import compare_runs
from vcelltools.evaluation.splits import RULES, make_splits
from vcelltools.io.frame import read_frame
from vcelltools.model.registry import MODELS, fit_model
from vcelltools.sampling.pseudobulk import measure_pseudobulk
from vcelltools.stores.store import open_store
from vcelltools.training.inputs import make_setup
from vcelltools.training.settings import make_settings

CONTEXTS = RULES[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build_small_store(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def made(store):
    """Return an evaluation of ridge, with each line left out in turn."""
    return evaluate(["ridge"], [CONTEXTS], store.parent / "made", stores=[store])


def test_every_model_answers_every_held_out_group(made, store):
    groups = made.groups
    assert set(groups["model"]) == {"control-mean", "perturbation-mean", "ridge"}
    assert made.n_splits == groups["split"].nunique() == 3 and made.n_models == 3 and made.n_reused == 0
    of_ridge = groups[groups["model"] == "ridge"]
    assert len(of_ridge) == len(of_ridge[["line", "perturbation"]].drop_duplicates()) == 36
    assert (of_ridge["line"] == of_ridge["split"]).all()


def test_the_table_is_the_mean_of_the_groups_and_pairs_them(made):
    table, groups = (
        made.table.set_index(["model", "metric"]),
        made.groups.set_index(["model", "line", "perturbation"]).sort_index(),
    )
    for metric in ("pds", "pearson_delta", "mae"):
        assert table.loc[("ridge", metric), "value"] == pytest.approx(groups.loc["ridge", metric].mean())
        gain = (groups.loc["ridge", metric] - groups.loc["perturbation-mean", metric]).mean()
        row = table.loc[("ridge", metric)]
        assert row["gain"] == pytest.approx(gain) and row["gain_low"] <= gain <= row["gain_high"]
    assert table.loc[("control-mean", "error"), "value"] == pytest.approx(1)  # the error of no effect over itself
    for label in ("table", "groups"):
        kept = read_frame(made.out / f"{label}.parquet", what="a table").to_pandas()
        pd.testing.assert_frame_equal(kept, getattr(made, label), check_dtype=False)
        assert len(pd.read_csv(made.out / f"{label}.csv")) == len(kept)


def test_a_stopped_evaluation_asks_only_what_is_missing(made, store):
    parts = sorted((made.out / "parts").iterdir())
    assert len(parts) == 9
    parts[0].unlink()
    parts[1].write_text("[{")
    again = evaluate(["ridge"], [CONTEXTS], made.out, stores=[store])
    assert again.n_reused == 7
    pd.testing.assert_frame_equal(again.groups, made.groups)
    more = evaluate(["ridge", "ridge:error"], [CONTEXTS], made.out, stores=[store])
    assert more.n_reused == 9 and set(more.groups["model"]) > {"ridge:error"}


def test_the_true_cells_are_a_prediction_without_error(made, store, tmp_path):
    source = store.parent.parent / "sim.h5ad"
    true = ad.read_h5ad(source)
    true.write_h5ad(tmp_path / "true.h5ad")
    label = str(open_store(store).manifest["labels"]["control"])
    columns = {"pert_col": "target_gene", "context_col": "cell_line", "control": label}
    found = evaluate(
        [], [CONTEXTS], tmp_path / "e", stores=[store], predictions={"true": tmp_path / "true.h5ad"}, **columns
    )
    table = found.table.set_index(["model", "metric"])["value"]
    # the store normalises over the library of its genes, and the file over that of all its genes
    assert table["true", "pds"] == 1 and table["true", "pearson_delta"] > 0.99 and table["true", "error"] < 0.02
    some = true[true.obs["target_gene"].isin([label])].copy()
    some.write_h5ad(tmp_path / "controls.h5ad")
    with pytest.raises(DataError, match="none of the held-out groups"):
        evaluate(
            [], [CONTEXTS], tmp_path / "e", stores=[store], predictions={"x": tmp_path / "controls.h5ad"}, **columns
        )


def test_a_split_that_holds_nothing_out_is_refused(store, tmp_path):
    with pytest.raises(DataError, match="holds out no group"):
        evaluate(["ridge"], ["few-shot"], tmp_path / "e", stores=[store], seen=1.0)


def test_two_runs_are_compared_on_what_both_hold_out(made, store, tmp_path):
    line = made.groups["line"].iloc[0]
    split = tmp_path / "split.toml"
    context = line.split(".", 1)[1]
    split.write_text(f'[datasets]\nsim = "sim"\n[training]\nsim = "train"\n[zeroshot]\n"sim.{context}" = "test"\n')
    runs = {
        model: vc.train(model=model, stores=[str(store)], split=str(split), out=str(tmp_path / model))
        for model in ("perturbation-mean", "ridge")
    }
    pair = compare_runs(runs["perturbation-mean"].out, runs["ridge"].out)
    assert pair.n_groups == 12
    for end, model in (("first", "perturbation-mean"), ("second", "ridge")):
        for metric in ("pds", "pearson_delta", "mae", "error"):
            assert pair.metrics[metric][end] == pytest.approx(runs[model].summary["final"][metric], abs=1e-6)
    assert all(v["gain"] == pytest.approx(v["second"] - v["first"]) for v in pair.metrics.values())
    same = compare_runs(runs["ridge"].out, runs["ridge"].out)
    assert all(v["gain"] == v["gain_low"] == v["gain_high"] == 0 for v in same.metrics.values())


@pytest.mark.parametrize("rule", RULES)
def test_poisoned_test_groups_change_no_model(store, tmp_path, rule):
    """Noise in the effects and pseudobulks of held-out groups must not change the predictions of any model."""
    opened = (open_store(store),)
    settings = make_settings({}, {"out": str(tmp_path), "stores": [str(store)], "model": "control-mean"})
    screen = make_setup(settings, opened, validate=False).screen
    bulk = measure_pseudobulk(screen)
    rng = np.random.default_rng(0)
    n = len(screen.perturbations)
    known = {"features_pf": rng.normal(size=(n, 4)).astype(np.float32)}
    known["network_pp"] = rng.random((n, n)).astype(np.float32)
    for split in make_splits(rule, opened, screen)[:1]:
        rows = screen.with_split(split.split).rows("test")
        assert len(rows)
        answers = []
        for poisoned in (False, True):
            effects, counts = screen.effect_kg.copy(), bulk.cp10k_kg.copy()
            if poisoned:
                effects[rows] = rng.normal(size=effects[rows].shape)
                counts[rows] = rng.gamma(1.0, 1.0, counts[rows].shape)
            changed = replace(screen, effect_kg=effects, pseudobulk=replace(bulk, cp10k_kg=counts))
            changed = changed.with_split(split.split)
            train = changed.get_effects(**known)
            answers.append({kind: fit_model(kind, train).predict(*changed.ids(rows)) for kind in MODELS})
        for kind, values in answers[0].items():
            np.testing.assert_array_equal(values, answers[1][kind], err_msg=kind)
