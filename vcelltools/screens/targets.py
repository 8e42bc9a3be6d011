"""Find the target gene of a guide from a table, a column of the file, or the name of the guide."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io import Table
from vcelltools.io.textfile import read_rows

NON_TARGETING = "non-targeting"
"""Label of cells whose guides have no target."""

COLUMNS = ("intended_target_name", "target_gene_name", "target_gene", "gene_target", "target_name", "target", "gene")
_GUIDE_HEADS = ("guide", "guide_id", "guide_name", "sgrna", "sgrna_id", "protospacer", "id", "name")
_TAIL = r"(?:[-_. ]*(?:sgrna|grna|guide|sg|g)?[-_. #]*\d+(?:[-_.]\w{1,3})?)?"
_NON_TARGETING = re.compile(
    r"(?:(?:non?|negative|neg)[-_. ]?(?:target(?:ing|s)?|ctrl|control|cutting)s?|nt[cg]?|safe[-_. ]?target(?:ing)?"
    r"|scramble[d]?|scr|ctrl|control)" + _TAIL,
    re.IGNORECASE,
)
_SAFE = re.compile(r"safe[-_. ]?target(?:ing)?", re.IGNORECASE)
# patterns of guide names, most specific first; the target precedes the number or position of the guide
_PATTERNS = (
    re.compile(r"^(?P<target>.+?)_[+-]_\d+(?:\.\d+)?(?:-P\w+)?$"),  # TP53_+_7676594.23-P1P2
    re.compile(r"^(?P<target>.+?)[-_. ]?(?:sgRNA|gRNA|guide|sg|g)[-_. #]?\d+$"),  # IFNGR2g1, TP53_sg2
    re.compile(r"^(?:sgRNA|gRNA|sg)[-_. ]?(?P<target>[A-Za-z].*?)[-_. #]\d+$"),  # sgTP53_2, sgTP53-2
    re.compile(r"^(?P<target>.+?)[_.]\d+$"),  # AAVS1_1
)
_DASHED = re.compile(r"^(?P<target>.+?)-\d+$")  # TP53-2, but NKX2-1 is a gene


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The target of every guide.

    Attributes
    ----------
    labels
        (g,) object array of str.
    how
        Description of the source of the targets.
    notes
        Notes for the user, on names without a target and on safe-targeting guides.
    """

    labels: np.ndarray
    how: str
    notes: list[str] = field(default_factory=list)


def is_non_targeting(name: str) -> bool:
    """Return whether the name of a guide or target is a non-targeting one: ``NTg3``, ``NegCtrl0``, ``NO-TARGET``.

    Examples
    --------
    >>> [is_non_targeting(n) for n in ("NTg3", "non-targeting_00012", "NegCtrl0", "NTRK1g2", "STAT1")]
    [True, True, True, False, False]
    """
    return _NON_TARGETING.fullmatch(name) is not None


def parse_names(names: Collection[str], genes: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Return (the targets in the names of guides, the names without a target, which are used as they are).

    ``TP53-2`` is read as a guide of TP53 only if another guide or a measured gene confirms this target, because
    ``NKX2-1`` is a gene. A name that is itself a measured gene is its own target.

    Parameters
    ----------
    genes
        Measured genes, if they are known.

    Examples
    --------
    >>> parse_names(["IFNGR2g1", "AAVS1_1", "NTg3", "TP53_+_7676594.23-P1P2", "NKX2-1"])
    (['IFNGR2', 'AAVS1', 'non-targeting', 'TP53', 'NKX2-1'], ['NKX2-1'])
    """
    known = set(genes)
    dashed = Counter(m.group("target") for n in names if (m := _DASHED.match(n)))
    out, whole = [], []
    for name in names:
        if is_non_targeting(name):
            out.append(NON_TARGETING)
            continue
        if name in known:
            out.append(name)
            continue
        found = next((m.group("target") for p in _PATTERNS if (m := p.match(name))), None)
        if (
            found is None
            and (m := _DASHED.match(name))
            and (dashed[m.group("target")] > 1 or m.group("target") in known)
        ):
            found = m.group("target")
        if found is None:
            whole.append(name)
        out.append(found or name)
    return out, whole


def read_table(path: str | os.PathLike) -> dict[str, str]:
    """Read a CSV or TSV of two columns, guide and target, with or without a header.

    Raises
    ------
    DataError
        If a row has only one column, or a guide has two targets.
    """
    what = "a table of guides and their targets"
    rows = [
        row[0].split("\t") if len(row) == 1 else row
        for row in read_rows(path, what=what, hint="columns: guide, target")
    ]
    at = (0, 1)
    head = [c.strip().lower() for c in rows[0]] if rows else []
    if any(h in _GUIDE_HEADS for h in head) and any(h in COLUMNS for h in head):
        at = (
            next(i for i, h in enumerate(head) if h in _GUIDE_HEADS),
            next(i for i, h in enumerate(head) if h in COLUMNS),
        )
        rows = rows[1:]
    out: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if len(row) <= max(at) or not row[at[0]].strip():
            raise DataError(f"{path}: row {number} does not have a guide and a target", hint="columns: guide, target")
        guide, target = row[at[0]].strip(), row[at[1]].strip()
        if out.setdefault(guide, target) != target:
            raise DataError(f"{path}: guide {guide!r} has two targets, {out[guide]!r} and {target!r}")
    return out


def read_targets(
    var: Table, *, table: str | os.PathLike | None = None, column: str | None = None, genes: Collection[str] = ()
) -> Targets:
    """Return the target of every guide: from the table, or else from a column of var, or else from the names.

    Non-targeting labels become ``non-targeting``.

    Parameters
    ----------
    var
        Table of the guides.
    table
        A CSV file of guides and targets, which must contain every guide.
    column
        Column of var; by default the first of the usual ones (``intended_target_name``, ``target_gene_name``, …).
    genes
        Measured genes, which help to parse the names.

    Raises
    ------
    DataError
        If the table lacks a guide, or the column does not exist.
    """
    names, notes = var.index.tolist(), []
    if table is not None:
        known = read_table(table)
        lacking = [n for n in names if n not in known]
        if lacking:
            raise DataError(
                f"{table} has no target for {len(lacking):,} of {len(names):,} guides (the first: {lacking[0]!r})",
                hint="give every guide a target",
            )
        labels, how = [known[n] for n in names], f"the table {os.fspath(table)}"
    else:
        chosen = column or next((c for c in COLUMNS if c in var.columns), None)
        said = None if chosen is None else var.column(chosen).labels().tolist()
        if column is not None or (said is not None and all(said)):
            labels, how = said or [], f"var/{chosen}"
            if not all(labels):
                at = next(i for i, v in enumerate(labels) if not v)
                raise DataError(f"{var.where}/{column} has no target for {names[at]!r}", hint=f"use {spell('targets')}")
        else:
            labels, whole = parse_names(names, genes)
            how = "the guides' names"
            if whole:
                notes.append(
                    f"{len(whole):,} names of guides contain no target ({whole[0]!r}, …) and are used as targets "
                    f"(set {spell('targets')} to change them)"
                )
    safe = sorted({v for v in (*labels, *names) if _SAFE.match(v)})
    if safe:
        notes.append(f"safe-targeting guides ({safe[0]!r}, …) count as {NON_TARGETING}")
    labels = [NON_TARGETING if is_non_targeting(v) else v for v in labels]
    return Targets(labels=np.array(labels, dtype=object), how=how, notes=notes)
