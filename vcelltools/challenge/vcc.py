"""``prep`` and ``lint``: pack a prediction into the container of the challenge, and check a container.

The 2025 container is a GNU tar of ``pred.h5ad.zst`` and ``watermark.txt``; the 2026 one has ``meta.json`` first. The
requirements are in :mod:`vcelltools.scoring.rules`; :mod:`vcelltools.challenge.checks` checks the
content.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vcelltools.challenge.checks import (
    Report,
    check_2025,
    check_2026,
    get_fingerprint,
    read_contexts,
    read_genes,
    read_perturbations,
)
from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.io import CscMatrix, CsrMatrix, Dataset, open_dataset
from vcelltools.io.chunks import DenseChunk
from vcelltools.io.dataset import list_choices
from vcelltools.io.formats.vcc import Member, read_bytes, read_members, unpack, write_vcc
from vcelltools.io.origin import find_stale
from vcelltools.io.results import Result
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import room_for
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.io.write.transpose import ColumnSpill
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.rules import RULES_2026, Rules2025, Rules2026, get_rules_2025
from vcelltools.scoring.vcc2026.counts import read_ahead
from vcelltools.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from scipy import sparse

PREDICTION, META, WATERMARK = "pred.h5ad.zst", "meta.json", "watermark.txt"
_MARK = get_rules_2025().watermark
_META_LIMIT = 64 << 10
_NAMED = 40  # maximum length of a value from meta.json in a message
Rows: TypeAlias = "tuple[sparse.csr_matrix, int, int]"
Block: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, int, int]


_META_KINDS: dict[str, type] = {
    "nnz": int, "n_obs": int, "n_vars": int, "cli_version": str, "contexts": list, "panel_id": str,
    "perts_fingerprint": str,
}  # fmt: skip
_KIND_NAMES: dict[type, str] = {int: "a whole number", str: "text", list: "a list of names"}


@dataclass(frozen=True, kw_only=True)
class PrepResult(Result):
    """What :func:`prep` wrote."""

    out: Path
    rules: str
    n_cells: int
    n_genes: int
    nnz: int
    n_bytes: int
    normalized: bool
    reordered: bool
    contexts: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LintResult(Result):
    """The result of :func:`lint`; ``ok`` means that there is no problem."""

    path: Path
    ok: bool
    rules: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


@checked
def prep(
    pred: str | os.PathLike,
    out: str | os.PathLike,
    *,
    genes: str | os.PathLike,
    year: int | None = None,
    perturbations: str | os.PathLike | None = None,
    contexts: tuple[str, ...] | None = None,
    cells_per_perturbation: int | None = None,
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    context_col: str = "context",
    celltype_col: str | None = None,
    layer: str | None = None,
    encoding: int = 32,
    allow_discrete: bool = False,
    day: date | None = None,
    max_cells: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> PrepResult:
    """Check a prediction against the rules of the challenge and pack it.

    Parameters
    ----------
    genes
        The genes of the challenge in order: a CSV with the genes in its first column, with or without a header.
    year
        2025 or 2026; by default 2026 if obs has ``context_col``.
    perturbations
        2026: ``pert_counts.csv``, with the perturbations that every context must hold.
    contexts
        2026: the contexts that the file must hold; by default those in the ``manifest.json`` beside ``perturbations``
        or ``genes``, or otherwise those of the validation phase.
    encoding
        Bits per value, 32 or 64.
    allow_discrete
        2025: whether to keep counts instead of scaling cells to the median library size and applying log1p.
    day
        2025: the day whose rules apply (the limit on cells was raised on 2025-10-27).

    Raises
    ------
    DataError
        If the prediction violates rules; the message lists all violations with perturbations, cells and genes.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.prep("pred.h5ad", "submission.vcc", genes="genes.csv", year=2025).n_genes
    100
    """
    if encoding not in (32, 64):
        raise UsageError(f"encoding {encoding} is not known", hint="32 or 64 bits a value")
    guard_outputs([Target(out, "vcc")], reads=[pred, genes, perturbations], force=force)
    names = read_genes(genes)
    with open_dataset(pred, layer=layer, name="prediction") as data:
        if year is None:
            year = 2026 if context_col in data.obs.columns else 2025
        _refuse_foreign(year, context_col, {
            2025: {spell("allow_discrete", True): allow_discrete, spell("day"): day},
            2026: {spell("perturbations"): perturbations, spell("contexts"): contexts, spell("cells_per_perturbation"):
                   cells_per_perturbation},
        })  # fmt: skip
        rules: Rules2025 | Rules2026
        meta: dict[str, Any] = {}
        if year == 2025:
            rules = get_rules_2025(day)
            rules = replace(rules, max_cells=max_cells or rules.max_cells)
            report = check_2025(
                data, rules, genes=names, pert_col=pert_col, control=control,
                allow_discrete=allow_discrete, threads=threads, progress=progress,
            )  # fmt: skip
        elif year == 2026:
            rules = replace(
                RULES_2026,
                max_cells=max_cells or RULES_2026.max_cells,
                cells_per_perturbation=cells_per_perturbation or RULES_2026.cells_per_perturbation,
            )
            wanted, panel = read_contexts(contexts, perturbations, genes)
            report = check_2026(
                data, rules, genes=names, pert_col=pert_col, control=control, context_col=context_col,
                contexts=wanted, perturbations=read_perturbations(perturbations, control) if perturbations else None,
                threads=threads, progress=progress,
            )  # fmt: skip
            meta = {"contexts": list(wanted), "panel_id": panel,
                    "perts_fingerprint": get_fingerprint(perturbations) if perturbations else None}  # fmt: skip
        else:
            raise UsageError(f"there are no rules for {year}", hint="2025 or 2026")
        if celltype_col and celltype_col not in data.obs.columns:
            have = ", ".join(data.obs.columns) or "none"
            report.problems.append(f"obs has no column {celltype_col!r} for the cell type (columns: {have})")
        report.raise_problems(f"{pred} violates the {year} rules")
        report.warnings += find_stale(pred)
        scale = report.library / report.median if report.normalize else None
        obs = _make_obs(data, {pert_col: "target_gene"} | ({celltype_col: "celltype"} if celltype_col else {})
                        | ({context_col: "context"} if year == 2026 else {}))  # fmt: skip
        return _pack(
            data, Path(out), obs=obs, names=names, report=report, scale=scale, rules=rules, meta=meta,
            encoding=encoding, force=force, threads=threads, progress=progress,
        )  # fmt: skip


def _refuse_foreign(year: int, context_col: str, options: dict[int, dict[str, object]]) -> None:
    """Raise a :class:`UsageError` for options that belong to the rules of the other year."""
    for other, given in options.items():
        names = [k for k, v in given.items() if v]
        if other != year and names:
            hint = f"use {spell('year')} {other}, the default if obs has a column {context_col!r}"
            raise UsageError(
                f"{', '.join(names)} belong to the {other} rules, but the {year} rules are checked",
                hint=hint if other == 2026 else f"{spell('year')} {other}",
            )


def _pack(
    data: Dataset,
    out: Path,
    *,
    obs: pd.DataFrame,
    names: list[str],
    report: Report,
    scale: np.ndarray | None,
    rules: Rules2025 | Rules2026,
    meta: dict[str, Any],
    encoding: int,
    force: bool,
    threads: int | None,
    progress: Progress,
) -> PrepResult:
    import pandas as pd

    from vcelltools.io.write.h5ad import H5adWriter

    order = None if report.gene_order is None else np.argsort(report.gene_order)
    nnz = 0
    with room_for(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        inner = Path(folder) / "pred.h5ad"
        dtype = "float32" if encoding == 32 else "float64"
        var = pd.DataFrame(index=pd.Index(names, dtype=object))
        progress.start("packing", data.matrix.stored_bytes, "bytes")
        with H5adWriter(
            inner, n_genes=len(names), var=var, obs=obs, layout="csr", dtype=dtype, compression="none",
            need_bytes=report.nnz * (4 + encoding // 8), threads=threads,
        ) as h5ad:  # fmt: skip
            for rows, first, n_bytes in _iterate_rows(data, order, Path(folder), threads):
                if scale is not None:  # like the tool of the challenge, in float32
                    by = np.where(scale[first : first + rows.shape[0]] == 0, 1, scale[first : first + rows.shape[0]])
                    values = rows.data.astype(np.float32) / np.repeat(by.astype(np.float32), np.diff(rows.indptr))
                    rows.data = np.log1p(values)
                elif report.to_natural != 1:
                    rows.data = rows.data * rows.data.dtype.type(report.to_natural)
                h5ad.append_csr(rows.indptr.astype(np.int64), rows.indices, rows.data.astype(dtype))
                nnz += rows.nnz
                progress.advance(n_bytes)
        progress.finish()
        parts: list[tuple[str, bytes | Path]] = [(PREDICTION, inner)]
        if isinstance(rules, Rules2025):
            parts.append((WATERMARK, rules.watermark))
        else:
            said = {k: v for k, v in meta.items() if v is not None}
            full = {"schema": rules.schema, "nnz": nnz, "n_obs": len(obs), "n_vars": len(names),
                    "cli_version": f"vcelltools {__version__}", **said}  # fmt: skip
            parts.insert(0, (META, json.dumps(full, sort_keys=True).encode()))
        n_bytes = write_vcc(
            out, parts, level=3, gnu=isinstance(rules, Rules2025), force=force, threads=get_threads(threads),
            verify=read_members,
        )  # fmt: skip
    return PrepResult(
        out=out,
        rules=rules.version,
        n_cells=len(obs),
        n_genes=len(names),
        nnz=nnz,
        n_bytes=n_bytes,
        normalized=scale is not None,
        reordered=order is not None,
        contexts=tuple(meta.get("contexts", ())),
        warnings=tuple(report.warnings),
    )


def _make_obs(data: Dataset, columns: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    index = pd.Index(np.arange(data.n_cells).astype(str), dtype=object)
    return pd.DataFrame(
        {new: pd.Categorical(data.obs.column(old).labels(exact=True)) for old, new in columns.items()}, index=index
    )


def _iterate_rows(data: Dataset, new_pos: np.ndarray | None, folder: Path, threads: int | None) -> Iterator[Rows]:
    """Yield (CSR rows in canonical form, first cell, bytes read), with genes moved to ``new_pos``."""
    from scipy import sparse

    by_columns = data.matrix.by_gene
    blocks = _turn_columns(data, folder) if by_columns else _read_rows(data, threads)
    for indptr, indices, values, first, n_bytes in blocks:
        at = indices if new_pos is None else new_pos[indices]
        rows = sparse.csr_matrix((values, at, indptr), shape=(len(indptr) - 1, data.n_genes))
        rows.sum_duplicates()
        rows.eliminate_zeros()
        yield rows, first, n_bytes


def _read_rows(data: Dataset, threads: int | None) -> Iterator[Block]:
    for chunk, n_bytes in read_ahead(data, get_threads(threads)):
        yield chunk.indptr, chunk.indices.astype(np.int64), chunk.data.copy(), chunk.row_start, n_bytes


def _turn_columns(data: Dataset, folder: Path) -> Iterator[Block]:
    """Yield the rows of a matrix stored by columns, using a temporary file."""
    from scipy import sparse

    matrix = data.matrix
    n = matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1]
    spans = matrix.plan()
    with ColumnSpill(folder, n_minor=data.n_cells, nnz=n) as spill:
        for span in spans:
            chunk = matrix.read(span)
            if isinstance(chunk, DenseChunk):
                columns = sparse.csr_matrix(chunk.block.T)
                spill.append(columns.indptr.astype(np.int64), columns.indices, columns.data)
            else:
                spill.append(chunk.indptr, chunk.indices, chunk.data)
        first = 0
        for indptr, indices, values in spill.blocks():
            yield indptr, indices.astype(np.int64), values, first, 0
            first += len(indptr) - 1


@checked
def lint(
    path: str | os.PathLike,
    *,
    genes: str | os.PathLike | None = None,
    perturbations: str | os.PathLike | None = None,
    contexts: tuple[str, ...] | None = None,
    cells_per_perturbation: int | None = None,
    control: str = "non-targeting",
    day: date | None = None,
    max_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> LintResult:
    """Check a ``.vcc`` against the rules of its year: the tar, its members, and the prediction inside.

    Only the prediction is extracted, to a temporary folder, with limits on its size and compression ratio.

    Parameters
    ----------
    genes, perturbations, contexts
        The required content of the prediction, if known; otherwise, only the metadata of the container is checked.
    max_bytes
        Maximum size of the unpacked prediction in bytes [default: the largest file that the rules allow].

    Raises
    ------
    DataError
        If a list cannot be read. Problems of the container are part of the result.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.lint("submission.vcc", genes="genes.csv").ok
    True
    """
    p = Path(path)
    problems: list[str] = []
    warnings: list[str] = []
    facts: dict[str, Any] = {}
    rules: Rules2025 | Rules2026 = get_rules_2025(day)
    names = read_genes(genes) if genes else None  # errors in the lists are not problems of the container
    panel = read_perturbations(perturbations, control) if perturbations else None
    try:
        members = read_members(p)
        rules = _check_members(p, members, day, problems, warnings)
        given = {spell("perturbations"): perturbations, spell("contexts"): contexts,
                 spell("cells_per_perturbation"): cells_per_perturbation}  # fmt: skip
        year, foreign = (2025, {spell("day"): day}) if isinstance(rules, Rules2026) else (2026, given)
        if isinstance(rules, Rules2026) and cells_per_perturbation:
            rules = replace(rules, cells_per_perturbation=cells_per_perturbation)
        unused = [k for k, v in foreign.items() if v]
        if unused:
            warnings.append(f"{', '.join(unused)} belong to the {year} rules, which are not checked")
        facts["members"] = [m.name for m in members]
        meta = _read_meta(p, members, problems, warnings)
        member = next((m for m in members if m.name == PREDICTION and m.size), None)
        if member is not None:
            cap = max_bytes or _get_cap(rules)
            with tempfile.TemporaryDirectory(prefix="vcelltools-lint-") as folder:
                inner = Path(folder) / "pred.h5ad"
                facts["unpacked_bytes"] = unpack(p, member, inner, max_bytes=cap)
                with open_dataset(inner) as data:
                    report = _check_content(data, rules, meta, names, panel, contexts, control, threads, progress)
                    stored = getattr(data.matrix, "nnz", None)
                    facts |= {"n_cells": data.n_cells, "n_genes": data.n_genes, "nnz": report.nnz,
                              "n_stored": report.nnz if stored is None else stored}  # fmt: skip
                    _check_layout(data, rules, warnings)
            problems += report.problems
            warnings += report.warnings
            _check_meta(meta, facts, report, perturbations, problems)
    except DataError as e:
        problems.append(str(e).replace(f"{p}: ", ""))
    return LintResult(
        path=p,
        ok=not problems,
        rules=rules.version,
        problems=tuple(dict.fromkeys(problems)),
        warnings=tuple(dict.fromkeys(warnings)),
        facts=facts,
    )


def _check_layout(data: Dataset, rules: Rules2025 | Rules2026, warnings: list[str]) -> None:
    """Warn if the file differs from one written by the tool of the challenge; additional content is not scored."""
    if not isinstance(data.matrix, CsrMatrix):
        warnings.append(
            f"X is {'CSC' if isinstance(data.matrix, CscMatrix) else 'dense'}, but the tool of the challenge writes CSR"
        )
    if data.matrix.dtype not in (np.float32, np.float64):
        warnings.append(f"X is {data.matrix.dtype}, but the tool of the challenge writes float32")
    wanted = {"target_gene", "celltype"} | ({"context"} if isinstance(rules, Rules2026) else set())
    for name, have in (("obs", set(data.obs.columns) - wanted), ("var", set(data.var.columns))):
        if have:
            warnings.append(f"{name} has columns that are not used: {', '.join(sorted(have)[:8])}")
    more = sorted(layer for _, layer in list_choices(data.source) if layer != "X")
    if more:
        warnings.append(f"it holds elements other than X: {', '.join(more[:8])}")


def _get_cap(rules: Rules2025 | Rules2026) -> int:
    """Return the size of the largest file that the rules allow, with 8 bytes per value and index and a margin."""
    n = rules.max_nnz if isinstance(rules, Rules2026) else rules.max_cells * rules.n_genes
    return n * 16 + (256 << 20)


def _check_members(
    path: Path, members: list[Member], day: date | None, problems: list[str], warnings: list[str]
) -> Rules2025 | Rules2026:
    names = [m.name for m in members]
    is_2026 = META in names or WATERMARK not in names
    rules: Rules2025 | Rules2026 = RULES_2026 if is_2026 else get_rules_2025(day)
    if PREDICTION not in names:
        problems.append(f"the member {PREDICTION} is missing (it holds {', '.join(names)})")
    elif next(m for m in members if m.name == PREDICTION).size == 0:
        problems.append(f"the member {PREDICTION} is empty")
    extra = sorted(set(names) - {PREDICTION, META, WATERMARK})
    if extra:
        problems.append(f"there are unexpected members: {', '.join(extra)}")
    if is_2026:
        if META not in names:
            warnings.append(f"there is no {META}, so the platform will choose its machine from the header of the file")
        elif names[0] != META:
            warnings.append(f"{META} is not the first member")
    else:
        if names != [PREDICTION, WATERMARK] and not extra and PREDICTION in names:
            problems.append(
                f"the members are {', '.join(names)} instead of {PREDICTION} and {WATERMARK}, in this order"
            )
        mark = next(m for m in members if m.name == WATERMARK)
        if mark.size != 8 or read_bytes(path, mark, limit=8) != _MARK:
            problems.append(f"{WATERMARK} does not hold the 8 bytes {_MARK.decode()!r}")
        if any(m.magic != b"ustar  \0" for m in members):
            warnings.append("the tar is not in GNU format, which the tool of the challenge writes")
    return rules


def _read_meta(path: Path, members: list[Member], problems: list[str], warnings: list[str]) -> dict[str, Any]:
    member = next((m for m in members if m.name == META), None)
    if member is None:
        return {}
    try:
        meta = parse_json(read_bytes(path, member, limit=_META_LIMIT).decode("utf-8"))
    except (ValueError, RecursionError) as e:
        problems.append(f"{META} is not JSON ({type(e).__name__})")
        return {}
    if not isinstance(meta, dict):
        problems.append(f"{META} is not a JSON object")
        return {}
    if meta.get("schema") != RULES_2026.schema or isinstance(meta.get("schema"), bool):
        warnings.append(f"{META} has the schema {_show(meta.get('schema'))} instead of {RULES_2026.schema}")
        return {}
    for key, kind in _META_KINDS.items():
        value = meta.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            problems.append(f"{META}: {key} is {_show(value)}, not {_KIND_NAMES[kind]}")
            meta[key] = None
    if isinstance(meta.get("contexts"), list) and not all(isinstance(c, str) for c in meta["contexts"]):
        problems.append(f"{META}: contexts is {_show(meta['contexts'])}, not a list of names")
        meta["contexts"] = None
    return meta


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _NAMED else text[: _NAMED - 1] + "…"


def _check_content(data: Dataset, rules, meta, names, panel, contexts, control, threads, progress) -> Report:
    if isinstance(rules, Rules2025):
        return check_2025(
            data, rules, genes=names, pert_col="target_gene", control=control, allow_discrete=True,
            threads=threads, progress=progress, packed=True,
        )  # fmt: skip
    listed = meta.get("contexts")
    phases = (rules.contexts, rules.final_contexts)
    known = contexts is not None
    if contexts is None and listed:
        contexts = tuple(listed)
    elif contexts is None:  # the phase is not stated, so infer it
        have = set(data.obs.column("context").labels()) if "context" in data.obs.columns else set()
        contexts = max(phases, key=lambda phase: len(have & set(phase)))
        known = True
    report = check_2026(
        data, rules, genes=names, pert_col="target_gene", control=control, context_col="context", contexts=contexts,
        perturbations=panel, threads=threads, progress=progress, packed=True,
    )  # fmt: skip
    if not known and {*contexts} not in [{*phase} for phase in phases]:
        report.warnings.append(f"the contexts {', '.join(contexts)} do not belong to either phase of the challenge")
    return report


def _check_meta(
    meta: dict[str, Any], facts: dict[str, Any], report: Report, perturbations: str | os.PathLike | None,
    problems: list[str],
) -> None:  # fmt: skip
    """Check the metadata of the container; the number of values may include stored zeros or not."""
    for key, true in (("n_obs", {facts["n_cells"]}), ("n_vars", {facts["n_genes"]}),
                      ("nnz", {facts["nnz"], facts["n_stored"]})):  # fmt: skip
        said = meta.get(key)
        if said is not None and said not in true:
            problems.append(f"{META} states {key} = {_show(said)}, but the prediction has {max(true):,}")
    said = meta.get("perts_fingerprint")
    if said and report.labels and said not in report.fingerprints:
        problems.append(f"{META} was made for other perturbations than those of the prediction")
    elif said and perturbations and said != get_fingerprint(perturbations):
        problems.append(f"{META} was made for other perturbations than those in {perturbations}")


def parse_contexts(text: str | None) -> tuple[str, ...] | None:
    """Return the names of a comma-separated list; None stays None."""
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(f"{spell('contexts')} lists no contexts", hint=f"for example {spell('contexts')} A,B,C")
    return names


def parse_day(text: str | None) -> date | None:
    """Return a date written YYYY-MM-DD; None stays None."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as e:
        raise UsageError(f"{spell('day')} {text!r} is not a date", hint="use YYYY-MM-DD, for example 2025-10-01") from e
