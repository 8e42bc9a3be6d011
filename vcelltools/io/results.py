"""The base classes of results."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vcelltools.io.write.atomic import to_plain

_ROWS, _LETTERS = 10, 200


class Shown:
    """A result that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        """Return the first rows of the result's frame, or its fields, as HTML."""
        from html import escape

        name = type(self).__name__
        if hasattr(self, "to_frame"):
            frame = self.to_frame()
            rows, columns = frame.shape
            return f"<p><b>{name}</b>: {rows:,} rows × {columns} columns</p>{frame.head(_ROWS).to_html()}"
        body = self.to_json()  # type: ignore[attr-defined]
        cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(_shorten(v))}</td></tr>" for k, v in body.items())
        return f"<p><b>{name}</b></p><table>{cells}</table>"


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…"


class Result(Shown):
    """A data class whose fields ``--json`` prints; subclasses add derived values."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return to_plain({f.name: getattr(self, f.name) for f in fields(self)})  # type: ignore[arg-type]
