"""``vcelltools score``, ``de`` and ``baseline`` end to end."""

from __future__ import annotations

import json
import shlex

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from tests.oracle.pairs import CONTROL, make_adata, make_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("score")
    pred, real, labels, genes, _ = make_pair(50)
    pred[np.array(labels) == CONTROL] = real[np.array(labels) == CONTROL]
    make_adata(sp.csr_matrix(pred), labels, genes).write_h5ad(path / "pred.h5ad")
    make_adata(sp.csr_matrix(real), labels, genes).write_h5ad(path / "real.h5ad")
    return path


def test_score_writes_and_prints(folder, cli, tmp_path):
    args = "score", folder / "pred.h5ad", "--truth", folder / "real.h5ad", "--out", tmp_path / "o"
    ran = cli(*args)
    assert ran.code == 0, ran.stderr
    assert "overlap_at_N" in ran.stdout
    assert "average score" in ran.stderr.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "agg_results.csv", "pred_de.csv", "real_de.csv", "results.csv", "score.json",
    ]  # fmt: skip
    again = cli(*args)
    assert again.code == 2
    assert "exists" in again.stderr
    forced = cli(*args, "--force", "--json", "-q")
    assert forced.code == 0
    assert forced.json["components"] == json.loads((tmp_path / "o" / "score.json").read_text())["components"]


def test_score_says_what_it_needs(folder, cli, tmp_path):
    ran = cli("score", folder / "pred.h5ad", cwd=tmp_path)
    assert ran.code == 2
    assert "--truth" in ran.stderr
    (tmp_path / "vcelltools.toml").write_text(f'[score]\ntruth = "{folder / "real.h5ad"}"\nprofile = "minimal"\n')
    assert cli("score", folder / "pred.h5ad", cwd=tmp_path).code == 0
    body = json.loads((tmp_path / "score-pred" / "score.json").read_text())
    assert body["profile"] == "minimal"


def test_bad_input_and_options(folder, cli, tmp_path):
    pred, real = folder / "pred.h5ad", folder / "real.h5ad"
    for args, code, text in [
        (("--pert-col", "nonsense"), 3, "no column 'nonsense'"),
        (("--control", "NT"), 3, "non-targeting (60)"),
        (("--profile", "nonsense"), 2, "--profile, one of"),
        (("--compat", "nonsense"), 2, "--compat, one of"),
        (("--layer", "nonsense"), 3, "nonsense"),
    ]:
        ran = cli("score", pred, "--truth", real, "--out", tmp_path / "x", *args)
        assert (ran.code, text in ran.stderr) == (code, True), ran.stderr
        assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(pred.read_bytes()[:20_000])
    assert cli("score", cut, "--truth", real, "--out", tmp_path / "x").code == 3
    assert cli("score", pred, "--truth", tmp_path / "none.h5ad", "--out", tmp_path / "x").code == 3


def test_truth_pack_replaces_the_truth(folder, cli, tmp_path):
    pack = tmp_path / "t.pack"
    first = cli("score", folder / "pred.h5ad", "--truth", folder / "real.h5ad", "--truth-pack", pack,
                "--out", tmp_path / "a", "--json")  # fmt: skip
    second = cli("score", folder / "pred.h5ad", "--truth-pack", pack, "--out", tmp_path / "b", "--json")
    assert (first.code, second.code) == (0, 0), second.stderr
    assert first.json["components"] == second.json["components"]


def test_baseline_then_score_is_zero(folder, cli, tmp_path):
    base = tmp_path / "base.h5ad"
    ran = cli("baseline", "--truth", folder / "real.h5ad", "--kind", "mean", "--out", base)
    assert ran.code == 0, ran.stderr
    assert cli("baseline", "--truth", folder / "real.h5ad", "--out", base).code == 2
    scored = cli(
        "score", base, "--truth", folder / "real.h5ad", "--compat", "cell-eval", "--out", tmp_path / "s", "--json"
    )
    assert scored.json["avg_score"] == 0
    assert all(c["score_unclipped"] == 0 for c in scored.json["components"].values())
    ran = cli("baseline", "--truth", folder / "real.h5ad", "--kind", "x", "--out", tmp_path / "y.h5ad")
    assert ran.code == 2


def test_the_next_step_after_a_baseline_of_counts_runs(cli, tmp_path):
    labels = [CONTROL] * 20 + ["A"] * 10 + ["B"] * 10
    counts = np.random.default_rng(0).poisson(3.0, (40, 12)).astype(np.float32)
    make_adata(sp.csr_matrix(counts), labels, [f"G{i}" for i in range(12)]).write_h5ad(tmp_path / "real.h5ad")
    ran = cli("baseline", "--truth", tmp_path / "real.h5ad", "--out", tmp_path / "base.h5ad", cwd=tmp_path)
    said = ran.stderr.split("next: vcelltools ")[1].split()
    assert said[-1] == "--to-cp10k"
    scored = cli(*said, "--out", tmp_path / "s", cwd=tmp_path)
    assert scored.code == 0, scored.stderr


def test_the_next_step_of_a_baseline_names_the_columns_that_were_given(cli, folder, tmp_path):
    real = ad.read_h5ad(folder / "real.h5ad")
    real.obs["my pert"] = real.obs.pop("target_gene")
    real.write_h5ad(tmp_path / "real.h5ad")
    ran = cli("baseline", "--truth", "real.h5ad", "--pert-col", "my pert", "--out", "base.h5ad", cwd=tmp_path)
    step = shlex.split(ran.stderr.split("next: vcelltools ")[1])
    assert step[-2:] == ["--pert-col", "my pert"]
    assert cli(*step, "--out", "s", cwd=tmp_path).code == 0


@pytest.mark.parametrize("test", ["wilcoxon", "nb"])
def test_de(thp1, cli, tmp_path, test):
    out = tmp_path / "de.csv"
    ran = cli(
        "de", thp1, "--pert-col", "perturbation", "--keep", "confident_guide", "--test", test, "--out", out, "--json"
    )
    assert ran.code == 0, ran.stderr
    assert ran.json["n_controls"] == 1923
    assert ran.json["significant"]["IRF7"] == 0
    assert ran.json["significant"]["JAK2"] > 100
    assert out.read_text().startswith('"perturbation","gene"')
    assert cli("de", thp1, "--pert-col", "perturbation", "--test", "x", "--out", tmp_path / "z.csv").code == 2
