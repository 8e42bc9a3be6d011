"""Prepare a result for the report, which has the same page for all rule sets."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.write.atomic import write_text
from vcelltools.scoring.cell_eval.metrics import get_distances
from vcelltools.scoring.cell_eval.rules import TOPS
from vcelltools.scoring.cell_eval.score import CellEvalScore
from vcelltools.scoring.report.report import Panel, ReportComponent, ReportData, make_html
from vcelltools.scoring.vcc2026.metrics import EXPRESSION, METRICS

if TYPE_CHECKING:
    from vcelltools.scoring.calibrated.score import CalibratedScore
    from vcelltools.scoring.result import Result
    from vcelltools.scoring.vcc2026.score import Vcc2026Score

DISCRIMINATION = "discrimination_score_"
DISTANCES = {
    "l1": "L1 distance",
    "l2": "Euclidean distance",
    "cosine": "cosine distance",
    "matched": "L1 distance at equal length",
}


# metric -> (title, explanation)
WORDS = {
    "pds_cosine": ("Discrimination", "Is each predicted effect closer to its own true effect than to the others'?"),
    EXPRESSION: ("Expression error", "Squared error of the mean profile, relative to the size of the true effects."),
    "de_wilcoxon_direction_fidelity_yield_raw": (
        "Direction of calls",
        "Share of the genes called significant whose change has the right sign; too few calls lower it too.",
    ),
    "de_wilcoxon_direction_reach_raw": (
        "Depth of the ranking",
        "How far down the ranked true genes the signs stay at least 90 % right.",
    ),
    "de_wilcoxon_sig_jaccard": ("Overlap of significant genes", "Shared significant genes over all significant ones."),
    "de_wilcoxon_lfc_nmae": ("Fold-change error", "Error of log2 fold changes over the significant genes."),
    "mae": ("Mean absolute error", "Error of mean expression over all genes."),
    "mse": ("Mean squared error", "Squared error of mean expression over all genes."),
    "mae_delta": ("Mean absolute error of effects", "Error of the changes from the controls over all genes."),
    "mse_delta": ("Mean squared error of effects", "Squared error of the changes from the controls over all genes."),
    "pearson_delta": ("Correlation of effects", "Pearson correlation of predicted and true changes."),
    "discrimination_score_l1": ("Discrimination", "Is each predicted effect closest to its own true one (L1)?"),
    "discrimination_score_l2": ("Discrimination, Euclidean", "The same by Euclidean distance."),
    "discrimination_score_cosine": ("Discrimination, cosine", "The same by direction only, regardless of size."),
    "discrimination_score_matched": (
        "Discrimination at equal length",
        "The same by L1 after scaling effects to equal length.",
    ),
    **{
        f"overlap_at_{k}": (
            f"Overlap of DE genes, {k}",
            f"Genes shared by the {k} most changed significant ones of both.",
        )
        for k in TOPS
    },
    **{
        f"precision_at_{k}": (
            f"Precision of DE genes, {k}",
            f"Share of the {k} most changed predicted genes that are true ones.",
        )
        for k in TOPS
    },
    "de_spearman_sig": ("Ranking of effect strength", "Rank correlation of the numbers of significant genes."),
    "de_direction_match": ("Direction of DE genes", "Share of the truly significant genes that change the right way."),
    "de_spearman_lfc_sig": ("Ranking of fold changes", "Rank correlation of log2 fold changes, significant genes."),
    "de_sig_genes_recall": ("Recall of DE genes", "Share of the truly significant genes that are called significant."),
    "pr_auc": ("Precision-recall area", "Do adjusted p-values rank the truly significant genes first?"),
    "roc_auc": ("ROC area", "The same, as the area under the ROC curve."),
    "pearson_edistance": ("Energy distances", "Are predicted perturbations as far from the controls as true ones?"),
    "clustering_agreement": ("Clustering", "Do predicted and true means fall into the same clusters?"),
    "wmse_delta": ("Weighted squared error", "Squared error of changes, weighted by the truth's significance."),
    "wmae_delta": ("Weighted absolute error", "Error of changes, weighted by the truth's significance."),
    "weighted_r2_delta": ("Weighted R²", "Share of the true changes' weighted variance that is explained."),
    "cosine_delta": ("Cosine of effects", "Cosine of predicted and true changes."),
    "pearson_ctrl": ("Correlation of changes from the controls", "Pearson correlation of predicted and true changes."),
    "pearson_pert": (
        "Correlation of changes from the other perturbations",
        "The same, of what sets a perturbation apart from the mean of the others.",
    ),
    "weighted_pearson_ctrl_exp2": (
        "Weighted correlation, from the controls",
        "Correlation of changes, each gene weighted by its true effect.",
    ),
    "weighted_pearson_pert_exp2": (
        "Weighted correlation, from the other perturbations",
        "The same, of changes from the mean of the other perturbations.",
    ),
    "r2_ctrl": ("R² of changes from the controls", "Share of the true changes' variance that is explained."),
    "r2_pert": (
        "R² of changes from the other perturbations",
        "The same, of changes from the mean of the other perturbations.",
    ),
    "weighted_r2_ctrl_exp2": ("Weighted R², from the controls", "R², each gene weighted by its true effect."),
    "weighted_r2_pert_exp2": (
        "Weighted R², from the other perturbations",
        "The same, of changes from the mean of the other perturbations.",
    ),
    "wmse_exp2": ("Weighted squared error", "Squared error, each gene weighted by its true effect."),
    "mse_degs": ("Squared error of DE genes", "Squared error over the genes that truly change."),
    "mae_degs": ("Absolute error of DE genes", "Absolute error over the genes that truly change."),
    "nir": ("Retrieval", "Share of the other true profiles that lie farther from a prediction than its own."),
    "centroid_accuracy": ("Centroid accuracy", "The same; a profile as near as the own one counts against it."),
    "reciprocal_rank": ("Reciprocal rank", "One over the rank of the own true profile among all."),
    "top_1": ("Nearest", "Is the own true profile the nearest one?"),
    "top_5": ("Among the nearest five", "Is the own true profile among the five nearest?"),
    "top_10": ("Among the nearest ten", "Is the own true profile among the ten nearest?"),
    "de_auprc": ("DE genes, precision-recall", "Does the prediction rank the genes first that truly change?"),
    "de_auroc": ("DE genes, ROC", "The same, as the area under the ROC curve."),
    "de_overlap_50": ("Overlap of the top 50 genes", "Genes shared by the 50 strongest of both."),
    "effect_norm_ratio": ("Size of effects", "Length of the predicted effect over that of the true one."),
    "de_nsig_counts_real": ("True DE genes", "Significant genes in the truth."),
    "de_nsig_counts_pred": ("Predicted DE genes", "Significant genes in the prediction."),
}


def write_report(result: Result, path: str | os.PathLike, *, force: bool = False, **names: str) -> Path:
    """Write the report of a scored prediction; ``names`` may set ``prediction`` and ``truth``."""
    return write_text(path, make_html(make_report_data(result, **names)), force=force)


def make_report_data(result: Result, *, prediction: str = "", truth: str = "") -> ReportData:
    """Return the page of a scored prediction; ``prediction`` and ``truth`` are the names of the files on it."""
    components = []
    for m, c in result.components.items():
        title, says = WORDS.get(m, (m, ""))
        components.append(
            ReportComponent(
                name=m, title=title, says=says, value=_or_nan(c.value), baseline=_or_nan(c.baseline),
                ceiling=_or_nan(c.ceiling) if result.compat == "vcc2026" else float(c.best), score=_or_nan(c.score),
                score_unclipped=_or_nan(c.score_unclipped), ci95=c.ci95, n=c.n, lower_is_better=c.best == 0,
                replicate=None if result.compat == "vcc2026" else c.ceiling, calibration=c.calibration,
            )
        )  # fmt: skip
    if result.profile == "calibrated":
        known = _describe_calibrated(result)
    else:
        known = _describe_2026(result) if result.compat == "vcc2026" else _describe_2025(result)
    if result.contexts[0].context:
        known["facts"].insert(0, ("Contexts", ", ".join(c.context for c in result.contexts)))
    files = result.details.get("files", {})
    checks = [
        replace(k, name=f"{k.name} ({c.context})" if c.context else k.name) for c in result.contexts for k in c.checks
    ]
    return ReportData(
        prediction=prediction or Path(files.get("pred", "prediction")).name,
        truth=truth or Path(files.get("truth", "truth")).name,
        avg_score=_or_nan(result.avg_score),
        components=components,
        checks=sorted(checks, key=lambda k: not k.flagged),
        warnings=list(result.warnings),
        problem=result.problem,
        **known,
    )


def _or_nan(v: float | None) -> float:
    return float("nan") if v is None else float(v)


def _describe_2026(result: Result) -> dict[str, Any]:
    """Return the content of the page for a scoring under the 2026 rules."""
    cells = int(sum(c.pred.size_k[1:].sum() for c in result.contexts))
    return {
        "rules": f"2026 challenge rules ({result.details['rules']})",
        "zero": "the mean response",
        "one": "a replicate of the experiment",
        "panels": [_panel_2026(c) for c in result.contexts],
        "facts": [
            ("Perturbations", f"{sum(len(c.labels) for c in result.contexts):,}"),
            ("Genes", f"{len(result.contexts[0].genes):,}"),
            ("Predicted cells", f"{cells:,}"),
            ("Rank test", f"{'with' if result.details['continuity'] else 'without'} continuity correction"),
        ],
    }


def _panel_2026(c: Vcc2026Score) -> Panel:
    per = [m for m in METRICS if m != EXPRESSION]
    values = np.column_stack([c.values.per[m] for m in per])
    ratio = np.divide(c.values.error_p, c.values.distance_p, out=np.full(len(c.labels), np.nan),
                      where=c.values.distance_p > 0)  # fmt: skip
    real, pred = c.real.de, c.pred.de
    return Panel(
        context=c.context, labels=c.labels, genes=c.genes[real.genes],
        columns=[*[WORDS[m][0] for m in per], "Expression error"], values_pm=np.column_stack([values, ratio]),
        real_lfc_ph=real.lfc_ph, pred_lfc_ph=pred.lfc_ph, real_padj_ph=real.padj_ph, pred_padj_ph=pred.padj_ph,
        distance_pp=c.values.distance_pp, distance_name=DISTANCES["cosine"],
        quality_p=-np.diagonal(c.values.distance_pp),
    )  # fmt: skip


def _describe_2025(result: Result) -> dict[str, Any]:
    """Return the content of the page for a scoring under our, cell-eval's or the 2025 rules."""
    facts = [
        ("Perturbations", f"{len(result.table.names):,}"),
        ("Genes", f"{len(result.contexts[0].pair.genes):,}"),
        ("Profile", result.profile),
        ("Scored by", result.details["source"]),
    ]
    if result.details["n_without_de"] is not None:
        facts.append(("Without a true DE gene", f"{result.details['n_without_de']:,}"))
    return {
        "rules": {"ours": "vcelltools rules", "vcc2025": "2025 challenge rules"}.get(result.compat, result.compat),
        "zero": "the mean of all perturbations",
        "one": "a perfect prediction",
        "panels": [_panel_2025(c) for c in result.contexts],
        "facts": facts,
    }


def _describe_calibrated(result: Result) -> dict[str, Any]:
    """Return what the page says of a scoring by the profile ``calibrated``."""
    weak = [m for m, c in result.components.items() if c.calibration is not None and not c.calibration.discriminates]
    return {
        "rules": "vcelltools rules, calibrated on the truth",
        "zero": "the metric's negative control",
        "one": "a perfect prediction",
        "panels": [_panel_calibrated(c) for c in result.contexts],
        "facts": [
            ("Perturbations", f"{len(result.table.names):,}"),
            ("Genes", f"{len(result.contexts[0].genes):,}"),
            ("Profile", result.profile),
            ("Metrics with little range", f"{len(weak)} of {len(result.components)}"),
            ("Without a true DE gene", f"{result.details['n_without_de']:,}"),
        ],
    }


def _panel_calibrated(c: CalibratedScore) -> Panel:
    names = list(c.table.columns)
    own, size = np.diagonal(c.distance_pp), np.median(c.distance_pp, axis=1)
    return Panel(
        context=c.context, labels=np.array(c.names, dtype=object), genes=c.genes,
        columns=[WORDS.get(k, (k, ""))[0] for k in names],
        values_pm=np.column_stack([np.asarray(c.table.values(k), float) for k in names]),
        real_lfc_ph=None, pred_lfc_ph=None, real_padj_ph=None, pred_padj_ph=None,
        distance_pp=c.distance_pp, distance_name=DISTANCES["l2"],
        quality_p=-np.divide(own, size, out=np.zeros_like(own), where=size > 0),
    )  # fmt: skip


def _panel_2025(c: CellEvalScore) -> Panel:
    pair = c.pair
    names = list(c.table.columns)
    values = np.column_stack([np.asarray(c.table.values(k), float) for k in names])
    # the heat map shows the distance of the discrimination score above it, or L1 without such a score
    metric = next((k for k in names if k.startswith(DISCRIMINATION)), f"{DISCRIMINATION}l1")
    distance = np.asarray(get_distances(pair, metric.removeprefix(DISCRIMINATION)), float)
    own = np.diagonal(distance)
    size = np.median(distance, axis=1)
    a, b = pair.real_de, pair.pred_de
    return Panel(
        context=c.context, labels=np.array(pair.names, dtype=object), genes=pair.genes,
        columns=[WORDS.get(k, (k, ""))[0] for k in names], values_pm=values,
        real_lfc_ph=None if a is None or b is None else a.log2fc_pg,
        pred_lfc_ph=None if a is None or b is None else b.log2fc_pg,
        real_padj_ph=None if a is None or b is None else np.nan_to_num(a.fdr_pg, nan=1.0),
        pred_padj_ph=None if a is None or b is None else np.nan_to_num(b.fdr_pg, nan=1.0),
        distance_pp=distance, distance_name=DISTANCES[metric.removeprefix(DISCRIMINATION)],
        quality_p=-np.divide(own, size, out=np.zeros_like(own), where=size > 0),
    )  # fmt: skip
