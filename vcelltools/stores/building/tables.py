"""Write the last files of a store: its tables and its manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vcelltools.io.write.atomic import fsync_path, step
from vcelltools.stores.building.cells_table import write_cells
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.files import to_arrow, write_parquet
from vcelltools.stores.format import MANIFEST, PARTS, SCHEMA, hash_file, make_manifest
from vcelltools.version import __version__


def write_tables(layout: Layout, dpath: Path) -> None:
    """Write the tables of genes, measured genes, runs and cells."""
    import pandas as pd

    plan = layout.plan
    merged, order = plan.match.merged, plan.order
    columns: list[list[int]] = [[] for _ in range(len(merged.ids))]
    names = [str(x) for x in layout.ds.var.index]
    for j, g in enumerate(merged.of_column.tolist()):
        if g >= 0:
            columns[g].append(j)
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
            "columns": ["|".join(names[j] for j in columns[g]) if g >= 0 else "" for g in gene_of],
            "column_indices": [columns[g] if g >= 0 else [] for g in gene_of],
            "present": plan.match.present,
            "how": list(plan.match.how),
        }
    )
    measured = pd.DataFrame({"id": merged.ids[layout.measured], "symbol": merged.names[layout.measured]})
    basis_row = np.full(len(merged.ids), -1, np.int32)
    basis_row[gene_of[plan.match.present]] = np.flatnonzero(plan.match.present)
    measured["basis"] = basis_row[layout.measured]
    measured["column_indices"] = [columns[g] for g in layout.measured.tolist()]
    for name, frame in (("genes", genes), ("measured", measured), ("runs", order.runs)):
        write_parquet(dpath / f"{name}.parquet", to_arrow(frame))
        step(f"table {name}")
    write_cells(layout, dpath)
    step("table cells")


def write_manifest(layout: Layout, dpath: Path, duplicates: int, hashes: Mapping[str, str]) -> None:
    """Write the manifest, which makes the folder a store; files without a known hash are read for it."""
    plan = layout.plan
    files = {
        name: {"bytes": (dpath / name).stat().st_size, "sha256": hashes.get(name) or hash_file(dpath / name)}
        for name in PARTS
    }
    files["X.f16"] = {"bytes": layout.n * layout.row_bytes}
    body = {
        "schema": SCHEMA,
        "name": plan.spec.name,
        "plan": layout.fingerprint,
        "n_cells": layout.n,
        "n_genes": plan.n_basis,
        "stride": layout.stride,
        "n_runs": len(plan.order.runs),
        "n_groups": plan.order.n_groups,
        "target_sum": plan.target_sum,
        "arithmetic": "float32" if layout.single else "float64",
        "seed": plan.seed,
        "basis": {"sha256": plan.basis.sha256, "n": plan.n_basis},
        "library_size": {"from": plan.libsize_from, "n_genes": layout.ds.n_genes},
        "sums": {"genes": layout.sums_mode, "n": len(layout.measured)},
        "source": layout.source,
        "labels": plan.describe_labels(),
        "genes": {
            **plan.match.summary(),
            "id_from": plan.genes.id_source,
            "name_from": plan.genes.name_source,
            "ambiguous_genes": {k: list(v) for k, v in plan.match.ambiguous.items()},
        },
        "duplicate_entries": duplicates,
        "versions": {"vcelltools": __version__},
        "files": files,
    }
    tmp = dpath / "manifest.tmp"
    tmp.write_text(make_manifest(body), encoding="utf-8")
    fsync_path(tmp)
    step("manifest")
    os.replace(tmp, dpath / MANIFEST)
    fsync_path(dpath)
    step("complete")
