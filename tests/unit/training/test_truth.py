"""The models on simulated data with a known truth: held-out cell lines and unseen perturbations.

The required margins are well below those of three other seeds of the simulation.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from vcelltools.simulation.simulate import simulate
from vcelltools.stores.building.make import build_store
from vcelltools.stores.store import open_store
from vcelltools.training.settings import make_settings
from vcelltools.training.train import train

pytestmark = pytest.mark.slow

SETTINGS = {"size": "tiny", "sets": 8, "set_size": 32, "eval_every": 75}
METRICS = ("pds", "pearson_delta")


def build_world(dpath, seed):
    """Return the store of 16,000 cells: 80 perturbations in 4 lines, some 40 cells each; and the features."""
    import anndata as ad

    made = simulate(
        out=dpath / "sim.h5ad", cells=16_000, genes=600, perturbations=80, cell_lines=4, seed=seed, inert=0.0,
        depth=3000, control_share=0.15,
    )  # fmt: skip
    adata = ad.read_h5ad(made.out)
    order = np.argsort(-np.asarray(adata.X.mean(axis=0)).ravel())
    targets = [p for p in adata.obs[made.pert_col].unique() if p != made.control]
    built = build_store(
        made.out, basis=list(dict.fromkeys([*adata.var_names[order[:300]], *targets])), out=dpath / "stores",
        name="sim", pert_col=made.pert_col, control=[made.control], cell_line_col="cell_line", gene_name_col="index",
    )  # fmt: skip
    return open_store(built.path), made.features


def score_models(dpath, store, split, *, seed, **options):
    """Train on a split, and return the scores of the held-out groups by model."""
    (dpath / "split.toml").write_text(f'[training]\nsim = "train"\n{split}')
    given = {**SETTINGS, "out": str(dpath / "run"), "split": str(dpath / "split.toml"), "seed": seed, **options}
    summary = train(make_settings({}, given), stores=[store]).summary
    final = summary["final"]
    return {**summary["baselines"], "untrained": final["untrained"], "transformer": final}


def score_held_out_line(dpath, store, seed):
    """Hold out all perturbed cells of one line."""
    lines = sorted(store.runs["cell_line"].unique())
    return score_models(dpath, store, f'[zeroshot]\n"sim.{lines[seed % 4]}" = "test"\n', seed=seed, steps=225)


def score_unseen_perturbations(dpath, store, features, seed):
    """Hold out a quarter of the perturbations in every line."""
    names = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())
    order = np.random.default_rng(seed).permutation(names).tolist()
    split = f"[heldout]\ntest = {json.dumps(order[:20])}\nval = {json.dumps(order[20:30])}\n"
    return score_models(dpath, store, split, seed=seed, steps=75, features=str(features))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("truth"), seed=4)


def gain(scores, model, over):
    return {m: scores[model][m] - scores[over][m] for m in METRICS}


def test_a_held_out_line(world, tmp_path):
    scores = score_held_out_line(tmp_path, world[0], seed=4)
    assert scores["transformer"]["n"] == 80
    over_control = gain(scores, "transformer", "control-mean")
    assert over_control["pds"] > 0.1 and over_control["pearson_delta"] > 0.3, scores
    over_mean = gain(scores, "transformer", "perturbation-mean")
    assert over_mean["pds"] > 0.005 and over_mean["pearson_delta"] > 0.015, scores
    over_start = gain(scores, "transformer", "untrained")  # the gain comes from training and not from the prior
    assert over_start["pds"] > 0.005 and over_start["pearson_delta"] > 0.015, scores


def test_unseen_perturbations_with_features(world, tmp_path):
    scores = score_unseen_perturbations(tmp_path, *world, seed=4)
    for model in ("ridge", "transformer"):
        assert gain(scores, model, "perturbation-mean")["pearson_delta"] > 0.12, (model, scores)
        assert gain(scores, model, "control-mean")["pearson_delta"] > 0.25, (model, scores)
