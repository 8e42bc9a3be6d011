"""The calibration page of guide assignment, one HTML file without external resources."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.write.atomic import write_text
from vcelltools.names import show

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.screens.thresholds import Fits

MOST_DRAWN = 240
"""Maximum number of histograms on a page."""
_PER_OCTAVE = 2
_WIDTH, _HEIGHT = 160.0, 56.0


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram, in the units of the drawing."""

    x: float
    y: float
    width: float
    height: float
    above: bool


@dataclass(frozen=True)
class Drawing:
    """The histogram of one guide's counts."""

    name: str
    target: str
    said: str
    own: bool
    bars: list[Bar]
    line: float
    ticks: list[tuple[float, str]]


def write_guide_page(
    frame: pd.DataFrame, summary: dict[str, Any], fits: Fits, out: str | os.PathLike, *, force: bool = False
) -> Path:
    """Write the page of an assignment.

    Parameters
    ----------
    frame
        The table of guides (:meth:`vcelltools.screens.assignment.GuideResult.guide_frame`).
    summary
        The summary of the assignment (``to_json``).
    fits
        The thresholds, in the order of the table.
    """
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("vcelltools.screens", "."),
        autoescape=True,
        finalize=lambda v: show(v) if type(v) is str else v,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    apart = _measure_gap(fits.params_gk, summary["method"])
    order = np.lexsort((np.arange(len(frame)), np.where(np.isnan(apart), -np.inf, apart)))
    rows = [
        [str(name), *_say_row(r)]
        for name, r in zip(frame.index[order].tolist(), frame.iloc[order].to_dict("records"), strict=True)
    ]
    html = env.get_template("page.html.j2").render(
        s=summary, rows=rows, drawings=[_draw(frame, fits, int(k)) for k in order[:MOST_DRAWN]],
        n_all=len(frame), width=_WIDTH, height=_HEIGHT,
    )  # fmt: skip
    return write_text(out, html, force=force)


def _measure_gap(p: np.ndarray, method: str) -> np.ndarray:
    """Return (g,) the distance between signal and background, in octaves of the counts; NaN without a fit."""
    if method == "mixture":
        return p[:, 3] - p[:, 1]
    with np.errstate(invalid="ignore"):
        return np.log2((1.0 + p[:, 3]) / (1.0 + p[:, 1]))


def _say_row(row: dict[str, Any]) -> list[str]:
    share = "–" if np.isnan(row["share"]) else f"{row['share']:.0%}"
    fitted = "own" if row["own_fit"] else "all guides"
    numbers = [f"{row[k]:,}" for k in ("cells_with_counts", "cells", "threshold")]
    return [str(row["target"]), *numbers, fitted, share]


def _draw(frame: pd.DataFrame, fits: Fits, k: int) -> Drawing:
    h, threshold = fits.histograms, int(fits.threshold_g[k])
    mine = h.over_gene == k
    count = np.concatenate([h.counts[0, h.offsets[k] : h.offsets[k + 1]], h.over_count[mine]])
    value = np.concatenate([np.arange(h.offsets[k + 1] - h.offsets[k]), h.over_value[mine]])
    value, count = value[(value > 0) & (count > 0)], count[(value > 0) & (count > 0)]
    n_bars = int(np.log2(max(value.max(initial=1), threshold)) * _PER_OCTAVE) + 1
    step = _WIDTH / n_bars
    place = np.floor(np.log2(value) * _PER_OCTAVE).astype(int)
    bars = []
    most = np.log1p(np.bincount(place, weights=count).max()) if len(value) else 1.0
    for at in np.unique(place).tolist():
        for above in (False, True):
            n = count[(place == at) & ((value >= threshold) == above)].sum()
            if n:
                tall = float(np.log1p(n) / most) * (_HEIGHT - 4)
                bars.append(Bar(at * step, _HEIGHT - tall, max(step - 0.6, 0.4), tall, above))
    ticks = [
        (float(np.log2(v)) * _PER_OCTAVE * step, f"{v:,}")
        for v in (1, 10, 100, 1000, 10_000)
        if np.log2(v) * _PER_OCTAVE <= n_bars
    ]
    return Drawing(
        name=str(frame.index[k]),
        target=str(frame["target"].iloc[k]),
        said=f"{int(frame['cells'].iloc[k]):,} cells with at least {threshold:,} counts",
        own=bool(fits.own_g[k]),
        bars=bars,
        line=float(np.log2(threshold)) * _PER_OCTAVE * step,
        ticks=ticks,
    )
