"""The base of what a pipeline returns."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vcelltools.io.atomic import to_plain


class Result:
    """A data class whose fields are what ``--json`` prints; a subclass adds what follows from them."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return to_plain({f.name: getattr(self, f.name) for f in fields(self)})  # type: ignore[arg-type]
