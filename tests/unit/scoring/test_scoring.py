"""Scoring: input rules, our own rule set, baseline, ceiling, truth pack, results."""

from __future__ import annotations

import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats as ss

import vcelltools as vc
from tests.oracle.pairs import CONTROL, make_adata, make_pair
from vcelltools.errors import DataError, UsageError
from vcelltools.scoring.cell_eval.baseline import write_baseline
from vcelltools.scoring.cell_eval.clustering import adjusted_mutual_information
from vcelltools.scoring.cell_eval.metrics import pearson, rank_average, spearman
from vcelltools.scoring.cell_eval.options import Options
from vcelltools.scoring.result import bootstrap_interval
from vcelltools.scoring.tables import describe


@pytest.fixture(scope="module")
def pair():
    """A prediction that shares the truth's controls."""
    pred, real, labels, genes, _ = make_pair(40)
    controls = np.array(labels) == CONTROL
    pred[controls] = real[controls]
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def with_x(data: ad.AnnData, X) -> ad.AnnData:
    return ad.AnnData(X, obs=data.obs.copy(), var=data.var.copy())


# ---- input rules ----


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1.0, which is negative")])
def test_a_bad_value_is_named_by_cell_and_gene(pair, layout, value, text):
    pred, real = pair
    X = pred.X.toarray()
    X[37, 11] = value
    with pytest.raises(DataError, match=rf"\(c37\).*\(G11\) holds {text}"):
        vc.score(with_x(pred, layout(X)), real)


def test_a_prediction_that_fails_leaves_no_file_open(pair, tmp_path):
    pred, real = pair
    X = pred.X.toarray()
    X[3, 3] = -1
    with_x(pred, X).write_h5ad(tmp_path / "p.h5ad")
    real.write_h5ad(tmp_path / "r.h5ad")
    with pytest.raises(DataError, match="negative") as caught:
        vc.score(tmp_path / "p.h5ad", tmp_path / "r.h5ad")
    for name in "pr":  # HDF5 refuses what is open elsewhere; the exception holds the frames it came from
        h5py.File(tmp_path / f"{name}.h5ad", "r+").close()
    assert caught.value


@pytest.mark.parametrize("layout", [sp.csr_matrix, np.asarray])
def test_nothing_but_zeros_goes_with_either_scale(pair, layout, tmp_path):
    pred, real = pair
    empty = with_x(pred, layout(np.zeros(pred.shape, np.float32)))
    got = vc.score(empty, real, profile="anndata", compat="cell-eval", truth_pack=tmp_path / "t.pack").to_frame()
    mean = pd.DataFrame(real.X.toarray()).groupby(real.obs["target_gene"].to_numpy()).mean().drop(CONTROL)
    assert np.allclose(got["mae"], mean.abs().mean(axis=1))
    again = vc.score(empty, None, profile="anndata", compat="cell-eval", truth_pack=tmp_path / "t.pack").to_frame()
    pd.testing.assert_frame_equal(again, got)
    both = vc.score(empty, empty, profile="minimal", compat="cell-eval").to_frame()
    assert (both["mae"] == 0).all()


def test_other_genes_and_labels_are_listed(pair):
    pred, real = pair
    other = pred[:, 2:].copy()
    with pytest.raises(DataError, match="lacks 2 genes of the truth: G0, G1"):
        vc.score(other, real)
    other = pred.copy()
    other.var_names = ["X", *other.var_names[1:]]
    with pytest.raises(DataError, match="lacks 1 genes of the truth: G0; has 1 genes that the truth lacks: X"):
        vc.score(other, real)
    other = pred.copy()
    other.obs["target_gene"] = other.obs["target_gene"].astype(str).replace({"T00": "T99"})
    with pytest.raises(
        DataError, match=r"perturbations of the truth: T00; has 1 perturbations that the truth lacks: T99"
    ):
        vc.score(other, real)


def test_no_controls_is_an_error_with_a_census(pair):
    pred, real = pair
    with pytest.raises(DataError, match=r"labelled 'NT'.*non-targeting \(60\)"):
        vc.score(pred, real, control="NT")
    lacking = pred[pred.obs["target_gene"] != CONTROL].copy()
    with pytest.raises(DataError, match=r"no cell of obs/target_gene is labelled 'non-targeting'.*T00 \(20\)"):
        vc.score(lacking, real, compat="cell-eval")
    ours = vc.score(lacking, real)  # ours borrows the truth's
    assert "holds no controls, so those of the truth were used" in " ".join(ours.warnings)
    pd.testing.assert_frame_equal(ours.to_frame(), vc.score(pred, real).to_frame())


def test_two_scales_are_refused_or_converted(pair):
    pred, real = pair
    counts = with_x(real, np.round(real.X.expm1() * 3))
    with pytest.raises(DataError, match=r"holds log1p and .* holds counts: .*different scales"):
        vc.score(pred, counts)
    both = vc.score(with_x(pred, np.round(pred.X.expm1() * 3)), counts, to_cp10k=True)
    mixed = vc.score(pred, counts, to_cp10k=True)
    assert both.components["mae"].value == pytest.approx(mixed.components["mae"].value, rel=0.2)
    X = real.X.expm1()
    X.data = (X.data / np.repeat(np.asarray(X.sum(axis=1)).ravel(), np.diff(X.indptr)) * 1e4).astype(np.float32)
    again = vc.score(with_x(real, X.log1p()), with_x(real, real.X), to_cp10k=True)
    assert again.components["mae"].value < 1e-5


def test_values_that_are_neither_counts_nor_log1p(pair):
    pred, real = pair
    X = pred.X.copy()
    X.data = X.data * 10
    with pytest.raises(DataError, match="neither counts nor log1p"):
        vc.score(with_x(pred, X), real)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csc_matrix])
def test_duplicate_entries_are_summed_and_said(pair, kind):
    pred, real = pair
    X = kind(pred.X)
    halves = kind((np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), X.indptr * 2), shape=X.shape)
    assert not halves.has_canonical_format
    got, want = vc.score(with_x(pred, halves), real), vc.score(pred, real)
    assert any("duplicate entries were summed" in w for w in got.warnings)
    pd.testing.assert_frame_equal(got.to_frame(), want.to_frame())


def test_layers_and_missing_labels(pair):
    pred, real = pair
    layered = with_x(pred, pred.X * 0)
    layered.layers["log"] = pred.X
    real_layered = real.copy()
    real_layered.layers["log"] = real.X
    want = vc.score(pred, real).to_frame()
    pd.testing.assert_frame_equal(vc.score(layered, real_layered, layer="log").to_frame(), want)
    lost = ad.concat([pred, pred[:3]], index_unique="-")
    lost.obs["target_gene"] = [*pred.obs["target_gene"], None, None, None]
    result = vc.score(lost, real)
    assert any("3 cells without a label" in w for w in result.warnings)
    pd.testing.assert_frame_equal(result.to_frame(), want)


def test_options_that_do_not_go_together(pair):
    for options, text in [
        ({"profile": "all"}, "no profile"), ({"compat": "x"}, "no rule set"), ({"epsilon": -1.0}, "epsilon"),
        ({"profile": "extended", "compat": "cell-eval"}, "extended"), ({"skip": ("nope",)}, "no metric 'nope'"),
        ({"compat": "vcc2025", "cpm_filter": 1.0}, "cpm_filter"),
        ({"allow_discrete": True, "to_cp10k": True}, "to_cp10k"),
        ({"profile": "pds", "skip": ("discrimination_score_l1",)}, "no metric"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=text):
            vc.score(*pair, **options)


# ---- our rule set ----


def test_a_perfect_prediction(pair):
    _, real = pair
    result = vc.score(real, real, profile="extended")
    for name, c in result.components.items():
        if name in ("clustering_agreement", "precision_at_N") or name.startswith("precision"):
            continue
        assert c.value == pytest.approx(c.best, abs=1e-9), name
        if c.baseline is not None and np.isfinite(c.baseline):
            assert c.score == pytest.approx(1), name
    assert result.n_without_de == 1
    assert any("1 of 6 perturbations have no true DE gene" in w for w in result.warnings)
    body = result.to_json()
    assert body["with_perturbations_without_de"]["overlap_at_N"] == pytest.approx(5 / 6)
    assert result.components["overlap_at_N"].n == 5
    # the peer counts the perturbation without DE genes as a failure
    theirs = vc.score(real, real, compat="cell-eval")
    assert theirs.components["overlap_at_N"].value == pytest.approx(5 / 6)


def test_predicted_controls_cannot_game_ours(pair):
    pred, real = pair
    shifted = pred.copy()
    controls = (shifted.obs["target_gene"] == CONTROL).to_numpy()
    X = shifted.X.toarray()
    X[controls] *= 0.5
    shifted.X = sp.csr_matrix(X)
    honest, gamed = vc.score(pred, real, profile="minimal"), vc.score(shifted, real, profile="minimal")
    pd.testing.assert_frame_equal(gamed.to_frame(), honest.to_frame())
    assert any("controls differ" in w for w in gamed.warnings)
    assert not any("controls differ" in w for w in honest.warnings)
    theirs = vc.score(shifted, real, profile="minimal", compat="cell-eval").to_frame()
    assert not np.allclose(theirs["pearson_delta"], honest.to_frame()["pearson_delta"])


def test_ties_in_discrimination_take_the_mid_rank():
    _, real, labels, genes, _ = make_pair(41)
    names = np.array(labels)
    pred = real.copy()
    pred[names != CONTROL] = real[names == CONTROL].mean(axis=0)
    truth = real.copy()
    targets = [n for n in dict.fromkeys(labels) if n != CONTROL]
    for n in targets[1:]:  # every perturbation has the effect of the first
        truth[names == n] = truth[names == targets[0]]
    off_panel = {n: f"Q{i}" for i, n in enumerate(targets)}
    labels = [off_panel.get(v, v) for v in labels]
    result = vc.score(make_adata(pred, labels, genes), make_adata(truth, labels, genes), profile="pds")
    np.testing.assert_allclose(result.to_frame()["discrimination_score_l1"], 1 - 2.5 / 6)


def test_the_target_gene_is_left_out():
    pred, real, labels, genes, _ = make_pair(42)
    base = vc.score(make_adata(pred, labels, genes), make_adata(real, labels, genes), profile="anndata",
                    skip=("clustering_agreement", "pearson_edistance"))  # fmt: skip
    names = np.array(labels)
    changed = pred.copy()
    changed[names == "G21", 21] += 5  # its own gene alone
    other = vc.score(make_adata(changed, labels, genes), make_adata(real, labels, genes), profile="anndata",
                     skip=("clustering_agreement", "pearson_edistance"))  # fmt: skip
    a, b = base.to_frame().loc["G21"], other.to_frame().loc["G21"]
    for kind in ("l1", "l2", "cosine"):
        assert a[f"discrimination_score_{kind}"] == b[f"discrimination_score_{kind}"]
    assert a["mae"] != b["mae"]


def test_copied_controls_have_no_direction():
    """Twelve cells copied from two controls: the mean differs from the controls' in the last bits alone."""
    rng = np.random.default_rng(3)
    labels = ["a"] * 12 + ["b"] * 6 + [CONTROL] * 2
    real = np.log1p(rng.poisson(3.0, (20, 12)) / 7.3)
    pred = real.copy()
    pred[:12] = real[18:][[0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0]]
    assert 0 < np.abs(pred[:12].mean(0) - pred[18:].mean(0)).max() < 1e-14
    genes = [f"G{i}" for i in range(12)]
    found = vc.score(make_adata(pred, labels, genes), make_adata(real, labels, genes), profile="anndata")
    values = found.to_frame()["pearson_delta"]
    assert np.isnan(values["a"]) and values["b"] == pytest.approx(1.0)


def test_undefined_values_are_left_out_and_counted(pair):
    pred, real = pair
    ours, theirs = (vc.score(pred, real, profile="de", compat=c) for c in ("ours", "cell-eval"))
    assert np.isnan(theirs.components["pr_auc"].value)
    assert theirs.components["pr_auc"].score == 0
    frame = ours.to_frame()
    assert ours.components["pr_auc"].value == pytest.approx(np.nanmean(frame["pr_auc"]))
    assert ours.components["pr_auc"].n == 5
    assert any(w.startswith("pr_auc: 1 of 6 perturbations are undefined") for w in ours.warnings)


# ---- baseline, ceiling, pack ----


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("compat", ["cell-eval", "vcc2025"])
def test_the_baseline_file_scores_as_the_baseline(pair, layout, compat, tmp_path):
    real = with_x(pair[1], layout(pair[1].X.toarray()))
    path = tmp_path / "base.h5ad"
    write_baseline(real, path, options=Options(compat="cell-eval"))
    result = vc.score(path, real, profile="full", compat=compat, skip=("pearson_edistance",))
    for name, c in result.components.items():
        np.testing.assert_equal(c.value, c.baseline, err_msg=name)
    back = ad.read_h5ad(path)
    assert back.obs["target_gene"].value_counts().to_dict() == real.obs["target_gene"].value_counts().to_dict()
    cells = back[back.obs["target_gene"] != CONTROL].X.toarray()
    assert (cells == cells[0]).all()


def test_scores_follow_from_baseline_and_best(pair, tmp_path):
    result = vc.score(*pair, profile="minimal")
    for c in result.components.values():
        want = (c.value - c.baseline) / (1 - c.baseline) if c.best == 1 else 1 - c.value / c.baseline
        assert c.score_unclipped == pytest.approx(want)
        assert c.score == max(0.0, c.score_unclipped)
        assert c.ci95[0] <= c.value <= c.ci95[1]
    assert result.avg_score == pytest.approx(np.mean([c.score for c in result.components.values()]))
    result.write(tmp_path / "a")
    other = vc.score(*pair, profile="minimal", baseline=tmp_path / "a" / "agg_results.csv")
    assert all(c.score_unclipped == pytest.approx(0, abs=1e-12) for c in other.components.values())


def test_ceiling_is_above_and_reproducible(pair):
    a = vc.score(*pair, ceiling=True, ceiling_seed=3)
    b = vc.score(*pair, ceiling=True, ceiling_seed=3)
    c = vc.score(*pair, ceiling=True, ceiling_seed=4)
    assert a.ceiling.values == pytest.approx(b.ceiling.values, nan_ok=True)
    assert a.ceiling.values["overlap_at_N"] != c.ceiling.values["overlap_at_N"]
    assert a.components["discrimination_score_l1"].ceiling > 0.8
    assert np.isnan(a.ceiling.values["mae"])


@pytest.mark.parametrize("compat", ["ours", "cell-eval", "vcc2025"])
def test_a_truth_pack_gives_the_same_scores(pair, compat, tmp_path):
    pred, real = pair
    pack = tmp_path / "truth.pack"
    want = vc.score(pred, real, profile="full", compat=compat, truth_pack=pack, ceiling=True)
    got = vc.score(pred, profile="full", compat=compat, truth_pack=pack)
    np.testing.assert_equal(got.to_json()["components"], want.to_json()["components"])
    pd.testing.assert_frame_equal(got.to_frame(), want.to_frame())
    got.write(tmp_path / "out")
    assert not (tmp_path / "out" / "real_de.csv").exists()
    with pytest.raises(UsageError, match="made with profile = 'full'"):
        vc.score(pred, profile="vcc", compat=compat, truth_pack=pack)
    raw = pack.read_bytes()
    for broken in (raw[:-20], raw[:30], b"vctruth4" + b"x" * 50, b"nothing", raw[:60] + b"\0" * 20 + raw[80:]):
        pack.write_bytes(broken)
        with pytest.raises(DataError, match="truth pack"):
            vc.score(pred, profile="full", compat=compat, truth_pack=pack)


def test_a_pack_cannot_lend_controls(pair, tmp_path):
    pred, real = pair
    vc.score(pred, real, truth_pack=tmp_path / "t.pack")
    without = pred[pred.obs["target_gene"] != CONTROL].copy()
    with pytest.raises(DataError, match="which a truth pack does not keep"):
        vc.score(without, truth_pack=tmp_path / "t.pack")
    with_both = vc.score(without, real, truth_pack=tmp_path / "t.pack")
    assert with_both.to_json()["components"] == vc.score(pred, real).to_json()["components"]


# ---- results ----


def test_result_json_and_files(pair, tmp_path):
    result = vc.score(*pair)
    files = result.write(tmp_path / "out")
    assert {"results.csv", "agg_results.csv", "pred_de.csv", "real_de.csv", "score.json"} == set(files)
    body = json.loads((tmp_path / "out" / "score.json").read_text())
    assert set(body["components"]) == {"mae", "discrimination_score_l1", "overlap_at_N"}
    assert set(body["components"]["mae"]) == {
        "value", "baseline", "ceiling", "score", "score_unclipped", "ci95", "n",
    }  # fmt: skip
    assert {"compat", "profile", "avg_score", "warnings"} <= set(body)
    with pytest.raises(UsageError, match="exists"):
        result.write(tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "results.csv", index_col=0)
    pd.testing.assert_frame_equal(frame, result.to_frame())
    assert list(frame.index) == sorted(frame.index)


def test_names_that_need_quotes(tmp_path):
    pred, real, labels, genes, _ = make_pair(43)
    odd = {"T00": 'a,"b"', "G7": "x\ny"}
    labels = [odd.get(v, v) for v in labels]
    genes = ["g,1", *genes[1:]]
    vc.score(make_adata(pred, labels, genes), make_adata(real, labels, genes), profile="minimal").write(tmp_path)
    assert set(pd.read_csv(tmp_path / "results.csv")["perturbation"]) >= set(odd.values())
    table = pd.read_csv(tmp_path / "real_de.csv")
    assert set(table["target"]) >= set(odd.values())
    assert "g,1" in set(table["feature"])


def test_statistics_of_a_column():
    polars_like = describe([0.2, None, float("nan"), 0.4, 0.1])
    assert polars_like["count"] == 4
    assert polars_like["null_count"] == 1
    assert np.isnan(polars_like["mean"])
    assert polars_like["min"] == 0.1
    assert polars_like["max"] == 0.4
    assert polars_like["50%"] == 0.4  # NaN sorts last
    assert describe([0.2, None, float("nan"), 0.4, 0.1], skip_nan=True)["mean"] == pytest.approx(0.7 / 3)
    assert describe([None])["mean"] is None


def test_correlations_equal_scipy():
    rng = np.random.default_rng(0)
    for n in (2, 3, 50):
        x, y = rng.integers(0, 6, n).astype(float), rng.normal(size=n)
        np.testing.assert_allclose(rank_average(x), ss.rankdata(x))
        if np.ptp(x):
            np.testing.assert_allclose(pearson(x, y), ss.pearsonr(x, y).statistic, rtol=1e-12)
            np.testing.assert_allclose(spearman(x, y), ss.spearmanr(x, y).statistic, rtol=1e-12)
    assert np.isnan(pearson(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(1)
    covered = 0
    for i in range(200):
        low, high = bootstrap_interval(rng.normal(size=60), 400, seed=i)
        covered += low <= 0 <= high
    assert covered >= 180
    assert bootstrap_interval(np.array([1.0]), 100) is None


def test_adjusted_mutual_information_equals_scikit_learn():
    from sklearn.metrics import adjusted_mutual_info_score

    rng = np.random.default_rng(2)
    for n, k in [(10, 2), (30, 4), (150, 9), (12, 12)]:
        a, b = rng.integers(0, k, n), rng.integers(0, k, n)
        np.testing.assert_allclose(adjusted_mutual_information(a, b), adjusted_mutual_info_score(a, b), atol=1e-10)
        np.testing.assert_allclose(adjusted_mutual_information(a, a), 1, atol=1e-10)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_energy_distances_equal_the_definition(layout, single, monkeypatch):
    from scipy.spatial.distance import cdist

    from vcelltools.differential.cell_labels import read_cells
    from vcelltools.differential.expression import Scale
    from vcelltools.io import open_dataset
    from vcelltools.scoring.cell_eval import edistance

    _, real, labels, genes, _ = make_pair(44)
    monkeypatch.setattr(edistance, "_block_rows", lambda *_: 7)  # many blocks, none of them whole
    if single:
        monkeypatch.setattr(edistance, "SINGLE_FROM", 0.0)
        first = np.flatnonzero(np.array(labels) != CONTROL)[0]
        real[first : first + 20] = real[first]  # cells that are the same: a difference in float32 would not vanish
    with open_dataset(make_adata(layout(real), labels, genes)) as data:
        cells = read_cells(data, "target_gene", CONTROL)
        got = edistance.energy_distances(data, cells, Scale(kind="log1p"), CONTROL)
    names, wide = np.array(labels), real.astype(np.float64)
    control = wide[names == CONTROL]
    want = []
    for name in sorted(set(labels) - {CONTROL}):
        x = wide[names == name]
        want.append(2 * cdist(x, control).mean() - cdist(x, x).mean() - cdist(control, control).mean())
    limit = 3e-6 if single else 1e-9
    np.testing.assert_allclose(got, want, rtol=limit, atol=limit)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_other_gene_order_with_the_truths_controls(layout):
    """The truth's controls stand in for the prediction's own also where the genes come in another order."""
    pred, real, labels, genes, rng = make_pair(61)
    names = np.array(labels)
    pred[names == CONTROL] *= 1.5
    truth = make_adata(sp.csr_matrix(real), labels, genes)
    plain = vc.score(make_adata(sp.csr_matrix(pred), labels, genes), truth, profile="full")
    order = rng.permutation(len(genes))
    turned = make_adata(layout(pred[:, order]), labels, [genes[i] for i in order])
    got = vc.score(turned, truth, profile="full")
    assert any("controls differ" in w for w in got.warnings)
    assert list(got.pred.genes) == genes
    np.testing.assert_array_equal(got.pred.sums.u_kg, plain.pred.sums.u_kg)
    np.testing.assert_allclose(got.to_frame(), plain.to_frame(), rtol=1e-9, atol=1e-12)


def test_tables_of_an_earlier_scoring_do_not_stay(tmp_path):
    pred, real, labels, genes, _ = make_pair(62)
    pair = [make_adata(sp.csr_matrix(x), labels, genes) for x in (pred, real)]
    vc.score(*pair, ceiling=True, out=tmp_path)
    assert (tmp_path / "ceiling_results.csv").exists()
    vc.score(*pair, profile="pds", out=tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agg_results.csv", "results.csv", "score.json"]


def test_adjusted_p_in_a_byte():
    from vcelltools.scoring.pack_format import code_p, decode_p

    p = np.array([0.0, 1e-310, 1e-200, 1e-8, 0.0499999, 0.05, 0.3, 1.0, np.nan])
    got = decode_p(code_p(p), p < 0.05, 0.05)
    assert np.isnan(got[-1])
    np.testing.assert_array_equal(got[:-1] < 0.05, p[:-1] < 0.05)
    np.testing.assert_allclose(np.log10(got[2:4]), np.log10(p[2:4]), rtol=0.05)
    assert got[7] == 1.0
    assert (np.diff(got[:-1]) >= 0).all()


def test_a_pack_is_planes_that_come_back(tmp_path):
    from vcelltools.errors import DataError, UsageError
    from vcelltools.scoring.pack_format import read_packfile, write_packfile

    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.random((30, 7)).astype(np.float32), "d": rng.random(5), "i": np.arange(9, dtype=np.int32),
        "b": np.arange(3, dtype=np.uint8), "none": np.zeros((0, 4)),
    }  # fmt: skip
    path = write_packfile(tmp_path / "x.pack", b"testpack", {"a": 1}, [({"n": np.int64(3)}, arrays), ({}, {})])
    first, second = read_packfile(path, b"testpack", {"a": 1}, lambda head, a: (head, a))
    assert first[0]["n"] == 3
    assert second[1] == {}
    for name, a in arrays.items():
        assert first[1][name].dtype == a.dtype
        np.testing.assert_array_equal(first[1][name], a)
    with pytest.raises(UsageError, match="a = 1"):
        read_packfile(path, b"testpack", {"a": 2}, lambda *_: None)
    with pytest.raises(DataError, match="not a truth pack"):
        read_packfile(path, b"otherone", {"a": 1}, lambda *_: None)
