"""``spatial report``: one page with the summary table and maps."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.frame import read_frame
from vcelltools.io.textfile import checking
from vcelltools.io.write.atomic import write_text
from vcelltools.spatial.files import SUMMARY

if TYPE_CHECKING:
    from vcelltools.spatial._run import Run

_HEADS = {
    "gene": "",
    "cluster": "",
    "n_cells": "",
    "n_nonzero": "coefficients that are not 0",
    "r2_in": "R² on the cells of the fit",
    "r2_out": "R² on held-out blocks",
    "r2_tf": "the same with TFs only",
    "r2_own": "the same where a cell receives only its own ligands",
    "gain": "r2_out above the better of r2_tf and r2_own",
    "gain_error": "its standard error over the blocks",
    "p": "how often permuted senders gain as much",
    "q": "p adjusted by Benjamini-Hochberg",
    "kept": "whether the score is high enough for the coefficients to be used",
    "r2_cluster": "R² of the coefficients of the cluster",
    "r2_blind": "R² of a network that sees neither place nor neighbours",
    "r2_cell": "R² of the coefficients by cell",
    "per_cell": "whether those are used",
}
"""The columns of the summary, and what they are where the text above the table does not tell."""
_OPTIONAL = ("gain_error", "r2_cluster", "r2_blind", "r2_cell", "per_cell")  # not in every run
_NOTHING = "–"
_MOST_ROWS, _MOST_GENES, _MOST_CHANGES = 60, 3, 4


@dataclass(frozen=True)
class Map:
    """A picture as base64 PNG, and its caption."""

    png: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and maps."""

    title: str
    text: str
    maps: list[Map] = field(default_factory=list)


def _draw(plot: Any) -> str:
    """Return the drawing of ``plot(axes)`` as a base64 PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot(axes)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(out.getvalue()).decode()


def draw_map(
    xy: np.ndarray, values: np.ndarray, caption: str, *, signed: bool = False, top: float | None = None
) -> Map:
    """Return a map of one value per cell; signed values are coloured around 0."""
    size = max(1.0, min(30.0, 24_000.0 / len(xy)))  # cells that touch, nearly

    def plot(axes: Any) -> None:
        high = top if top is not None else float(np.abs(values).max(initial=0.0)) or 1.0
        shown = axes.scatter(
            xy[:, 0], xy[:, 1], c=values, s=size, linewidths=0, cmap="RdBu_r" if signed else "viridis",
            vmin=-high if signed else 0.0, vmax=high,
        )  # fmt: skip
        axes.set_aspect("equal")
        axes.set_axis_off()
        axes.figure.colorbar(shown, ax=axes, shrink=0.7)

    return Map(_draw(plot), caption)


def draw_bars(names: list[str], values: np.ndarray, caption: str) -> Map:
    """Return a bar chart with one bar per cell type."""

    def plot(axes: Any) -> None:
        axes.barh(range(len(names)), values, color="#4477aa")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.axvline(0, color="#222", linewidth=0.8)
        axes.set(xlabel="mean effect", ylabel="cell type")
        axes.invert_yaxis()

    return Map(_draw(plot), caption)


def write_report(
    run: Run,
    out: str | os.PathLike,
    *,
    desired: Mapping[str, float] | None = None,
    response: str = "derivative",
    hops: int = 4,
    force: bool = False,
) -> Path:
    """Write one HTML page: the summary, maps of the targets with the largest gains, and one perturbation.

    Parameters
    ----------
    desired
        The perturbation to show, if any.
    """
    from jinja2 import Environment, PackageLoader

    rows = _read_summary(run)
    heads = [h for h in _HEADS if any(_say(r.get(h), run, h) != _NOTHING for r in rows)]
    sections = [_show_target(run, g) for g in _choose_targets(run, rows)]
    warnings = []
    if desired:
        p = run.perturb(desired, hops=hops, response=response)
        warnings += list(p.warnings)
        sections.append(_show_perturbation(run, p))
    if rows and all(r["r2_out"] is None for r in rows):
        warnings.append("R² was not measured on held-out cells, and R² in the sample says little about new cells")
    text = Environment(loader=PackageLoader("vcelltools.spatial", "."), autoescape=True)
    html = text.get_template("report.html.j2").render(
        data=run.tissue.where, name=Path(run.tissue.where).name, n_cells=f"{run.tissue.n_cells:,}",
        n_clusters=len(run.tissue.labels), n_genes=len(run.genes), warnings=warnings, heads=heads, sections=sections,
        meanings={h: _HEADS[h] for h in heads if _HEADS[h]},
        rows=[[_say(r.get(h), run, h) for h in heads] for r in rows[:_MOST_ROWS]],
    )  # fmt: skip
    return write_text(out, html, force=force)


def _read_summary(run: Run) -> list[dict[str, Any]]:
    """Return the rows of the summary, largest gains first; none for a run of another program."""
    path = run.folder / SUMMARY
    if not path.exists():
        return []
    table = read_frame(path, what="a summary")
    with checking(path):
        rows = table.select([h for h in _HEADS if h not in _OPTIONAL or h in table.column_names]).to_pylist()
        return sorted(rows, key=lambda r: (r["gain"] is None, -(r["gain"] or 0.0), r["gene"], r["cluster"]))


def _choose_targets(run: Run, rows: list[dict[str, Any]]) -> list[str]:
    kept = [r["gene"] for r in rows if r["kept"]] or run.genes
    return [g for g in dict.fromkeys(kept) if g in run.genes][:_MOST_GENES]


def _say(value: Any, run: Run, head: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _NOTHING
    if head == "cluster":
        return run.tissue.labels.get(value, str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{round(value, 3) + 0.0:.3f}"  # + 0.0 drops the sign of zero
    return f"{value:,}" if isinstance(value, int) else str(value)


def _show_target(run: Run, gene: str) -> Section:
    """Return maps of a target's expression, its strongest ligand, and the effect of that ligand by cell and type."""
    tissue, betas = run.tissue, run.betas(gene)
    xy, x = tissue.xy, tissue.expression([gene])[:, 0]
    maps = [draw_map(xy, x, f"{gene}: expression")]
    table = run.splash(gene)
    ligands = betas.modulators.ligands
    text = "No ligand has a coefficient."
    if ligands:
        effects = {g: np.asarray(table.columns[f"beta_{g}"]) for g in ligands}
        best = max(ligands, key=lambda g: float(np.abs(effects[g]).mean()))
        W = run.receiver.receive(tissue.expression([best]), [best])[:, 0]
        maps.append(draw_map(xy, W, f"{best}: received"))
        maps.append(draw_map(xy, effects[best], f"{best} on {gene}: effect by cell", signed=True))
        numbers = sorted(tissue.labels)
        means = np.array([effects[best][tissue.clusters == c].mean() for c in numbers])
        maps.append(draw_bars([tissue.labels[c] for c in numbers], means, f"{best} on {gene}: effect by cell type"))
        text = f"{len(ligands)} ligands have coefficients; {best} has the largest mean effect."
    return Section(gene, text, maps)


def _show_perturbation(run: Run, p: Any) -> Section:
    """Return maps of the genes that respond most: before, after, and change."""
    delta, xy = p.delta, run.tissue.xy
    size = np.abs(delta).mean(0)
    others = [i for i in np.argsort(-size, kind="stable") if p.genes[i] not in p.desired and size[i] > 0]
    maps = []
    for i in others[:_MOST_CHANGES]:
        before, after = p.change.before[:, i], p.simulated[:, i]
        top = float(max(before.max(), after.max())) or 1.0
        maps.append(draw_map(xy, before, f"{p.genes[i]}: before", top=top))
        maps.append(draw_map(xy, after, f"{p.genes[i]}: after", top=top))
        maps.append(draw_map(xy, delta[:, i], f"{p.genes[i]}: change", signed=True))
    said = ", ".join(f"{g} = {v:g}" for g, v in p.desired.items())
    text = f"{len(others)} other genes change." if others else "No other gene changes."
    return Section(f"Perturbation: {said}", text, maps)
