"""The direction of perturbations: how a screen changes its targets, such as ``crispri`` or ``crispra``.

A method has a sense: it lowers its target (``down``), raises it (``up``), or does something else (``other``). Effects
of methods with the same sense are comparable; models convert or leave out the others.
"""

from __future__ import annotations

import difflib
import re

import numpy as np

from vcelltools.errors import DataError

UNKNOWN = "unknown"
SENSES = ("down", "up", "other")
DIRECTIONS = {
    "crispri": "down",
    "knockout": "down",
    "knockdown": "down",
    "crispra": "up",
    "overexpression": "up",
    "treatment": "other",
}
"""The sense of every direction; ``treatment`` stands for drugs, cytokines and the like."""
_ALIASES = {
    "crisprko": "knockout", "ko": "knockout", "cas9": "knockout", "rnai": "knockdown", "shrna": "knockdown",
    "sirna": "knockdown", "kd": "knockdown", "oe": "overexpression", "orf": "overexpression", "drug": "treatment",
    "compound": "treatment", "cytokine": "treatment",
}  # fmt: skip


def parse_direction(text: str, *, where: str) -> str:
    """Return the name of a direction, written in any case and with or without hyphens; aliases such as KO are read.

    Raises
    ------
    DataError
        If it is not known; the message lists the names.
    """
    plain = re.sub(r"[^a-z0-9]", "", str(text).lower())
    found = _ALIASES.get(plain, plain)
    if found == UNKNOWN or found in DIRECTIONS:
        return found
    near = difflib.get_close_matches(plain, [*DIRECTIONS, *_ALIASES], 1, 0.7)
    guess = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join([*DIRECTIONS, UNKNOWN])
    raise DataError(f"{where}: {text!r} is not a direction of perturbations", hint=f"{guess}directions: {names}")


def get_senses(directions: np.ndarray) -> np.ndarray:
    """Return the senses (n,) int64 of directions as positions in :data:`SENSES`, -1 if they are unknown."""
    of = {name: SENSES.index(sense) for name, sense in DIRECTIONS.items()}
    return np.array([of.get(str(d), -1) for d in directions], np.int64)
