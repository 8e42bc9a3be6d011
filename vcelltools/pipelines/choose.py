"""Which cells of a file: by their labels, at random, or both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io import Dataset, open_dataset

if TYPE_CHECKING:
    from anndata import AnnData


def choose_rows(
    ds: Dataset,
    *,
    n: int | None,
    frac: float | None,
    per_group: int | None,
    by: str | None,
    seed: int,
    allowed_n: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, int] | None]:
    """Return the (m,) increasing positions chosen, and the cells by group where there is a column.

    ``allowed_n`` is a (n,) bool mask of the cells to choose among; with it, no number means all of them.
    """
    given = [k for k, v in (("n", n), ("frac", frac), ("per_group", per_group)) if v is not None]
    if len(given) > 1 or (not given and allowed_n is None):
        raise UsageError(
            "how many cells?", hint="give exactly one of --n, --frac and --per-group, or --where or --matching"
        )
    among = np.arange(ds.n_cells) if allowed_n is None else np.flatnonzero(allowed_n)
    if per_group is not None and by is None:
        raise UsageError("per group of what?", hint="--by names an obs column")
    if frac is not None and not 0 < frac <= 1:
        raise UsageError(f"a share of {frac}; above 0 and up to 1 expected")
    if n is not None and not 1 <= n <= len(among):
        raise UsageError(f"{n:,} cells cannot be taken of {len(among):,}", hint="at least 1, at most all of them")
    if per_group is not None and per_group < 1:
        raise UsageError(f"{per_group} cells a group; at least 1 expected")
    if seed < 0:
        raise UsageError(f"seed {seed}; a whole number from 0 on expected")
    labels = ["all cells"]
    codes = np.zeros(len(among), np.int64)
    if by is not None:
        found, labels = ds.obs.column(by).factorize()
        found = found[among]
        codes = np.where(found < 0, len(labels), found)
        if (found < 0).any():
            labels = [*labels, "no label"]
    size = np.bincount(codes, minlength=len(labels))
    if per_group is not None:
        take = np.minimum(size, per_group)
    elif not given:
        take = size
    else:
        total = n if n is not None else max(1, round(frac * len(among)))  # type: ignore[operator]
        take = _share_out(size, total)
    draw = np.random.Generator(np.random.Philox(key=[seed, 1])).random(ds.n_cells)[among]
    order = np.lexsort((draw, codes))  # group by group, each in random order
    first = np.concatenate([[0], np.cumsum(size)])[:-1]
    rank = np.arange(len(among)) - np.repeat(first, size)
    rows = among[np.sort(order[rank < np.repeat(take, size)])]
    return rows, None if by is None else {
        k: int(v) for k, v in zip(labels, take, strict=True) if v or allowed_n is None
    }


def _share_out(size: np.ndarray, total: int) -> np.ndarray:
    """Split ``total`` over groups in proportion to their sizes, by largest remainders."""
    exact = size * (total / size.sum())
    take = np.floor(exact).astype(np.int64)
    rest = np.argsort(take - exact, kind="stable")[: total - int(take.sum())]
    take[rest] += 1
    return take


def find_allowed(
    ds: Dataset, where: Mapping[str, Sequence[str]], by: str | None, matching: str | os.PathLike | AnnData | None
) -> np.ndarray:
    """Return (n,) bool: the cells with one of the labels of ``where`` in each of its columns, and with a label in the
    column ``by`` that the file ``matching`` has too. A label that no cell has may be several with commas between.

    Raises
    ------
    DataError
        For a label that no cell has, and where no cell is left.
    """
    allowed = np.ones(ds.n_cells, bool)
    for column, given in where.items():
        codes, labels = ds.obs.column(column).factorize()
        wanted = [part for w in given for part in ([w] if w in labels else w.split(","))]
        unknown = [w for w in wanted if w not in labels]
        if unknown:
            more = ", …" if len(labels) > 10 else ""
            raise DataError(
                f"{ds.label}: no cell has obs/{column} = {unknown[0]!r}",
                hint=f"it holds {', '.join(sorted(map(str, labels))[:10])}{more}",
            )
        allowed &= _has(codes, [label in set(wanted) for label in labels])
    if matching is not None:
        if by is None:
            raise UsageError("matching in what?", hint="--by names the obs column that both files have")
        with open_dataset(matching) as other:
            theirs = set(other.obs.column(by).factorize()[1])
            codes, labels = ds.obs.column(by).factorize()
            allowed &= _has(codes, [label in theirs for label in labels])
            where = {**where, by: [f"those of {other.label}"]}
    if not allowed.any():
        said = ", ".join(f"{k} = {' or '.join(v)}" for k, v in where.items())
        raise DataError(f"{ds.label}: no cell has {said}")
    return allowed


def _has(codes: np.ndarray, wanted: list[bool]) -> np.ndarray:
    return np.array([*wanted, False])[codes]  # the last is for cells without a label, whose code is -1


def parse_where(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return column -> labels of ``COLUMN=A,B`` texts."""
    out: dict[str, list[str]] = {}
    for text in texts:
        column, equals, label = text.partition("=")
        if not column or not equals or not label or column in out:
            raise UsageError(
                f"--where {text!r} does not say which cells", hint="COLUMN=LABEL or COLUMN=A,B, each column once"
            )
        out[column] = [label]
    return out
