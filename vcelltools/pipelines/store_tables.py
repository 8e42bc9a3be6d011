"""The last files of a store: its tables, and the manifest that makes it one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.io.atomic import fsync_path, step
from vcelltools.pipelines.store_cells import write_cells
from vcelltools.pipelines.store_files import to_arrow, write_parquet
from vcelltools.pipelines.store_format import MANIFEST, PARTS, SCHEMA, hash_file, make_manifest

if TYPE_CHECKING:
    from vcelltools.pipelines.store_build import Builder


def write_tables(b: Builder) -> None:
    """Write the tables of genes, measured genes, runs and cells."""
    import pandas as pd

    plan = b.plan
    merged, order = plan.match.merged, plan.order
    columns: list[list[str]] = [[] for _ in range(len(merged.ids))]
    index = b.ds.var.index
    for j, g in enumerate(merged.of_column.tolist()):
        columns[g].append(str(index[j]))
    gene_of = plan.match.gene_of
    genes = pd.DataFrame(
        {
            "gene": list(plan.basis.labels),
            "id": [
                merged.ids[g] if g >= 0 and merged.ids[g] else i for g, i in zip(gene_of, plan.basis.ids, strict=True)
            ],
            "symbol": [
                s or (merged.names[g] if g >= 0 else None) for g, s in zip(gene_of, plan.basis.symbols, strict=True)
            ],
            "columns": ["|".join(columns[g]) if g >= 0 else "" for g in gene_of],
            "present": plan.match.present,
            "how": list(plan.match.how),
        }
    )
    measured = pd.DataFrame({"id": merged.ids[b.measured], "symbol": merged.names[b.measured]})
    basis_row = np.full(len(merged.ids), -1, np.int32)
    basis_row[gene_of[plan.match.present]] = np.flatnonzero(plan.match.present)
    measured["basis"] = basis_row[b.measured]
    for name, frame in (("genes", genes), ("measured", measured), ("runs", order.runs)):
        write_parquet(b.dpath / f"{name}.parquet", to_arrow(frame))
        step(f"table {name}")
    write_cells(b)
    step("table cells")


def write_manifest(b: Builder) -> None:
    """Write the manifest: from here on the folder is a store."""
    from vcelltools import __version__

    plan = b.plan
    files = {name: {"bytes": (b.dpath / name).stat().st_size, "sha256": hash_file(b.dpath / name)} for name in PARTS}
    files["X.f16"] = {"bytes": b.n * b.row_bytes}
    body = {
        "schema": SCHEMA,
        "name": plan.spec.name,
        "plan": b.fingerprint,
        "n_cells": b.n,
        "n_genes": plan.n_basis,
        "stride": b.stride,
        "n_runs": len(plan.order.runs),
        "n_groups": plan.order.n_groups,
        "target_sum": plan.target_sum,
        "arithmetic": "float32" if b.single else "float64",
        "seed": plan.seed,
        "basis": {"sha256": plan.basis.sha256, "n": plan.n_basis},
        "library_size": {"from": plan.libsize_from, "n_genes": b.ds.n_genes},
        "sums": {"genes": b.sums_mode, "n": len(b.measured)},
        "source": {**b.source, "n_cells": b.ds.n_cells, "n_genes": b.ds.n_genes},
        "labels": {
            "pert_col": plan.spec.pert_col,
            "control": plan.labels.perturbations[0],
            "controls": list(plan.spec.controls),
            "control_is_missing": plan.spec.control_is_missing,
            "group_by": list(plan.spec.group_by),
            "cell_line": plan.spec.cell_line,
            "cell_line_col": plan.spec.cell_line_col,
            "dropped": plan.labels.dropped,
            "small_groups": [list(x) for x in plan.labels.small],
        },
        "genes": {
            **plan.match.summary(),
            "id_from": plan.genes.id_source,
            "name_from": plan.genes.name_source,
            "ambiguous_genes": {k: list(v) for k, v in plan.match.ambiguous.items()},
        },
        "duplicate_entries": b.duplicates,
        "versions": {"vcelltools": __version__},
        "files": files,
    }
    tmp = b.dpath / "manifest.tmp"
    tmp.write_text(make_manifest(body), encoding="utf-8")
    fsync_path(tmp)
    step("manifest")
    os.replace(tmp, b.dpath / MANIFEST)
    fsync_path(b.dpath)
    step("complete")
