"""The mean-variance plot with the selected genes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from vcelltools.io.atomic import atomic_file
from vcelltools.pipelines.hvg import HvgResult

_LABELLED = 12


def plot_hvg(result: HvgResult, fpath: str | os.PathLike, *, force: bool = False) -> Path:
    """Write a PNG of variance against mean (both of the counts, log scale), selected genes marked, best ones named."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mean, variance = result.columns["means"], result.columns["variances"]
    if "variances_norm" not in result.columns and "dispersions" in result.columns:
        mean, variance = np.abs(mean), np.abs(variance)
    shown = (mean > 0) & (variance > 0)
    chosen = result.columns["highly_variable"] & shown
    rest = shown & ~chosen
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.scatter(mean[rest], variance[rest], s=3, color="#9aa5b1", linewidths=0, label=f"other genes ({rest.sum():,})")
    ax.scatter(mean[chosen], variance[chosen], s=5, color="#c2410c", linewidths=0, label=f"selected ({chosen.sum():,})")
    edge = np.array([mean[shown].min(), mean[shown].max()]) if shown.any() else np.array([0.1, 1.0])
    ax.plot(edge, edge, color="#1f2937", lw=0.8, ls="--", label="Poisson: variance = mean")
    for g in result.order[:_LABELLED]:
        if shown[g]:
            ax.annotate(
                str(result.genes[g]), (mean[g], variance[g]), fontsize=6, xytext=(3, 2), textcoords="offset points"
            )
    ax.set(xscale="log", yscale="log", xlabel="mean count", ylabel="variance of counts")
    ax.set_title(
        f"{len(result.order):,} of {len(result.genes):,} genes by {result.settings['flavor']}, {result.n_cells:,} cells"
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    with atomic_file(fpath, force=force) as tmp:
        figure.savefig(tmp, format="png")
    return Path(fpath)
