"""The result of a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vcelltools.io.results import Result


@dataclass(frozen=True, kw_only=True)
class PredictResult(Result):
    """A prediction that was written.

    Attributes
    ----------
    n_filled, n_control_genes
        Numbers of genes outside the basis that have a training effect for some perturbation, and that have none.
    rules
        The challenge whose rules were checked, if any.
    """

    out: Path
    model: str
    n_cells: int
    n_genes: int
    n_perturbations: int
    n_basis: int
    n_filled: int
    n_control_genes: int
    lines: tuple[str, ...]
    rules: int | None
    warnings: tuple[str, ...]
    peak_memory_bytes: int
