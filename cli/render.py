"""Print the results of ``hvg``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.cli.hints import find_building

if TYPE_CHECKING:
    from vcelltools.cli.output import Output
    from vcelltools.selection.hvg import HvgResult


def show_hvg(o: Output, result: HvgResult, out: Path, plot: Path | None = None) -> None:
    """Print the result of ``hvg``."""
    from vcelltools.io.write.atomic import say_bytes
    from vcelltools.runtime.memory import peak_memory

    body: dict[str, Any] = {
        "n_cells": result.n_cells,
        "n_genes": len(result.genes),
        "n_selected": len(result.order),
        "flavor": result.settings["flavor"],
        "batches": result.batches,
        "bytes_read": result.bytes_read,
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "out": str(out),
        "plot": None if plot is None else str(plot),
        "warnings": list(result.warnings),
        "notes": list(result.notes),
    }
    for n in result.notes:
        o.note(n)
    o.warn(result.warnings)
    o.result(body)
    also = "" if plot is None else f", and {plot}"
    o.done(
        f"wrote {out} and hvg_scores.json beside it{also}: {len(result.order):,} of {len(result.genes):,} genes over "
        f"{result.n_cells:,} cells by {result.settings['flavor']}, {say_bytes(result.bytes_read)} in "
        f"{result.seconds:.1f} s",
        find_building(out, [s["path"] for s in result.source]),
    )


def show_hvg_plan(o: Output, plan: dict[str, Any]) -> None:
    """Print the plan of ``hvg --plan``."""
    o.table(
        ["file", "cells", "genes", "layout", "non-zeros", "GB to read", "passes"],
        [
            [
                Path(f["path"]).name,
                f["n_cells"],
                f["n_genes"],
                f["layout"],
                f["nnz"],
                f["bytes_to_read"] / 1e9,
                f["passes"],
            ]
            for f in plan["files"]
        ],
    )
    for f in plan["files"]:
        if f["batches"]:
            o.table(["batch", "cells"], [[k, v] for k, v in f["batches"].items()], title="batches")
    o.result(plan, f"about {plan['seconds']:.1f} s and {plan['peak_memory_bytes'] / 1e6:,.0f} MB of memory")
    o.warn(plan["warnings"])
