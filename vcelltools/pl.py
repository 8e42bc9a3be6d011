"""Plots of results: each function takes a result and returns matplotlib axes.

A function draws on ``ax`` if it is given. Otherwise it makes a new figure, outside pyplot's list of open figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.names import show
from vcelltools.selection.plot import name_points

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from vcelltools.differential.de import DeResult
    from vcelltools.files.qc import QcResult
    from vcelltools.scoring.result import Result
    from vcelltools.selection.hvg import HvgResult

_GREY, _RED, _BLUE = "#9aa5b1", "#c2410c", "#0068a8"
_LABELLED = 10
_SMALLEST_P = 1e-300


def _get_axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def hvg(result: HvgResult | pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the variance of every gene against its mean; mark the selected genes and name the best ones.

    Parameters
    ----------
    result
        The result of :func:`vcelltools.hvg`, or an ``HvgResult``.

    Raises
    ------
    UsageError
        Where a frame has no columns of means and variances.

    Examples
    --------
    >>> import vcelltools as vc
    >>> axes = vc.pl.hvg(vc.hvg("atlas.h5ad", top=20))
    >>> axes.get_xlabel()
    'mean'
    """
    frame: Any = result.to_frame() if hasattr(result, "to_frame") else result
    if not {"means", "variances", "highly_variable"} <= set(frame):
        raise UsageError(
            "the frame has no columns means, variances and highly_variable", hint="pass what vc.hvg returned"
        )
    ax = _get_axes(ax)
    mean, variance = frame["means"].to_numpy(), frame["variances"].to_numpy()
    shown = (mean > 0) & (variance > 0)
    chosen = frame["highly_variable"].to_numpy(bool) & shown
    rest = shown & ~chosen
    ax.scatter(mean[rest], variance[rest], s=4, color=_GREY, linewidths=0, label=f"other genes ({rest.sum():,})")
    ax.scatter(mean[chosen], variance[chosen], s=7, color=_RED, linewidths=0, label=f"selected ({chosen.sum():,})")
    ax.set(xscale="log", yscale="log", xlabel="mean", ylabel="variance")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    rank = frame["highly_variable_rank"].to_numpy() if "highly_variable_rank" in frame else -variance
    best = np.flatnonzero(chosen)[np.argsort(rank[chosen], kind="stable")][:_LABELLED]
    name_points(ax, [str(frame.index[i]) for i in best], mean[best], variance[best])
    return ax


def volcano(
    result: DeResult, perturbation: str, *, context: str | None = None, fdr: float = 0.05, ax: Axes | None = None
) -> Axes:
    """Draw log2 fold changes against p-values of one perturbation; infinite fold changes are drawn at the edges.

    Parameters
    ----------
    result
        The result of :func:`vcelltools.de`.
    context
        The context, if there are several.
    fdr
        Genes below this adjusted p are marked.

    Raises
    ------
    UsageError
        Where there is no such perturbation or context.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.de("atlas.h5ad")
    >>> vc.pl.volcano(result, result.perturbations[0]).get_ylabel()
    '−log10 p'
    """
    rows = [
        i
        for i, p in enumerate(result.perturbations)
        if p == perturbation and (context is None or result.contexts is None or result.contexts[i] == context)
    ]
    if len(rows) != 1:
        known = ", ".join(dict.fromkeys(result.perturbations[:8]))
        what = "several contexts have" if rows else "there is no"
        raise UsageError(
            f"{what} perturbation {perturbation!r}", hint=f"context chooses one; perturbations: {known}, …"
        )
    change, p, adjusted = (x[rows[0]] for x in (result.log2fc_pg, result.p_pg, result.fdr_pg))
    known = np.isfinite(p)
    limit = max(1.0, float(np.abs(change[known & (np.abs(change) < 20)]).max(initial=1.0)) * 1.1)
    out = known & (np.abs(change) > limit)
    x, y = np.clip(change, -limit, limit), -np.log10(np.maximum(p, _SMALLEST_P))
    found = known & (adjusted < fdr)
    ax = _get_axes(ax)
    ax.scatter(x[known & ~found], y[known & ~found], s=5, color=_GREY, linewidths=0, label="other genes")
    ax.scatter(x[found], y[found], s=8, color=_BLUE, linewidths=0, label=f"FDR < {fdr:g} ({found.sum():,})")
    if out.any():
        ax.scatter(x[out], y[out], s=14, marker="D", facecolors="none", edgecolors=_RED, linewidths=0.7,
                   label=f"beyond the axis ({out.sum():,})")  # fmt: skip
    ax.axvline(0, color=_GREY, lw=0.6)
    title = show(perturbation) + (f" in {show(context)}" if context else "")
    ax.set(xlabel="log2 fold change of mean CP10K", ylabel="−log10 p")
    ax.set_title(title, parse_math=False)
    ax.legend(frameon=False, fontsize=8)
    best = np.flatnonzero(found)[np.argsort(p[found], kind="stable")][:_LABELLED]
    name_points(ax, [str(result.genes[i]) for i in best], x[best], y[best])
    return ax


def discrimination(result: Result, *, context: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the distance of each predicted effect (rows) to each true one (columns), ranked within each row.

    A good prediction has a dark diagonal, because each prediction is closest to its own truth.

    Parameters
    ----------
    result
        The result of :func:`vcelltools.score`.
    context
        The context, if there are several.

    Raises
    ------
    UsageError
        Where there is no such context.
    DataError
        Where the score has no discrimination between perturbations.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.pl.discrimination(vc.score("pred.h5ad", "truth.h5ad")).get_ylabel()
    'predicted effect of'
    """
    from vcelltools.scoring.report.data import make_report_data

    panels = make_report_data(result).panels
    if context is not None:
        panels = [p for p in panels if p.context == context]
    if len(panels) != 1:
        raise UsageError(f"{len(panels)} contexts are named {context!r}", hint="context names one")
    panel = panels[0]
    if panel.distance_pp is None:
        raise DataError("the score holds no distances between perturbations", hint="score more than one perturbation")
    ax = _get_axes(ax)
    d = panel.distance_pp
    rank = np.argsort(np.argsort(d, axis=1, kind="stable"), axis=1) / max(d.shape[1] - 1, 1)
    shown = ax.imshow(rank, cmap="viridis", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    ax.figure.colorbar(shown, ax=ax, label="rank within the row (0: closest)", shrink=0.8)
    n = len(panel.labels)
    step = max(1, -(-n // 40))
    at = np.arange(0, n, step)
    names = [show(panel.labels[i]) for i in at]
    ax.set_xticks(at, names, rotation=90, fontsize=6, parse_math=False)
    ax.set_yticks(at, names, fontsize=6, parse_math=False)
    own = int((np.diagonal(d) <= d.min(axis=1)).sum())
    ax.set(xlabel="true effect of", ylabel="predicted effect of")
    ax.set_title(f"{own:,} of {n:,} closest to their own truth ({panel.distance_name})", fontsize=9)
    return ax


def qc(result: QcResult, *, ax: Axes | None = None) -> Axes:
    """Draw the number of genes of every cell against its number of counts; mark flagged cells.

    Parameters
    ----------
    result
        The result of :func:`vcelltools.qc`.

    Raises
    ------
    DataError
        Where no cell has a count.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.pl.qc(vc.qc("atlas.h5ad")).get_xlabel()
    'counts'
    """
    counts, genes = result.columns["total_counts"], result.columns["n_genes_by_counts"]
    good = result.columns["qc_pass"].astype(bool)
    shown = (counts > 0) & (genes > 0)
    if not shown.any():
        raise DataError("no cell has a count")
    ax = _get_axes(ax)
    for mask, color, label in ((good & shown, _GREY, "no flag"), (~good & shown, _RED, "flagged")):
        ax.scatter(counts[mask], genes[mask], s=4, color=color, linewidths=0, label=f"{label} ({mask.sum():,})")
    ax.set(xscale="log", yscale="log", xlabel="counts", ylabel="genes with a count")
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    return ax
