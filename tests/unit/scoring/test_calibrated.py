"""The profile ``calibrated``: metrics by hand, controls, calibration, contexts, packs and the report."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.oracle.pairs import CONTROL, make_adata, make_pair
from vcelltools.errors import UsageError
from vcelltools.scoring.calibrated.controls import judge
from vcelltools.scoring.calibrated.metrics import _RETRIEVAL as RETRIEVAL
from vcelltools.scoring.calibrated.metrics import rank_own
from vcelltools.scoring.calibrated.moments import compare_means, get_weights, make_moments
from vcelltools.scoring.calibrated.score import split_cells


@pytest.fixture(scope="module")
def pair():
    pred, real, labels, genes, _ = make_pair(40, n_perts=6, per_pert=40, n_controls=80, n_genes=70)
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def test_retrieval_by_hand():
    real = np.array([[0.0], [10.0], [20.0]])
    pred = np.array([[1.0], [19.0], [15.0]])  # the nearest; the other one is nearer; tied with another
    rank = rank_own(pred, real)
    assert rank.tolist() == [[0, 0, 2], [1, 0, 2], [0, 1, 2]]
    assert RETRIEVAL["nir"](rank).tolist() == [1, 0.5, 0.75]
    assert RETRIEVAL["centroid_accuracy"](rank).tolist() == [1, 0.5, 0.5]
    assert RETRIEVAL["reciprocal_rank"](rank) == pytest.approx([1, 1 / 2, 1 / 1.5])
    assert RETRIEVAL["top_1"](rank).tolist() == [1, 0, 0.5]
    assert np.isnan(RETRIEVAL["top_5"](rank)).all()  # five of three hold every one


def test_fraction_and_score_by_hand():
    # an error: 4 to 0 of which the positive control comes 3, then none, then the wrong way, then no room at all
    c, drf = judge(np.array([1.0, 4.0, 12.0, 0.0]), np.array([4.0, 4.0, 4.0, 0.0]), 0.0)
    assert drf == pytest.approx([0.75, 0, -1, 0], abs=1e-6)
    assert c.bds == 0.25
    assert not c.discriminates
    # a correlation whose negative control is undefined once
    c, drf = judge(np.array([0.8, 0.9]), np.array([0.0, np.nan]), 1.0)
    assert drf[0] == pytest.approx(0.8, abs=1e-5)
    assert np.isnan(drf[1])
    assert (c.n, c.bds, c.discriminates) == (1, 0.5, False)


def test_welch_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (23, 6)), rng.normal(0.4, 2, (31, 6))
    m = [make_moments(np.array([len(x)]), x.sum(axis=0)[None], (x**2).sum(axis=0)[None]) for x in (a, b)]
    found = compare_means(*m)
    t, p = stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(found.t_pg[0], t, rtol=1e-9)
    np.testing.assert_allclose(found.padj_pg[0], stats.false_discovery_control(p), rtol=1e-9)


def test_weights_sum_to_one_and_are_even_where_nothing_differs():
    assert get_weights(np.array([-2.0, 0.0, 1.0])) == pytest.approx([0.8, 0, 0.2])
    assert get_weights(np.full(4, 3.0)) == pytest.approx([0.25] * 4)


def test_halves_are_disjoint_and_small_groups_are_not_split():
    codes = np.repeat([0, 1, 2], [31, 29, 40]).astype(np.int32)
    half, split = split_cells(codes, np.array([0, 1, 2]), 3)
    assert split.tolist() == [True, False, True]
    assert np.bincount(half[codes == 0]).tolist() == [15, 16]
    assert (half[codes == 1] == -1).all()
    assert np.bincount(half[codes == 2]).tolist() == [20, 20]


def test_a_perfect_prediction_is_perfect(pair):
    result = vc.score(pair[1], pair[1], profile="calibrated")
    for m, c in result.components.items():
        if c.value is not None and not m.startswith("de_"):
            assert c.value == pytest.approx(c.best, abs=1e-9), m
    assert result.components["de_overlap_50"].value == 1
    assert result.avg_score > 0.9


def test_the_predictions_controls_do_not_matter(pair):
    pred, real = pair
    alone = pred[pred.obs.target_gene != CONTROL]
    a, b = (vc.score(x, real, profile="calibrated").table.columns for x in (pred, alone.copy()))
    assert a == b


@pytest.mark.parametrize("layout", [sp.csc_matrix, lambda x: x.toarray()])
@pytest.mark.parametrize("threads", [1, 3])
def test_layout_threads_and_order_do_not_matter(pair, layout, threads):
    pred, real = pair
    order = np.random.default_rng(1).permutation(pred.n_obs)
    shuffled = ad.AnnData(layout(pred.X)[order], obs=pred.obs.iloc[order], var=pred.var)
    a = vc.score(pred, real, profile="calibrated").table.columns
    b = vc.score(shuffled, real, profile="calibrated", threads=threads).table.columns
    assert a == b


def test_few_cells_are_scored_but_not_calibrated(pair):
    pred, real = pair
    few = np.flatnonzero(real.obs.target_gene == "T00")[29:]
    kept = np.setdiff1d(np.arange(real.n_obs), few)
    result = vc.score(pred, real[kept].copy(), profile="calibrated")
    assert len(result.table.names) == 6
    assert result.components["mse"].calibration.n == 5
    assert any("fewer than 30 true cells" in w for w in result.warnings)


def test_one_perturbation_has_no_average(pair):
    keep = [x[x.obs.target_gene.isin([CONTROL, "T00"])].copy() for x in pair]
    result = vc.score(*keep, profile="calibrated")
    assert result.avg_score is None
    assert result.components["nir"].value is None


def test_contexts_are_calibrated_apart(pair, tmp_path):
    parts = []
    for data in pair:
        x = ad.concat([data, data], index_unique="-")
        x.obs["line"] = np.repeat(["a", "b"], data.n_obs)
        parts.append(x)
    both = vc.score(*parts, profile="calibrated", context_col="line")
    one = vc.score(*pair, profile="calibrated")
    assert both.components["mse"].value == pytest.approx(one.components["mse"].value)
    assert both.components["mse"].calibration.drf == pytest.approx(one.components["mse"].calibration.drf)
    assert both.components["mse"].calibration.n == 12


def test_files_report_and_pack(pair, tmp_path):
    from vcelltools.scoring.report.data import write_report

    pred, real = pair
    real.write_h5ad(tmp_path / "real.h5ad")
    first = vc.score(pred, tmp_path / "real.h5ad", profile="calibrated", truth_pack=tmp_path / "t.pack",
                     out=tmp_path / "out")  # fmt: skip
    again = vc.score(pred, profile="calibrated", truth_pack=tmp_path / "t.pack")
    assert again.table.columns == first.table.columns
    assert again.components == first.components
    body = json.loads((tmp_path / "out" / "score.json").read_text())
    assert body["components"]["mse"]["calibration"]["bds"] == first.components["mse"].calibration.bds
    assert list(pd.read_csv(tmp_path / "out" / "results.csv").columns)[1:] == list(first.table.columns)
    write_report(first, tmp_path / "r.html")
    weak = sum(not c.calibration.discriminates for c in first.components.values())
    assert (tmp_path / "r.html").read_text().count('class="metric weak"') == weak > 0


@pytest.mark.parametrize("option", [{"epsilon": 0.1}, {"ceiling": True}, {"allow_discrete": True}, {"cpm_filter": 1.0}])
def test_options_that_would_do_nothing_are_refused(pair, option):
    with pytest.raises(UsageError, match="calibrated"):
        vc.score(*pair, profile="calibrated", **option)


def test_official_rules_have_no_such_profile(pair):
    with pytest.raises(UsageError, match="'calibrated' belongs to our rules"):
        vc.score(*pair, profile="calibrated", compat="cell-eval")
