"""Genes outside the basis are filled only from training groups."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.errors import DataError, UsageError
from vcelltools.prediction.genes_outside import Fill, make_panel, open_source, read_rows
from vcelltools.prediction.predict import predict_baseline
from vcelltools.sampling.splits import Split


@pytest.fixture
def panel(store):
    with open_source(store, None) as source:
        return make_panel(store, source)


def make_split(store, part: str) -> tuple[Split, str]:
    lines = sorted(store.runs["cell_line"].unique())
    pert = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())[0]
    return Split(training=frozenset(["sim"]), fewshot={("sim", lines[0]): {pert: part}}), pert


def get_mean_effect(store, pert: str, lines: list[str]) -> np.ndarray:
    """Return the mean training effect, weighted by cells, over the columns of the sums."""
    runs = store.runs
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
    return total / weight


def test_the_fill_keeps_what_stands_out_of_the_mean_training_effect(store, panel):
    split, pert = make_split(store, "test")
    lines = sorted(store.runs["cell_line"].unique())[1:]
    mean = get_mean_effect(store, pert, lines)
    fill = Fill((store,), split, panel)
    got = fill.effect(pert)
    shared, _ = fill._background
    want, floor = mean[panel.sums_m], shared[panel.sums_m]
    between = np.minimum(want, floor) - 1e-12, np.maximum(want, floor) + 1e-12
    assert ((between[0] <= got) & (got <= between[1])).all()  # never beyond what was measured
    own = panel.names.index(pert)
    assert got[own] == pytest.approx(want[own])  # the knock-down is not shrunken
    strong = np.argsort(-np.abs(want - floor))[:3]
    np.testing.assert_allclose(got[strong], want[strong], atol=0.3 * np.abs(want - floor)[strong].max())
    assert (np.abs(got - floor) < 1e-12).mean() > 0.3  # noise is removed


def test_noise_alone_fills_nothing(store, panel):
    rng = np.random.default_rng(0)
    sizes = np.asarray(store.group_sizes)[:, None]
    store.__dict__["sums"] = sizes * 0.5 + rng.normal(size=store.sums.shape) * np.sqrt(sizes)
    fill = Fill((store,), Split(training=frozenset(["sim"])), panel)
    perts = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())
    shared, _ = fill._background
    kept = np.mean([np.abs(fill.effect(p) - shared[panel.sums_m]) > 1e-12 for p in perts])
    assert kept < 0.1  # two standard errors: one gene in twenty, and those shrunken


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
    with pytest.raises(DataError, match="is missing"):
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
    with pytest.raises(UsageError, match="not known"):
        predict_baseline("median", tmp_path / "x.h5ad", settings=settings(), stores=[store])


def test_predicted_cells_have_the_mean_of_all_controls_whichever_were_drawn(store, settings, tmp_path):
    import anndata as ad

    out = tmp_path / "base.h5ad"
    predict_baseline("control-mean", out, settings=settings(), stores=[store])
    pred = ad.read_h5ad(out)
    X, obs = pred.X.toarray(), pred.obs
    for line in obs["context"].unique():
        here = (obs["context"] == line).to_numpy()
        control = X[here & (obs["target_gene"] == "non-targeting").to_numpy()]
        basis = np.isin(pred.var_names, store.genes)
        common = basis & ((control > 0).mean(axis=0) > 0.2)
        for pert in set(obs["target_gene"][here]) - {"non-targeting"}:
            cells = X[here & (obs["target_gene"] == pert).to_numpy()]
            error = np.abs(cells.mean(axis=0) - control.mean(axis=0))[common]
            luck = control.std(axis=0)[common] / np.sqrt(len(cells))
            assert np.mean(error < 0.3 * luck) > 0.95  # by chance a quarter would be
            spread = cells.std(axis=0)[common] / control.std(axis=0)[common]
            assert 0.8 < np.median(spread) < 1.2
