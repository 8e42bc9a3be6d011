"""Two predictions of the same perturbations: is one better, or are they level?

Perturbations that are hard for one model are hard for the other, so the intervals of two scores overlap long before
the models are level. The bootstrap here is paired: every resample of the perturbations is scored for both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError
from vcelltools.results import Result
from vcelltools.scoring.compat import METRICS
from vcelltools.scoring.result import get_unclipped
from vcelltools.textfile import read_columns, read_text


@dataclass(frozen=True, kw_only=True)
class Difference(Result):
    """How much the average score of one prediction is above that of another.

    Attributes
    ----------
    value
        The difference of the average scores; above 0 the first is better.
    ci95
        2.5 % and 97.5 % percentiles of it over resamples of the perturbations, the same for both.
    n
        Perturbations that both have.
    """

    value: float
    ci95: tuple[float, float]
    n: int

    @property
    def level(self) -> bool:
        """Whether 0 lies within the interval."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def compare_scores(first: str | Path, second: str | Path, *, n_bootstrap: int = 2000, seed: int = 0) -> Difference:
    """Compare two folders that ``score`` wrote against one truth.

    A resample's score of a metric is what ``score`` makes of its mean: 0 at the baseline, which stays where it is,
    1 at the best value, clipped below at 0; the average is over the metrics.

    Parameters
    ----------
    n_bootstrap, seed
        Resamples, and the seed of their draws.

    Raises
    ------
    DataError
        Where a file is missing or damaged, or the two have no metric or fewer than two perturbations in common.
    """
    (names, columns), (other_names, other_columns) = (_read_values(Path(d)) for d in (first, second))
    baselines = _read_baselines(Path(first))
    metrics = [m for m, b in baselines.items() if b is not None and m in columns and m in other_columns]
    place = {n: i for i, n in enumerate(other_names)}
    both = [i for i, n in enumerate(names) if n in place]
    if not metrics or len(both) < 2:
        raise DataError(f"{first} and {second} share {len(metrics)} metrics and {len(both)} perturbations")
    theirs = [place[names[i]] for i in both]
    draws = np.random.default_rng(seed).integers(0, len(both), (n_bootstrap, len(both)))
    draws = np.vstack([np.arange(len(both)), draws])  # first, the perturbations as they are
    gains = []
    for m in metrics:
        scores = []
        for values in (columns[m][both], other_columns[m][theirs]):
            mean = _mean_of_draws(values, draws)
            raw = get_unclipped(mean, float(baselines[m] or 0.0), METRICS[m].best or 0.0)
            scores.append(np.where(np.isnan(raw), 0.0, np.maximum(raw, 0.0)))
        gains.append(scores[0] - scores[1])
    gain = np.mean(gains, axis=0)
    low, high = np.percentile(gain[1:], [2.5, 97.5])
    return Difference(value=float(gain[0]), ci95=(float(low), float(high)), n=len(both))


def _mean_of_draws(values: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return (d,) means of the values that are not NaN; NaN for a draw of none."""
    some = ~np.isnan(values)
    total, count = np.where(some, values, 0.0)[draws].sum(axis=1), some[draws].sum(axis=1)
    return np.divide(total, count, out=np.full(len(draws), np.nan), where=count > 0)


_HINT = "score the prediction again"


def _read_values(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the perturbations of ``results.csv`` and its columns, NaN where one has no value."""
    names, columns = read_columns(folder / "results.csv", first="perturbation", what="a table of scores", hint=_HINT)
    return names, {name: np.array(values) for name, values in columns.items()}


def _read_baselines(folder: Path) -> dict[str, float | None]:
    """Return metric -> baseline of the components of ``score.json``."""
    path = folder / "score.json"
    text = read_text(path, what="a score", hint=_HINT)
    try:
        return {m: c["baseline"] for m, c in json.loads(text)["components"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: is not what score writes: {e}", hint=_HINT) from e
