"""The whole workflow on real data: a CRISPR screen in THP-1 from its file to a scored prediction, and its biology.

Papalexi et al. 2021: knock-outs along the interferon-gamma pathway (IFNGR1, IFNGR2, JAK2, STAT1, IRF1) change many
genes; most other targets change few or none. One biological replicate is held out.
"""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.conftest import run_cli

HELD_OUT = "rep_1"
CELLS = {
    "non-targeting": 1923, "IFNGR1": 1064, "IFNGR2": 973, "IRF1": 900, "ATF2": 891, "CD86": 883, "JAK2": 871,
    "CAV1": 757, "MARCH8": 745, "TNFRSF14": 702, "ETV7": 699, "CMTM6": 655, "NFKBIA": 559, "STAT2": 557, "STAT5A": 532,
    "PDCD1LG2": 514, "POU2F2": 464, "SMAD4": 462, "IRF7": 413, "STAT3": 383, "UBE2L6": 370, "STAT1": 325, "BRD4": 254,
    "CUL3": 190, "MYC": 73, "SPI1": 33,
}  # fmt: skip
SIGNIFICANT = {
    "IFNGR1": 114, "JAK2": 107, "IFNGR2": 105, "STAT1": 96, "SMAD4": 72, "IRF1": 48, "BRD4": 15, "CUL3": 8, "STAT2": 3,
    "MYC": 1, "ATF2": 0, "CAV1": 0, "CD86": 0, "ETV7": 0, "IRF7": 0, "SPI1": 0,
}  # fmt: skip
PATHWAY = ("IFNGR1", "IFNGR2", "JAK2", "STAT1")


def step(cwd, *args):
    done = run_cli(*args, "--json", cwd=cwd)
    assert done.code == 0, f"{args}\n{done.stderr}"
    return done.json


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """The folder in which every step has run, and what each one said."""
    import anndata as ad

    from tests.conftest import need_data

    thp1 = need_data("papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad")
    d = tmp_path_factory.mktemp("thp1")
    (d / "vcelltools.toml").write_text(
        f"""
[[datasets]]
name = "thp1"
path = {json.dumps(str(thp1.resolve()))}
pert_col = "perturbation"
control = "non-targeting"
cell_line_col = "bio_rep"
keep = ["confident_guide"]

[basis]
path = "genes.txt"

[train]
split = "split.toml"
size = "tiny"
sets = 8
set_size = 32
eval_every = 20
"""
    )
    (d / "split.toml").write_text(f'[training]\nthp1 = "train"\n\n[zeroshot]\n"thp1.{HELD_OUT}" = "test"\n')
    adata = ad.read_h5ad(thp1)
    confident = adata[adata.obs["confident_guide"].astype(bool)].copy()
    confident.obs["target_gene"] = confident.obs["perturbation"].astype(str)
    confident[confident.obs["bio_rep"] == HELD_OUT].copy().write_h5ad(d / "truth_counts.h5ad")
    controls = confident[confident.obs["target_gene"] == "non-targeting"].copy()
    half = np.random.default_rng(0).permutation(controls.n_obs) < controls.n_obs // 2
    controls.obs["target_gene"] = np.where(half, "half", "non-targeting")
    controls.write_h5ad(d / "halves.h5ad")
    said = {
        "hvg": step(d, "hvg", thp1, "--top", 299, "--batch-key", "bio_rep", "--out", "genes.txt"),
        "store": step(d, "build-store"),
        "verify": step(d, "verify", "stores/thp1"),
        "de": step(d, "de", thp1, "--pert-col", "perturbation", "--keep", "confident_guide", "--out", "de.csv"),
        "halves": step(d, "de", "halves.h5ad", "--out", "halves.csv"),
        "truth": step(d, "normalize", "truth_counts.h5ad", "--out", "truth.h5ad"),
    }
    for name, options in (("transformer", ("--steps", 20)), ("perturbation-mean", ("--model", "perturbation-mean"))):
        run = f"runs/{name}"
        said[f"train {name}"] = step(d, "train", "--out", run, *options)
        said[f"predict {name}"] = step(d, "predict", "--run", run, "--out", f"{name}.h5ad")
        scored = ("--truth", "truth.h5ad", "--profile", "minimal", "--ceiling", "--out", f"scored/{name}")
        said[f"score {name}"] = step(d, "score", f"{name}.h5ad", *scored)
    return d, said


def count_significant(path, column) -> dict[str, int]:
    out: dict[str, int] = {}
    with path.open() as f:
        for row in csv.DictReader(f):
            out[row[column]] = out.get(row[column], 0) + (float(row["fdr"]) < 0.05)
    return out


def test_every_gene_is_ranked(workflow):
    d, said = workflow
    genes = (d / "genes.txt").read_text().split()
    assert said["hvg"]["n_cells"] == 20_729 and len(set(genes)) == 299
    assert said["hvg"]["batches"] == ["rep_1", "rep_2", "rep_3"]
    assert "PLK1" in genes[:20], "the cell cycle varies within every replicate"


def test_the_store_holds_the_confident_cells(workflow):
    import vcelltools as vc

    d, said = workflow
    assert said["verify"]["ok"] is True
    store = vc.open_store(d / "stores/thp1")
    sizes = store.runs.groupby("perturbation", observed=True)["length"].sum()
    assert sizes.to_dict() == CELLS


def test_differential_expression_is_the_screens(workflow):
    d, said = workflow
    found = count_significant(d / "de.csv", "perturbation")
    assert {k: found[k] for k in SIGNIFICANT} == SIGNIFICANT
    assert said["de"]["significant"] == found
    own = {}
    with (d / "de.csv").open() as f:
        for row in csv.DictReader(f):
            if row["perturbation"] == row["gene"]:
                own[row["perturbation"]] = float(row["log2_fold_change"])
    assert own["JAK2"] == pytest.approx(-2.2, abs=0.1) and own["STAT1"] == pytest.approx(-2.3, abs=0.1)


def test_controls_do_not_differ_from_controls(workflow):
    d, _ = workflow
    assert count_significant(d / "halves.csv", "perturbation") == {"half": 0}


def test_training_ranks_the_baselines_as_the_data_allow(workflow):
    _, said = workflow
    summary = said["train transformer"]
    assert summary["groups"]["test"] == 25
    pds = {k: v["pds"] for k, v in summary["baselines"].items()}
    assert pds["perturbation-mean"] > 0.65 > pds["control-mean"]
    # a few steps from the prior must not lose what the prior knows
    assert summary["final"]["pds"] > pds["perturbation-mean"] - 0.05


def test_the_prediction_knows_the_pathway(workflow):
    import anndata as ad

    d, _ = workflow
    pred = ad.read_h5ad(d / "transformer.h5ad")
    label = pred.obs["target_gene"].astype(str) if "target_gene" in pred.obs else pred.obs["perturbation"].astype(str)
    X = pred.X.toarray()
    control = X[(label == "non-targeting").to_numpy()].mean(axis=0)
    effect = {p: X[(label == p).to_numpy()].mean(axis=0) - control for p in set(label) - {"non-targeting"}}
    size = {p: np.abs(e).sum() for p, e in effect.items()}
    assert set(PATHWAY) <= set(sorted(size, key=size.get, reverse=True)[:6]), size
    for a in PATHWAY:
        for b in PATHWAY:
            assert np.corrcoef(effect[a], effect[b])[0, 1] > 0.7, (a, b)
        assert np.corrcoef(effect[a], effect["CAV1"])[0, 1] < 0.7, a


def test_the_score_stands_between_baseline_and_ceiling(workflow):
    d, said = workflow
    for name in ("transformer", "perturbation-mean"):
        body = said[f"score {name}"]
        pds = body["components"]["discrimination_score_l1"]
        assert pds["n"] == 25 and pds["ci95"][0] < pds["value"] < pds["ci95"][1]
        assert pds["value"] > 0.65 and pds["score"] > 0.2
        assert 0.6 < pds["ceiling"] <= 1
        assert json.loads((d / f"scored/{name}/score.json").read_text())["avg_score"] == body["avg_score"]
    found = count_significant(d / "scored/perturbation-mean/real_de.csv", "target")
    assert set(PATHWAY) <= set(sorted(found, key=found.get, reverse=True)[:6])
