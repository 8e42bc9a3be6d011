"""Generated prediction and truth pairs for the scoring oracles: small, and full of edge cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

CONTROL = "non-targeting"


def make_counts(rng: np.random.Generator, codes: np.ndarray, effect_pg: np.ndarray, depth: float = 2.0) -> np.ndarray:
    base = rng.gamma(0.6, depth, effect_pg.shape[1])
    library = rng.lognormal(0.0, 0.35, len(codes))[:, None]
    return rng.poisson(library * base * effect_pg[codes]).astype(np.float32)


def log_normalize(counts: np.ndarray, target: float = 1e3) -> np.ndarray:
    total = counts.sum(axis=1, keepdims=True)
    return np.log1p(counts / np.where(total > 0, total, 1) * target).astype(counts.dtype)


def make_labels(n_perts: int, per_pert: int, n_controls: int, genes: list[str]) -> list[str]:
    # half of the targets are genes of the panel, half are not; names do not sort as they come
    names = [genes[(7 * i) % len(genes)] if i % 2 else f"T{(37 * i) % 100:02d}" for i in range(n_perts)]
    return [CONTROL] * n_controls + [n for n in names for _ in range(per_pert)]


def make_adata(X, labels, genes, *, categories=None, index: str = "c") -> ad.AnnData:
    column = pd.Categorical(labels, categories=categories) if categories else labels
    obs = pd.DataFrame({"target_gene": column}, index=[f"{index}{i}" for i in range(len(labels))])
    return ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=genes))


def make_pair(
    seed: int, *, n_perts: int = 6, per_pert: int = 20, n_controls: int = 60, n_genes: int = 50, strength: float = 0.8
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], np.random.Generator]:
    """Return (pred, real) as dense log1p float32, labels and genes."""
    rng = np.random.default_rng(seed)
    genes = [f"G{i}" for i in range(n_genes)]
    labels = make_labels(n_perts, per_pert, n_controls, genes)
    uniq = sorted(set(labels), key=labels.index)
    codes = np.array([uniq.index(label) for label in labels])
    effect = np.exp(rng.normal(0, strength, (len(uniq), n_genes)) * (rng.random((len(uniq), n_genes)) < 0.3))
    effect[0] = 1
    effect[-1] = 1  # one perturbation without any effect
    guess = effect ** rng.uniform(0.2, 1.0, effect.shape)
    real, pred = make_counts(rng, codes, effect), make_counts(rng, codes, guess)
    return log_normalize(pred), log_normalize(real), labels, genes, rng


def _plain(seed: int, layout: Callable = sp.csr_matrix, **options):
    pred, real, labels, genes, _ = make_pair(seed, **options)
    return make_adata(layout(pred), labels, genes), make_adata(layout(real), labels, genes)


def csr():
    return _plain(1)


def csc():
    return _plain(2, sp.csc_matrix)


def dense():
    return _plain(3, np.asarray)


def float64():
    pred, real, labels, genes, _ = make_pair(4)
    return (
        make_adata(sp.csr_matrix(np.log1p(np.expm1(pred.astype(np.float64)))), labels, genes),
        make_adata(np.log1p(np.expm1(real.astype(np.float64))), labels, genes),
    )


def ties():
    """Values from a handful of levels: nearly everything is tied."""
    pred, real, labels, genes, _ = make_pair(5)
    return tuple(make_adata(sp.csr_matrix(np.round(x * 1.3) / np.float32(1.3)), labels, genes) for x in (pred, real))


def one_sided():
    """Genes at zero in the controls or in a perturbation alone (infinite fold changes), or everywhere."""
    pred, real, labels, genes, rng = make_pair(6)
    names = np.array(labels)
    for X in (pred, real):
        X[:, :3] = 0
        X[names == CONTROL, 3:9] = 0
        for p in np.unique(names):
            X[np.ix_(names == p, rng.choice(50, 5, replace=False))] = 0
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def long_ties():
    """Long lists of significant genes, cut among infinite fold changes: the peer's sort leaves those in no order."""
    pred, real, labels, genes, rng = make_pair(24, n_genes=150, strength=2.0)
    names = np.array(labels)
    for X in (pred, real):
        X[np.ix_(names == CONTROL, rng.choice(150, 60, replace=False))] = 0
        for p in np.unique(names):
            X[np.ix_(names == p, rng.choice(150, 40, replace=False))] = 0
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def same_cells_predicted():
    """One set of cells is the answer to every perturbation."""
    pred, real, labels, genes, _ = make_pair(65)
    for start in range(60, len(labels), 20):
        pred[start : start + 20] = real[60:80]
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def empty_prediction():
    """Nothing but zeros, which may be counts or log1p of them."""
    pred, real, labels, genes, _ = make_pair(25)
    return make_adata(sp.csr_matrix(pred * 0), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def one_gene():
    pred, real, labels, _, _ = make_pair(26)
    gene = [sorted(set(labels))[0]]  # and it is a target
    return make_adata(sp.csr_matrix(pred[:, :1]), labels, gene), make_adata(sp.csr_matrix(real[:, :1]), labels, gene)


def large_groups():
    """Groups whose p-values leave single precision."""
    return _plain(27, n_controls=400, per_pert=150, n_genes=30, n_perts=3)


def one_cell():
    pred, real, labels, genes, _ = make_pair(7)
    names = np.array(labels)
    keep = np.ones(len(names), bool)
    for p in np.unique(names)[:3]:
        if p != CONTROL:
            keep[np.flatnonzero(names == p)[1:]] = False
    labels = [str(v) for v in names[keep]]
    return make_adata(sp.csr_matrix(pred[keep]), labels, genes), make_adata(sp.csr_matrix(real[keep]), labels, genes)


def different_cells():
    """Other numbers of cells, in another order, than the truth's."""
    pred, real, labels, genes, rng = make_pair(8)
    rows = rng.permutation(len(labels))[: int(0.8 * len(labels))]
    return (
        make_adata(sp.csr_matrix(pred[rows]), [labels[i] for i in rows], genes),
        make_adata(sp.csr_matrix(real), labels, genes),
    )


def no_de():
    return _plain(9, strength=0.0)


def no_de_predicted():
    _, real, labels, genes, rng = make_pair(10)
    controls = real[np.array(labels) == CONTROL]
    pred = np.concatenate([controls, controls[rng.integers(0, len(controls), len(labels) - len(controls))]])
    return make_adata(sp.csr_matrix(pred), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def equal_to_truth():
    _, real, labels, genes, _ = make_pair(11)
    return make_adata(sp.csr_matrix(real), labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def control_mean():
    _, real, labels, genes, _ = make_pair(12)
    names = np.array(labels)
    pred = real.copy()
    pred[names != CONTROL] = real[names == CONTROL].mean(axis=0)
    return make_adata(pred, labels, genes), make_adata(sp.csr_matrix(real), labels, genes)


def mean_effect():
    """Every cell of a perturbation is that perturbation's true mean."""
    _, real, labels, genes, _ = make_pair(13)
    names = np.array(labels)
    pred = real.copy()
    for p in np.unique(names):
        if p != CONTROL:
            pred[names == p] = real[names == p].mean(axis=0)
    return make_adata(pred, labels, genes), make_adata(real, labels, genes)


def _counts(seed: int, dtype, layout):
    rng = np.random.default_rng(seed)
    pred, real, labels, genes, _ = make_pair(seed)
    out = []
    for X in (pred, real):
        counts = np.round(np.expm1(X) * rng.uniform(0.05, 0.2, (len(labels), 1))).astype(dtype)
        out.append(make_adata(layout(counts), labels, genes))
    return tuple(out)


def counts_csr():
    return _counts(14, np.float32, sp.csr_matrix)


def counts_dense_int():
    return _counts(15, np.int64, np.asarray)


def counts_csc():
    return _counts(16, np.float32, sp.csc_matrix)


def counts_float64():
    return _counts(17, np.float64, sp.csr_matrix)


def float16():
    pred, real, labels, genes, _ = make_pair(18)
    return make_adata(pred.astype(np.float16), labels, genes), make_adata(real.astype(np.float16), labels, genes)


def category_order():
    """Categories in an order of their own: the ceiling's random stream follows it."""
    pred, real, labels, genes, _ = make_pair(19)
    order = sorted(set(labels), reverse=True)
    return (
        make_adata(sp.csr_matrix(pred), labels, genes),
        make_adata(sp.csr_matrix(real), labels, genes, categories=order),
    )


def two_perturbations():
    return _plain(20, n_perts=2)


def three_perturbations():
    return _plain(23, n_perts=3)


def one_perturbation():
    return _plain(21, n_perts=1)


def many_perturbations():
    return _plain(22, n_perts=30, per_pert=12, n_genes=70)


PAIRS = {
    f.__name__: f
    for f in (
        csr, csc, dense, float64, ties, one_sided, one_cell, different_cells, no_de, no_de_predicted, equal_to_truth,
        control_mean, mean_effect, counts_csr, counts_dense_int, counts_csc, counts_float64, float16, category_order,
        two_perturbations, three_perturbations, one_perturbation, many_perturbations, long_ties, same_cells_predicted,
        empty_prediction, one_gene, large_groups,
    )
}  # fmt: skip


def write_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write every pair once; return name -> (pred, real)."""
    out = {}
    for name, make in PAIRS.items():
        pred, real = make()
        paths = folder / f"{name}_pred.h5ad", folder / f"{name}_real.h5ad"
        pred.write_h5ad(paths[0])
        real.write_h5ad(paths[1])
        out[name] = paths
    return out
