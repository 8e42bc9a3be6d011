"""Both challenges end to end, by the commands of docs/challenges.md, on simulated files of the published form."""

from __future__ import annotations

import json
import shlex

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import ROOT, run_cli
from tests.meta.test_docs import get_commands

pytestmark = pytest.mark.slow
CONTROL = "non-targeting"
SIZES = {"genes": 300, "inert": 0.0, "effect_seed": 1, "depth": 4000}


def log1p(adata):
    X = adata.X.toarray()
    return np.log1p(1e4 * X / X.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def challenges(tmp_path_factory):
    """Run every command of the page; return the folder, and the targets of both."""
    d = tmp_path_factory.mktemp("challenges")
    made = vc.simulate(d / "h1.h5ad", cells=4800, perturbations=40, seed=1, shared=1.0, **SIZES)
    cells = ad.read_h5ad(made.out)
    label = cells.obs["target_gene"].astype(str)
    names = sorted(set(label) - {CONTROL})
    held = names[::5]
    cells[~label.isin(held).to_numpy()].copy().write_h5ad(d / "h1_train.h5ad")
    truth = cells[label.isin([*held, CONTROL]).to_numpy()].copy()
    truth.X = log1p(truth).astype(np.float32)
    truth.write_h5ad(d / "h1_truth.h5ad")
    (d / "h1.features.parquet").rename(d / "embedding.parquet")
    counts = label[label.isin(held)].value_counts()
    pd.DataFrame({"target_gene": counts.index, "n_cells": counts.to_numpy()}).to_csv(d / "pert_counts.csv", index=False)
    (d / "genes.csv").write_text("gene_name\n" + "\n".join(cells.var_names) + "\n")
    (d / "basis.txt").write_text("\n".join(cells.var_names[:150]) + "\n")
    vc.simulate(d / "screens.h5ad", cells=1500, perturbations=8, cell_lines=2, seed=1, **SIZES)
    vc.simulate(
        d / "new.h5ad", cells=1500, perturbations=8, cell_lines=3, first_cell_line=3, seed=2, control_share=0.4, **SIZES
    )
    new = ad.read_h5ad(d / "new.h5ad")
    new.obs["cell_line"] = new.obs["cell_line"].astype(str).map({"line3": "A", "line4": "B", "line5": "C"})
    targets = sorted(set(new.obs["target_gene"]) - {CONTROL})
    new[(new.obs["target_gene"] == CONTROL).to_numpy()].copy().write_h5ad(d / "controls.h5ad")
    table = pd.DataFrame([(n, 40, c) for c in "ABC" for n in targets], columns=["target_gene", "n_cells", "context"])
    table.to_csv(d / "pert_counts_2026.csv", index=False)
    (d / "leave_line2.toml").write_text('[training]\nscreens = "train"\n[zeroshot]\n"screens.line2" = "test"\n')
    for command in get_commands(ROOT / "docs" / "challenges.md"):
        done = run_cli(*shlex.split(command)[1:], cwd=d)
        assert done.code == 0, f"$ {command}\n{done.stderr}"
    return d, held, targets


def test_2025_predicts_unseen_targets_better_than_the_baselines(challenges):
    d, held, _ = challenges
    pred, truth = ad.read_h5ad(d / "pred_h1.h5ad"), ad.read_h5ad(d / "h1_truth.h5ad")
    label = pred.obs["target_gene"].astype(str)
    assert set(label) == {*held, CONTROL} and set(pred.obs["evidence"].astype(str)) == {"controls", "features"}
    assert list(pred.var_names) == list(truth.var_names)
    store = vc.open_store(d / "h1" / "h1_train")
    assert not set(held) & set(store.runs["perturbation"]) and set(store.directions) == {"crispri"}
    true = truth.obs["target_gene"].astype(str)

    def get_effects(adata, of):
        X = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
        return {n: X[(of == n).to_numpy()].mean(axis=0) - X[(of == CONTROL).to_numpy()].mean(axis=0) for n in held}

    mine, real = get_effects(pred, label), get_effects(truth, true)
    own = [np.corrcoef(mine[n], real[n])[0, 1] for n in held]
    assert np.mean(own) > 0.1
    summary = json.loads((d / "runs/h1/summary.json").read_text())
    assert {"control-mean", "perturbation-mean", "ridge"} <= set(summary["baselines"])
    assert summary["final"]["pearson_delta"] > summary["baselines"]["control-mean"]["pearson_delta"]
    assert (d / "h1.vcc").exists()
    for name in ("scored_h1", "scored_nothing"):
        assert any((d / name).iterdir()), name


def test_2026_predicts_contexts_with_controls_alone(challenges):
    d, _, targets = challenges
    pred = ad.read_h5ad(d / "pred_new.h5ad")
    assert set(pred.obs["context"]) == set("ABC") and set(pred.obs["target_gene"]) == set(targets)
    assert pred.n_obs == 3 * 40 * len(targets) and (d / "new.vcc").exists()
    truth = ad.read_h5ad(d / "new.h5ad")
    truth = truth[(truth.obs["cell_line"] == "line3").to_numpy()]
    here = pred[(pred.obs["context"] == "A").to_numpy()]
    made, real = log1p(here), log1p(truth)
    zero = real[(truth.obs["target_gene"] == CONTROL).to_numpy()].mean(axis=0)

    def get_effect(X, adata, n):
        return X[(adata.obs["target_gene"] == n).to_numpy()].mean(axis=0) - zero

    same = np.mean([np.corrcoef(get_effect(made, here, n), get_effect(real, truth, n))[0, 1] for n in targets])
    other = np.mean([
        np.corrcoef(get_effect(made, here, a), get_effect(real, truth, b))[0, 1]
        for a, b in zip(targets, [*targets[1:], targets[0]], strict=True)
    ])  # fmt: skip
    assert same > other + 0.1
