"""A small simulated atlas as a store: quick to build, with effects strong enough to learn."""

from __future__ import annotations

from pathlib import Path

from vcelltools.pipelines.simulate import simulate
from vcelltools.pipelines.store import build_store


def build_small_store(dpath: Path, *, seed: int = 3, name: str = "sim") -> Path:
    """Write ``sim.h5ad`` (4,000 cells × 200 genes, 12 perturbations, 3 lines) and ``stores/sim``; return the latter."""
    made = simulate(
        out=dpath / f"{name}.h5ad", cells=4000, genes=200, perturbations=12, cell_lines=3, batches=2, seed=seed,
        control_share=0.2, inert=0.0, depth=2000,
    )  # fmt: skip
    import h5py

    with h5py.File(made.out) as f:
        genes = f["var"][f["var"].attrs["_index"]].asstr()[:]
    result = build_store(
        made.out, basis=genes[:60].tolist(), out=dpath / "stores", name=name, pert_col=made.pert_col,
        control=[made.control], cell_line_col="cell_line", group_by=["batch"], gene_name_col="index",
    )  # fmt: skip
    return result.path
