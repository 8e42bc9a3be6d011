"""Public atlases, from a bucket to one matrix: list, choose, fetch with verification, and merge.

``list_experiments``, ``fetch``, ``merge`` and ``verify_folder`` implement the commands of ``atlas``, and
``open_source`` opens a source. Other rooms may use the names below. No lower room imports this one.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Access": "_remote",
    "Choice": "_choose",
    "Folder": "_folder",
    "PRESETS": "_sources",
    "Transfer": "_fetch",
    "fetch": "_fetch",
    "list_experiments": "_choose",
    "make_plan": "_fetch",
    "merge": "_merge",
    "open_folder": "_folder",
    "open_source": "_sources",
    "plan_merge": "_merge",
    "read_ids": "_choose",
    "verify_folder": "_folder",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
