"""What a scoring returns: tables, components with baseline, ceiling and interval, and how they are written."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools import __version__
from vcelltools.io.atomic import dump_json, staged, to_plain, write_json, write_text
from vcelltools.scoring.frames import ScoreTable, aggregate_csv, write_de_csv

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.scoring.evaluate import Truth
    from vcelltools.scoring.metrics import Pair
    from vcelltools.scoring.sides import Side


@dataclass(frozen=True, kw_only=True)
class Component:
    """One scored metric.

    Attributes
    ----------
    value
        Mean over perturbations.
    baseline, ceiling
        The same of the baseline, and the split-half ceiling; None where there is none.
    score, score_unclipped
        0 is the baseline and 1 the best value: (u − b)/(1 − b) where the best is one, 1 − u/b where it is zero;
        clipped below at zero, and not.
    ci95
        Percentile bootstrap interval of ``value`` over perturbations; None for a global metric.
    n
        Perturbations that have a value.
    best
        The metric's best value.
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

    @staticmethod
    def make(
        name: str,
        values: np.ndarray,
        stats: dict[str, float | None],
        baseline: float | None,
        ceiling: float | None,
        best: float,
        n_bootstrap: int,
    ) -> Component:
        """Put one together from the column and its aggregate."""
        value = stats["mean"]
        raw = None
        if value is not None and baseline is not None:
            raw = float(get_unclipped(np.float64(value), baseline, best))
        score = None if raw is None else (0.0 if math.isnan(raw) else max(raw, 0.0))
        some = values[~np.isnan(values)]
        return Component(
            name=name,
            value=value,
            baseline=baseline,
            ceiling=ceiling,
            score=score,
            score_unclipped=raw,
            ci95=bootstrap_interval(some, n_bootstrap) if name not in GLOBAL_METRICS else None,
            n=len(some),
            best=best,
        )


def get_unclipped(value: np.ndarray | np.float64, baseline: float, best: float) -> np.ndarray | np.float64:
    """Return values on the scale from 0, the baseline, to 1, the best value (of which there are two: one and zero)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        b = np.float64(baseline)
        return (value - b) / (1 - b) if best == 1 else 1 - value / b


GLOBAL_METRICS = ("de_spearman_sig", "pearson_edistance", "clustering_agreement")


def bootstrap_interval(values: np.ndarray, n: int, seed: int = 0) -> tuple[float, float] | None:
    """Return the 2.5 % and 97.5 % percentiles of the mean of ``n`` resamples of the perturbations."""
    if len(values) < 2 or n < 1:
        return None
    draws = np.random.default_rng(seed).integers(0, len(values), (n, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Two disjoint halves of every real group scored against each other.

    Attributes
    ----------
    table
        Scores of one half against the other.
    values
        Metric -> the ceiling 2r/(1 + r) at full depth, or NaN where that has no meaning.
    n_dropped
        Groups of fewer than two cells, which cannot be split.
    """

    table: ScoreTable
    values: dict[str, float]
    n_dropped: int

    def to_csv(self) -> str:
        """Return the text of ``agg_ceiling_results.csv``."""
        cells = ["NaN" if math.isnan(v) else repr(v) for v in self.values.values()]
        return ",".join(self.values) + "\n" + ",".join(cells) + "\n"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A scored prediction.

    Attributes
    ----------
    compat, source, profile
        The rule set, whose numbers it gives, and the profile of metrics.
    table, aggregate
        Scores by perturbation, and their statistics.
    components
        Scored metrics with baseline, ceiling and interval.
    n_without_de
        Perturbations without a true DE gene; None without differential expression.
    pair, pred, real
        Pseudobulks, effects and tables of both sides, for reports.
    ceiling
        The split-half ceiling, where it was asked for.
    settings, warnings
        How it was computed, and what to know about it.
    """

    compat: str
    source: str
    profile: str
    table: ScoreTable
    aggregate: dict[str, dict[str, float | None]]
    components: dict[str, Component]
    skip_undefined: bool
    n_without_de: int | None
    pair: Pair
    pred: Side
    real: Side
    ceiling: Ceiling | None
    control: str
    truth: Truth = field(repr=False)
    order_by: str
    from_pack: bool
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def avg_score(self) -> float | None:
        """The plain mean of the components' scores."""
        scores = [c.score for c in self.components.values() if c.score is not None]
        if self.skip_undefined:  # a component that nobody can score says nothing about this prediction
            scores = [
                c.score
                for c in self.components.values()
                if c.score is not None and c.score_unclipped is not None and math.isfinite(c.score_unclipped)
            ]
        return float(np.mean(scores)) if scores else None

    def to_frame(self) -> pd.DataFrame:
        """Return the scores by perturbation as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(
            {k: self.table.values(k) for k in self.table.columns}, index=pd.Index(self.table.names, name="perturbation")
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``score.json`` holds."""
        from vcelltools.scoring.report_data import get_checks_2025

        keys = ("value", "baseline", "ceiling", "score", "score_unclipped", "ci95", "n")
        body = {
            "compat": self.compat,
            "profile": self.profile,
            "components": {n: {k: getattr(c, k) for k in keys} for n, c in self.components.items()},
            "avg_score": self.avg_score,
            "n_perturbations": len(self.table.names),
            "n_without_de": self.n_without_de,
            "source": self.source,
            "settings": self.settings,
            "files": {"pred": self.pred.label, "truth": self.real.label},
            "version": __version__,
            "gaming": [asdict(c) for c in get_checks_2025(self)],
            "warnings": self.warnings,
        }
        with_empty = self._with_empty()
        if with_empty:
            body["with_perturbations_without_de"] = with_empty
        return to_plain(json.loads(dump_json(body)))

    def _with_empty(self) -> dict[str, float]:
        """Return the means with perturbations that have no true DE gene counted as zero, where they were left out."""
        if not self.skip_undefined or not self.n_without_de:
            return {}
        return {
            k: float(np.nan_to_num(self.table.values(k)).mean())
            for k in self.table.columns
            if k.startswith(("overlap_at_", "precision_at_"))
        }

    def get_files(self, folder: str | os.PathLike) -> dict[str, Path]:
        """Return name -> path of what :meth:`write` writes."""
        names = ["results.csv", "agg_results.csv", "score.json"]
        if self.pair.pred_de is not None:
            names += ["pred_de.csv"]
            if not self.from_pack:
                names += ["real_de.csv"]
        if self.ceiling is not None:
            names += ["ceiling_results.csv", "agg_ceiling_results.csv"]
        return {n: Path(folder) / n for n in names}

    def write(self, folder: str | os.PathLike, *, force: bool = False, threads: int = 2) -> dict[str, Path]:
        """Write the tables, ``score.json`` and the differential expression of both sides."""
        from concurrent.futures import ThreadPoolExecutor

        files = self.get_files(folder)
        optional = ("real_de.csv", "pred_de.csv", "ceiling_results.csv", "agg_ceiling_results.csv")
        stale = [Path(folder) / name for name in optional]
        with (
            staged(list(files.values()), force=force, stale=stale) as there,
            ThreadPoolExecutor(max(1, threads)) as pool,
        ):
            jobs = []
            for name, side, table in (
                ("pred_de.csv", self.pred, self.pair.pred_de),
                ("real_de.csv", self.real, self.pair.real_de),
            ):
                if name in files and table is not None:
                    sizes = dict(zip(side.labels, side.sums.size_k.tolist(), strict=True))
                    jobs.append(
                        pool.submit(
                            write_de_csv,
                            there / name,
                            table,
                            side.genes,
                            order=getattr(side, self.order_by),
                            sizes=sizes,
                            control=self.control,
                            dtype=side.dtype,
                        )
                    )
            write_text(there / "results.csv", self.table.to_csv())
            write_text(there / "agg_results.csv", aggregate_csv(self.aggregate))
            if self.ceiling is not None:
                write_text(there / "ceiling_results.csv", self.ceiling.table.to_csv())
                write_text(there / "agg_ceiling_results.csv", self.ceiling.to_csv())
            write_json(there / "score.json", self.to_json())
            for job in jobs:
                job.result()
        return files
