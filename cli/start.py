"""Prepare a command that computes, before it imports the library."""

from __future__ import annotations

from pathlib import Path


def start(*files: Path | None) -> None:
    """Probe the input files in child processes while numba loads in this one."""
    from vcelltools.io.hdf5.probe import start_probe

    for file in files:
        if file is not None:
            start_probe(file)
    from vcelltools.kernels import load_numba

    load_numba(alone=True)
