"""The settings of a scoring by the 2026 rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PERT_COL = "target_gene"
CONTROL = "non-targeting"
CONTEXT_COL = "context"


@dataclass(frozen=True, kw_only=True)
class Options2026:
    """How predictions and truth are read, and what is computed.

    Attributes
    ----------
    pert_col, control
        The obs column of the perturbation, and the control's label in it.
    context_col
        Column of contexts; the data is one context where the truth lacks it.
    layer
        The layer to read in place of X.
    target_gene_map
        Perturbation → its own gene, or None where it has none; other labels are matched by name.
    continuity
        Whether the rank test takes the continuity correction.
    anchors
        Whether to compute the two ends; without them there are values and no scores.
    threads
        Worker threads (default: the usable cores).
    """

    pert_col: str = PERT_COL
    control: str = CONTROL
    context_col: str = CONTEXT_COL
    layer: str | None = None
    target_gene_map: Mapping[str, str | None] | None = None
    continuity: bool = True
    anchors: bool = True
    threads: int | None = None
