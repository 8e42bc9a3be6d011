"""Cells of several lines: pooled with a warning, or scored and tested apart; copies of cells are said."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from vcelltools.differential.cell_labels import read_cells, split_halves
from vcelltools.errors import DataError, UsageError
from vcelltools.io import open_dataset

CONTROL = "non-targeting"
PERTS = ("A", "B", "C")
N_GENES, N_EACH = 40, 25


def make_line(name: str, seed: int, *, noise: float = 0.15, perts=PERTS, effects: int = 0) -> ad.AnnData:
    """A line with a baseline of its own; the effects are those of ``effects``, whatever the line."""
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(sum(map(ord, name))).uniform(1, 4, N_GENES)
    effect = np.random.default_rng(100 + effects).normal(0, 0.6, (len(perts) + 1, N_GENES))
    effect[0] = 0
    labels = np.repeat([CONTROL, *perts], N_EACH)
    mean = base + np.repeat(effect, N_EACH, axis=0)
    x = np.maximum(mean + rng.normal(0, noise, mean.shape), 0.01)
    index = [f"{name}{seed}-{i}" for i in range(len(labels))]
    obs = pd.DataFrame({"target_gene": labels, "cell_line": name}, index=index)
    return ad.AnnData(sp.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))


@pytest.fixture(scope="module")
def lines():
    """(prediction, truth) of two lines, each also apart."""
    truths = {n: make_line(n, i) for i, n in enumerate(("K562", "RPE1"))}
    preds = {n: make_line(n, 10 + i, noise=0.3) for i, n in enumerate(("K562", "RPE1"))}
    return preds, truths


@pytest.mark.parametrize("compat", ["ours", "cell-eval", "vcc2025"])
def test_pooled_lines_are_said(lines, compat):
    preds, truths = lines
    result = vc.score(ad.concat(preds.values()), ad.concat(truths.values()), compat=compat, profile="minimal")
    said = [w for w in result.warnings if "cell_line" in w]
    assert [w.split(":")[0] for w in said] == ["AnnData (truth)", "AnnData (prediction)"]
    assert all("pooled" in w and "context_col='cell_line'" in w for w in said)
    alone = vc.score(preds["K562"], truths["K562"], compat=compat, profile="minimal")
    assert not any("pooled" in w for w in alone.warnings)


@pytest.mark.parametrize("compat", ["ours", "cell-eval", "vcc2025"])
def test_contexts_are_scored_apart_and_averaged(lines, compat, tmp_path):
    preds, truths = lines
    pred, truth = ad.concat(preds.values()), ad.concat(truths.values())
    mixed = pred[np.random.default_rng(0).permutation(pred.n_obs)].copy()
    how = {"compat": compat, "profile": "full", "skip": ("clustering_agreement",)}
    both = vc.score(mixed, truth, context_col="cell_line", out=tmp_path, **how)
    apart = {n: vc.score(preds[n], truths[n], **how) for n in preds}
    assert [c.context for c in both.contexts] == ["K562", "RPE1"]
    for m, c in both.components.items():
        want = [a.components[m].value for a in apart.values()]
        assert c.value == pytest.approx(np.mean(want), rel=1e-5, nan_ok=True), m
    assert both.avg_score == pytest.approx(np.mean([a.avg_score for a in apart.values()]), rel=1e-5)
    assert not any("pooled" in w for w in both.warnings)
    body = json.loads((tmp_path / "score.json").read_text())
    assert set(body["contexts"]) == {"K562", "RPE1"}
    assert body["settings"]["context_col"] == "cell_line"
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["context"]) == ["K562"] * 3 + ["RPE1"] * 3
    np.testing.assert_allclose(table["mae"], [v for a in apart.values() for v in a.to_frame()["mae"]], rtol=1e-5)
    de = pd.read_csv(tmp_path / "real_de.csv")
    assert len(de) == 2 * 3 * N_GENES
    np.testing.assert_allclose(
        de[de["context"] == "RPE1"]["p_value"], apart["RPE1"].pair.real_de.p_pg.ravel(), rtol=1e-6
    )


def test_lines_apart_are_closer_to_the_truth_than_pooled_ones(lines):
    """Each line's own mean is what a prediction of that line has to meet."""
    _, truths = lines
    truth = ad.concat(truths.values())
    swapped = truth.copy()  # every perturbed cell of one line is taken from the other
    other = {"K562": "RPE1", "RPE1": "K562"}
    is_control = (truth.obs["target_gene"] == CONTROL).to_numpy()
    swapped.obs["cell_line"] = [v if c else other[v] for v, c in zip(truth.obs["cell_line"], is_control, strict=True)]
    pooled = vc.score(swapped, truth, profile="vcc").components["mae"].value
    apart = vc.score(swapped, truth, profile="vcc", context_col="cell_line").components["mae"].value
    assert pooled < 1e-6
    assert apart > 0.3


def test_a_pack_of_contexts_gives_the_same_scores(lines, tmp_path):
    preds, truths = lines
    pred, truth = ad.concat(preds.values()), ad.concat(truths.values())
    how = {"compat": "cell-eval", "profile": "minimal", "truth_pack": tmp_path / "t.pack"}
    want = vc.score(pred, truth, context_col="cell_line", ceiling=True, **how)
    got = vc.score(pred, context_col="cell_line", **how)
    assert got.to_json()["components"] == want.to_json()["components"]
    assert got.to_json()["contexts"] == want.to_json()["contexts"]
    with pytest.raises(UsageError, match="context_col"):
        vc.score(pred, **how)


def test_contexts_that_differ_or_lack_controls_are_named(lines):
    preds, truths = lines
    pred, truth = ad.concat(preds.values()), ad.concat(truths.values())
    with pytest.raises(DataError, match="lacks 1 contexts of the truth: RPE1"):
        vc.score(ad.concat([preds["K562"]] * 2, index_unique="-"), truth, context_col="cell_line")
    bare = truth[~((truth.obs["target_gene"] == CONTROL) & (truth.obs["cell_line"] == "RPE1"))].copy()
    with pytest.raises(DataError, match=r"context RPE1: no cell of obs/target_gene is labelled 'non-targeting'"):
        vc.score(pred, bare, context_col="cell_line")
    fewer = pred[~((pred.obs["target_gene"] == "C") & (pred.obs["cell_line"] == "RPE1"))].copy()
    with pytest.raises(DataError, match="context RPE1: lacks 1 perturbations of the truth: C"):
        vc.score(fewer, truth, context_col="cell_line")


def test_the_2026_rules_warn_of_lines_without_a_column_of_contexts():
    counts = {n: make_line(n, i) for i, n in enumerate(("K562", "RPE1"))}
    data = ad.concat(counts.values())
    data.X = sp.csr_matrix(np.round(np.expm1(data.X.toarray())))
    data.var_names = [*PERTS, *data.var_names[3:]]
    result = vc.score(data, data, compat="vcc2026", anchors=False)
    assert any("pooled" in w for w in result.warnings)
    apart = vc.score(data, data, compat="vcc2026", anchors=False, context_col="cell_line")
    assert not any("pooled" in w for w in apart.warnings)
    assert [c.context for c in apart.contexts] == ["K562", "RPE1"]


def test_de_of_contexts_is_de_of_each(lines, tmp_path):
    _, truths = lines
    truth = ad.concat(truths.values())
    pooled = vc.de(truth)
    assert any("pooled" in n for n in pooled.notes)
    both = vc.de(truth, context_col="cell_line")
    assert both.contexts == ["K562"] * 3 + ["RPE1"] * 3
    assert not any("pooled" in n for n in both.notes)
    for i, name in enumerate(("K562", "RPE1")):
        one, rows = vc.de(truths[name]), slice(3 * i, 3 * i + 3)
        assert both.perturbations[rows] == one.perturbations
        np.testing.assert_allclose(both.log2fc_pg[rows], one.log2fc_pg, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(both.fdr_pg[rows], one.fdr_pg, rtol=1e-9)
        assert (both.n_controls_p[rows] == N_EACH).all()
        assert both.significant()[name] == one.significant()
    assert both.n_controls == 2 * N_EACH
    frame = pd.read_parquet(both.write(tmp_path / "de.parquet"))
    assert list(frame.columns[:2]) == ["context", "perturbation"]
    assert frame.groupby("context", observed=True).size().to_dict() == {"K562": 120, "RPE1": 120}


def test_copies_of_cells_are_said_and_flagged():
    pred, truth = make_line("K562", 5, noise=0.4), make_line("K562", 6, noise=0.4)
    perturbed = pred[pred.obs["target_gene"] != CONTROL]
    tiled = ad.concat([pred, *[perturbed] * 9], index_unique="-")
    honest, gamed = (vc.score(p, truth, profile="minimal") for p in (pred, tiled))
    assert gamed.to_frame()["de_nsig_counts_pred"].sum() > honest.to_frame()["de_nsig_counts_pred"].sum()
    assert any("675 of 750 perturbed cells are copies" in w for w in gamed.warnings)
    assert not any("copies" in w for w in honest.warnings)
    flags = {c.name: c.flagged for c in gamed.contexts[0].checks}
    assert flags["copied cells"]
    assert not any(c.flagged for c in honest.contexts[0].checks if c.name == "copied cells")
    assert any("copies" in n for n in vc.de(tiled).notes)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_copies_are_found_in_every_layout(layout):
    data = make_line("K562", 5)
    x = data.X.toarray()
    x[30] = x[31]  # both of perturbation A
    x[60] = x[90]  # of two perturbations: no copy
    data.X = layout(x)
    assert vc.score(data, data).contexts[0].pred.copied_share == pytest.approx(1 / 75)


def test_halves_are_disjoint_and_as_large_as_can_be():
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 5, 203).astype(np.int32)
    halves = split_halves(codes, np.array([3, 1, 0, 2, 4]), 5, seed=1)
    for k in range(5):
        n = int((codes == k).sum())
        assert (halves == k).sum() == (halves == k + 5).sum() == n // 2
        assert (codes[(halves >= 0) & (halves % 5 == k)] == k).all()
    assert (halves[codes < 0] == -1).all()


def test_kept_cells_keep_their_labels_and_order():
    data = make_line("K562", 1)
    data.obs["target_gene"] = pd.Categorical(data.obs["target_gene"], categories=["C", CONTROL, "B", "A"])
    with open_dataset(data) as ds:
        cells = read_cells(ds, "target_gene", CONTROL)
    kept = cells.keep(np.asarray(data.obs["target_gene"] != "B"))
    assert kept.labels == ("A", "C", CONTROL)
    assert kept.order == ("C", CONTROL, "A")
    assert (kept.codes == -1).sum() == N_EACH
    assert [kept.labels[k] for k in kept.codes if k >= 0] == [v for v in data.obs["target_gene"] if v != "B"]
