"""The truth, which is reduced once for any number of predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vcelltools.differential.ranks import GeneBuckets
from vcelltools.differential.reduce import Reduced
from vcelltools.errors import DataError, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.cell_eval.baseline import get_mean_profile, make_mean_baseline
from vcelltools.scoring.cell_eval.ceiling import split_half_ceiling
from vcelltools.scoring.cell_eval.de_table import DeTable
from vcelltools.scoring.cell_eval.metrics import compute_all, make_pair
from vcelltools.scoring.cell_eval.options import Opened, Options
from vcelltools.scoring.result import Ceiling


@dataclass(kw_only=True)
class Truth:
    """The reduced true cells of one context, with their baseline.

    Attributes
    ----------
    context
        The name of the context, or "" if there is only one.
    reduced, effects
        The reduced cells and their DE table (None without differential expression).
    opened, reopen
        The open file, or None if the truth came from a pack; and a function that opens it, if available.
    base_value_g, base_u_pg, base_p_pg
        The mean baseline: its profile, and its rank statistics against the controls.
    base_means
        Metric -> mean of the scores of the baseline; see :meth:`score_baseline`.
    energy_p
        Energy distances, once computed.
    ceiling
        The split-half ceiling, if requested.
    from_pack
        Whether it came from a pack, which keeps no p-values.
    """

    context: str
    reduced: Reduced
    effects: DeTable | None
    opened: Opened | None
    options: Options
    base_u_pg: np.ndarray | None = None
    base_p_pg: np.ndarray | None = None
    base_value_g: np.ndarray | None = None
    energy_p: np.ndarray | None = None
    ceiling: Ceiling | None = None
    base_means: dict[str, float | None] | None = None
    from_pack: bool = False
    reopen: Callable[[], Opened] | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The file from which it was read."""
        return self.reduced.label

    def score_baseline(self) -> dict[str, float | None]:
        """Return the mean scores of the mean baseline, which are computed once."""
        if self.base_means is None:
            assert self.base_value_g is not None
            options, real = self.options, self.reduced
            base = make_mean_baseline(real, self.base_value_g, self.base_u_pg, self.base_p_pg, options)
            effects = options.make_de_table(base) if self.base_u_pg is not None and options.scores_de else None
            pair = make_pair(base, real, effects, self.effects, options.rules, get_threads(options.threads))
            # all cells of the baseline are equal, so its energy distances are constant and have no correlation
            table = compute_all(pair, [n for n in options.names if n != "pearson_edistance"])
            self.base_means = {k: v["mean"] for k, v in table.aggregate(skip_nan=options.rules.null_empty).items()}
        return self.base_means

    def get_energy(self) -> np.ndarray:
        """Return the energy distances of the truth, which are computed once."""
        if self.energy_p is None:
            opened = self.get_opened()
            if opened is None:
                raise DataError(
                    "the truth pack holds no energy distances", hint=f"write it with {spell('profile', 'full')}"
                )
            self.energy_p = opened.get_energy()
        return self.energy_p

    def get_opened(self) -> Opened | None:
        """Return the open file, or None if it is not available."""
        if self.opened is None and self.reopen is not None:
            self.opened = self.reopen()
        return self.opened

    def close(self) -> None:
        """Close the file, and keep the reduced data."""
        if self.opened is not None:
            self.opened.dataset.close()


def reduce_truth(opened: Opened, context: str = "", *, progress: Progress = SILENT) -> Truth:
    """Reduce the true cells, and keep the file open for its controls and energy distances."""
    options = opened.options
    buckets: list[GeneBuckets] = []
    reduced = opened.reduce(test=options.needs_de, keep=buckets, progress=progress, phase="truth")
    notes = list(reduced.notes)
    if opened.cells.n_missing:
        notes.append(f"{reduced.label}: {opened.cells.n_missing:,} cells without a label were left out")
    value = get_mean_profile(reduced)
    found: dict[str, Any] = {}
    if options.needs_de:
        u, _, p = buckets[0].rank_constant(value, reduced.sums.size_k[reduced.perts], reduced.control, reduced.sums)
        found = {"base_u_pg": u, "base_p_pg": p}
    del buckets
    return Truth(
        context=context,
        reduced=reduced,
        effects=options.make_de_table(reduced) if options.needs_de else None,
        opened=opened,
        options=options,
        base_value_g=value,
        ceiling=split_half_ceiling(opened, progress=progress) if options.ceiling else None,
        notes=notes,
        **found,
    )
