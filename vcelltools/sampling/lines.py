"""The name of a cell line of a store, ``STORE.LINE``, as used in splits, options, tables and messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vcelltools.errors import DataError

if TYPE_CHECKING:
    from vcelltools.stores.store import Store


def name_line(store: str, line: str) -> str:
    """Return ``STORE.LINE``."""
    return f"{store}.{line}"


def list_lines(stores: Sequence[Store]) -> dict[str, tuple[int, str]]:
    """Return (position of the store, cell line) by ``STORE.LINE``, in the order of the ids in training.

    Raises
    ------
    DataError
        If two lines have the same name, such as line ``b.c`` of store ``a`` and line ``c`` of store ``a.b``.
    """
    out: dict[str, tuple[int, str]] = {}
    for k, store in sorted(enumerate(stores), key=lambda x: x[1].name):
        for line in sorted(store.runs["cell_line"].unique()):
            name = name_line(store.name, line)
            if name in out:
                other = stores[out[name][0]].name
                hint = "build one of the stores with another name"
                raise DataError(f"stores {other} and {store.name} both have a cell line {name}", hint=hint)
            out[name] = k, line
    return out


def match_lines(lines: Mapping[str, tuple[int, str]], name: str) -> list[str]:
    """Return the lines that match a name, which is ``STORE.LINE`` or only the cell line."""
    return [name] if name in lines else [full for full, (_, line) in lines.items() if line == name]


def find_line(lines: Mapping[str, tuple[int, str]], name: str) -> str:
    """Return the line that matches a name; raise a DataError if none or several do."""
    found = match_lines(lines, name)
    if len(found) != 1:
        raise DataError(
            f"{f'{len(found)} lines are' if found else 'no line is'} named {name!r}",
            hint=f"lines: {', '.join(list(lines)[:12])}",
        )
    return found[0]


def respell(names: Iterable[str], stores: Sequence[Store]) -> list[str]:
    """Convert names from an older file, which spells a line ``STORE / LINE``."""
    out = list(names)
    for store in stores:
        out = [name.replace(f"{store.name} / ", name_line(store.name, ""), 1) for name in out]
    return out
