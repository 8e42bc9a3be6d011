"""A tissue with known regulation: planted edges are found, knockouts have the true sign, nulls do not pass."""

from __future__ import annotations

import pytest

from benchmarks.bench_spatial_truth import measure_tissue, summarize_edges, summarize_knockouts, summarize_null


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return measure_tissue(
        tmp_path_factory.mktemp("truth"), cells=700, genes=76, clusters=1, ligand_share=0.4, seed=3, fit={"null": 9}
    )


def test_planted_edges_are_found(found):
    rows = {r["edges"].partition(",")[0]: r for r in summarize_edges([found])}
    assert rows["tf"]["recall"] > 0.8 and rows["tf"]["precision"] > 0.6 and rows["tf"]["average precision"] > 0.8
    pairs = rows["ligand-receptor"]
    assert pairs["recall"] > 0.6 and pairs["same sign"] == 1.0
    assert pairs["average precision"] > 5 * pairs["planted"] / (48 * 16), "far above the share of true pairs"


def test_knockouts_go_the_true_way(found):
    rows = {(r["knock-out"], r["place"], r["response"]): r for r in summarize_knockouts([found])}
    assert {k[:2] for k in rows} == {("TF", "near"), ("ligand", "near"), ("ligand", "far")}
    for (kind, _, _), r in rows.items():
        assert r["same sign"] >= (0.9 if kind == "TF" else 0.7), r
        assert r["rank"] > 0.6 and r["found"] > 0.8 and 0.3 < r["size"] < 1.2, r


def test_what_no_ligand_touches_does_not_pass(found):
    rows = {r["targets"]: r for r in summarize_null([found])}
    touched, null = rows["touched"], rows["null"]
    assert touched["gain"] > 0.05 > null["gain"]
    s = found["summary"]
    assert (s.p[s["class"] == "touched"] <= 0.1).mean() > 0.5 > 2 * (s.p[s["class"] != "touched"] <= 0.1).mean()
    assert all(r["r2_out"] <= r["ceiling"] + 0.01 for r in rows.values()), "the planted model is the best there is"
