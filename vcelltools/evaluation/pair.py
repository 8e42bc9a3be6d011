"""``evaluate --compare``: compare two runs on the groups that both hold out, with paired intervals."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError
from vcelltools.evaluation.table import compare
from vcelltools.io.results import Result
from vcelltools.model.metrics import correlate_rows, evaluate_effects
from vcelltools.prediction.predict import Request, get_effects
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.inputs import make_setup
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.train import final_part

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.training.inputs import Setup


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """The scores of two runs on the same groups.

    Attributes
    ----------
    metrics
        By metric: ``first``, ``second``, the ``gain`` of the second with its paired interval, and the number of groups.
    """

    first: Path
    second: Path
    n_groups: int
    metrics: dict[str, dict[str, float]]


def compare_runs(first: str | os.PathLike, second: str | os.PathLike, *, progress: Progress = SILENT) -> Comparison:
    """Compare two runs of ``train`` on the groups that both hold out.

    Raises
    ------
    DataError
        If they hold out no common group, or were trained on different stores.
    """
    tables, sums = [], []
    for run in (first, second):
        folder = RunFolder(Path(run))
        setup = make_setup(folder.read_settings(), progress=progress)
        folder.compare_vocabulary(setup)
        sums.append({s.name: s.sha256 for s in setup.stores})
        tables.append((folder, setup, setup.screen.groups.iloc[setup.screen.rows(final_part(setup))]))
    keys = [set(zip(t["line"], t["perturbation"], strict=True)) for _, _, t in tables]
    both = keys[0] & keys[1]
    if not both:
        raise DataError(f"{first} and {second} hold out no common group", hint="train both with the same split")
    if any(sums[0].get(k, v) != v for k, v in sums[1].items()):
        raise DataError(
            f"{first} and {second} were trained on different stores with the same names", hint="train them again"
        )
    frames = [_score(folder, setup, both) for folder, setup, _ in tables]
    return Comparison(first=Path(first), second=Path(second), n_groups=len(both), metrics=compare(*frames))


def _score(folder: RunFolder, setup: Setup, both: set[tuple[str, str]]) -> pd.DataFrame:
    """Return one row of scores for each of the groups."""
    import pandas as pd

    groups = setup.screen.groups
    rows = np.array([i for i, r in enumerate(groups.itertuples()) if (r.line, r.perturbation) in both])
    picked = groups.iloc[rows]
    requests = [Request(perturbation=r.perturbation, line=r.line, n_cells=int(r.cells)) for r in picked.itertuples()]
    predicted = get_effects(folder, setup, requests)
    measured = setup.screen.effect_kg[rows].astype(np.float64)
    pert, line = setup.screen.ids(rows)
    scores = evaluate_effects(predicted, measured, line, setup.screen.target_p[pert])
    return pd.DataFrame(
        {
            "line": picked["line"].to_numpy(), "perturbation": picked["perturbation"].to_numpy(), "pds": scores.pds_k,
            "pearson_delta": correlate_rows(predicted, measured), "mae": scores.mae_k,
            "square": ((predicted - measured) ** 2).sum(axis=1), "nothing": (measured**2).sum(axis=1),
        }
    )  # fmt: skip
