"""The interface of rule sets: read the truth, score a prediction against it, and save the truth to a pack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vcelltools.runtime.progress import Progress
from vcelltools.scoring.result import Result

if TYPE_CHECKING:
    from anndata import AnnData


class RuleSet(Protocol):
    """A rule set with its settings; a truth is the true cells of one context, ready to score against.

    Attributes
    ----------
    magic
        The first bytes of its truth packs.
    settings
        The settings on which a truth depends, which must match those of a pack.
    """

    magic: bytes
    settings: dict[str, Any]

    def read_truth(self, source: str | os.PathLike | AnnData, progress: Progress) -> Sequence[Any]:
        """Read the true cells, and return the truth of every context, sorted by name."""

    def score(
        self,
        pred: str | os.PathLike | AnnData,
        truths: Sequence[Any],
        truth: str | os.PathLike | AnnData | None,
        progress: Progress,
    ) -> Result:
        """Score a prediction against truths; ``truth`` is the file behind those of a pack, if available."""

    def pack(self, truth: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the content of a truth pack for a truth: a header and named arrays."""

    def unpack(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
        """Return the truth from the result of :meth:`pack`; raise ValueError, KeyError or TypeError if invalid."""


def make_rule_set(compat: str, **options: Any) -> RuleSet:
    """Return a rule set by its name in ``compat``, with its options.

    Raises
    ------
    UsageError
        If options cannot be combined.
    """
    if compat == "vcc2026":
        from vcelltools.scoring.vcc2026.score import Vcc2026

        return Vcc2026(**options)
    if options.get("profile") == "calibrated":
        from vcelltools.scoring.calibrated.score import Calibrated

        return Calibrated(compat=compat, **options)
    from vcelltools.scoring.cell_eval.score import CellEval

    return CellEval(compat=compat, **options)
