"""Genes outside the basis: filled from training groups alone."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.errors import DataError, UsageError
from vcelltools.pipelines.fill import Fill, make_panel, open_source, read_rows
from vcelltools.pipelines.predict import predict_baseline
from vcelltools.pipelines.splits import Split


@pytest.fixture
def panel(store):
    with open_source(store, None) as source:
        return make_panel(store, source)


def make_split(store, part: str) -> tuple[Split, str]:
    lines = sorted(store.runs["cell_line"].unique())
    pert = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())[0]
    return Split(training=frozenset(["sim"]), fewshot={("sim", lines[0]): {pert: part}}), pert


def test_the_fill_is_the_mean_training_effect(store, panel):
    split, pert = make_split(store, "test")
    runs = store.runs
    lines = sorted(runs["cell_line"].unique())[1:]
    total, weight = 0.0, 0
    for line in lines:
        rows = {
            label: runs[(runs["cell_line"] == line) & (runs["perturbation"] == label)]["sums_row"].iloc[0]
            for label in (pert, "non-targeting")
        }
        n = store.group_sizes[rows[pert]]
        change = (
            store.sums[rows[pert]] / n - store.sums[rows["non-targeting"]] / store.group_sizes[rows["non-targeting"]]
        )
        total, weight = total + change * n, weight + n
    np.testing.assert_allclose(Fill((store,), split, panel).effect(pert), (total / weight)[panel.sums_m])


def test_held_out_groups_do_not_leak(store, panel):
    split, pert = make_split(store, "test")
    before = Fill((store,), split, panel).effect(pert)
    held = store.runs[(store.runs["cell_line"] == "line1") & (store.runs["perturbation"] == pert)]["sums_row"].iloc[0]
    sums = np.array(store.sums)
    sums[held] += 1e6
    store.__dict__["sums"] = sums
    np.testing.assert_array_equal(Fill((store,), split, panel).effect(pert), before)
    seen, _ = make_split(store, "train")
    assert np.abs(Fill((store,), seen, panel).effect(pert) - before).max() > 1.0


def test_an_unmeasured_perturbation_moves_nothing(store, panel):
    assert not Fill((store,), Split(training=frozenset(["sim"])), panel).effect("NOSUCH").any()


def test_rows_come_in_the_order_asked_for(store):
    import anndata as ad

    rows = np.array([17, 3, 3999, 3])
    with open_source(store, None) as source:
        got = read_rows(source, rows).toarray()
    np.testing.assert_array_equal(got, ad.read_h5ad(store.manifest["source"]["path"]).X[rows].toarray())


def test_another_or_missing_source(store, tmp_path):
    with pytest.raises(DataError, match="not there"):
        open_source(store, tmp_path / "gone.h5ad")


@pytest.mark.parametrize("kind", ["control-mean", "ridge"])
def test_a_baseline_predicts_what_was_held_out(store, settings, tmp_path, kind):
    import anndata as ad

    out = tmp_path / "base.h5ad"
    r = predict_baseline(kind, out, settings=settings(), stores=[store])
    pred = ad.read_h5ad(out)
    assert pred.n_obs == r.n_cells
    assert r.n_perturbations == len(set(pred.obs["target_gene"])) - 1
    assert r.model == kind
    with pytest.raises(UsageError, match="exists"):
        predict_baseline(kind, out, settings=settings(), stores=[store])
    with pytest.raises(UsageError, match="unknown"):
        predict_baseline("median", tmp_path / "x.h5ad", settings=settings(), stores=[store])
