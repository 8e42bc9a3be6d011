"""``score --compat vcc2026`` end to end: files, packs, contexts, reports, refusals."""

from __future__ import annotations

import csv
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.oracle.vcc2026_pairs import CONTROL, PAIRS, make_pair

NAMES = ("de_wilcoxon_direction_fidelity_yield_raw", "de_wilcoxon_direction_reach_raw", "de_wilcoxon_lfc_nmae",
         "de_wilcoxon_sig_jaccard", "expr_mse_unbiased_capped_norm", "pds_cosine")  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    box = tmp_path_factory.mktemp("score26")
    truth, pred = make_pair(**PAIRS["anchored"])
    truth.write_h5ad(box / "real.h5ad")
    pred.write_h5ad(box / "pred.h5ad")
    return box


def test_files_report_and_pack(cli, pair):
    out, pack = pair / "out", pair / "truth.pack"
    given = ["score", pair / "pred.h5ad", "--compat", "vcc2026"]
    done = cli(*given, "--truth", pair / "real.h5ad", "--out", out, "--report", pair / "r.html", "--truth-pack", pack,
               "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    body = json.loads((out / "score.json").read_text())
    assert body["compat"] == "vcc2026"
    assert sorted(body["components"]) == sorted(NAMES)
    for c in body["components"].values():
        assert set(c) == {"value", "baseline", "ceiling", "score", "score_unclipped", "ci95", "n"}
        assert c["ci95"][0] <= c["value"] <= c["ci95"][1]
    assert body["avg_score"] == pytest.approx(np.mean([c["score"] for c in body["components"].values()]), rel=1e-12)
    assert done.json["avg_score"] == body["avg_score"]
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert np.mean([float(r["pds_cosine"]) for r in rows]) == pytest.approx(body["components"]["pds_cosine"]["value"])
    assert {p.name for p in out.iterdir()} == {
        "results.csv", "agg_results.csv", "pred_de.csv", "real_de.csv", "score.json"
    }  # fmt: skip
    assert "pred.h5ad" in (pair / "r.html").read_text()
    again = cli(*given, "--truth-pack", pack, "--out", pair / "packed")
    assert again.code == 0, again.stderr
    assert (pair / "packed" / "score.json").read_bytes() == (out / "score.json").read_bytes()
    assert not (pair / "packed" / "real_de.csv").exists()
    refused = cli(*given, "--truth", pair / "real.h5ad", "--out", out)
    assert refused.code == 2
    assert "--force" in refused.stderr
    other = cli(*given, "--truth-pack", pack, "--no-continuity", "--out", pair / "other")
    assert other.code == 2
    assert "continuity" in other.stderr


def test_damaged_packs_are_refused(cli, pair):
    from vcelltools.errors import DataError
    from vcelltools.scoring.truth_pack import read_pack, write_pack
    from vcelltools.scoring.vcc2026.score import Vcc2026

    rules = Vcc2026(anchors=False)
    whole = write_pack(pair / "w.pack", rules, rules.read_truth(pair / "real.h5ad"), pair / "real.h5ad").read_bytes()
    assert read_pack(pair / "w.pack", rules)[0].labels.shape == (8,)
    rng = np.random.default_rng(0)
    for k in range(40):
        raw = bytearray(whole)
        for at in rng.integers(0, len(raw), 3):
            raw[at] ^= int(rng.integers(1, 256))
        (pair / "d.pack").write_bytes(bytes(raw[: len(raw) if k % 2 else rng.integers(0, len(raw))]))
        try:
            read_pack(pair / "d.pack", rules)
        except DataError:
            continue
        assert bytes(raw) != whole


def test_contexts_are_scored_apart_and_averaged(pair, tmp_path):
    truths, preds = [], []
    for name, seed in (("A", 21), ("B", 22)):
        t, p = make_pair(seed, n_cells=100, n_controls=300, noise=0.4)
        # the same eight genes are perturbed in both contexts
        labels = dict(zip(sorted(set(t.obs["target_gene"]) - {CONTROL}), [f"G{i:04d}" for i in range(8)], strict=True))
        for a in (t, p):
            a.obs["target_gene"] = [labels.get(v, v) for v in a.obs["target_gene"]]
            a.obs["context"] = name
            a.obs_names = [f"{name}{i}" for i in range(a.n_obs)]
        truths.append(t)
        preds.append(p)
    both, pred = ad.concat(truths), ad.concat(preds)
    mixed = pred[np.random.default_rng(0).permutation(pred.n_obs)].copy()
    mixed.write_h5ad(tmp_path / "p.h5ad")
    result = vc.score(tmp_path / "p.h5ad", both, compat="vcc2026")
    apart = [vc.score(p, t, compat="vcc2026") for t, p in zip(truths, preds, strict=True)]
    assert [c.context for c in result.contexts] == ["A", "B"]
    assert result.avg_score == pytest.approx(np.mean([a.avg_score for a in apart]), abs=1e-9)
    for m, c in result.components.items():
        assert c.score == pytest.approx(np.mean([a.components[m].score for a in apart]), abs=1e-9)
    assert set(result.to_json()["contexts"]) == {"A", "B"}
    del preds[0].obs["context"]  # one context needs no column
    assert vc.score(preds[0], truths[0], compat="vcc2026").avg_score == apart[0].avg_score
    from vcelltools.errors import DataError

    one = mixed[mixed.obs["context"] == "A"].copy()
    with pytest.raises(DataError, match="lacks 1 contexts of the truth: B"):
        vc.score(one, both, compat="vcc2026")


def _spoil(kind, pred):
    a = pred.copy()
    labels = a.obs["target_gene"].astype(str).to_numpy()
    some = sorted(set(labels) - {CONTROL})
    if kind == "perturbation":
        return a[labels != some[0]].copy(), f"lacks 1 perturbations of the truth: {some[0]}"
    if kind == "extra":
        a.obs["target_gene"] = np.where(np.arange(len(labels)) == 0, "NEW", labels)
        return a, "perturbations that the truth lacks: NEW"
    if kind == "gene":
        return a[:, 1:].copy(), "lacks 1 genes of the truth: G0000"
    row, column = (x[3] for x in a.X.nonzero())
    place = f"cell {row} ({a.obs_names[row]}), gene {column} ({a.var_names[column]}) holds"
    if kind == "fraction":
        a.X.data[3] = 0.5
        return a, f"{place} 0.5, not a whole number"
    if kind == "negative":
        a.X.data[3] = -1
        return a, f"{place} -1.0, which is negative"
    if kind == "nan":
        a.X.data[3] = np.nan
        return a, f"{place} nan"
    a.X.data[3] = 2e6
    return a, "more than 1,000,000 counts"


@pytest.mark.parametrize("kind", ["perturbation", "extra", "gene", "fraction", "negative", "nan", "heavy"])
def test_faults_are_refused_with_their_place(pair, kind):
    from vcelltools.errors import DataError

    pred, says = _spoil(kind, ad.read_h5ad(pair / "pred.h5ad"))
    with pytest.raises(DataError) as e:
        vc.score(pred, pair / "real.h5ad", compat="vcc2026", anchors=False)
    assert says in str(e.value)


def test_truth_without_controls_or_known_targets(pair):
    from vcelltools.errors import DataError

    truth = ad.read_h5ad(pair / "real.h5ad")
    with pytest.raises(
        DataError, match=r"no cell of obs/target_gene is labelled 'ctl', the control.*one of: non-targeting"
    ):
        vc.score(pair / "pred.h5ad", truth, compat="vcc2026", control="ctl")
    strange = truth.copy()
    strange.obs["target_gene"] = [v if v == CONTROL else f"{v}-1" for v in strange.obs["target_gene"]]
    pred = ad.read_h5ad(pair / "pred.h5ad")
    pred.obs["target_gene"] = [v if v == CONTROL else f"{v}-1" for v in pred.obs["target_gene"]]
    with pytest.raises(DataError, match="none of the 8 perturbations is the name of a gene"):
        vc.score(pred, strange, compat="vcc2026", anchors=False)
    given = {v: v[:-2] for v in set(pred.obs["target_gene"]) if v != CONTROL}
    mapped = vc.score(pred, strange, compat="vcc2026", anchors=False, target_gene_map=given)
    plain = vc.score(pair / "pred.h5ad", pair / "real.h5ad", compat="vcc2026", anchors=False)
    for m, c in plain.components.items():
        assert mapped.components[m].value == pytest.approx(c.value, abs=1e-12), m
    none = vc.score(pred, strange, compat="vcc2026", anchors=False, target_gene_map={"*": None})
    assert none.components["pds_cosine"].n == 8


def test_gene_order_layout_threads_and_duplicates_do_not_matter(pair):
    from scipy import sparse

    base = vc.score(pair / "pred.h5ad", pair / "real.h5ad", compat="vcc2026", anchors=False, threads=1)
    pred = ad.read_h5ad(pair / "pred.h5ad")
    back = pred[:, ::-1].copy()
    doubled = pred.copy()
    X = sparse.csr_matrix(doubled.X)
    half = np.floor(X.data / 2)
    rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    order = np.argsort(np.concatenate([rows, rows]), kind="stable")
    doubled.X = sparse.csr_matrix(
        (np.concatenate([half, X.data - half])[order], np.concatenate([X.indices, X.indices])[order], X.indptr * 2),
        shape=X.shape,
    )
    dense = pred.copy()
    dense.X = dense.X.toarray()
    typed = pred.copy()
    typed.X = sparse.csr_matrix(typed.X).astype(np.int16)
    for other in (back, doubled, dense, typed):
        got = vc.score(other, pair / "real.h5ad", compat="vcc2026", anchors=False, threads=3)
        for m, c in base.components.items():
            assert got.components[m].value == pytest.approx(c.value, abs=1e-12), m


def test_no_scale_is_said_after_the_values_are_written(cli, tmp_path):
    truth, pred = make_pair(**PAIRS["plain"])
    truth.write_h5ad(tmp_path / "t.h5ad")
    pred.write_h5ad(tmp_path / "p.h5ad")
    given = ["score", tmp_path / "p.h5ad", "--truth", tmp_path / "t.h5ad", "--compat", "vcc2026"]
    done = cli(*given, "--out", tmp_path / "o")
    assert done.code == 3
    assert "no better than the mean response" in done.stderr
    body = json.loads((tmp_path / "o" / "score.json").read_text())
    assert body["avg_score"] is None
    assert body["components"]["pds_cosine"]["value"] == 1.0
    values = cli(*given, "--no-anchors", "--out", tmp_path / "v", "--json")
    assert values.code == 0
    assert values.json["components"]["pds_cosine"] == body["components"]["pds_cosine"] | {
        "baseline": None,
        "ceiling": None,
    }


def test_one_cell_groups_have_values_and_no_replicate(tmp_path):
    truth, pred = make_pair(**PAIRS["anchored"])
    label = next(v for v in truth.obs["target_gene"] if v != CONTROL)
    at = np.flatnonzero(truth.obs["target_gene"] == label)
    truth = truth[np.delete(np.arange(truth.n_obs), at[1:])].copy()
    result = vc.score(pred, truth, compat="vcc2026")
    assert label in result.problem
    assert np.isfinite(result.components["pds_cosine"].value)
    assert np.isnan(result.avg_score)


def test_gene_map_file(tmp_path):
    from vcelltools.errors import DataError
    from vcelltools.scoring.vcc2026.score import read_gene_map

    (tmp_path / "m.csv").write_text("perturbation,gene\nA-1,A\ndrug,\n")
    assert read_gene_map(tmp_path / "m.csv") == {"A-1": "A", "drug": None}
    assert read_gene_map(None) is None
    (tmp_path / "m.csv").write_text("A-1\n")
    with pytest.raises(DataError, match="two columns"):
        read_gene_map(tmp_path / "m.csv")


def test_frames(pair):
    result = vc.score(pair / "pred.h5ad", pair / "real.h5ad", compat="vcc2026")
    frame = result.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == list(result.contexts[0].labels)
    assert frame["pds_cosine"].mean() == pytest.approx(result.components["pds_cosine"].value)


def test_real_screen_against_itself(thp1):
    """THP-1: every real effect is told apart from the others, its genes are its own, and a shuffle finds nothing."""
    adata = ad.read_h5ad(thp1)
    sure = adata[adata.obs["confident_guide"].astype(bool)].copy()
    known = {"pert_col": "perturbation", "compat": "vcc2026"}
    same = vc.score(sure, sure, anchors=False, **known)
    assert same.components["pds_cosine"].value == 1.0
    assert same.components["de_wilcoxon_sig_jaccard"].value == 1.0
    assert same.components["de_wilcoxon_lfc_nmae"].value == 0.0
    context = same.contexts[0]
    n = dict(zip(context.labels, (context.real.de.padj_ph < 0.05).sum(axis=1), strict=True))
    assert n["IFNGR1"] > 90
    assert n["JAK2"] > 80
    assert n["ATF2"] == 0
    mixed = sure.copy()
    labels = mixed.obs["perturbation"].astype(str).to_numpy()
    other = labels != "non-targeting"
    labels[other] = np.random.default_rng(0).permutation(labels[other])
    mixed.obs["perturbation"] = labels
    lost = vc.score(mixed, sure, anchors=False, **known)
    assert lost.components["pds_cosine"].value < 0.75
    assert lost.components["de_wilcoxon_sig_jaccard"].value < 0.5
