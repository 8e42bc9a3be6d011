"""Read small text files that users name, with errors that say what was expected."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from vcelltools.errors import DataError, EnvironmentFault, VcellError

_MOST_TOML = 1 << 24
_MOST_TEXT = 1 << 30  # characters; a small gzip may unpack to anything
_MOST_NAMES = 10_000  # of a folder that are looked at for a nearly right one


def say_missing(path: str | os.PathLike) -> DataError:
    """Return the error for a missing file, with the most similar name in its folder."""
    import difflib

    p = Path(path)
    if p.is_symlink():
        return DataError(
            f"{p} is a link to {os.readlink(p)}, which does not exist", hint="copy the file or link it again"
        )
    if not p.parent.is_dir():
        return DataError(f"{p}: no such file", hint=f"the folder {p.parent} does not exist")
    try:
        with os.scandir(p.parent) as entries:
            names = {Path(e.name).stem: e.name for e in islice(entries, _MOST_NAMES)}
    except OSError:
        names = {}
    near = difflib.get_close_matches(p.stem, names, 1, 0.7)  # a common extension is no evidence of similarity
    hint = f"did you mean {p.with_name(names[near[0]])}?" if near else "check the path"
    return DataError(f"{p}: no such file", hint=hint)


def read_text(path: str | os.PathLike, *, what: str, hint: str | None = None, missing: str = "no such file") -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Parameters
    ----------
    what
        What the file should be, for the message, such as ``a list of genes``.
    hint
        What to do if it is something else or missing.
    missing
        The message if the file does not exist.

    Raises
    ------
    DataError
        If it is missing, a folder, or not text.
    EnvironmentFault
        If permission is denied.
    """
    p = Path(path)
    with _say_what_is_wrong(p, what, hint, missing), _open_text(p) as f:
        text = f.read(_MOST_TEXT + 1)
    if len(text) > _MOST_TEXT:
        raise DataError(f"{p}: has more than {_MOST_TEXT:,} characters; {what} is expected", hint=hint)
    if "\0" in text:
        raise DataError(f"{p} is not a text file, but {what} is expected", hint=hint)
    return text


@contextmanager
def _say_what_is_wrong(p: Path, what: str, hint: str | None, missing: str = "no such file") -> Iterator[None]:
    """Raise the errors of :func:`read_text` for what opening and reading a file raise."""
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(f"{p}: {missing}", hint=hint) from e
    except IsADirectoryError as e:
        raise DataError(f"{p} is a folder, but {what} is expected", hint=hint) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{p} is not a text file, but {what} is expected", hint=hint) from e
    except PermissionError as e:
        raise EnvironmentFault(f"{p}: permission denied", hint="check the file's mode and owner") from e
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{p} cannot be read: {getattr(e, 'strerror', None) or e}", hint=hint) from e


def _open_text(p: Path) -> TextIO:
    """Open a text file, packed by gzip where its name says so; a line break inside a quoted name stays as it is."""
    if p.suffix == ".gz":
        import gzip

        return cast(TextIO, gzip.open(p, "rt", encoding="utf-8-sig", newline=""))
    return p.open(encoding="utf-8-sig", newline="")


@contextmanager
def checking(path: str | os.PathLike, hint: str | None = None) -> Iterator[None]:
    """Raise a :class:`DataError` that names the file where what was read from it is of the wrong kind."""
    try:
        yield
    except VcellError:
        raise
    except KeyError as e:
        raise DataError(f"{path}: lacks {e}", hint=hint) from e
    except (ValueError, TypeError, OverflowError) as e:
        raise DataError(f"{path}: does not hold what it should: {' '.join(str(e).split())[:200]}", hint=hint) from e


def parse_toml(text: str, *, where: str, hint: str | None = None) -> dict[str, Any]:
    """Parse the text of a TOML file; ``where`` names the file in errors.

    Raises
    ------
    DataError
        If it is not TOML, too long for a configuration, or nested too deeply.
    """
    import tomllib

    if len(text) > _MOST_TOML:
        raise DataError(f"{where} has {len(text):,} characters, too many for a configuration", hint=hint)
    try:
        return tomllib.loads(text)
    except RecursionError as e:
        raise DataError(f"{where}: not valid TOML: it is nested too deeply", hint=hint) from e
    except ValueError as e:  # TOMLDecodeError, or an integer with thousands of digits
        raise DataError(f"{where}: not valid TOML: {e}", hint=hint) from e


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text; raise a ValueError if it is invalid or nested too deeply."""
    import json

    try:
        return json.loads(text)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def read_rows(path: str | os.PathLike, *, what: str, hint: str | None = None) -> list[list[str]]:
    """Return the non-empty rows of a CSV as text; parameters and errors as in :func:`read_text`."""
    import csv
    import io

    text = read_text(path, what=what, hint=hint)
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(c.strip() for c in row)]
    except csv.Error as e:
        raise DataError(f"{Path(path)} is not valid CSV, but {what} is expected: {e}", hint=hint) from e


def read_columns(
    path: str | os.PathLike, *, first: str, what: str, hint: str | None = None, only: str | None = None
) -> tuple[list[str], dict[str, list[float]]]:
    """Return the names in the first column of a CSV, called ``first``, and the numeric columns; empty cells are NaN.

    With ``only``, read just the rows with this name; the others need not hold numbers.
    """
    rows = read_rows(path, what=what, hint=hint)
    p = Path(path)
    if not rows or rows[0][0] != first:
        raise DataError(f"{p}: the first column is not {first!r}, but {what} is expected", hint=hint)
    head, body = rows[0][1:], [row for row in rows[1:] if only is None or row[0] == only]
    columns: dict[str, list[float]] = {name: [] for name in head}
    for row in body:
        try:
            for name, v in zip(head, row[1:], strict=True):
                columns[name].append(float(v or "nan"))
        except ValueError as e:
            raise DataError(f"{p}: row {row[0]!r} does not consist of {len(head)} numbers", hint=hint) from e
    return [row[0] for row in body], columns


def iterate_lines(path: str | os.PathLike, *, what: str, hint: str | None = None) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, plain or gzipped; parameters and errors as :func:`read_text`."""
    import gzip
    import io

    p = Path(path)
    with _say_what_is_wrong(p, what, hint), p.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as f:  # type: ignore[type-var]
            for line in f:
                if "\0" in line:
                    raise DataError(f"{p} is not a text file, but {what} is expected", hint=hint)
                yield line
