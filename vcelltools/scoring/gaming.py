"""Check for signs that a score results from gaming the metrics rather than from a good prediction.

No metric forbids any of these, and each of them has raised scores without any knowledge of biology. A flag
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
COPIES = 0.01


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence for the panel; everything except the profiles may be None if it is unknown.

    Attributes
    ----------
    real_pg, pred_pg
        (p, g) mean log profile of each perturbation.
    real_control_g, pred_control_g
        (g,) mean log profile of the controls of each side; None if those of the prediction are not read.
    real_spread_p, pred_spread_p
        (p,) variance between the cells of a perturbation, summed over genes.
    real_significant_p, pred_significant_p
        (p,) number of significant genes.
    real_copied, pred_copied
        Fraction of cells that are copies of another cell with the same label.
    library_ratio
        Ratio of the median counts of predicted and true cells (only for counts).
    """

    real_pg: np.ndarray
    pred_pg: np.ndarray
    real_control_g: np.ndarray
    pred_control_g: np.ndarray | None = None
    real_spread_p: np.ndarray | None = None
    pred_spread_p: np.ndarray | None = None
    real_significant_p: np.ndarray | None = None
    pred_significant_p: np.ndarray | None = None
    real_copied: float | None = None
    pred_copied: float | None = None
    library_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the panel.

    Attributes
    ----------
    name
        Short name.
    value
        The measured value.
    low, high
        The unremarkable range.
    flagged
        Whether the value is outside that range.
    text
        A sentence that explains it.
    """

    name: str
    value: float
    low: float
    high: float
    flagged: bool
    text: str


def check_gaming(e: Evidence) -> list[Check]:
    """Return every check that the evidence allows, flagged or not.

    The ratios are medians over perturbations, so that a few outliers do not decide.
    """
    out = [
        *_check_spread(e),
        *_check_significant(e),
        _check_effects(e),
        *_check_same_response(e),
        *_check_controls(e),
        *_check_copies(e),
        _check_double_log(e),
    ]
    if e.library_ratio is not None:
        low, high = LIBRARY
        r = e.library_ratio
        size = f"{_say(r)} times the counts of a true one"
        out.append(
            _make(
                "library size",
                r,
                low,
                high,
                f"A predicted cell has {size}, which affects the rank test.",
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


def _say(ratio: float) -> str:
    """Return a ratio in plain digits: 0.34, 6.9, 390."""
    if ratio < 0.01:
        return "less than 0.01"
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}" if ratio < 1e6 else "over a million"


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
            f"The cells of a predicted perturbation vary {word} than true ones ({_say(r)} times): "
            f"{'tests call far too many genes significant' if r < 1 else 'noise hides true effects'}.",
            f"The cells of a predicted perturbation vary like true ones ({_say(r)} times).",
        ),
        Check(
            name="collapsed to the mean", value=r, low=COLLAPSED, high=float("inf"), flagged=collapsed,
            text="All cells of a perturbation are (nearly) equal: the prediction consists of copies of its mean."
            if collapsed else "The cells of a perturbation differ from one another.",
        ),
    ]  # fmt: skip


def _check_significant(e: Evidence) -> list[Check]:
    if e.real_significant_p is None or e.pred_significant_p is None:
        return []
    r = _median_ratio(e.pred_significant_p + 1.0, e.real_significant_p + 1.0)
    low, high = SIGNIFICANT
    said = f"{_say(r)} times as many genes significant as the truth"
    return [_make("significant genes", r, low, high, f"The prediction calls {said}, which changes overlap scores.",
                  f"The prediction calls {said}.")]  # fmt: skip


def _effects(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    own = e.real_control_g if e.pred_control_g is None else e.pred_control_g
    return e.real_pg - e.real_control_g, e.pred_pg - own


def _check_effects(e: Evidence) -> Check:
    real, pred = _effects(e)
    r = _median_ratio(np.linalg.norm(pred, axis=1), np.linalg.norm(real, axis=1))
    low, high = EFFECT
    said = f"Predicted effects are {_say(r)} times as large as true ones"
    why = "this increases distances between perturbations" if r > 1 else "this lowers errors without any knowledge"
    return _make("effect size", r, low, high, f"{said}; {why}.", f"{said}.")


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
    bad = f"The predicted effects of different perturbations are nearly the same ({said}): nothing distinguishes them."
    good = f"Predicted effects differ between perturbations ({said})."
    return [_make("one response for all", r, -1.0, high, bad, good)]


def _check_controls(e: Evidence) -> list[Check]:
    if e.pred_control_g is None:
        return []
    size = float(np.median(np.linalg.norm(e.real_pg - e.real_control_g, axis=1)))
    gap = float(np.linalg.norm(e.pred_control_g - e.real_control_g))
    r = gap / size if size > 0 else 0.0
    return [_make("own controls", r, 0.0, CONTROLS,
                  f"The controls of the prediction differ from those of the truth by {r:.0%} of a typical effect, so "
                  "effects measured against them are not comparable.",
                  "The controls of the prediction are those of the truth.")]  # fmt: skip


def _check_copies(e: Evidence) -> list[Check]:
    if e.pred_copied is None or e.real_copied is None:
        return []
    said = f"{e.pred_copied:.0%} of the predicted cells are copies of another one with the same label"
    return [_make("copied cells", e.pred_copied, 0.0, e.real_copied + COPIES,
                  f"{said}: the rank test treats each as an independent observation, and calls more genes significant.",
                  f"{said}.")]  # fmt: skip


def _check_double_log(e: Evidence) -> Check:
    """Compare the mean profile with that of the truth, and with log1p of it."""
    real, pred = e.real_pg.mean(axis=0), e.pred_pg.mean(axis=0)
    plain = float(np.linalg.norm(pred - real))
    logged = float(np.linalg.norm(pred - np.log1p(np.maximum(real, 0))))
    r = plain / logged if logged > 0 else float("inf")
    flagged = bool(r > 2 and plain > 0.05 * float(np.linalg.norm(real)))
    return Check(
        name="log1p taken twice", value=min(r, 1e6), low=0.0, high=2.0, flagged=flagged,
        text=f"The predicted means are {_say(r)} times closer to log1p of the true means than to the means "
        "themselves, so log1p was probably applied twice." if flagged
        else "The predicted means are on the scale of the truth.",
    )  # fmt: skip
