"""What a scoring by the 2026 rules returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.scoring.gaming import Check
from vcelltools.scoring.metrics26 import EXPRESSION, METRICS, Values
from vcelltools.scoring.rules import Rules2026
from vcelltools.scoring.sides26 import Side

if TYPE_CHECKING:
    import os

    import pandas as pd

N_BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True)
class Component:
    """One metric of the score; fields as in ``score.json``."""

    value: float
    baseline: float
    ceiling: float
    score: float
    score_unclipped: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True, kw_only=True)
class ContextScore:
    """A prediction's score in one context, with what the report draws."""

    context: str
    labels: np.ndarray
    genes: np.ndarray
    values: Values
    components: dict[str, Component]
    avg_score: float
    real: Side
    pred: Side
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Score2026:
    """The result of :func:`score_vcc2026`.

    Attributes
    ----------
    components
        Metric → its value, both ends and score; means over the contexts.
    avg_score
        The plain mean of the six scores, averaged over contexts; NaN where ``problem`` says why.
    contexts
        The contexts, in name order.
    continuity
        Whether the rank test was corrected for continuity.
    problem
        Why there is no score although there are values, or "".
    warnings
        What the user should know.
    """

    components: dict[str, Component]
    avg_score: float
    contexts: tuple[ContextScore, ...]
    continuity: bool
    rules: Rules2026
    problem: str = ""
    warnings: tuple[str, ...] = ()

    def require(self, hint: str | None = None) -> Score2026:
        """Return itself; raise a :class:`DataError`, with a hint, where there are values but no score."""
        if self.problem:
            raise DataError(self.problem, hint=hint)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return what ``score.json`` holds."""
        return {
            "compat": "vcc2026",
            "profile": "vcc",
            "rules": self.rules.version,
            "continuity": self.continuity,
            "components": {m: _component_json(c) for m, c in self.components.items()},
            "avg_score": self.avg_score,
            "contexts": {
                c.context: {
                    "avg_score": c.avg_score,
                    "components": {m: _component_json(k) for m, k in c.components.items()},
                }
                for c in self.contexts
                if c.context
            },
            "gaming": [
                asdict(k) | ({"context": c.context} if c.context else {}) for c in self.contexts for k in c.checks
            ],
            "problem": self.problem or None,
            "warnings": list(self.warnings),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return ``results.csv`` as a DataFrame indexed by perturbation."""
        import pandas as pd

        head, rows = self.to_rows()
        return pd.DataFrame(rows, columns=head).set_index("perturbation")

    def write(self, folder: str | os.PathLike, *, force: bool = False) -> dict[str, Any]:
        """Write the tables and ``score.json``; return their paths by name."""
        from vcelltools.scoring.run26 import write_result

        return write_result(self, folder, force=force)

    def to_rows(self) -> tuple[list[str], list[list[Any]]]:
        """Return the header and rows of ``results.csv``: a row a perturbation, a column a metric."""
        with_context = any(c.context for c in self.contexts)
        per = [m for m in METRICS if m != EXPRESSION]
        parts = ["expr_mse_unbiased_capped", "expr_distance_unbiased"]
        rows = [
            [label, *([c.context] if with_context else []), *[float(c.values.per[m][i]) for m in per],
             float(c.values.error_p[i]), float(c.values.distance_p[i])]
            for c in self.contexts
            for i, label in enumerate(c.labels)
        ]  # fmt: skip
        return ["perturbation", *(["context"] if with_context else []), *per, *parts], rows


def _component_json(c: Component) -> dict[str, Any]:
    return {
        "value": c.value,
        "baseline": c.baseline,
        "ceiling": c.ceiling,
        "score": c.score,
        "score_unclipped": c.score_unclipped,
        "ci95": list(c.ci95),
        "n": c.n,
    }


def get_interval(values: Values, metric: str) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a metric's raw value over perturbations."""
    if metric == EXPRESSION:
        ok = np.isfinite(values.error_p) & np.isfinite(values.distance_p)
        above, below = values.error_p[ok], values.distance_p[ok]
    else:
        above = values.per[metric][np.isfinite(values.per[metric])]
        below = np.ones(len(above))
    if len(above) < 2:
        return float("nan"), float("nan")
    pick = np.random.default_rng(0).integers(0, len(above), (N_BOOTSTRAP, len(above)))
    under = below[pick].sum(axis=1)
    drawn = np.divide(above[pick].sum(axis=1), under, out=np.full(N_BOOTSTRAP, np.nan), where=under > 0)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < N_BOOTSTRAP // 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def average(scores: list[ContextScore]) -> dict[str, Component]:
    """Return the components of all contexts together: the means of their numbers."""
    if len(scores) == 1:
        return scores[0].components
    out = {}
    for m in METRICS:
        parts = [s.components[m] for s in scores]
        mean = {k: float(np.mean([getattr(c, k) for c in parts])) for k in
                ("value", "baseline", "ceiling", "score", "score_unclipped")}  # fmt: skip
        # contexts are independent: the half-widths of their mean add in squares
        half = [np.sqrt(sum((c.value - c.ci95[0]) ** 2 for c in parts)) / len(parts),
                np.sqrt(sum((c.ci95[1] - c.value) ** 2 for c in parts)) / len(parts)]  # fmt: skip
        ci = (float(mean["value"] - half[0]), float(mean["value"] + half[1]))
        out[m] = Component(**mean, ci95=ci, n=sum(c.n for c in parts))
    return out
