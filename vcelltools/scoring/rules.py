"""The challenges' rules for submissions, dated: what a container of each year must hold.

A rule that moved has one entry for each date from which it held; :func:`get_rules_2025` picks by the day.

Sources: cell-eval 0.6.6 and 0.8.2 (2025), vcc-cli 0.3.0 and cell-eval2 0.20.0 (2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, kw_only=True)
class Rules2025:
    """What a 2025 ``.vcc`` must hold, from ``since`` on."""

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
    """What a 2026 ``.vcc`` must hold, and the caps that scoring enforces."""

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
    zstd_level: int = 3


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
    """Return the rules that held on ``day`` (default: the last)."""
    if day is None:
        return RULES_2025[-1]
    held = [r for r in RULES_2025 if r.since <= day]
    return held[-1] if held else RULES_2025[0]
