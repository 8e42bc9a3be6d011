"""Compare two predictions of the same perturbations with a paired bootstrap.

Perturbations that are hard for one model are also hard for the other, so the intervals of two scores overlap even if
one model is clearly better. The bootstrap is therefore paired: every resample of the perturbations is scored for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.results import Result
from vcelltools.io.textfile import parse_json, read_columns, read_text
from vcelltools.scoring.cell_eval.rules import METRICS
from vcelltools.scoring.result import get_unclipped


@dataclass(frozen=True, kw_only=True)
class Difference(Result):
    """The difference between the average scores of two predictions.

    Attributes
    ----------
    value
        The difference of the average scores; above 0, the first is better.
    ci95
        Its 2.5 % and 97.5 % percentiles over resamples of the perturbations, the same for both.
    n
        Number of perturbations that both have.
    """

    value: float
    ci95: tuple[float, float]
    n: int

    @property
    def level(self) -> bool:
        """Whether 0 is within the interval."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def compare_scores(first: str | Path, second: str | Path, *, n_bootstrap: int = 2000, seed: int = 0) -> Difference:
    """Compare two folders that ``score`` wrote against one truth.

    A resample is scored like in ``score``: the mean of a metric is 0 at the baseline, which is fixed,
    and 1 at the best value, clipped below at 0; the average is over the metrics.

    Parameters
    ----------
    n_bootstrap, seed
        Number of resamples, and their random seed.

    Raises
    ------
    DataError
        If a file is missing or damaged, or the two have no metric or fewer than two perturbations in common.
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
    draws = np.vstack([np.arange(len(both)), draws])  # the first row is the perturbations without resampling
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
    """Return (d,) means of the values that are not NaN; NaN for draws without values."""
    some = ~np.isnan(values)
    total, count = np.where(some, values, 0.0)[draws].sum(axis=1), some[draws].sum(axis=1)
    return np.divide(total, count, out=np.full(len(draws), np.nan), where=count > 0)


_HINT = "score the prediction again"


def _read_values(folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the perturbations in ``results.csv`` and its columns, with NaN for missing values."""
    names, columns = read_columns(folder / "results.csv", first="perturbation", what="a table of scores", hint=_HINT)
    return names, {name: np.array(values) for name, values in columns.items()}


def _read_baselines(folder: Path) -> dict[str, float | None]:
    """Return metric -> baseline of the components of ``score.json``."""
    path = folder / "score.json"
    text = read_text(path, what="a score", hint=_HINT)
    try:
        return {m: c["baseline"] for m, c in parse_json(text)["components"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path} was not written by score: {e}", hint=_HINT) from e
