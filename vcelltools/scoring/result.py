"""The result of a scoring under any rule set: components with both ends of their scale, tables, and files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.results import Shown
from vcelltools.io.write.atomic import dump_json, staged, to_plain, write_json, write_text
from vcelltools.scoring.gaming import Check
from vcelltools.scoring.tables import Columns, ScoreTable, Statistics, aggregate_csv, texts, write_arrow_csv

if TYPE_CHECKING:
    import pandas as pd

JSON_KEYS = ("value", "baseline", "ceiling", "score", "score_unclipped", "ci95", "n")
OPTIONAL_FILES = ("pred_de.csv", "real_de.csv", "ceiling_results.csv", "agg_ceiling_results.csv")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether a metric tells a good prediction from a bad one on the data at hand.

    Attributes
    ----------
    drf, drf_median
        Dynamic Range Fraction: how far from the negative control to a perfect prediction the positive control comes;
        mean and median over perturbations.
    bds
        Bound Discrimination Score: the share of perturbations in which the positive control wins.
    positive, negative
        Mean values of both controls.
    n
        Perturbations that have a fraction.
    discriminates
        False where the range is too small for the metric to tell models apart.
    """

    drf: float | None
    drf_median: float | None
    bds: float | None
    positive: float | None
    negative: float | None
    n: int
    discriminates: bool


@dataclass(frozen=True, kw_only=True)
class Component:
    """One scored metric.

    Attributes
    ----------
    value
        Mean over perturbations.
    baseline, ceiling
        The value of the baseline, and of true cells that predict true cells; None or NaN if there is none.
    score, score_unclipped
        The position of the value between the ends of the scale, clipped as the rules say, and unclipped.
    ci95
        Percentile bootstrap interval of ``value`` over perturbations; None for a metric over all of them together.
    n
        Number of perturbations that have a value.
    best
        The best value of the metric, one or zero.
    calibration
        Whether the metric tells anything on this data, where the rule set looks.
    """

    name: str
    value: float | None
    baseline: float | None
    ceiling: float | None
    score: float | None
    score_unclipped: float | None
    ci95: tuple[float, float] | None
    n: int
    best: float
    calibration: Calibration | None = None

    def to_json(self) -> dict[str, Any]:
        """Return its entry in ``score.json``."""
        out = {k: getattr(self, k) for k in JSON_KEYS}
        return out if self.calibration is None else {**out, "calibration": asdict(self.calibration)}


def get_unclipped(value: np.ndarray | np.float64, baseline: float, best: float) -> np.ndarray | np.float64:
    """Return values on the scale from 0, the baseline, to 1, the best value (which is one or zero)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        b = np.float64(baseline)
        return (value - b) / (1 - b) if best == 1 else 1 - value / b


def bootstrap_interval(values: np.ndarray, n: int, seed: int = 0) -> tuple[float, float] | None:
    """Return the 2.5 % and 97.5 % percentiles of the mean of ``n`` resamples of the perturbations."""
    if len(values) < 2 or n < 1:
        return None
    draws = np.random.default_rng(seed).integers(0, len(values), (n, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Two disjoint halves of every true group, scored against each other.

    Attributes
    ----------
    table
        Scores of one half against the other.
    values
        Metric -> the ceiling 2r/(1 + r) at full depth, or NaN if it is meaningless.
    n_dropped
        Number of groups with fewer than two cells, which cannot be split.
    """

    table: ScoreTable
    values: dict[str, float]
    n_dropped: int

    def to_csv(self) -> str:
        """Return the text of ``agg_ceiling_results.csv``."""
        cells = ["NaN" if math.isnan(v) else repr(v) for v in self.values.values()]
        return ",".join(self.values) + "\n" + ",".join(cells) + "\n"


@dataclass(frozen=True, kw_only=True)
class ContextScore:
    """The score of a prediction in one context; the subclass of a rule set adds the data for its report.

    Attributes
    ----------
    context
        The context's name, "" where the data is one.
    components
        Metric -> its value, both ends and score.
    avg_score
        The mean of the scores of the components, as defined by the rule set.
    table
        The scores by perturbation.
    checks
        The gaming panel.
    problem
        Why there is no average although there are values, or "".
    """

    context: str
    components: dict[str, Component]
    avg_score: float | None
    table: ScoreTable
    checks: Sequence[Check]
    problem: str = ""

    @property
    def has_de(self) -> bool:
        """Whether there are tables of differential expression."""
        return True

    def get_de(self, side: str) -> tuple[Columns, int, list[str]]:
        """Return the table of differential expression of ``"pred"`` or ``"real"``, its rows, and the texts in it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Result(Shown):
    """A scored prediction.

    Attributes
    ----------
    compat, profile
        The rule set and the profile of metrics.
    contexts
        The contexts, sorted by name; a single one has no name.
    components, avg_score
        Means over the contexts; the average is None or NaN if there is a ``problem``.
    table, aggregate
        Scores by perturbation, and their statistics.
    details
        Additional content of ``score.json``: the settings and counts of the rule set.
    from_pack
        Whether the truth came from a pack, which keeps no p-values.
    ceiling
        The split-half ceiling, if requested.
    problem
        The reason why there are values but no score, or "".
    warnings
        Messages for the user.
    """

    compat: str
    profile: str
    contexts: tuple[Any, ...]
    components: dict[str, Component]
    avg_score: float | None
    table: ScoreTable
    aggregate: dict[str, Statistics]
    details: dict[str, Any]
    from_pack: bool
    ceiling: Ceiling | None = None
    problem: str = ""
    warnings: Sequence[str] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the only context, such as ``pair``, ``pred`` or ``real``."""
        if name.startswith("_") or len(self.__dict__.get("contexts", ())) != 1:
            raise AttributeError(name)
        return getattr(self.contexts[0], name)

    def require(self, hint: str | None = None) -> Result:
        """Return the result, or raise a :class:`DataError` with a hint if there are values but no score."""
        if self.problem:
            raise DataError(self.problem, hint=hint)
        return self

    def to_frame(self) -> pd.DataFrame:
        """Return ``results.csv`` as a pandas DataFrame indexed by perturbation."""
        return self.table.to_frame()

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``score.json`` as plain values, with None for undefined ones."""
        named = [c for c in self.contexts if c.context]
        body = {
            "compat": self.compat,
            "profile": self.profile,
            "components": {m: c.to_json() for m, c in self.components.items()},
            "avg_score": self.avg_score,
            **self.details,
            "gaming": [
                asdict(k) | ({"context": c.context} if c.context else {}) for c in self.contexts for k in c.checks
            ],
            "warnings": list(self.warnings),
        }
        if named or "contexts" in self.details:
            body["contexts"] = {
                c.context: {
                    "avg_score": c.avg_score,
                    "components": {m: k.to_json() for m, k in c.components.items()},
                }
                for c in named
            }
        return to_plain(json.loads(dump_json(body)))

    def get_files(self, folder: str | os.PathLike) -> dict[str, Path]:
        """Return name -> path of the files that :meth:`write` writes."""
        names = ["results.csv", "agg_results.csv", "score.json"]
        if self.contexts[0].has_de:
            names += ["pred_de.csv"] if self.from_pack else ["pred_de.csv", "real_de.csv"]
        if self.ceiling is not None:
            names += ["ceiling_results.csv", "agg_ceiling_results.csv"]
        return {n: Path(folder) / n for n in names}

    def write(self, folder: str | os.PathLike, *, force: bool = False) -> dict[str, Path]:
        """Write the tables, ``score.json`` and the differential expression of both sides; return their paths."""
        files = self.get_files(folder)
        stale = [Path(folder) / name for name in OPTIONAL_FILES]
        with staged(list(files.values()), force=force, stale=stale) as there, ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(self._write_de, there / f"{side}_de.csv", side)
                for side in ("pred", "real")
                if f"{side}_de.csv" in files
            ]
            write_text(there / "results.csv", self.table.to_csv())
            write_text(there / "agg_results.csv", aggregate_csv(self.aggregate))
            if self.ceiling is not None:
                write_text(there / "ceiling_results.csv", self.ceiling.table.to_csv())
                write_text(there / "agg_ceiling_results.csv", self.ceiling.to_csv())
            write_json(there / "score.json", self.to_json())
            for job in jobs:
                job.result()
        return files

    def _write_de(self, path: Path, side: str) -> None:
        tables, names = [], []
        for c in self.contexts:
            columns, n_rows, said = c.get_de(side)
            tables.append(({"context": texts([c.context], each=n_rows)} if c.context else {}) | columns)
            names += [c.context, *said]
        write_arrow_csv(path, tables, said=names)


def average_contexts(scores: Sequence[ContextScore]) -> dict[str, Component]:
    """Return the combined components: the means of their numbers over the contexts that have them."""
    if len(scores) == 1:
        return scores[0].components
    out = {}
    for m in dict.fromkeys(k for s in scores for k in s.components):
        parts = [s.components[m] for s in scores if m in s.components]
        means = {}
        for k in ("value", "baseline", "ceiling", "score", "score_unclipped"):
            known = [v for c in parts if (v := getattr(c, k)) is not None]
            means[k] = float(np.mean(known)) if known else None
        ci = None
        if means["value"] is not None and all(c.ci95 is not None and c.value is not None for c in parts):
            # contexts are independent, so the squared half-widths of their mean add up
            wide = np.array([(c.value - c.ci95[0], c.value - c.ci95[1]) for c in parts])  # type: ignore[operator,index]
            below, above = np.sqrt((wide**2).sum(axis=0)) / len(parts)
            ci = float(means["value"] - below), float(means["value"] + above)
        out[m] = Component(name=m, **means, ci95=ci, n=sum(c.n for c in parts), best=parts[0].best,
                           calibration=average_calibrations([c.calibration for c in parts]))  # fmt: skip
    return out


def average_calibrations(parts: Sequence[Calibration | None]) -> Calibration | None:
    """Return the means over contexts; a metric discriminates where it does so in most of them."""
    some = [c for c in parts if c is not None]
    if not some:
        return None
    means = {}
    for k in ("drf", "drf_median", "bds", "positive", "negative"):
        known = [v for c in some if (v := getattr(c, k)) is not None]
        means[k] = float(np.mean(known)) if known else None
    return Calibration(
        **means, n=sum(c.n for c in some), discriminates=2 * sum(c.discriminates for c in some) > len(some)
    )


def average_scores(scores: Sequence[ContextScore]) -> float | None:
    """Return the mean of the defined average scores of the contexts."""
    known = [s.avg_score for s in scores if s.avg_score is not None and not math.isnan(s.avg_score)]
    return float(np.mean(known)) if known else None
