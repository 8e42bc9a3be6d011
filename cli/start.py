"""What a command that computes does first, before it imports its pipeline."""

from __future__ import annotations

from pathlib import Path


def start(*files: Path | None) -> None:
    """Let children look at the input files while numba is loaded here."""
    from vcelltools.io.probe import start_probe

    for file in files:
        if file is not None:
            start_probe(file)
    from vcelltools.kernels._lean import load_numba

    load_numba()
