"""Files that users name: what is not there is said, small text files are read whole or refused in plain words."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from vcelltools.errors import DataError, EnvironmentFault

_MOST_NAMES = 10_000  # of a folder that are looked at for a nearly right one


def say_missing(path: str | os.PathLike) -> DataError:
    """Return the error for a file that is not there, with what may be meant instead."""
    import difflib

    p = Path(path)
    if p.is_symlink():
        return DataError(f"{p}: a link to {os.readlink(p)}, where nothing is", hint="copy or link the file again")
    if not p.parent.is_dir():
        return DataError(f"{p}: no such file", hint=f"there is no folder {p.parent}")
    try:
        with os.scandir(p.parent) as entries:
            names = {Path(e.name).stem: e.name for e in islice(entries, _MOST_NAMES)}
    except OSError:
        names = {}
    near = difflib.get_close_matches(p.stem, names, 1, 0.7)  # ends alike say nothing
    hint = f"did you mean {p.with_name(names[near[0]])}?" if near else "check the path"
    return DataError(f"{p}: no such file", hint=hint)


def read_text(path: str | os.PathLike, *, what: str, hint: str | None = None, missing: str = "no such file") -> str:
    """Return the text of a UTF-8 file, without the mark that some editors put first.

    Parameters
    ----------
    what
        What the file should be, for the message: ``a list of genes``.
    hint
        What to do where it is something else or missing.
    missing
        What is said where nothing is there.

    Raises
    ------
    DataError
        Where it is missing, a folder, or not text.
    EnvironmentFault
        Where it may not be read.
    """
    p = Path(path)
    try:
        text = p.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise DataError(f"{p}: {missing}", hint=hint) from e
    except IsADirectoryError as e:
        raise DataError(f"{p}: is a folder; {what} is expected", hint=hint) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{p}: is not text; {what} is expected", hint=hint) from e
    except PermissionError as e:
        raise EnvironmentFault(f"{p}: permission denied", hint="check the file's mode and owner") from e
    except OSError as e:
        raise DataError(f"{p}: cannot be read: {e.strerror}", hint=hint) from e
    if "\0" in text:
        raise DataError(f"{p}: is not text; {what} is expected", hint=hint)
    return text


def read_rows(path: str | os.PathLike, *, what: str, hint: str | None = None) -> list[list[str]]:
    """Return the rows of a CSV as text, those that are empty left out; parameters and errors as :func:`read_text`."""
    import csv

    text = read_text(path, what=what, hint=hint)
    try:
        return [row for row in csv.reader(text.splitlines(keepends=True), strict=True) if any(c.strip() for c in row)]
    except csv.Error as e:
        raise DataError(f"{Path(path)}: {what} is expected, in CSV: {e}", hint=hint) from e


def read_columns(
    path: str | os.PathLike, *, first: str, what: str, hint: str | None = None, only: str | None = None
) -> tuple[list[str], dict[str, list[float]]]:
    """Return the names in the first column of a CSV, called ``first``, and the columns of numbers; empty is NaN.

    With ``only``, of the rows with this name; the others need not hold numbers.
    """
    rows = read_rows(path, what=what, hint=hint)
    p = Path(path)
    if not rows or rows[0][0] != first:
        raise DataError(f"{p}: its first column is not {first!r}; {what} is expected", hint=hint)
    head, body = rows[0][1:], [row for row in rows[1:] if only is None or row[0] == only]
    columns: dict[str, list[float]] = {name: [] for name in head}
    for row in body:
        try:
            for name, v in zip(head, row[1:], strict=True):
                columns[name].append(float(v or "nan"))
        except ValueError as e:
            raise DataError(f"{p}: row {row[0]!r} is not made of {len(head)} numbers", hint=hint) from e
    return [row[0] for row in body], columns
