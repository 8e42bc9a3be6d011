"""Describe a build before it begins: cells, genes, passes, disk and memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.errors import spell
from vcelltools.io import CscMatrix
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.sums import MAPPED_SUMS


def describe(layout: Layout) -> dict[str, Any]:
    """Return what would be built and how, without reading counts."""
    plan, m = layout.plan, layout.ds.matrix
    runs, every = plan.order.runs, spell("sums", "all")
    return {
        "name": plan.spec.name,
        "source": layout.ds.label,
        "layout": m.layout,
        "passes": _describe_passes(layout),
        "bytes_to_read": _get_bytes_to_read(layout),
        "sums_over": "all genes" if layout.sums_mode == "all" else f"the basis genes ({every}: all genes)",
        "cells": layout.n,
        "of_cells": layout.ds.n_cells,
        "left_out": plan.labels.dropped,
        "cell_lines": plan.labels.lines,
        **({"directions": sorted(set(runs["direction"]))} if "direction" in runs else {}),
        "perturbations": len(plan.labels.perturbations) - 1,
        "contexts": len(plan.labels.contexts),
        "runs": len(runs),
        "controls": int(runs.loc[runs["is_control"], "length"].sum()),
        "smallest_group": int(runs["length"].min()),
        "groups_too_small": len(plan.labels.small),
        "genes": plan.match.describe(),
        "disk_bytes": layout.disk_bytes,
        "sums_on_disk_bytes": 0 if layout.sums_fit else layout.sums_bytes,
        "memory_bytes": layout.work_bytes + (layout.sums_bytes if layout.sums_fit else MAPPED_SUMS),
    }


def _describe_passes(layout: Layout) -> str:
    """Describe how many times the source is read, and which parts of it."""
    if not layout.by_column:
        return "one pass over all counts"
    what = "all genes" if layout.sums_mode == "all" else f"the {layout.plan.match.present.sum():,} basis genes"
    if layout.plan.libsize is None:
        return (
            f"one pass over all counts for the library sizes (which vcelltools hvg --stats saves), then one over {what}"
        )
    return f"one pass over {what} (library sizes from {layout.plan.libsize_from})"


def _get_bytes_to_read(layout: Layout) -> int:
    """Return the approximate number of stored bytes that the passes read."""
    m = layout.ds.matrix
    if not layout.by_column:
        return m.stored_bytes
    wanted = (layout.basis_of_column >= 0) | (layout.measured_of_column >= 0)
    share = np.diff(m.indptr)[wanted].sum() / max(m.nnz, 1) if isinstance(m, CscMatrix) else wanted.mean()
    return int(m.stored_bytes * (share + (layout.plan.libsize is None)))
