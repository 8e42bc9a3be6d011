"""The files of a fitted run, and all files that are read when it is opened."""

from __future__ import annotations

import os
from pathlib import Path

from vcelltools.errors import DataError
from vcelltools.spatial.betadata import SUFFIX, list_betas
from vcelltools.spatial.settings import CONFIG_NAME, RUN_NAME, Loaded, load_toml

SUMMARY, STABILITY = "summary.parquet", "stability.parquet"
REMAKE = "remove it; the same command makes it again"


def find_run(path: Path) -> tuple[Path | None, Loaded | None, Path]:
    """Return the TOML file of a run, its content, and the folder of the coefficients."""
    toml = path if path.suffix == ".toml" else None
    toml = toml or next((f for n in (RUN_NAME, CONFIG_NAME) if (f := path / n).exists()), None)
    if toml is None:
        if not path.is_dir():
            raise DataError(f"{path}: no such folder")
        return None, None, path
    loaded, folder = load_toml(toml), toml.parent
    if not list_betas(folder) and loaded.command.get("execution.output_dir"):
        folder = Path(loaded.command["execution.output_dir"])
    return toml, loaded, folder


def list_inputs(path: str | os.PathLike, adata: str | os.PathLike | None = None) -> list[Path]:
    """Return every file that is read when a run is opened and used: its TOML and tables, the data, the network.

    Raises
    ------
    DataError
        If there is no such run.
    """
    toml, loaded, folder = find_run(Path(path))
    command, settings = (loaded.command, loaded.settings) if loaded is not None else ({}, {})
    named = [toml, adata or command.get("data.adata_path"), settings.get("network"), settings.get("tf_prior")]
    tables = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")] if folder.is_dir() else []
    own = [p for p in tables if p.stem.endswith(SUFFIX) or p.name in (SUMMARY, STABILITY)]
    return [*(Path(p) for p in named if p is not None), *own]
