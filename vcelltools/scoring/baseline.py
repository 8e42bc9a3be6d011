"""The mean baseline: the floor that a prediction has to leave, and the file that anybody can score."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.scoring.compat import METRICS, Rules
from vcelltools.scoring.effects import make_effects
from vcelltools.scoring.frames import ScoreTable
from vcelltools.scoring.sides import Side

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Options, Truth


def get_mean_profile(side: Side, kind: str = "perturbation-mean") -> np.ndarray:
    """Return (g,) the baseline's one profile, in the precision of the data.

    ``perturbation-mean`` is the mean of the group means, the control group's among them (as in cell-eval);
    ``control-mean`` the mean of the controls.
    """
    mean_kg = side.sums.mean_kg.astype(side.dtype)
    return mean_kg[side.control] if kind == "control-mean" else mean_kg.mean(axis=0, dtype=side.dtype)


def baseline_table(truth: Truth, rules: Rules, names: list[str], options: Options) -> ScoreTable:
    """Score the mean baseline without writing it: every cell of every perturbation is the same profile.

    Its ranks follow from counting the controls below each value, so no cell of it ever exists.
    """
    from vcelltools.scoring.evaluate import compute_all, make_pair
    from vcelltools.stream import get_threads

    real = truth.side
    assert truth.base_value_g is not None
    value = truth.base_value_g.astype(np.float64)
    sums = real.sums
    size = sums.size_k[:, None].astype(np.float64)
    sum_kg = np.where(np.arange(len(size))[:, None] == real.control, sums.sum_kg, size * value)
    changed: dict[str, np.ndarray | None] = {"sum_kg": sum_kg}
    if sums.single_kg is not None:
        single = np.broadcast_to(truth.base_value_g.astype(np.float32), sums.single_kg.shape).copy()
        if not real.sparse:
            single *= size.astype(np.float32)
        single[real.control] = sums.single_kg[real.control]
        changed["single_kg"] = single
    if sums.moment_kg is not None:
        moment = size * (np.log1p(value) if options.allow_discrete else np.expm1(value))
        moment[real.control] = sums.moment_kg[real.control]
        changed["moment_kg"] = moment
    effects = None
    if truth.base_p_pg is not None and any(METRICS[n].kind in ("de", "extended") for n in names):
        assert sums.u_kg is not None
        assert sums.p_kg is not None
        u, p = sums.u_kg.copy(), sums.p_kg.copy()
        u[real.perts], p[real.perts] = truth.base_u_pg, truth.base_p_pg
        changed |= {"u_kg": u, "p_kg": p}
    side = replace(real, label="perturbation-mean baseline", sums=replace(sums, **changed))  # type: ignore[arg-type]
    if "u_kg" in changed:
        effects = make_effects(
            side, rules, epsilon=options.epsilon, cpm_filter=options.cpm_filter, discrete=options.allow_discrete
        )
    pair = make_pair(side, real, effects, truth.effects, rules, get_threads(options.threads))
    return compute_all(pair, names)
