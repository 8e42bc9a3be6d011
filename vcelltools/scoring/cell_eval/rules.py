"""The rule sets: a table of the differences between versions of cell-eval, the challenge, and our rules."""

from __future__ import annotations

from dataclasses import dataclass

from vcelltools.errors import UsageError, spell


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One rule set.

    Attributes
    ----------
    name
        The name in ``--compat``.
    source
        The implementation and version whose numbers it reproduces.
    exact_p
        Whether small samples without ties get exact p-values.
    global_bh
        Whether Benjamini-Hochberg covers all perturbations and genes at once, instead of each perturbation.
    fold_limit
        The fold change (or its inverse) if one mean is zero; otherwise it is infinite.
    peer_precision
        Whether pseudobulks and effects have the precision of the data, as in the official implementation, instead of
        float64.
    mid_ranks
        Whether ties in discrimination take the mid-rank, instead of the order of a sort.
    quicksort_ties
        Whether equal fold changes at the cutoff of a gene list have the order of the official quicksort, instead of
        gene order.
    null_empty
        Whether perturbations without a true DE gene have no overlap, instead of zero, and NaN is excluded from means.
    force_controls
        Whether the controls of the prediction are replaced with those of the truth if they differ.
    fold_spearman
        Whether ``de_spearman_lfc_sig`` ranks fold changes over genes in both tables (0.6), instead of log2 fold
        changes.
    clip_scores
        Whether the scores of ``pr_auc`` and ``roc_auc`` are clipped at an adjusted p of 1e-10 (in 0.6, only zeros are).
    """

    name: str
    source: str
    exact_p: bool = False
    global_bh: bool = False
    fold_limit: float | None = None
    peer_precision: bool = True
    mid_ranks: bool = False
    quicksort_ties: bool = True
    null_empty: bool = False
    force_controls: bool = False
    fold_spearman: bool = False
    clip_scores: bool = True


RULES = {
    "ours": Rules(
        name="ours",
        source="vcelltools",
        peer_precision=False,
        mid_ranks=True,
        quicksort_ties=False,
        null_empty=True,
        force_controls=True,
    ),
    "cell-eval": Rules(name="cell-eval", source="cell-eval 0.8.2 with pdex 0.3.0"),
    "vcc2025": Rules(
        name="vcc2025",
        source="cell-eval 0.6.6 with pdex 0.1.27",
        exact_p=True,
        global_bh=True,
        fold_limit=20.0,
        fold_spearman=True,
        clip_scores=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """The name of a metric, its requirements, and its best value (1, 0, or None if it is not scored)."""

    name: str
    kind: str
    best: float | None
    reliability: bool = False


TOPS = ("N", "50", "100", "200", "500")
METRICS: dict[str, MetricInfo] = {
    m.name: m
    for m in (
        *(MetricInfo(name=f"overlap_at_{k}", kind="de", best=1, reliability=True) for k in TOPS),
        *(MetricInfo(name=f"precision_at_{k}", kind="de", best=1, reliability=True) for k in TOPS),
        MetricInfo(name="de_spearman_sig", kind="de", best=1, reliability=True),
        MetricInfo(name="de_direction_match", kind="de", best=1, reliability=True),
        MetricInfo(name="de_spearman_lfc_sig", kind="de", best=1, reliability=True),
        MetricInfo(name="de_sig_genes_recall", kind="de", best=1, reliability=True),
        MetricInfo(name="de_nsig_counts", kind="de", best=None),
        MetricInfo(name="pr_auc", kind="de", best=1, reliability=True),
        MetricInfo(name="roc_auc", kind="de", best=1, reliability=True),
        MetricInfo(name="pearson_delta", kind="anndata", best=1, reliability=True),
        MetricInfo(name="mse", kind="anndata", best=0),
        MetricInfo(name="mae", kind="anndata", best=0),
        MetricInfo(name="mse_delta", kind="anndata", best=0),
        MetricInfo(name="mae_delta", kind="anndata", best=0),
        MetricInfo(name="discrimination_score_l1", kind="anndata", best=1, reliability=True),
        MetricInfo(name="discrimination_score_l2", kind="anndata", best=1, reliability=True),
        MetricInfo(name="discrimination_score_cosine", kind="anndata", best=1, reliability=True),
        MetricInfo(name="pearson_edistance", kind="anndata", best=1),
        MetricInfo(name="clustering_agreement", kind="anndata", best=1),
        # only under our rules
        MetricInfo(name="wmse_delta", kind="extended", best=0),
        MetricInfo(name="wmae_delta", kind="extended", best=0),
        MetricInfo(name="weighted_r2_delta", kind="extended", best=1),
        MetricInfo(name="cosine_delta", kind="extended", best=1, reliability=True),
        MetricInfo(name="discrimination_score_matched", kind="extended", best=1, reliability=True),
        MetricInfo(name="effect_norm_ratio", kind="extended", best=None),
        # of the profile ``calibrated``, by the names of scPertEval where it has them
        *(MetricInfo(name=m, kind="calibrated", best=1) for m in (
            "pearson_ctrl", "pearson_pert", "weighted_pearson_ctrl_exp2", "weighted_pearson_pert_exp2", "r2_ctrl",
            "r2_pert", "weighted_r2_ctrl_exp2", "weighted_r2_pert_exp2",
        )),
        *(MetricInfo(name=m, kind="calibrated", best=0) for m in ("wmse_exp2", "mse_degs", "mae_degs")),
        *(MetricInfo(name=m, kind="calibrated", best=1) for m in (
            "nir", "centroid_accuracy", "reciprocal_rank", "top_1", "top_5", "top_10", "de_auprc", "de_auroc",
            "de_overlap_50",
        )),
    )
}  # fmt: skip
GLOBAL_METRICS = ("de_spearman_sig", "pearson_edistance", "clustering_agreement")
COUNT_COLUMNS = ("de_nsig_counts_real", "de_nsig_counts_pred")

PROFILES: dict[str, tuple[str, ...]] = {
    "full": tuple(m.name for m in METRICS.values() if m.kind in ("de", "anndata")),
    "vcc": ("mae", "discrimination_score_l1", "overlap_at_N"),
    "minimal": (
        "pearson_delta", "mse", "mae", "discrimination_score_l1", "overlap_at_N", "precision_at_N", "de_nsig_counts",
    ),
    "de": tuple(m.name for m in METRICS.values() if m.kind == "de"),
    "anndata": tuple(m.name for m in METRICS.values() if m.kind == "anndata"),
    "pds": ("discrimination_score_l1",),
    "extended": tuple(m.name for m in METRICS.values() if m.kind != "calibrated"),
    "calibrated": ("mse", *(m.name for m in METRICS.values() if m.kind == "calibrated")),
}  # fmt: skip


def get_rules(name: str) -> Rules:
    """Return a rule set by name."""
    if name not in RULES:
        raise UsageError(f"no rule set {name!r}", hint=f"{spell('compat')}, one of: {', '.join([*RULES, 'vcc2026'])}")
    return RULES[name]


def get_metrics(profile: str, skip: tuple[str, ...] = ()) -> list[str]:
    """Return the metrics of a profile in the order of their columns: DE metrics, then the others."""
    if profile not in PROFILES:
        raise UsageError(f"no profile {profile!r}", hint=f"{spell('profile')}, one of: {', '.join(PROFILES)}")
    unknown = [m for m in skip if m not in METRICS]
    if unknown:
        raise UsageError(f"no metric {unknown[0]!r}", hint=f"metrics: {', '.join(METRICS)}")
    names = [m for m in PROFILES[profile] if m not in skip]
    if not names:
        raise UsageError(
            f"no metric of profile {profile!r} is left to compute", hint=f"skip fewer metrics with {spell('skip')}"
        )
    rank = {"de": 0, "anndata": 1, "extended": 2, "calibrated": 3}
    return sorted(names, key=lambda m: rank[METRICS[m].kind])
