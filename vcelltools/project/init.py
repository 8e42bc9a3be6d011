"""``init``: write a commented ``vcelltools.toml`` from the files in a folder."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcelltools.config import CONFIG_NAME, parse_config
from vcelltools.errors import UsageError, VcellError
from vcelltools.files.inspect import InspectReport, inspect
from vcelltools.io import open_dataset
from vcelltools.io.results import Result
from vcelltools.io.write.atomic import write_text
from vcelltools.io.write.guard import INIT_MARK, Target, guard_outputs
from vcelltools.names import escape_json, show
from vcelltools.runtime.progress import SILENT, Progress

_SUFFIXES = (".h5ad", ".h5mu", ".h5", ".zarr")
_OURS = re.compile(r"\.truth\.h5ad$|^pred\b|^prediction", re.IGNORECASE)
_TRUTH = re.compile(r"valid|truth|held[-_]?out|holdout", re.IGNORECASE)
_SEPARATORS = ("|", ";", "+")


@dataclass(frozen=True, kw_only=True)
class InitResult(Result):
    """The data sets that were found, and the file that was written.

    Attributes
    ----------
    out
        The configuration.
    datasets
        Names of the data sets in it.
    truth
        The file that looks like a held-out truth, or None.
    skipped
        Files that were skipped, and why.
    warnings
        Doubts about the genes and labels of the files in the configuration.
    """

    out: Path
    datasets: tuple[str, ...]
    truth: str | None
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()


def init(
    folder: str | os.PathLike = ".",
    *,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> InitResult:
    """Inspect the data files in a folder and write a configuration for them.

    Every guess is a line of the file with its evidence beside it, and every key that could not be
    guessed is a commented line to fill in.

    Parameters
    ----------
    folder
        Folder with the data files.
    out
        The configuration; ``vcelltools.toml`` in ``folder`` by default.

    Raises
    ------
    UsageError
        If the folder does not exist, or the configuration exists and ``force`` is off.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(
            f"{root}: {'is a file' if root.exists() else 'no such folder'}", hint="name the folder with the data"
        )
    path = Path(out) if out is not None else root / CONFIG_NAME
    files = _find_files(root)
    guard_outputs([Target(path, "config")], reads=files, force=force)
    blocks: list[str] = []
    skipped: list[tuple[str, str]] = []
    warnings: list[str] = []
    names: list[str] = []
    truth: str | None = None
    pert: tuple[str, list[str]] | None = None
    columns: list[tuple[str, tuple[str, ...]]] = []
    progress.start("inspect", len(files), "files")
    for file in files:
        shown = os.path.relpath(file, path.parent)
        if not _is_text(shown):
            skipped.append((repr(shown), "its name is not valid UTF-8, which TOML needs; rename the file"))
            continue
        try:
            report = inspect(file)
        except VcellError as e:
            skipped.append((shown, e.message.removeprefix(f"{file}: ")))
            continue
        finally:
            progress.advance(1)
        reason = _get_reason_to_skip(report, shown)
        if reason:
            skipped.append((shown, reason))
            continue
        column = report.get_column("perturbation")
        assert column is not None
        warnings += [f"{shown}: {p.removeprefix(f'{file}: ')}" for p in _find_doubts(report)]
        if truth is None and _TRUTH.search(file.stem):
            truth, pert = shown, (column.name, report.control)
            continue
        name = _make_name(file, names)
        names.append(name)
        columns.append((column.name, tuple(report.control)))
        blocks.append(_describe(name, shown, file, report))
    progress.finish()
    if truth is None and len(set(columns)) == 1:
        pert = columns[0][0], list(columns[0][1])  # the names in a truth among these files
    text = _compose(blocks, skipped, truth, pert)
    parse_config(text, where=str(path))  # the file must load
    write_text(path, text, force=force)
    return InitResult(out=path, datasets=tuple(names), truth=truth, skipped=tuple(skipped), warnings=tuple(warnings))


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _find_files(root: Path) -> list[Path]:
    """Return data files and folders, sorted, without hidden ones and outputs of vcelltools."""
    out = []
    for p in sorted(root.iterdir()):
        if p.name.startswith(".") or _OURS.search(p.name):
            continue
        mtx = p.is_dir() and any((p / f"matrix.mtx{end}").exists() for end in ("", ".gz"))
        if mtx or (p.suffix in _SUFFIXES and (p.is_file() or p.suffix == ".zarr")):
            out.append(p)
    return out


def _get_reason_to_skip(report: InspectReport, shown: str) -> str | None:
    if not any(m.is_counts for m in report.matrices):
        return "no matrix looks like counts"
    if report.get_column("perturbation") is None:
        guides = ", ".join(f"modality {m!r} may hold the guides" for m in report.guide_modalities)
        command = f"vcelltools guides {shlex.quote(shown)} --write labelled.h5ad"
        more = f"; {guides}, from which this command makes the labels: {command}" if guides else ""
        return f"no obs column looks like the perturbation (pert_col){more}"
    return None


def _find_doubts(report: InspectReport) -> list[str]:
    """Return the problems that inspect found, and its notes on the columns that have a role."""
    roles = {c.name for c in report.obs if c.roles}
    return [*report.problems, *(n for n in report.notes if n.partition(":")[0] in roles)]


def _make_name(file: Path, taken: list[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", file.stem).strip("-._") or "data"
    name, i = stem[:90], 2
    while name in taken:
        name, i = f"{stem[:90]}-{i}", i + 1
    return name


def _quote(value: Any) -> str:
    """Return a string or a list of strings as TOML, whose basic strings use the escapes of JSON."""
    return escape_json(json.dumps(value, ensure_ascii=False))


def _say(value: Any) -> str:
    """Return a label for a comment, on one line and shortened."""
    text = show(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _census(pairs: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{_say(label)} ({n:,})" for label, n in pairs)


def _describe(name: str, shown: str, file: Path, r: InspectReport) -> str:
    """Return the ``[[datasets]]`` table of one file."""
    column = r.get_column("perturbation")
    assert column is not None
    matrix = next((m for m in r.matrices if (m.modality, m.layer) == r.opened and m.is_counts), None)
    matrix = matrix or next(m for m in r.matrices if m.is_counts)
    lines = ["[[datasets]]", f"name = {_quote(name)}", f"path = {_quote(shown)}"]
    lines.append(f"# {r.n_cells or 0:,} cells × {r.n_genes or 0:,} genes")
    if matrix.modality is not None:
        lines.append(f"modality = {_quote(matrix.modality)}")
    if matrix.layer != "X":
        lines.append(f"layer = {_quote(matrix.layer)}  # the matrix that looks like counts")
    lines.append(f"pert_col = {_quote(column.name)}  # {column.n_labels} labels: {_census(column.examples)}, …")
    others = [c.name for c in r.get_columns("perturbation") if c.name != column.name]
    if others:
        lines.append(f"# other candidates for the perturbation: {', '.join(map(_say, others))}")
    if column.controls:
        lines.append(f"control = {_quote([label for label, _ in column.controls])}  # {_census(column.controls)}")
    else:
        lines.append('# control = ["…"]             # no label looks like controls; name them here')
        if column.n_missing:
            lines.append(f"# control_is_missing = true   # {column.n_missing:,} cells have no label")
    filters = [c for c in r.obs if c.kind == "bool"][:4]
    lines += [f"# keep = {_quote([c.name])}  # only cells that are True: {_census(c.examples)}" for c in filters]
    lines += _describe_columns(r, file)
    return "\n".join(lines)


def _describe_columns(r: InspectReport, file: Path) -> list[str]:
    lines = []
    batch = r.get_column("batch")
    if batch is not None:
        lines.append(f"group_by = {_quote([batch.name])}  # controls are matched within: {_census(batch.examples)}")
        others = [c.name for c in r.get_columns("batch") if c.name != batch.name]
        if others:
            lines.append(f"# other candidates for the batch: {', '.join(map(_say, others))}")
    else:
        lines.append("group_by = []  # no column looks like a batch, so controls are matched over all cells")
    line = r.get_column("cell_line")
    if line is not None:
        lines.append(f"cell_line_col = {_quote(line.name)}  # {_census(line.examples)}")
    else:
        lines.append('# cell_line = "…"             # one name for all cells')
    gene_id, gene_name = r.get_column("gene_id"), r.get_column("gene_name")
    if r.index_kind == "ensembl":
        lines.append('gene_id_col = "index"')
    elif gene_id is not None:
        lines.append(f"gene_id_col = {_quote(gene_id.name)}")
    if r.index_kind != "ensembl":
        lines.append('gene_name_col = "index"')
    elif gene_name is not None:
        lines.append(f"gene_name_col = {_quote(gene_name.name)}")
    n_guides = r.get_column("n_guides")
    sep = _find_separator(r, file)
    if sep is not None:
        count = f", n_col = {_quote(n_guides.name)}" if n_guides else ""
        lines.append(f'guides = {{ sep = {_quote(sep)}{count}, policy = "single" }}  # single | combination | first')
    return lines


def _find_separator(r: InspectReport, file: Path) -> str | None:
    """Return the separator of labels with several guides: one whose parts are labels themselves."""
    column = r.get_column("perturbation")
    assert column is not None
    assert r.opened is not None
    with open_dataset(file, modality=r.opened[0], layer=r.opened[1]) as ds:
        _, labels = ds.obs.column(column.name).factorize()
    known = set(labels)
    for sep in _SEPARATORS:
        joined = [v for v in labels if sep in v]
        if joined and sum(all(p in known for p in v.split(sep)) for v in joined) >= 0.5 * len(joined):
            return sep
    return None


def _compose(
    blocks: list[str], skipped: list[tuple[str, str]], truth: str | None, pert: tuple[str, list[str]] | None
) -> str:
    head = [
        f"{INIT_MARK} that runs in this folder; options override it.",
        "# Paths are relative to this file. Check the lines below, then:",
        "#   vcelltools basis && vcelltools build-store && vcelltools train",
        "",
        "[basis]",
        "top = 2000            # number of genes in the basis",
        'path = "basis.txt"',
        "",
    ]
    if not blocks:
        head += [
            "# No data set was found. Example:",
            "# [[datasets]]",
            '# name = "atlas"',
            '# path = "atlas.h5mu"',
            '# modality = "rna"              # h5mu only',
            '# pert_col = "feature_call"     # obs column with the perturbation',
            '# control = ["Non-Targeting"]   # a label or a list',
            '# group_by = ["batch"]          # controls are matched within these columns',
            '# cell_line = "KOLF2.1J"        # or cell_line_col = "…"',
            "",
        ]
    for block in blocks:
        head += [block, ""]
    if skipped:
        head += ["# Skipped:", *(f"#   {_say(name)}: {show(reason)}" for name, reason in skipped), ""]
    head += [
        "[store]",
        'path = "stores"       # one folder per data set',
        "",
        "[train]",
        'out = "runs/first"',
        'model = "transformer"  # control-mean | perturbation-mean | ridge | transformer',
        "",
        "[score]",
    ]
    if truth is None:
        head.append(
            '# truth = "…"         # the true cells as log1p (see vcelltools normalize), to score predictions against'
        )
    else:
        head.append(f"truth = {_quote(truth)}")
    if pert is not None:
        head.append(f"pert_col = {_quote(pert[0])}")
    if pert is not None and len(pert[1]) == 1:
        head.append(f"control = {_quote(pert[1][0])}")
    return "\n".join(head) + "\n"
