"""``transfer``: transfers the effect of a perturbation from other contexts as ratios.

A ratio is ``log((m + p) / (b + p))``, where ``m`` is the mean CP10K of the perturbed cells, ``b`` that of their
controls, and ``p`` a pseudocount in counts per million. Ratios are averaged over the other contexts (weighted by cells,
but a context counts at most ten times the median) and applied to the context's own controls. If few cells express a
gene, a higher mean implies more expressing cells; if all cells express it, a higher level. The change of the mean log1p
is therefore computed from the share of expressing controls and their level.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vcelltools.model.baselines import Effects, PerturbationMean

_PER_MILLION = 100.0  # CP10K to counts per million
_MOST_WEIGHT = 10.0


class Transfer:
    """Averaged log ratios of pseudobulks."""

    NEEDS_PSEUDOBULK = True
    GRID = tuple({"pseudocount": p} for p in (10.0, 3.0, 30.0, 100.0))

    def __init__(self, effects: Effects, *, pseudocount: float = 10.0) -> None:
        if effects.pseudobulk is None:
            raise ValueError("transfer needs effects with pseudobulks")
        self._e, self._bulk = effects, effects.pseudobulk
        self._mean = PerturbationMean(effects)
        self._p = pseudocount / _PER_MILLION
        ratio = np.log((self._bulk.cp10k_kg + self._p) / (self._bulk.base_kg + self._p))
        cells = np.minimum(effects.cells_k, _MOST_WEIGHT * np.median(effects.cells_k))
        self._ratio = PerturbationMean(replace(effects, effect_kg=ratio, cells_k=cells))

    def parts(self, pert_q: np.ndarray, context_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shared effects, and the perturbation-specific effects transferred from other contexts."""
        ratio, weight = self._ratio.elsewhere(pert_q, context_q)
        known = weight[:, None] > 0
        there = self._common_elsewhere(pert_q, context_q)
        here = self._ratio.common(pert_q, context_q)
        shared = self._apply(here, context_q)
        own = np.where(known, self._apply(here + ratio - there, context_q) - shared, 0.0)
        measured = np.bincount(self._e.context_k, minlength=len(self._e.control_cg))[context_q] > 0
        direct = self._mean.common(pert_q, context_q)  # effects measured in this context need no ratio
        return np.where(measured[:, None], direct, shared), own

    def _common_elsewhere(self, pert_q: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the mean ratios (q, g) of all perturbations in the other contexts of each requested perturbation."""
        e, common = self._e, self._ratio.common_cg
        out = np.zeros((len(pert_q), common.shape[1]))
        for i, (p, c) in enumerate(zip(pert_q, context_q, strict=True)):
            rows = np.flatnonzero((e.pert_k == p) & (e.context_k != c))
            if len(rows):
                out[i] = np.average(common[e.context_k[rows]], axis=0, weights=self._ratio.weight_k[rows])
        return out

    def _apply(self, ratio_qg: np.ndarray, context_q: np.ndarray) -> np.ndarray:
        """Return the changes of the mean log1p (q, g) that log ratios cause in contexts."""
        base = self._bulk.control_cg[context_q]
        factor = np.maximum((base + self._p) * np.exp(ratio_qg) - self._p, 0.0) / np.maximum(base, 1e-9)
        share = np.clip(self._bulk.share_cg[context_q], 0.0, 1.0 - 1e-12)
        mean = self._e.control_cg[context_q]
        level = np.where(share > 0, mean / np.maximum(share, 1e-12), 0.0)
        now = -np.expm1(np.log1p(-share) * factor)  # assumes that cells express the gene independently
        each = factor * share / np.maximum(now, 1e-12)  # relative number of molecules per expressing cell
        changed = np.log1p(np.expm1(np.minimum(level, 20.0)) * each) * now
        absent = base <= 1e-9  # without a baseline, the new expression itself is the change
        return np.where(absent, np.log1p(np.maximum(np.expm1(ratio_qg) * self._p, 0.0)), changed - mean)
