"""Check a prediction against every rule before and after packing, and list the cells and names that violate it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset
from vcelltools.io.counts import find_log_base
from vcelltools.io.textfile import parse_json, read_rows
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.rules import RULES_2026, Rules2025, Rules2026
from vcelltools.scoring.vcc2026.counts import read_ahead, take_census

_HEADERS = frozenset({"gene_name", "gene", "gene_symbol", "gene_names", "genes"})
_FRACTION = 1e-3
_LARGEST = float(np.finfo(np.float32).max)
_SOME = 8
_MOST_CELLS = 2**31 - 1  # of one perturbation: what positions of cells can count
_LONG = 60
_GUIDE = re.compile(r"-\d+$")


@dataclass(kw_only=True)
class Report:
    """The results of the checks, and the data for packing.

    Attributes
    ----------
    gene_order
        Positions of the listed genes in the file, or None if they are in order.
    library, median, normalize
        2025: library sizes, their median, and whether to log-normalise counts.
    to_natural
        2025: factor that converts log1p values to natural logarithms.
    labels
        The perturbations of the prediction.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    gene_order: np.ndarray | None = None
    library: np.ndarray = field(default_factory=lambda: np.zeros(0))
    median: float = 1.0
    normalize: bool = False
    to_natural: float = 1.0
    nnz: int = 0
    labels: frozenset[str] = frozenset()
    fingerprints: frozenset[str] = frozenset()

    def raise_problems(self, where: str) -> None:
        """Raise a :class:`DataError` that lists every problem."""
        if self.problems:
            raise DataError(f"{where}: " + "; ".join(self.problems))


def read_genes(path: str | os.PathLike) -> list[str]:
    """Return the first column of a CSV of genes, with an optional header; duplicates are an error."""
    rows = read_rows(
        path,
        what="a list of genes",
        hint=f"set {spell('genes')} to the gene list of the challenge, with one gene per line",
    )
    genes = [row[0].strip() for row in rows if row[0].strip()]
    if genes and genes[0].lower() in _HEADERS:
        genes = genes[1:]
    if not genes:
        raise DataError(f"{path} holds no genes")
    twice = sorted({g for g, n in zip(*np.unique(genes, return_counts=True), strict=True) if n > 1})
    if twice:
        raise DataError(f"{path}: {len(twice)} genes are listed twice ({_some(twice)})")
    return genes


def read_perturbations(path: str | os.PathLike, control: str) -> dict[str | None, dict[str, int | None]]:
    """Return {context or None: {perturbation: cells}} of a ``pert_counts.csv``.

    The columns are ``target_gene`` and optionally ``context`` and ``n_cells``. The control is excluded. The number of
    cells is None without the column (the rules then set the number), and 0 if the row has no number (any number is then
    allowed).

    Raises
    ------
    DataError
        If the table has no ``target_gene``, names no perturbation, gives a number that is not a count of cells, or
        gives two numbers for one perturbation in one context.
    """
    rows = _read_table(path)
    out: dict[str | None, dict[str, int | None]] = {}
    for row in rows:
        name = (row.get("target_gene") or "").strip()
        if not name or name in (control, RULES_2026.control):
            continue
        cells = _read_number(row["n_cells"], f"{path}: n_cells of {name!r}") if "n_cells" in row else None
        of_context = out.setdefault((row.get("context") or "").strip() or None, {})
        if of_context.setdefault(name, cells) != cells:
            raise DataError(
                f"{path}: {name!r} has both {of_context[name]} and {cells} cells", hint="keep one of the rows"
            )
    if not out:
        raise DataError(f"{path} lists no perturbations")
    return out


def _read_number(text: str, where: str) -> int:
    if not text.strip():
        return 0
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number <= _MOST_CELLS and number.is_integer()):
        raise DataError(f"{where} is {text.strip()!r}, not a number of cells")
    return int(number)


def _read_table(path: str | os.PathLike) -> list[dict[str, str]]:
    hint = f"set {spell('perturbations')} to pert_counts.csv of the challenge"
    rows = read_rows(path, what="a table of perturbations", hint=hint)
    head = [c.strip() for c in rows[0]] if rows else []
    if "target_gene" not in head:
        have = ", ".join(head) or "none"
        raise DataError(f"{path} has no column target_gene", hint=f"its columns: {have}")
    return [dict(zip_longest(head, row[: len(head)], fillvalue="")) for row in rows[1:]]


def get_fingerprint(source: str | os.PathLike | Sequence[str]) -> str:
    """Return ``sha256:`` of the sorted unique names, joined with newlines; for a CSV, of its ``target_gene``."""
    if isinstance(source, str | os.PathLike):
        source = [(row.get("target_gene") or "").strip() for row in _read_table(source)]
    names = sorted(set(source) - {""})
    return "sha256:" + hashlib.sha256("\n".join(names).encode()).hexdigest()


def read_contexts(
    contexts: tuple[str, ...] | None, *near: str | os.PathLike | None
) -> tuple[tuple[str, ...], str | None]:
    """Return (contexts, panel): as given, from the ``manifest.json`` beside a file, or of the validation phase."""
    for path in near:
        manifest = Path(path).resolve().parent / "manifest.json" if path else None
        if manifest is None or not manifest.is_file() or manifest.stat().st_size > 256 << 10:
            continue
        try:
            said = parse_json(manifest.read_text("utf-8"))
        except (ValueError, RecursionError):
            continue
        listed = said.get("contexts") if isinstance(said, dict) else None
        if isinstance(listed, list) and listed and all(isinstance(c, str) and c.strip() for c in listed):
            found = tuple(c.strip() for c in listed)
            panel = said.get("panel_id") if isinstance(said.get("panel_id"), str) else None
            if contexts is None or set(contexts) == set(found):
                return contexts or found, panel
    return contexts or RULES_2026.contexts, None


def _some(names: Sequence[str]) -> str:
    """Return the first names; ambiguous ones (empty, with spaces or control characters) are quoted."""
    more = f", … {len(names) - _SOME} more" if len(names) > _SOME else ""
    return ", ".join(_quote(str(n)) for n in names[:_SOME]) + more


def _quote(name: str) -> str:
    short = name if len(name) <= _LONG else name[: _LONG - 1] + "…"
    plain = short and short == short.strip() and short.isprintable()
    return short if plain else repr(short)


def _say_alike(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Return the change that would turn unexpected names into the missing ones, or nothing."""
    wanted, n = set(missing), len(extra)
    changes: dict[str, Callable[[str], str]] = {
        "without surrounding spaces": str.strip,
        "in upper case": str.upper,
        "in lower case": str.lower,
        "without the part after the last dot": lambda v: v.rpartition(".")[0],
        "without the guide number (use only the gene symbol)": lambda v: _GUIDE.sub("", v),
    }
    for what, change in changes.items():
        if 2 * sum(change(v) in wanted for v in extra) > n:
            return f"; they match the missing ones {what}"
    return ""


def _check_genes(data: Dataset, genes: list[str] | None, expected: int, report: Report, *, packed: bool) -> None:
    have = [str(g) for g in data.var.index]
    twice = sorted({g for g, n in zip(*np.unique(have, return_counts=True), strict=True) if n > 1})
    if twice:
        report.problems.append(f"{len(twice)} gene names are duplicates ({_some(twice)})")
        return
    if len(genes or have) != expected:
        report.warnings.append(f"{len(genes or have):,} genes, but the panel of the challenge has {expected:,}")
    if genes is None or have == genes:
        return
    missing, extra = sorted(set(genes) - set(have)), sorted(set(have) - set(genes))
    if missing:
        report.problems.append(f"{len(missing):,} genes of the list are missing ({_some(missing)})")
    if extra:
        alike = _say_alike(missing, extra)
        report.problems.append(f"{len(extra):,} genes are not on the list ({_some(extra)}){alike}")
    if missing or extra:
        return
    if packed:
        report.problems.append("the genes are in a different order than in the list")
        return
    at = {g: i for i, g in enumerate(have)}
    report.gene_order = np.array([at[g] for g in genes], np.int64)
    report.warnings.append("the genes were sorted into the order of the list")


def _get_labels(data: Dataset, column: str, report: Report) -> np.ndarray | None:
    if column not in data.obs.columns:
        have = ", ".join(data.obs.columns) or "none"
        report.problems.append(f"obs has no column {column!r} (columns: {have})")
        return None
    labels = data.obs.column(column).labels(exact=True)
    missing = [i for i, v in enumerate(labels) if v is None]
    if missing:
        report.problems.append(f"{len(missing):,} cells have no {column} (first: row {missing[0]})")
        return None
    return labels.astype(str)


def check_2025(
    data: Dataset,
    rules: Rules2025,
    *,
    genes: list[str] | None,
    pert_col: str,
    control: str,
    allow_discrete: bool,
    threads: int | None = None,
    progress: Progress = SILENT,
    packed: bool = False,
) -> Report:
    """Check a prediction against the 2025 rules; ``packed`` if it is already in a container."""
    report = Report()
    labels = _get_labels(data, pert_col, report)
    if labels is not None:
        report.labels = frozenset(labels)
        if control not in report.labels:
            report.problems.append(f"no cell is the control {control!r} (labels: {_some(sorted(report.labels))})")
    _check_genes(data, genes, rules.n_genes, report, packed=packed)
    if data.n_cells > rules.max_cells:
        report.problems.append(
            f"there are {data.n_cells:,} cells, but at most {rules.max_cells:,} are allowed ({rules.version} rules)"
        )
    _scan_values(data, rules, report, allow_discrete=allow_discrete, packed=packed, threads=threads, progress=progress)
    return report


def _scan_values(
    data: Dataset,
    rules: Rules2025,
    report: Report,
    *,
    allow_discrete: bool,
    packed: bool,
    threads: int | None,
    progress: Progress,
) -> None:
    """Decide whether the values are counts or log1p, like the tool of the challenge, and check them."""
    library = np.zeros(data.n_cells)
    low, high, fractions, nnz, n_bad, n_low = 0.0, 0.0, False, 0, 0, 0
    bad: tuple[int, int] | None = None
    progress.start("checking the prediction", data.matrix.stored_bytes, "bytes")
    for rows, n_bytes in read_ahead(data, get_threads(threads)):
        values = rows.data.astype(np.float64)
        if not _are_indices_good(rows.indices + rows.col_start, data.n_genes, report):
            progress.finish()
            return
        row_of = np.repeat(np.arange(len(rows.indptr) - 1), np.diff(rows.indptr))
        broken = np.flatnonzero(~(np.abs(values) <= _LARGEST))
        n_bad += len(broken)
        if len(broken) and bad is None:
            j = int(broken[0])
            bad = rows.row_start + int(row_of[j]), rows.col_start + int(rows.indices[j])
        elif len(values):
            n_low += int((values < 0).sum())
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            fractions = fractions or bool(np.any(values - np.trunc(values) > _FRACTION))
            library[rows.row_start : rows.row_start + len(rows.indptr) - 1] += np.bincount(
                row_of, weights=values, minlength=len(rows.indptr) - 1
            )
        nnz += int(np.count_nonzero(values))
        progress.advance(n_bytes)
    progress.finish()
    report.library, report.nnz = library, nnz
    if bad is not None:
        report.problems.append(
            f"a value is not finite at cell {data.obs.index[bad[0]]} (row {bad[0]}), gene {data.var.index[bad[1]]} "
            f"({n_bad:,} such values in total; values must fit into float32)"
        )
        return
    if fractions:
        base, _, notes = find_log_base(data)
        report.warnings += notes
        if base != math.e:
            report.to_natural = math.log(base)
            high *= report.to_natural
            if packed:
                report.problems.append(
                    f"the values are log1p with base {base:g}, and are converted to natural logarithms, which are "
                    "scored"
                )
    if low < 0:
        report.problems.append(f"there are {n_low:,} negative values (smallest {low:.4g})")
    if nnz == 0:
        report.warnings.append("every value is zero")
    if fractions and high >= rules.max_log1p and (packed or not allow_discrete):
        report.problems.append(
            f"there are fractional values up to {high:.4g}, so they are neither counts nor log1p (below "
            f"{rules.max_log1p:g})"
        )
    if not fractions and not allow_discrete:
        report.normalize = True
        report.median = float(np.float32(np.median(library.astype(np.float32)))) or 1.0
        report.warnings.append("the values are counts: cells are scaled to the median library size, followed by log1p")


def _are_indices_good(indices: np.ndarray, n_genes: int, report: Report) -> bool:
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n_genes):
        bad = int(indices.min() if indices.min() < 0 else indices.max())
        report.problems.append(f"the matrix has the gene index {bad}, but there are only {n_genes:,} genes")
        return False
    return True


def check_2026(
    data: Dataset,
    rules: Rules2026,
    *,
    genes: list[str] | None,
    pert_col: str,
    control: str,
    context_col: str,
    contexts: tuple[str, ...] | None,
    perturbations: dict[str | None, dict[str, int | None]] | None,
    threads: int | None = None,
    progress: Progress = SILENT,
    packed: bool = False,
) -> Report:
    """Check a prediction against the 2026 rules; ``packed`` if it is already in a container."""
    report = Report()
    labels = _get_labels(data, pert_col, report)
    if labels is not None:
        report.labels = frozenset(labels)
        report.fingerprints = frozenset(
            get_fingerprint(sorted(report.labels | extra)) for extra in (frozenset(), frozenset({control}))
        )
        n_control = int((labels == control).sum())
        if n_control:
            report.problems.append(f"{n_control:,} cells are the control {control!r}, but the platform adds its own")
    where = _get_labels(data, context_col, report)
    if labels is not None and where is not None:
        _check_panel(labels, where, contexts, perturbations, rules, control, report)
    _check_genes(data, genes, rules.n_genes, report, packed=packed)
    if data.n_cells > rules.max_cells:
        report.problems.append(f"there are {data.n_cells:,} cells, but at most {rules.max_cells:,} are allowed")
    try:
        census = take_census(
            data, np.zeros(data.n_cells, np.int32), 1, what="prediction", max_total=rules.max_counts_per_cell,
            threads=threads, progress=progress,
        )  # fmt: skip
    except DataError as e:
        report.problems.append(e.message.replace(f"{data.label}: ", "") + (f" ({e.hint})" if e.hint else ""))
        return report
    report.nnz = census.nnz
    if report.nnz > rules.max_nnz:
        report.problems.append(f"{report.nnz:,} stored values, but at most {rules.max_nnz:,} are allowed")
    if labels is not None:
        names, codes = np.unique(labels, return_inverse=True)
        empty = names[np.bincount(codes, weights=census.library) == 0]
        if len(empty):
            report.problems.append(f"{len(empty)} perturbations are all zero in every cell ({_some(list(empty))})")
        if where is not None:
            _warn_of_empty_contexts(labels, where, census.library, set(empty.tolist()), report)
    return report


def _warn_of_empty_contexts(
    labels: np.ndarray, where: np.ndarray, library: np.ndarray, known: set[str], report: Report
) -> None:
    for context in np.unique(where):
        here = where == context
        names, codes = np.unique(labels[here], return_inverse=True)
        empty = [n for n in names[np.bincount(codes, weights=library[here]) == 0].tolist() if n not in known]
        if empty:
            report.warnings.append(
                f"context {context}: {len(empty)} perturbations are all zero in every cell ({_some(empty)})"
            )


def _check_panel(
    labels: np.ndarray,
    where: np.ndarray,
    contexts: tuple[str, ...] | None,
    perturbations: dict[str | None, dict[str, int | None]] | None,
    rules: Rules2026,
    control: str,
    report: Report,
) -> None:
    """Check contexts, and the perturbations and cells in each of them."""
    have = sorted(set(where))
    wanted = sorted(contexts) if contexts is not None else have
    missing, extra = sorted(set(wanted) - set(have)), sorted(set(have) - set(wanted))
    if missing:
        report.problems.append(f"contexts are missing: {_some(missing)}")
    if extra:
        report.problems.append(f"there are unexpected contexts: {_some(extra)} (expected: {_some(wanted)})")
    if perturbations is None:
        report.warnings.append("the perturbations were not checked, because no list was given")
        _warn_of_numbers(labels, where, rules.cells_per_perturbation, control, report)
        return
    for context in (c for c in wanted if c in have):
        panel = perturbations.get(context, perturbations.get(None))
        if panel is None:
            report.problems.append(f"the list has no perturbation for context {context}")
            continue
        names, n = np.unique(labels[where == context], return_counts=True)
        cells = dict(zip(names.tolist(), n.tolist(), strict=True))
        cells.pop(control, None)
        lost, strange = sorted(set(panel) - set(cells)), sorted(set(cells) - set(panel))
        if lost:
            report.problems.append(f"context {context}: {len(lost)} perturbations are missing ({_some(lost)})")
        if strange:
            alike = _say_alike(lost, strange)
            report.problems.append(f"context {context}: {len(strange)} are not on the list ({_some(strange)}){alike}")
        wrong = []
        for name in sorted(set(panel) & set(cells)):
            stated = panel[name]
            want = rules.cells_per_perturbation if stated is None else stated
            if want and cells[name] != want:
                wrong.append(f"{_quote(name)} has {cells[name]:,} cells, not {want:,}")
        if wrong:
            number = f"{len(wrong)} perturbations have the wrong number of cells: " if len(wrong) > 1 else ""
            report.problems.append(f"context {context}: {number}{_some(wrong)}")


def _warn_of_numbers(labels: np.ndarray, where: np.ndarray, want: int, control: str, report: Report) -> None:
    """Warn about groups with a different size than in the rules, and about perturbations missing in a context."""
    pairs = np.unique(np.stack([where, labels]), axis=1, return_counts=True)
    wrong = [f"{c} {_quote(p)}: {n:,}" for (c, p), n in zip(pairs[0].T.tolist(), pairs[1], strict=True)
             if n != want and p != control]  # fmt: skip
    if wrong:
        report.warnings.append(f"{len(wrong):,} perturbations do not have {want:,} cells ({_some(wrong)})")
    sets = [set(labels[where == c].tolist()) for c in np.unique(where)]
    uneven = sorted(set.union(*sets) - set.intersection(*sets) - {control}) if sets else []
    if uneven:
        report.warnings.append(f"{len(uneven):,} perturbations are not in every context ({_some(uneven)})")
