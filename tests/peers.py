"""Where the peers live: packages that our results are compared with, each in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def find_peer(name: str) -> Path | None:
    """Return the Python of the environment ``name`` (``cell-eval-0.8.2``, ...), or None where it is not made."""
    for base in (os.environ.get("VCELLTOOLS_PEERS"), ROOT / ".peers"):
        if base and (python := Path(base) / name / "bin" / "python").exists():
            return python
    return None


def peer_python(name: str) -> Path:
    """Return the Python of the environment ``name``, or skip the test, saying how to make it."""
    python = find_peer(name)
    if python is None:
        pytest.skip(f"the peer {name} is not installed here (make peers)")
    return python
