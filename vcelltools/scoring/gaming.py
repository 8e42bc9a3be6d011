"""Signs that a score was earned by a trick, not by a prediction: arrays in, plain sentences out.

None of these is forbidden by a metric, and each of them has lifted a score without any knowledge of biology. A flag
is a question to the author, not a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VARIANCE = (0.5, 2.0)
COLLAPSED = 0.01
SIGNIFICANT = (1 / 3, 3.0)
EFFECT = (0.5, 2.0)
SAME_RESPONSE = 0.95
CONTROLS = 0.1
LIBRARY = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the panel looks at; everything but the profiles may be None where it is not known.

    Attributes
    ----------
    real_pg, pred_pg
        (p, g) mean log profile of each perturbation.
    real_control_g, pred_control_g
        (g,) mean log profile of the controls that each side brought along; None where the prediction's are not read.
    real_spread_p, pred_spread_p
        (p,) variance between the cells of a perturbation, summed over genes.
    real_significant_p, pred_significant_p
        (p,) number of significant genes.
    library_ratio
        Median counts of a predicted cell over that of a true one (counts alone).
    """

    real_pg: np.ndarray
    pred_pg: np.ndarray
    real_control_g: np.ndarray
    pred_control_g: np.ndarray | None = None
    real_spread_p: np.ndarray | None = None
    pred_spread_p: np.ndarray | None = None
    real_significant_p: np.ndarray | None = None
    pred_significant_p: np.ndarray | None = None
    library_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the panel.

    Attributes
    ----------
    name
        Short name.
    value
        What was measured.
    low, high
        The range in which it is not remarkable.
    flagged
        Whether it lies outside.
    text
        A sentence that says what it means.
    """

    name: str
    value: float
    low: float
    high: float
    flagged: bool
    text: str


def check_gaming(e: Evidence) -> list[Check]:
    """Return every check that the evidence allows, flagged or not.

    The ratios are medians over perturbations, so that a few odd ones do not decide.
    """
    out = [
        *_check_spread(e),
        *_check_significant(e),
        _check_effects(e),
        *_check_same_response(e),
        *_check_controls(e),
        _check_double_log(e),
    ]
    if e.library_ratio is not None:
        low, high = LIBRARY
        r = e.library_ratio
        size = f"{r:.2g} times the counts of a true one"
        out.append(
            _make(
                "library size",
                r,
                low,
                high,
                f"A predicted cell has {size}; the rank test feels the difference.",
                f"A predicted cell has {size}.",
            )
        )
    return out


def _make(name: str, value: float, low: float, high: float, bad: str, good: str) -> Check:
    flagged = not (low <= value <= high) if np.isfinite(value) else False
    return Check(name=name, value=float(value), low=low, high=high, flagged=flagged, text=bad if flagged else good)


def _median_ratio(above: np.ndarray, below: np.ndarray) -> float:
    ok = np.isfinite(above) & np.isfinite(below) & (below > 0)
    return float(np.median(above[ok] / below[ok])) if ok.any() else float("nan")


def _check_spread(e: Evidence) -> list[Check]:
    if e.real_spread_p is None or e.pred_spread_p is None:
        return []
    r = _median_ratio(e.pred_spread_p, e.real_spread_p)
    collapsed = bool(np.isfinite(r) and r < COLLAPSED)
    low, high = VARIANCE
    word = "less" if r < 1 else "more"
    return [
        _make(
            "cell-to-cell variance", r, low, high,
            f"The cells of a predicted perturbation vary {word} than true ones do ({r:.2g} times): "
            f"{'tests call far too many genes significant' if r < 1 else 'true effects drown in noise'}.",
            f"The cells of a predicted perturbation vary as true ones do ({r:.2g} times).",
        ),
        Check(
            name="collapsed to the mean", value=r, low=COLLAPSED, high=float("inf"), flagged=collapsed,
            text="Every cell of a perturbation is (nearly) the same: the prediction is its own mean, copied."
            if collapsed else "The cells of a perturbation differ from one another.",
        ),
    ]  # fmt: skip


def _check_significant(e: Evidence) -> list[Check]:
    if e.real_significant_p is None or e.pred_significant_p is None:
        return []
    r = _median_ratio(e.pred_significant_p + 1.0, e.real_significant_p + 1.0)
    low, high = SIGNIFICANT
    said = f"{r:.2g} times as many genes significant as the truth does"
    return [_make("significant genes", r, low, high, f"The prediction calls {said}; overlap scores follow the count.",
                  f"The prediction calls {said}.")]  # fmt: skip


def _effects(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    own = e.real_control_g if e.pred_control_g is None else e.pred_control_g
    return e.real_pg - e.real_control_g, e.pred_pg - own


def _check_effects(e: Evidence) -> Check:
    real, pred = _effects(e)
    r = _median_ratio(np.linalg.norm(pred, axis=1), np.linalg.norm(real, axis=1))
    low, high = EFFECT
    said = f"Predicted effects are {r:.2g} times as large as true ones"
    why = "distances between perturbations grow with them" if r > 1 else "predicting little is the safe bet of an error"
    return _make("effect size", r, low, high, f"{said}: {why}.", f"{said}.")


def _mean_cosine(effect_pg: np.ndarray) -> float:
    norm = np.linalg.norm(effect_pg, axis=1)
    unit = effect_pg[norm > 0] / norm[norm > 0, None]
    n = len(unit)
    if n < 2:
        return float("nan")
    total = unit.sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def _check_same_response(e: Evidence) -> list[Check]:
    real, pred = _effects(e)
    r, truth = _mean_cosine(pred), _mean_cosine(real)
    if not (np.isfinite(r) and np.isfinite(truth)):
        return []
    high = max(SAME_RESPONSE, truth + 0.02)
    said = f"mean cosine {r:.2f}; {truth:.2f} in the truth"
    bad = f"The predicted effects of different perturbations are nearly the same ({said}): nothing tells them apart."
    good = f"Predicted effects differ between perturbations ({said})."
    return [_make("one response for all", r, -1.0, high, bad, good)]


def _check_controls(e: Evidence) -> list[Check]:
    if e.pred_control_g is None:
        return []
    size = float(np.median(np.linalg.norm(e.real_pg - e.real_control_g, axis=1)))
    gap = float(np.linalg.norm(e.pred_control_g - e.real_control_g))
    r = gap / size if size > 0 else 0.0
    return [_make("own controls", r, 0.0, CONTROLS,
                  f"The prediction's controls differ from the truth's by {r:.0%} of a typical effect; effects measured "
                  "against them are not the truth's.",
                  "The prediction's controls are the truth's.")]  # fmt: skip


def _check_double_log(e: Evidence) -> Check:
    """Compare the mean profile with the truth's, and with log1p of the truth's."""
    real, pred = e.real_pg.mean(axis=0), e.pred_pg.mean(axis=0)
    plain = float(np.linalg.norm(pred - real))
    logged = float(np.linalg.norm(pred - np.log1p(np.maximum(real, 0))))
    r = plain / logged if logged > 0 else float("inf")
    flagged = bool(r > 2 and plain > 0.05 * float(np.linalg.norm(real)))
    return Check(
        name="log1p taken twice", value=min(r, 1e6), low=0.0, high=2.0, flagged=flagged,
        text=f"The predicted means lie {min(r, 1e6):.2g} times closer to log1p of the true means than to the means "
        "themselves: log1p was probably taken twice." if flagged
        else "The predicted means are on the truth's scale.",
    )  # fmt: skip
