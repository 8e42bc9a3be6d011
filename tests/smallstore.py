"""A small simulated atlas as a store: quick to build, with effects strong enough to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vcelltools.simulation.simulate import simulate
from vcelltools.stores.building.make import build_store


def build_small_store(dpath: Path, *, seed: int = 3, name: str = "sim", basis: list[str] | None = None) -> Path:
    """Write ``sim.h5ad`` (4,000 cells × 200 genes, 12 perturbations, 3 lines) and ``stores/sim``; return the latter."""
    made = simulate(
        out=dpath / f"{name}.h5ad", cells=4000, genes=200, perturbations=12, cell_lines=3, batches=2, seed=seed,
        control_share=0.2, inert=0.0, depth=2000,
    )  # fmt: skip
    if basis is None:
        import anndata as ad

        adata = ad.read_h5ad(made.out)
        X = adata.X.toarray().astype("float64")
        X = np.log1p(1e4 * X / X.sum(axis=1, keepdims=True))
        basis = adata.var_names[np.argsort(-X.var(axis=0))][:60].tolist()  # the most variable first, as in a basis
    result = build_store(
        made.out, basis=basis, out=dpath / "stores", name=name, pert_col=made.pert_col,
        control=[made.control], cell_line_col="cell_line", group_by=["batch"], gene_name_col="index",
    )  # fmt: skip
    return result.path
