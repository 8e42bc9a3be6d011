"""What a build would be, told before it begins: cells, genes, passes, disk, memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.io import CscMatrix
from vcelltools.pipelines.store_build import MAPPED_SUMS, Builder


def describe(b: Builder) -> dict[str, Any]:
    """Return what would be built and how, without reading counts."""
    plan, m = b.plan, b.ds.matrix
    runs = plan.order.runs
    return {
        "name": plan.spec.name,
        "source": b.ds.label,
        "layout": m.layout,
        "passes": _describe_passes(b),
        "bytes_to_read": _get_bytes_to_read(b),
        "sums_over": "all genes" if b.sums_mode == "all" else "the basis genes (--sums all: all genes)",
        "cells": b.n,
        "of_cells": b.ds.n_cells,
        "left_out": plan.labels.dropped,
        "cell_lines": plan.labels.lines,
        "perturbations": len(plan.labels.perturbations) - 1,
        "contexts": len(plan.labels.contexts),
        "runs": len(runs),
        "controls": int(runs.loc[runs["is_control"], "length"].sum()),
        "smallest_group": int(runs["length"].min()),
        "groups_too_small": len(plan.labels.small),
        "genes": plan.match.describe(),
        "disk_bytes": b.disk_bytes,
        "sums_on_disk_bytes": 0 if b.sums_fit else b.sums_bytes,
        "memory_bytes": b.work_bytes + (b.sums_bytes if b.sums_fit else MAPPED_SUMS),
    }


def _describe_passes(b: Builder) -> str:
    """Return, in words, how often the source is read, and what of it."""
    if not b.by_column:
        return "one pass over all counts"
    what = "all genes" if b.sums_mode == "all" else f"the {b.plan.match.present.sum():,} basis genes"
    if b.known_libsize is None:
        return f"one pass over all counts for the library sizes (hvg --stats saves it), then one over {what}"
    return f"one pass over {what} (library sizes from {b.plan.libsize_from})"


def _get_bytes_to_read(b: Builder) -> int:
    """Return about how many stored bytes the passes read."""
    m = b.ds.matrix
    if not b.by_column:
        return m.stored_bytes
    wanted = (b.basis_of_column >= 0) | (b.measured_of_column >= 0)
    share = np.diff(m.indptr)[wanted].sum() / max(m.nnz, 1) if isinstance(m, CscMatrix) else wanted.mean()
    return int(m.stored_bytes * (share + (b.known_libsize is None)))
