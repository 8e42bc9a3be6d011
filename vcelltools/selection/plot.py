"""Plot the variance of genes against their mean, with the selected genes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.io.write.atomic import atomic_file
from vcelltools.names import show
from vcelltools.selection.hvg import HvgResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import BboxBase

    from vcelltools.selection.pooled import PooledResult

_LABELLED = 12
_PLACES = ((-3, 2), (-16, 12), (-28, 24), (-40, 36), (3, 2), (3, -6), (16, 12), (16, -16), (28, -24))
"""Offsets of a name from its point in points of 1/72 inch, in the order in which they are tried."""


def name_points(ax: Axes, names: list[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write names beside their points, in order, clear of the legend and of each other; others are left out.

    Parameters
    ----------
    ax
        Axes with all their content.
    x, y
        (k,) coordinates of the points.
    """
    from matplotlib.text import Text

    ax.figure.canvas.draw()
    legend = ax.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    for name, at in zip(names, zip(x.tolist(), y.tolist(), strict=True), strict=True):
        for dx, dy in _PLACES:
            text = ax.annotate(
                show(name),
                at,
                fontsize=6,
                xytext=(dx, dy),
                textcoords="offset points",
                ha="right" if dx < 0 else "left",
                parse_math=False,
                annotation_clip=True,
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#5b6874"} if abs(dx) > 3 else None,
            )
            text.get_window_extent()  # places it; this box would include the line to the point
            box = Text.get_window_extent(text).expanded(1.05, 1.1)
            if _is_inside(box, ax.bbox) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _is_inside(box: BboxBase, frame: BboxBase) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def plot_hvg(result: HvgResult, fpath: str | os.PathLike, *, force: bool = False) -> Path:
    """Write a PNG of the variance against the mean of counts (log scale), marking the selected genes."""
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
    ax.set(xscale="log", yscale="log", xlabel="mean count", ylabel="variance of counts")
    hidden = len(shown) - int(shown.sum())
    without = f", {hidden:,} without variance left out" if hidden else ""
    ax.set_title(
        f"{len(result.order):,} of {len(result.genes):,} genes by {result.settings['flavor']}, {result.n_cells:,} cells"
        f"{without}",
        fontsize=10,
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    best = [int(g) for g in result.order[:_LABELLED] if shown[g]]
    name_points(ax, [result.genes[g] for g in best], mean[best], variance[best])
    with atomic_file(fpath, force=force) as tmp:
        figure.savefig(tmp, format="png")
    return Path(fpath)


def draw_analysis(result: PooledResult, fpath: str | os.PathLike) -> None:
    """Write a PNG of a pooled ranking: dispersions, the selected genes, and the share of variance between batches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    c, chosen = result.columns, result.columns["highly_variable"]
    rest, order = ~chosen & (result.n_positive > 0), result.order
    figure = Figure(figsize=(12, 14), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    ((spread, means), (cells, best), (shares, compared)) = figure.subplots(3, 2)
    x = np.log1p(c["means"])
    grey, red = "#9aa5b1", "#c2410c"
    spread.scatter(x[rest], c["dispersions"][rest], s=3, color=grey, linewidths=0, label=f"others ({rest.sum():,})")
    spread.scatter(x[chosen], c["dispersions"][chosen], s=5, color=red, linewidths=0, label=f"HVGs ({len(order):,})")
    spread.set(xlabel="log1p of the mean", ylabel="dispersion (variance / mean)", title="Dispersion by mean")
    spread.set_yscale("symlog", linthresh=0.1)
    spread.legend(frameon=False)
    means.hist(x[chosen], bins=50, color=red)
    means.set(xlabel="log1p of the mean", ylabel="HVGs", title="Means of the HVGs")
    cells.hist(100.0 * result.n_positive[chosen] / max(result.n_cells, 1), bins=50, range=(0, 100), color=red)
    cells.set(xlabel="% of the cells", ylabel="HVGs", title="Cells that express the HVGs")
    top = order[:20]
    best.barh(np.arange(len(top)), c["dispersions"][top], color=red)
    best.set_yticks(np.arange(len(top)), [show(result.genes[g]) for g in top], fontsize=7, parse_math=False)
    best.invert_yaxis()
    best.set(xlabel="dispersion", title="Top 20")
    share = c["between_share"]
    known = ~np.isnan(share)
    for mask, color, label in ((known, grey, "all genes"), (known & chosen, red, "HVGs")):
        shares.hist(share[mask], bins=40, range=(0, 1), density=bool(mask.any()), color=color, alpha=0.6, label=label)
    shares.set(xlabel="share of the variance between batches", ylabel="density", title="Variance between batches")
    shares.legend(frameon=False)
    assert result.normalised is not None
    a, b = result.counts.dispersion, result.normalised.dispersion
    compared.scatter(a[rest], b[rest], s=3, color=grey, linewidths=0)
    compared.scatter(a[chosen], b[chosen], s=5, color=red, linewidths=0)
    compared.set(xlabel="dispersion of counts", ylabel="dispersion of log1p-cp10k", title="Depth-normalised")
    compared.set_xscale("symlog", linthresh=0.1)
    figure.savefig(fpath, format="png")
