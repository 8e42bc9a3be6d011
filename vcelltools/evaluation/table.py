"""Summarise the scores of held-out groups: means, bootstrap intervals, and paired gains over a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("pds", "pearson_delta", "mae", "error")
REFERENCE = "perturbation-mean"
_RESAMPLES = 2000


def make_table(groups: pd.DataFrame, reference: str = REFERENCE) -> pd.DataFrame:
    """Return one row for each family of splits, model and metric.

    ``value`` is the mean over the held-out groups (for ``error``, the summed squared error over that of no effect).
    ``low`` and ``high`` are its 95 % bootstrap interval. ``gain`` is the difference from the reference on the same
    groups, with a paired interval. The bootstrap resamples perturbations with all of their groups, because the groups
    of one perturbation in several lines or splits are not independent.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for family, part in groups.groupby("family", sort=False):
        base = part[part["model"] == reference]
        for model, own in part.groupby("model", sort=False):
            pair = own.merge(base, on=["split", "line", "perturbation"], suffixes=("", "_base"))
            for metric in METRICS:
                value, low, high = _summarise(own, metric)
                row = {
                    "family": family, "model": model, "metric": metric, "value": value, "low": low, "high": high,
                    "splits": own["split"].nunique(), "groups": len(own),
                }  # fmt: skip
                if model != reference and len(pair):
                    row["gain"], row["gain_low"], row["gain_high"] = _summarise(pair, metric, paired=True)
                rows.append(row)
    return pd.DataFrame(rows, columns=[*rows[0], *(k for k in ("gain", "gain_low", "gain_high") if k not in rows[0])])


def _summarise(groups: pd.DataFrame, metric: str, *, paired: bool = False) -> tuple[float, float, float]:
    """Return the value and interval of a metric, or with ``paired`` of the difference from the columns ``_base``."""
    codes, names = groups["perturbation"].factorize()
    n = len(names)
    ends = ("", "_base") if paired else ("",)
    if metric == "error":
        parts = [_sum(groups, codes, n, f"square{e}", f"nothing{e}") for e in ends]
    else:
        parts = [_sum(groups, codes, n, f"{metric}{e}", None) for e in ends]

    def get(weight: np.ndarray) -> np.ndarray:
        values = [(weight @ a) / np.maximum(weight @ b, 1e-12) for a, b in parts]
        return values[0] - values[1] if paired else values[0]

    value = float(get(np.ones((1, n)))[0])
    if n < 2:
        return value, float("nan"), float("nan")
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(np.float64)
    low, high = np.quantile(get(drawn), [0.025, 0.975])
    return value, float(low), float(high)


def _sum(groups: pd.DataFrame, codes: np.ndarray, n: int, top: str, bottom: str | None) -> tuple[np.ndarray, ...]:
    below = np.ones(len(groups)) if bottom is None else groups[bottom].to_numpy(np.float64)
    return np.bincount(codes, groups[top].to_numpy(np.float64), n), np.bincount(codes, below, n)


def compare(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return both values and the paired gain of the second, by metric, on the common groups."""
    pair = second.merge(first, on=["line", "perturbation"], suffixes=("", "_base"))
    out = {}
    for metric in METRICS:
        gain, low, high = _summarise(pair, metric, paired=True)
        base = pair[[c for c in pair if c.endswith("_base") or c in ("line", "perturbation")]]
        base = base.rename(columns=lambda c: c.removesuffix("_base"))
        out[metric] = {
            "first": _summarise(base, metric)[0], "second": _summarise(pair, metric)[0], "gain": gain,
            "gain_low": low, "gain_high": high, "groups": len(pair),
        }  # fmt: skip
    return out
