"""The rule sets: what differs between cell-eval's versions, the competition's, and ours, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from vcelltools.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One rule set.

    Attributes
    ----------
    name
        As ``--compat`` spells it.
    source
        The implementation and version whose numbers it gives.
    exact_p
        Exact p-values for small samples without ties.
    global_bh
        Benjamini-Hochberg over all perturbations and genes at once (else within each perturbation).
    fold_limit
        The fold change where one mean is zero is this or its inverse (else infinite).
    peer_precision
        Pseudobulks and effects in the data's own precision, as the peer has them (else float64).
    mid_ranks
        Discrimination ties take the mid-rank (else the order in which a sort leaves them).
    quicksort_ties
        Equal fold changes stand as the peer's quicksort leaves them where a list of genes is cut (else in gene order).
    null_empty
        Perturbations without a true DE gene have no overlap, rather than one of zero, and NaN is left out of means.
    force_controls
        The prediction's controls are replaced by the truth's where they differ.
    fold_spearman
        ``de_spearman_lfc_sig`` ranks fold changes over genes in both tables (0.6) rather than log2 fold changes.
    clip_scores
        The scores of ``pr_auc`` and ``roc_auc`` end at an adjusted p of 1e-10 (0.6: only a zero is raised to it).
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
    """A metric's name, what it needs, and its best value (1, 0, or None where it is not scored)."""

    name: str
    kind: str
    best: float | None
    reliability: bool = False


_TOPS = ("N", "50", "100", "200", "500")
METRICS: dict[str, MetricInfo] = {
    m.name: m
    for m in (
        *(MetricInfo(name=f"overlap_at_{k}", kind="de", best=1, reliability=True) for k in _TOPS),
        *(MetricInfo(name=f"precision_at_{k}", kind="de", best=1, reliability=True) for k in _TOPS),
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
        # ours alone
        MetricInfo(name="wmse_delta", kind="extended", best=0),
        MetricInfo(name="wmae_delta", kind="extended", best=0),
        MetricInfo(name="weighted_r2_delta", kind="extended", best=1),
        MetricInfo(name="cosine_delta", kind="extended", best=1, reliability=True),
        MetricInfo(name="discrimination_score_matched", kind="extended", best=1, reliability=True),
        MetricInfo(name="effect_norm_ratio", kind="extended", best=None),
    )
}
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
    "extended": tuple(METRICS),
}  # fmt: skip


def get_rules(name: str) -> Rules:
    """Return a rule set by name."""
    if name not in RULES:
        raise UsageError(f"no rule set {name!r}", hint=f"--compat, one of: {', '.join([*RULES, 'vcc2026'])}")
    return RULES[name]


def get_metrics(profile: str, skip: tuple[str, ...] = ()) -> list[str]:
    """Return a profile's metrics in the order of their columns: DE metrics, then the others."""
    if profile not in PROFILES:
        raise UsageError(f"no profile {profile!r}", hint=f"--profile, one of: {', '.join(PROFILES)}")
    unknown = [m for m in skip if m not in METRICS]
    if unknown:
        raise UsageError(f"no metric {unknown[0]!r}", hint=f"metrics: {', '.join(METRICS)}")
    names = [m for m in PROFILES[profile] if m not in skip]
    if not names:
        raise UsageError(f"no metric of profile {profile!r} is left to compute", hint="fewer --skip-metrics")
    rank = {"de": 0, "anndata": 1, "extended": 2}
    return sorted(names, key=lambda m: rank[METRICS[m].kind])
