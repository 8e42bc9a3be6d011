"""What the report shows of a result: the same page for the 2025 and the 2026 rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.scoring.gaming import Check, Evidence, check_gaming
from vcelltools.scoring.metrics26 import EXPRESSION, LOWER_IS_BETTER, METRICS
from vcelltools.scoring.report import Panel, ReportComponent, ReportData

if TYPE_CHECKING:
    from vcelltools.scoring.result import Result
    from vcelltools.scoring.result26 import ContextScore, Score2026
    from vcelltools.scoring.sides import Side

# metric -> (title, what it says)
WORDS = {
    "pds_cosine": ("Discrimination", "Is each predicted effect closer to its own true effect than to the others'?"),
    EXPRESSION: ("Expression error", "Squared error of the mean profile, relative to the size of the true effects."),
    "de_wilcoxon_direction_fidelity_yield_raw": (
        "Direction of calls",
        "Of the genes called significant, the share whose change has the right sign; too few calls cost as well.",
    ),
    "de_wilcoxon_direction_reach_raw": (
        "Depth of the ranking",
        "How far down the ranked true genes the signs stay at least 90 % right.",
    ),
    "de_wilcoxon_sig_jaccard": ("Overlap of significant genes", "Shared significant genes over all significant ones."),
    "de_wilcoxon_lfc_nmae": ("Fold-change error", "Error of log2 fold changes over the significant genes."),
    "mae": ("Mean absolute error", "Error of mean expression over all genes."),
    "mse": ("Mean squared error", "Squared error of mean expression over all genes."),
    "discrimination_score_l1": ("Discrimination", "Is each predicted effect closest to its own true one (L1)?"),
    "overlap_at_N": ("Overlap of DE genes", "Shared genes among the top changed ones, as many as the truth has."),
    "pearson_delta": ("Correlation of effects", "Pearson correlation of predicted and true changes."),
}


def from_2026(result: Score2026, *, prediction: str = "prediction", truth: str = "truth") -> ReportData:
    """Return the page of a scoring by the 2026 rules."""
    components = []
    for m, c in result.components.items():
        title, says = WORDS[m]
        components.append(
            ReportComponent(
                name=m, title=title, says=says, value=c.value, baseline=c.baseline, ceiling=c.ceiling, score=c.score,
                score_unclipped=c.score_unclipped, ci95=c.ci95, n=c.n, lower_is_better=m in LOWER_IS_BETTER,
            )
        )  # fmt: skip
    first = result.contexts[0]
    cells = int(sum(c.pred.size_k[1:].sum() for c in result.contexts))
    facts = [
        ("Perturbations", f"{sum(len(c.labels) for c in result.contexts):,}"),
        ("Genes", f"{len(first.genes):,}"),
        ("Predicted cells", f"{cells:,}"),
        ("Rank test", f"{'with' if result.continuity else 'without'} continuity correction"),
    ]
    if first.context:
        facts.insert(0, ("Contexts", ", ".join(c.context for c in result.contexts)))
    return ReportData(
        prediction=prediction, truth=truth, rules=f"2026 challenge rules ({result.rules.version})",
        zero="the mean response", one="a replicate of the experiment", avg_score=result.avg_score,
        components=components, panels=[_panel_2026(c) for c in result.contexts], checks=_merge_checks(result.contexts),
        warnings=list(result.warnings), problem=result.problem, facts=facts,
    )  # fmt: skip


def _panel_2026(c: ContextScore) -> Panel:
    per = [m for m in METRICS if m != EXPRESSION]
    values = np.column_stack([c.values.per[m] for m in per])
    ratio = np.divide(c.values.error_p, c.values.distance_p, out=np.full(len(c.labels), np.nan),
                      where=c.values.distance_p > 0)  # fmt: skip
    real, pred = c.real.de, c.pred.de
    return Panel(
        context=c.context, labels=c.labels, genes=c.genes[real.genes],
        columns=[*[WORDS[m][0] for m in per], "Expression error"], values_pm=np.column_stack([values, ratio]),
        real_lfc_ph=real.lfc_ph, pred_lfc_ph=pred.lfc_ph, real_padj_ph=real.padj_ph, pred_padj_ph=pred.padj_ph,
        distance_pp=c.values.distance_pp, quality_p=-np.diagonal(c.values.distance_pp),
    )  # fmt: skip


def _merge_checks(contexts: tuple[ContextScore, ...]) -> list[Check]:
    out = []
    for c in contexts:
        for k in c.checks:
            name = f"{k.name} ({c.context})" if c.context else k.name
            out.append(Check(**{**k.__dict__, "name": name}))
    return sorted(out, key=lambda k: not k.flagged)


def get_checks_2025(
    result: Result, real_spread_p: np.ndarray | None = None, pred_spread_p: np.ndarray | None = None
) -> list[Check]:
    """Return the gaming panel of a scoring by the other rules, from the pseudobulks and tables of both sides.

    The spreads between cells, from :func:`measure_spread`, cost a pass over each file and may be left out.
    """
    pair = result.pair
    real, pred = pair.real_de, pair.pred_de
    return check_gaming(
        Evidence(
            real_pg=np.asarray(pair.real_pg, float),
            pred_pg=np.asarray(pair.pred_pg, float),
            real_control_g=np.asarray(pair.real_control_g, float),
            pred_control_g=np.asarray(pair.pred_control_g, float),
            real_spread_p=real_spread_p,
            pred_spread_p=pred_spread_p,
            real_significant_p=None if real is None or pred is None else real.significant_pg.sum(axis=1),
            pred_significant_p=None if real is None or pred is None else pred.significant_pg.sum(axis=1),
        )
    )


def measure_spread(side: Side, pert_col: str, *, layer: str | None = None) -> np.ndarray | None:
    """Return (p,) the variance between the cells of each perturbation of a file, summed over genes, of log1p values.

    Counts are scaled to the file's median library first. None where the file is not at hand (an AnnData in memory, or
    a truth pack), or is stored by genes.
    """
    from vcelltools.io import open_dataset
    from vcelltools.scoring.genemajor import read_ahead
    from vcelltools.stream import get_threads

    if not Path(side.label).is_file():
        return None
    k, n_genes = len(side.labels), len(side.genes)
    at = {label: i for i, label in enumerate(side.labels)}
    squares, sizes = np.zeros(k), np.zeros(k)
    sums = np.zeros(k * n_genes)
    with open_dataset(side.label, layer=layer) as data:
        if data.matrix.layout == "csc" or getattr(data.matrix, "axis", 0) == 1:
            return None
        code = np.array([at.get(v, -1) for v in data.obs.column(pert_col).labels()])
        for rows, _ in read_ahead(data, get_threads(None)):
            n = len(rows.indptr) - 1
            values = rows.data.astype(np.float64)
            own = code[rows.row_start : rows.row_start + n]
            of_row = np.repeat(np.arange(n), np.diff(rows.indptr))
            if side.scale == "counts":
                library = np.bincount(of_row, weights=values, minlength=n)
                middle = side.median_library or float(np.median(library[library > 0]))
                values *= (middle / np.where(library > 0, library, 1.0))[of_row]
                np.log1p(values, out=values)
            keep = own[of_row] >= 0
            group, value = own[of_row][keep], values[keep]
            squares += np.bincount(group, weights=value**2, minlength=k)
            np.add.at(sums, group * n_genes + rows.indices[keep], value)
            sizes += np.bincount(own[own >= 0], minlength=k)
    n_k = np.maximum(sizes, 1)
    spread = squares / n_k - ((sums.reshape(k, n_genes) / n_k[:, None]) ** 2).sum(axis=1)
    return np.maximum(spread, 0.0)[side.perts]


def from_2025(result: Result, *, prediction: str = "", truth: str = "") -> ReportData:
    """Return the page of a scoring by our, cell-eval's or the 2025 rules."""
    nan = float("nan")
    components = []
    for m, c in result.components.items():
        title, says = WORDS.get(m, (m, ""))
        components.append(
            ReportComponent(
                name=m, title=title, says=says, value=_or_nan(c.value), baseline=_or_nan(c.baseline),
                ceiling=float(c.best), score=_or_nan(c.score), score_unclipped=_or_nan(c.score_unclipped),
                ci95=c.ci95, n=c.n, lower_is_better=c.best == 0, replicate=c.ceiling,
            )
        )  # fmt: skip
    pert_col, layer = str(result.settings.get("pert_col", "target_gene")), result.settings.get("layer")
    spreads: list[np.ndarray | None] = [None, None]
    if not result.from_pack:
        spreads = [measure_spread(side, pert_col, layer=layer) for side in (result.real, result.pred)]
    checks = sorted(get_checks_2025(result, *spreads), key=lambda k: not k.flagged)
    facts = [
        ("Perturbations", f"{len(result.table.names):,}"),
        ("Genes", f"{len(result.pair.genes):,}"),
        ("Profile", result.profile),
        ("Numbers of", result.source),
    ]
    if result.n_without_de is not None:
        facts.append(("Without a true DE gene", f"{result.n_without_de:,}"))
    return ReportData(
        prediction=prediction or Path(result.pred.label).name, truth=truth or Path(result.real.label).name,
        rules={"ours": "vcelltools rules", "vcc2025": "2025 challenge rules"}.get(result.compat, result.compat),
        zero="the mean of all perturbations", one="a perfect prediction",
        avg_score=nan if result.avg_score is None else result.avg_score, components=components,
        panels=[_panel_2025(result)], checks=checks, warnings=list(result.warnings), facts=facts,
    )  # fmt: skip


def _or_nan(v: float | None) -> float:
    return float("nan") if v is None else float(v)


def _panel_2025(result: Result) -> Panel:
    pair = result.pair
    names = list(result.table.columns)
    values = np.column_stack([np.asarray(result.table.values(k), float) for k in names])
    real, pred = np.asarray(pair.real_delta_pg, float), np.asarray(pair.pred_delta_pg, float)
    norm = np.linalg.norm(pred, axis=1)[:, None] * np.linalg.norm(real, axis=1)[None, :]
    cosine = np.divide(pred @ real.T, norm, out=np.zeros((len(pred), len(real))), where=norm > 0)
    a, b = pair.real_de, pair.pred_de
    return Panel(
        context="", labels=np.array(pair.names, dtype=object), genes=pair.genes,
        columns=[WORDS.get(k, (k, ""))[0] for k in names], values_pm=values,
        real_lfc_ph=None if a is None or b is None else a.log2fc_pg,
        pred_lfc_ph=None if a is None or b is None else b.log2fc_pg,
        real_padj_ph=None if a is None or b is None else np.nan_to_num(a.fdr_pg, nan=1.0),
        pred_padj_ph=None if a is None or b is None else np.nan_to_num(b.fdr_pg, nan=1.0),
        distance_pp=1 - cosine, quality_p=np.diagonal(cosine),
    )  # fmt: skip
