"""Small pairs of truth and prediction for the 2026 rules, each with an oddity; written as h5ad by either side."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

CONTROL = "non-targeting"


def make_pair(seed: int, *, n_perts=8, n_cells=40, n_controls=150, n_genes=300, noise=1.0, layout="csr", oddity=""):
    """Return (truth, prediction): negative-binomial counts with knock-downs and downstream effects."""
    rng = np.random.default_rng(seed)
    genes = np.array([f"G{i:04d}" for i in range(n_genes)])
    base = rng.gamma(0.6, 2.0, n_genes) + 0.02
    targets = rng.choice(n_genes, n_perts, replace=False)
    labels = genes[targets].copy()
    effect = np.zeros((n_perts, n_genes))
    for p in range(n_perts):
        hit = rng.choice(n_genes, n_genes // 6, replace=False)
        effect[p, hit] = rng.normal(0, 1.2, len(hit))
        effect[p, targets[p]] = -3
    if oddity == "no-de":
        effect[:] = 0
    if oddity == "few-de":
        effect[n_perts // 2 :] = 0
    if oddity == "some-unresolved":
        labels[:2] = ["drug-1", "drug-2"]

    def draw(n, lfc):
        depth = rng.lognormal(0, 0.35, (n, 1))
        mean = base * np.exp(lfc) * depth
        return rng.poisson(rng.gamma(2.0, mean / 2.0))

    sizes = np.full(n_perts, n_cells)
    if oddity == "uneven":
        sizes = rng.integers(4, 2 * n_cells, n_perts)

    def build(strength, jitter):
        rows = [draw(n_controls, 0.0)]
        obs = [CONTROL] * n_controls
        for p in range(n_perts):
            rows.append(draw(sizes[p], strength * effect[p] + jitter * rng.normal(0, 0.3, n_genes)))
            obs += [labels[p]] * sizes[p]
        X = np.vstack(rows).astype(np.float32)
        if oddity == "zero-genes":
            X[:, 5:25] = 0
            X[:n_controls, 30:40] = 0
        if oddity == "same-depth":  # many ties
            X = np.minimum(X, 3)
            X[:, 0] = 900 - X[:, 1:].sum(axis=1)
        order = rng.permutation(len(obs))
        return X[order], np.array(obs)[order]

    real, real_obs = build(1.0, 0.0)
    pred, pred_obs = build(0.7, noise)
    if oddity == "equal":
        pred, pred_obs = real.copy(), real_obs.copy()
    if oddity == "copied-controls":  # each perturbation is the first control cells, bit for bit
        controls = real[real_obs == CONTROL]
        pred = pred.copy()
        for p in range(n_perts):
            at = pred_obs == labels[p]
            pred[at] = controls[: at.sum()]
    if oddity == "zero-group":
        pred = pred.copy()
        pred[pred_obs == labels[0]] = 0
    if oddity == "one-cell-all":  # one cell holds all of its group's counts
        at = np.flatnonzero(pred_obs == labels[1])
        pred = pred.copy()
        pred[at[1:]] = 0
    if oddity == "flat":  # identical cells
        pred = pred.copy()
        for p in range(n_perts):
            at = pred_obs == labels[p]
            pred[at] = np.round(pred[at].mean(axis=0))
    if oddity == "dust":  # what a rounding leaves, within 1e-6 of whole numbers
        real, pred = (np.where(X > 0, X - rng.choice([0, 4e-7], X.shape), 0).astype(np.float32) for X in (real, pred))
        assert np.any(real % 1)
    return _adata(real, real_obs, genes, layout, oddity), _adata(pred, pred_obs, genes, layout)


def _adata(X, obs, genes, layout, oddity=""):
    n = len(obs)
    order = sorted(set(obs), reverse=oddity == "category-order")  # the replicate's random stream follows it
    frame = pd.DataFrame({"target_gene": pd.Categorical(obs, categories=order)}, index=[f"c{i}" for i in range(n)])
    X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[layout](X)
    return ad.AnnData(X=X, obs=frame, var=pd.DataFrame(index=genes))


PAIRS = {
    "plain": {"seed": 1},
    "good": {"seed": 2, "noise": 0.2},
    "csc": {"seed": 3, "layout": "csc"},
    "dense": {"seed": 4, "layout": "dense"},
    "uneven": {"seed": 5, "oddity": "uneven"},
    "ties": {"seed": 6, "oddity": "same-depth"},
    "zero-genes": {"seed": 7, "oddity": "zero-genes"},
    "equal": {"seed": 8, "oddity": "equal"},
    "copied-controls": {"seed": 9, "oddity": "copied-controls"},
    "zero-group": {"seed": 10, "oddity": "zero-group"},
    "one-cell-all": {"seed": 11, "oddity": "one-cell-all"},
    "flat": {"seed": 12, "oddity": "flat"},
    "some-unresolved": {"seed": 13, "oddity": "some-unresolved"},
    "few-de": {"seed": 14, "oddity": "few-de"},
    "anchored": {"seed": 16, "n_cells": 120, "n_controls": 400, "noise": 0.5},
    "category-order": {"seed": 17, "n_cells": 60, "n_controls": 200, "oddity": "category-order"},
    "dust": {"seed": 18, "oddity": "dust"},
    "no-de": {"seed": 15, "oddity": "no-de"},
}
