"""Print the report of ``inspect``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vcelltools.cli.hints import find_free
from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.files.card import Card
    from vcelltools.files.inspect import ColumnReport, InspectReport, MatrixReport

_MATRIX_COLUMNS = ["matrix", "layout", "cells × genes", "stored as", "non-zeros", "packed", "MB", "values"]
_ROLES = {
    "perturbation": "perturbation",
    "batch": "batch",
    "cell_line": "cell line",
    "n_guides": "guides a cell",
    "gene_id": "gene ids",
    "gene_name": "gene names",
}


def show_inspect(o: Output, r: InspectReport) -> None:
    """Print the report as JSON, or as tables of matrices, recognised columns and problems."""
    size = "" if r.size_bytes is None else f", {r.size_bytes / 1e6:,.1f} MB"
    shape = "" if r.n_cells is None else f", {r.n_cells:,} cells × {r.n_genes:,} genes ({r.index_kind})"
    o.result(r.to_json(), f"{r.path}: {r.kind or 'unreadable'}{size}{shape}", "")
    o.table(
        ["matrix", "layout", "cells × genes", "stored as", "non-zeros", "packed", "MB", "values"],
        _matrices(r),
        left=True,
    )
    rows = _roles(r)
    if rows:
        o.table(["\nrole", "\ncolumn", "\nlabels", "\nmissing", "\nmost frequent"], rows, left=True)
    if o.verbose:
        every = [[c.name, c.kind, c.n_labels, c.n_missing, _examples(c)] for c in (*r.obs, *r.var)]
        o.table(["\ncolumn", "\nkind", "\nlabels", "\nmissing", "\nmost frequent"], every, left=True)
    if not o.json and r.problems:
        o.table([f"\n{len(r.problems)} problem{'s' if len(r.problems) > 1 else ''}"], [[p] for p in r.problems])
    for note in r.notes:
        o.note(f"note: {note}")
    counts = next((m for m in r.matrices if (m.modality, m.layer) == r.opened and m.is_counts), None)
    if counts is not None and len(r.guide_modalities) == 1 and counts.modality not in r.guide_modalities:
        table = find_free("guides.parquet")
        words = ["--single", "--write", find_free("labelled.h5ad")]
        words += ["--out", table] if table.name != "guides.parquet" else []
        o.done("it holds counts, and counts of guides", ("guides", r.path, *words))
    elif counts is not None:
        out = find_free("hvgs.txt")
        words = [*shlex.split(counts.options), *(["--out", out] if out.name != "hvgs.txt" else [])]
        o.done("it holds counts", ("hvg", r.path, *words))
    else:
        o.done("nothing in it can be used as counts")


def _matrices(r: InspectReport) -> list[list[object]]:
    return [[_name(m), *_matrix_row(m)] for m in r.matrices]


def _name(m: MatrixReport) -> str:
    return m.layer if m.modality is None else f"{m.modality}: {m.layer}"


def _matrix_row(m: MatrixReport) -> list[object]:
    if m.shape is None:
        return [None, None, None, None, None, None, m.problem]
    stored = m.dtype if m.index_dtype is None else f"{m.dtype} at {m.index_dtype}"
    share = "" if m.nnz is None else f"{m.nnz:,} ({m.nnz / max(m.shape[0] * m.shape[1], 1):.1%})"
    verdict = m.problem or (m.counts.describe() if m.counts else "")
    size = f"{(m.stored_bytes or 0) / 1e6:,.1f}"
    return [m.layout, f"{m.shape[0]:,} × {m.shape[1]:,}", stored, share, "+".join(m.compression) or "no", size, verdict]


def _roles(r: InspectReport) -> list[list[object]]:
    rows: list[list[object]] = []
    for role, name in _ROLES.items():
        for c in r.get_columns(role)[:4]:
            rows.append([name, c.name, c.n_labels, c.n_missing, _examples(c)])
            if role == "perturbation" and c.controls:
                rows.append(["  its control", "", None, None, ", ".join(f"{v} ({k:,})" for v, k in c.controls)])
    return rows


def _examples(c: ColumnReport) -> str:
    return ", ".join(v if k == 1 else f"{v} ({k:,})" for v, k in c.examples)


def show_card(o: Output, c: Card) -> None:
    """Print an experiment card as JSON, or as a table of factors and sentences."""
    o.result(c.to_json(), f"{c.path}: {c.n_cells:,} cells", "")
    rows = [
        [f.name, f.role.replace("_", " "), f.levels, f.missing, f"{f.smallest:,} / {f.median:,.0f} / {f.largest:,}",
         ", ".join(f.nested_in)]
        for f in sorted(c.factors, key=lambda f: (not f.role, f.name))
    ]  # fmt: skip
    o.table(["factor", "role", "labels", "missing", "cells (least / median / most)", "nested in"], rows, left=True)
    facts = [
        ["perturbations", f"{c.n_perturbations:,}"],
        ["control", f"{c.control or 'none'} ({c.n_controls:,} cells)"],
    ]
    for name, spread in (
        ("cells per perturbation", c.cells_per_perturbation),
        ("replicates per perturbation", c.replicates_per_perturbation),
    ):
        if spread is not None:
            facts.append([name, f"{spread[0]:,} / {spread[1]:,.0f} / {spread[2]:,}"])
    if c.confounding is not None:
        facts.append([f"Cramér's V with {c.batch or c.cell_line}", f"{c.confounding:.2f}"])
    facts.append(["a score is possible", "yes" if c.can_score else "no"])
    o.table(["\nexperiment", "\n"], facts, left=True)
    if not o.json and c.findings:
        o.table(["\nfindings"], [[f] for f in c.findings], left=True)
    if c.can_score and c.control is not None and c.perturbation is not None:
        o.done("effects can be measured", ("de", c.path, "--pert-col", c.perturbation, "--control", c.control))
    else:
        o.done("no score is possible")
