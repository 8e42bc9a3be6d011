"""Write, read and print names from files (genes, labels, columns, paths) that may hold unusual characters.

- **Data files** (h5ad, Parquet, JSON, CSV) hold every name unchanged; CSV cells are quoted if necessary.
- **Lists with one name per line** hold ordinary names unchanged. A name that does not fit on a line (because it has
  a line break or another non-printing character, a space at either end, a leading ``#`` or a leading quotation mark)
  is written as a JSON string, which :func:`read_lines` decodes. A line ends at ``\\n``, never at U+2028 or ``\\x85``.
- **Text for people** (terminal, log, error, HTML report, plot) passes through :func:`show`, so that no name can
  move the cursor, colour the screen, change the direction of text or start a line of its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable

_ODD = re.compile(r"[^\x20-\x7e]")
_ODD_JSON = re.compile(r"[^\x00-\x7e]")  # JSON itself escapes characters below the space
_NO_WIDTH = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")
_SEPARATORS = re.compile(r"[\s_-]+")
_CELL = re.compile(r'[,"\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]')


def fold(name: str) -> str:
    """Return a name without differences that readers overlook: case, separators, Unicode forms, zero width."""
    plain = name if name.isascii() else _NO_WIDTH.sub("", unicodedata.normalize("NFKC", name))
    return _SEPARATORS.sub("_", plain.casefold())


def show(text: object) -> str:
    """Return text for people: non-printing characters, including line breaks, become Python escapes."""
    return _ODD.sub(_escape, str(text))


def show_lines(text: str) -> str:
    """Apply :func:`show` to each line of a text with intended line breaks, such as a traceback."""
    return "\n".join(map(show, text.split("\n")))


def _escape(match: re.Match[str]) -> str:
    c = match[0]
    return c if c.isprintable() else c.encode("unicode_escape").decode("ascii")


def escape_json(text: str) -> str:
    """Return JSON text without characters that control a terminal or that some readers treat as line breaks."""
    return text if text.isascii() and "\x7f" not in text else _ODD_JSON.sub(_escape_json, text)


def _escape_json(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"


def quote_line(name: str) -> str:
    """Return a name as one line of a list; :func:`read_lines` is the inverse."""
    plain = name and name.isprintable() and name == name.strip() and name[0] not in '#"'
    return name if plain else json.dumps(name).replace("\x7f", "\\u007f")


def write_lines(names: Iterable[str]) -> str:
    """Return the text of a list, with one name per line."""
    return "".join(f"{quote_line(n)}\n" for n in names)


def read_lines(text: str) -> list[str]:
    """Return the names in a list; empty lines and lines that begin with ``#`` are skipped."""
    out = []
    for line in split_lines(text):
        name = line.strip(" \t")
        if name.startswith('"') and name.endswith('"'):
            try:
                name = json.loads(name)
            except ValueError:  # the name itself is in quotation marks
                pass
        elif name.startswith("#"):
            continue
        if name:
            out.append(name)
    return out


def split_lines(text: str) -> list[str]:
    """Return the lines of a text file, which end at ``\\n`` or ``\\r\\n`` (or at ``\\r`` if there is no ``\\n``)."""
    if "\r" in text:
        text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def quote_cell(text: str) -> str:
    """Return a CSV cell, quoted if it holds a comma, a quotation mark or a line break."""
    return '"' + text.replace('"', '""') + '"' if _CELL.search(text) else text
