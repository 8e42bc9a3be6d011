"""The model of a simulated screen: genes, cell lines, batches, perturbations and their effects.

Everything is drawn from counter-based streams keyed by (seed, kind, index), so that gene 17, line 2 or
perturbation 5 is the same in every atlas with the same ``effect_seed``, regardless of their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Constants of a transcriptome, measured on 892 PBMC (10x v3, 36,601 genes, median depth 6,819 molecules) and
# on 20,729 THP-1 cells (299 genes).
N_EXPRESSED = 22_000  # number of genes with a mean above about 1e-5 CP10K; the others are not expressed
_LOG10_MEAN, _BEND = -0.99, 0.35  # log10 CP10K at the bend of a two-piece normal quantile curve
_SD_ABOVE, _SD_BELOW = 0.72, 1.5
_SILENT_LOG10 = -6.0
_N_ABUNDANT, _ABUNDANT_LOG10, _ABUNDANT_SD = 150 / 22_000, 1.36, 0.39  # ribosomal, mitochondrial and similar genes
_DISPERSION_FLOOR, _DISPERSION_SLOPE, _DISPERSION_POWER = 0.10, 0.20, -0.3  # median over genes, by mean in CP10K
_DISPERSION_SD, _DISPERSION_MAX = 0.5, 3.0
MEDIAN_DEPTH = 6_819
DEPTH_SD = 0.5  # standard deviation of log depth within a batch; 0.54 in THP-1, 0.66 over the cell types of PBMC
_BATCH_DEPTH_SD, _BATCH_GENE_SD = 0.15, 0.10
_LINE_GENE_SHARE, _LINE_GENE_SD = 0.3, 0.6
_N_STATES, _STATE_SHARE, _STATE_SD = 3, 0.02, 0.35

# Effects of perturbations
N_LATENT = 16
_N_PROGRAMMES, _PROGRAMME_SHARE, _PROGRAMME_SD = 24, 0.012, 0.35
_ACTIVE_ABOVE = 0.9  # a programme responds if the latent projection of a target exceeds this
_DIRECT = (4, 24)  # range of the number of direct targets
_DIRECT_LOG_MEAN, _DIRECT_LOG_SD = -0.7, 0.5  # parameters of abs(natural-log fold change), with median 0.5
_RESIDUAL = (0.1, 0.35)  # remaining expression of the target
_STRENGTH_LOG_MEAN, _STRENGTH_LOG_SD = -0.5, 0.7  # few strong effects, most weak
_MAX_LFC = 4.0
_LINEAGE_OWN = 0.3  # lineages: share of a line's differences in expression that is its own
_SILENT_SHARE, _SILENT = 0.25, 0.002  # share of the targets that a lineage does not express, and what remains of them
_ACTIVATION = (2.0, 6.0)  # range of the fold change of a target that CRISPRa activates
_ACTIVATION_SIZE = 0.7  # CRISPRa: size of the reversed downstream effects
_EMBEDDING_NOISE = 0.3
N_FEATURES = 32

_GENES, _LINE, _PERT, _PERT_LINE, _PROGRAMMES, _EMBED, _BATCH, _STATES, _TARGETS, _ACTIVATED, _LINEAGE, _SILENCED = (
    range(1, 13)
)


def rng(seed: int, what: int, which: int = 0, sub: int = 0) -> np.random.Generator:
    """Return the random stream of (seed, what, which, sub)."""
    return np.random.Generator(np.random.Philox(key=[seed, (what << 56) | (which << 24) | sub]))


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The effects of every (perturbation, cell line): a CSR of natural-log fold changes, one row per pair.

    Attributes
    ----------
    indptr, indices, data
        Rows are perturbation-major: row ``p * n_lines + c``.
    strength_p
        (p,) float64; 0 if a perturbation only lowers its target.
    n_direct
        (p,) number of direct targets.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    strength_p: np.ndarray
    n_direct: np.ndarray


@dataclass(frozen=True, kw_only=True)
class World:
    """Genes, lines, batches and perturbations of one atlas.

    Attributes
    ----------
    gene_ids, symbols
        (g,) of the atlas.
    universe
        (g,) positions of the genes of the atlas among all genes.
    cp10k_cg
        (c, g) float64 mean CP10K of unperturbed cells in each line, before batch shifts.
    dispersion_g
        (g,) float32 negative-binomial dispersion.
    profile_kg
        (c · b, g) float32 relative abundances of every (line, batch), summing to one.
    targets
        (p,) positions of the targets of the perturbations among the genes of the atlas.
    features_gf
        (g, f) float32 embeddings; those of the targets predict the effects of their perturbations.
    state_indptr, state_indices, state_data
        CSR of the cell-state programmes.
    """

    gene_ids: np.ndarray
    symbols: np.ndarray
    universe: np.ndarray
    cp10k_cg: np.ndarray
    dispersion_g: np.ndarray
    profile_kg: np.ndarray
    targets: np.ndarray
    effects: Effects
    features_gf: np.ndarray
    state_indptr: np.ndarray
    state_indices: np.ndarray
    state_data: np.ndarray


def _draw_means(n: int, seed: int) -> np.ndarray:
    """Return (n,) float64 mean CP10K of all genes."""
    r = rng(seed, _GENES)
    z = r.normal(size=n)
    log10 = _LOG10_MEAN + np.where(z > _BEND, _SD_ABOVE, _SD_BELOW) * (z - _BEND)
    kind = r.permutation(n)
    n_expressed = min(n, N_EXPRESSED)
    abundant = kind[: max(1, round(n_expressed * _N_ABUNDANT))]
    log10[abundant] = _ABUNDANT_LOG10 + _ABUNDANT_SD * z[abundant]
    log10[kind[n_expressed:]] = _SILENT_LOG10
    means = 10.0**log10
    return means / means.sum() * 1e4


def _draw_dispersions(means_g: np.ndarray, seed: int) -> np.ndarray:
    typical = _DISPERSION_FLOOR + _DISPERSION_SLOPE * np.maximum(means_g, 1e-4) ** _DISPERSION_POWER
    spread = np.exp(_DISPERSION_SD * rng(seed, _GENES, 1).normal(size=len(means_g)))
    return np.minimum(typical * spread, _DISPERSION_MAX).astype(np.float32)


def _draw_shift(n: int, r: np.random.Generator) -> np.ndarray:
    differs = r.random(n) < _LINE_GENE_SHARE
    return np.where(differs, _LINE_GENE_SD * r.normal(size=n), 0.0)


def _get_silent(n_targets: int, line: int, lineages: int, seed: int) -> np.ndarray:
    """Return (targets,) bool: the targets that the lineage of a line does not express."""
    if not lineages:
        return np.zeros(n_targets, bool)
    return rng(seed, _SILENCED, line % lineages).random(n_targets) < _SILENT_SHARE


def _draw_lines(means_g: np.ndarray, targets: np.ndarray, lines: range, lineages: int, seed: int) -> np.ndarray:
    out = np.empty((len(lines), len(means_g)))
    for i, line in enumerate(lines):
        shift = _draw_shift(len(means_g), rng(seed, _LINE, line))
        if lineages:
            common = _draw_shift(len(means_g), rng(seed, _LINEAGE, line % lineages))
            shift = np.sqrt(1 - _LINEAGE_OWN) * common + np.sqrt(_LINEAGE_OWN) * shift
        shift[targets[_get_silent(len(targets), line, lineages, seed)]] += np.log(_SILENT)
        out[i] = means_g * np.exp(shift)
    return out / out.sum(axis=1, keepdims=True) * 1e4


def _draw_targets(means_g: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return n distinct genes from the more highly expressed half, because a knockdown must be visible."""
    score = np.log(np.maximum(means_g, 1e-9)) + rng(seed, _TARGETS).gumbel(size=len(means_g))
    score[means_g < np.quantile(means_g[means_g > 1e-3], 0.4)] -= 1e3
    abundant = means_g > np.quantile(means_g, 0.995)
    score[abundant] -= 10.0
    return np.argsort(-score, kind="stable")[:n]


def _draw_programmes(means_g: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (genes, natural-log loadings) for each programme; genes are drawn from the expressed ones."""
    r = rng(seed, _PROGRAMMES)
    n = max(5, round(min(len(means_g), N_EXPRESSED) * _PROGRAMME_SHARE))
    pool = np.flatnonzero(means_g > 1e-2) if (means_g > 1e-2).sum() > n else np.arange(len(means_g))
    out = []
    for _ in range(_N_PROGRAMMES):
        genes = r.choice(pool, min(n, len(pool)), replace=False)
        out.append((genes, _PROGRAMME_SD * (r.normal(size=len(genes)) + 0.5 * r.choice([-1, 1]))))
    return out


def _draw_effects(
    means_g: np.ndarray,
    targets: np.ndarray,
    which: np.ndarray,
    lines: range,
    *,
    lineages: int,
    activated: int,
    shared: float,
    inert: float,
    seed: int,
) -> tuple[Effects, np.ndarray]:
    """Return the effects of perturbations ``which`` in ``lines``, and the (g, d) latent vectors of all genes.

    The last ``activated`` lines are screened by CRISPRa: effects are reversed.
    """
    n_genes = len(means_g)
    latent = rng(seed, _EMBED).normal(size=(n_genes, N_LATENT))
    answer = rng(seed, _PROGRAMMES, 1).normal(size=(N_LATENT, _N_PROGRAMMES)) / np.sqrt(N_LATENT)
    programmes = _draw_programmes(means_g, seed)
    pool = np.flatnonzero(means_g > 1e-2)
    pool = pool if len(pool) > _DIRECT[1] else np.arange(n_genes)
    indptr, indices, data = [0], [], []
    strengths, counts = [], []
    for p in which:
        r = rng(seed, _PERT, int(p))
        target = targets[p]
        strength = 0.0 if r.random() < inert else float(np.exp(_STRENGTH_LOG_MEAN + _STRENGTH_LOG_SD * r.normal()))
        residual = r.uniform(*_RESIDUAL)
        n_direct = min(int(r.integers(*_DIRECT)), len(pool))
        direct = r.choice(pool, n_direct, replace=False)
        size = np.exp(_DIRECT_LOG_MEAN + _DIRECT_LOG_SD * r.normal(size=n_direct)) * r.choice([-1, 1], n_direct)
        projected = latent[target] @ answer
        active = np.sign(projected) * np.maximum(np.abs(projected) - _ACTIVE_ABOVE, 0.0)
        for line in lines:
            q = rng(seed, _PERT_LINE, int(p), line % lineages if lineages else line)
            lfc = np.zeros(n_genes)
            own = np.sqrt(1 - shared) * q.normal(size=_N_PROGRAMMES) * (q.random(_N_PROGRAMMES) < 0.1)
            mixed = np.sqrt(shared) * active + own
            lfc[direct] += strength * size * np.where(q.random(n_direct) < shared, 1.0, q.normal(size=n_direct) * 0.5)
            for k in np.flatnonzero(mixed):
                genes, loadings = programmes[k]
                lfc[genes] += strength * mixed[k] * loadings
            if _get_silent(len(targets), line, lineages, seed)[p]:
                lfc[:] = 0.0  # what is not expressed cannot be lowered
            np.clip(lfc, -_MAX_LFC, _MAX_LFC, out=lfc)
            lfc[target] = np.log(residual)
            if line >= lines.stop - activated:
                lfc *= -_ACTIVATION_SIZE
                lfc[target] = np.log(rng(seed, _ACTIVATED, int(p), line).uniform(*_ACTIVATION))
            support = np.flatnonzero(np.abs(lfc) > 1e-3)
            indices.append(support.astype(np.int32))
            data.append(lfc[support].astype(np.float32))
            indptr.append(indptr[-1] + len(support))
        strengths.append(strength)
        counts.append(n_direct if strength > 0 else 0)
    effects = Effects(
        indptr=np.array(indptr, np.int64),
        indices=np.concatenate(indices) if indices else np.zeros(0, np.int32),
        data=np.concatenate(data) if data else np.zeros(0, np.float32),
        strength_p=np.array(strengths),
        n_direct=np.array(counts, np.int64),
    )
    return effects, latent


def _draw_states(n_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = rng(seed, _STATES)
    n = max(1, round(n_genes * _STATE_SHARE))
    genes = [np.sort(r.choice(n_genes, n, replace=False)) for _ in range(_N_STATES)]
    return (
        np.arange(_N_STATES + 1, dtype=np.int64) * n,
        np.concatenate(genes).astype(np.int32),
        (_STATE_SD * r.normal(size=n * _N_STATES)).astype(np.float32),
    )


def _keep_columns(effects: Effects, keep: np.ndarray, n_genes: int) -> Effects:
    """Return the effects on the kept genes, renumbered."""
    new = np.full(n_genes, -1, np.int32)
    new[keep] = np.arange(len(keep), dtype=np.int32)
    mapped = new[effects.indices]
    inside = mapped >= 0
    ends = np.concatenate([[0], np.cumsum(inside)])
    return Effects(
        indptr=ends[effects.indptr].astype(np.int64),
        indices=mapped[inside],
        data=effects.data[inside],
        strength_p=effects.strength_p,
        n_direct=effects.n_direct,
    )


def make_world(
    *,
    n_genes: int,
    n_perturbations: int,
    n_universe: int,
    lines: range,
    n_batches: int,
    shared: float,
    inert: float,
    lineages: int,
    activated: int,
    drop: float,
    seed: int,
    effect_seed: int,
) -> World:
    """Draw the model of one atlas.

    Parameters
    ----------
    n_genes
        Number of all genes; a fraction ``drop`` of them (never a target) is missing from this atlas.
    n_universe
        Number of perturbations from which the ``n_perturbations`` of this atlas are drawn.
    lines
        Indices of the cell lines.
    shared, inert
        Fraction of the effects common to all lines; fraction of perturbations without a downstream effect.
    lineages
        Number of lineages, whose lines share expression and effects; 0 for independent lines.
    activated
        Number of lines, the last ones, whose perturbations activate their targets.
    seed, effect_seed
        ``effect_seed`` determines genes, lines and effects; ``seed`` determines everything else.
    """
    means = _draw_means(n_genes, effect_seed)
    targets = _draw_targets(means, n_universe, effect_seed)
    r = rng(seed, _TARGETS, 1)
    which = np.sort(r.permutation(n_universe)[:n_perturbations])
    effects, latent = _draw_effects(
        means,
        targets,
        which,
        lines,
        lineages=lineages,
        activated=activated,
        shared=shared,
        inert=inert,
        seed=effect_seed,
    )
    keep = np.ones(n_genes, bool)
    if drop > 0:
        free = np.setdiff1d(np.arange(n_genes), targets)
        keep[r.choice(free, min(round(drop * n_genes), len(free)), replace=False)] = False
    kept = np.flatnonzero(keep)
    cp10k = _draw_lines(means, targets, lines, lineages, effect_seed)
    noise = rng(effect_seed, _EMBED, 1).normal(size=(n_genes, N_LATENT))
    spread = rng(effect_seed, _EMBED, 2).normal(size=(N_LATENT, N_FEATURES)) / np.sqrt(N_LATENT)
    features = ((latent + _EMBEDDING_NOISE * noise) @ spread).astype(np.float32)
    profile = np.empty((len(lines) * n_batches, len(kept)), np.float32)
    for c in range(len(lines)):
        for b in range(n_batches):
            shift = np.exp(_BATCH_GENE_SD * rng(seed, _BATCH, b, 1).normal(size=n_genes))[kept]
            row = cp10k[c, kept] * shift
            profile[c * n_batches + b] = row / row.sum()
    place = np.cumsum(keep) - 1
    state_indptr, state_indices, state_data = _draw_states(len(kept), seed)
    return World(
        gene_ids=np.array([f"ENSG9{g:010d}" for g in kept], dtype=object),
        symbols=np.array([f"GENE{g + 1:05d}" for g in kept], dtype=object),
        universe=kept,
        cp10k_cg=cp10k[:, kept],
        dispersion_g=_draw_dispersions(means, effect_seed)[kept],
        profile_kg=profile,
        targets=place[targets[which]],
        effects=_keep_columns(effects, kept, n_genes),
        features_gf=features[kept],
        state_indptr=state_indptr,
        state_indices=state_indices,
        state_data=state_data,
    )


def get_batch_depth(seed: int, batch: int) -> float:
    """Return the factor by which a batch is sequenced deeper than the median."""
    return float(np.exp(_BATCH_DEPTH_SD * rng(seed, _BATCH, batch, 2).normal()))


def get_density(depth_q: np.ndarray, profile_kg: np.ndarray, dispersion_g: np.ndarray) -> float:
    """Return the expected fraction of non-zeros over cells with the depths ``depth_q``."""
    mean_g = profile_kg.mean(axis=0, dtype=np.float64)
    zeros = [np.exp(-np.log1p(mean_g * d * dispersion_g) / dispersion_g).mean() for d in depth_q]
    return float(1.0 - np.mean(zeros))
