"""The dated rules of the challenges for submissions: the required content of containers of each year.

A rule that changed has one entry per start date; :func:`get_rules_2025` selects by the day.

Sources: cell-eval 0.6.6 and 0.8.2 (2025), vcc-cli 0.3.0 and cell-eval2 0.20.0 (2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, kw_only=True)
class Rules2025:
    """The requirements for a 2025 ``.vcc``, from ``since`` on."""

    version: str
    since: date
    n_genes: int
    max_cells: int
    control: str = "non-targeting"
    watermark: bytes = b"vcc-prep"
    members: tuple[str, ...] = ("pred.h5ad.zst", "watermark.txt")
    max_log1p: float = 15.0


@dataclass(frozen=True, kw_only=True)
class Rules2026:
    """The requirements for a 2026 ``.vcc``, and the limits that scoring enforces."""

    version: str
    since: date
    n_genes: int
    n_perturbations: int
    cells_per_perturbation: int
    contexts: tuple[str, ...]
    final_contexts: tuple[str, ...]
    max_cells: int
    max_nnz: int
    max_counts_per_cell: float
    schema: int = 1
    control: str = "non-targeting"
    members: tuple[str, ...] = ("meta.json", "pred.h5ad.zst")


RULES_2025 = (
    Rules2025(version="2025-06", since=date(2025, 6, 26), n_genes=18_080, max_cells=100_000),
    Rules2025(version="2025-10", since=date(2025, 10, 27), n_genes=18_080, max_cells=200_000),
)

RULES_2026 = Rules2026(
    version="2026-r3",
    since=date(2026, 8, 19),
    n_genes=18_533,
    n_perturbations=300,
    cells_per_perturbation=400,
    contexts=("A", "B", "C"),
    final_contexts=("D", "E", "F"),
    max_cells=400_000,
    max_nnz=4_750_000_000,
    max_counts_per_cell=1_000_000.0,
)


def get_rules_2025(day: date | None = None) -> Rules2025:
    """Return the rules that applied on ``day`` (by default, the latest)."""
    if day is None:
        return RULES_2025[-1]
    held = [r for r in RULES_2025 if r.since <= day]
    return held[-1] if held else RULES_2025[0]
