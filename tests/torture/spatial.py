"""Drills on the spatial wing: fits and screens killed at their steps, and damaged tables and configurations."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.torture.common import ROOT, Drill, rounds

FIT = {"genes": ["Gene0", "Gene2", "Tf1"], "radius": 100.0, "l1_reg": 0.02, "validate": False, "threads": 1}
KNOCKED = ["Tf0", "Lig0"]


def hash_files(folder: Path) -> dict[str, str]:
    """Return a digest of every file that a user reads."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def make_run(work: Path) -> Path:
    """Write a tissue, its network, a fitted run and a screen of it; return the folder of all."""
    from tests.tissues import make_tissue_adata, write_network

    make_tissue_adata(60).write_h5ad(work / "x.h5ad")
    write_network(work)
    fit(work / "run")
    screen(work / "run", work / "screen")
    return work


def fit(run: Path) -> None:
    """Fit, or go on where a fit was stopped."""
    from vcelltools import spatial

    spatial.fit(run.parent / "x.h5ad", run, network=run.parent / "mouse_network.parquet", **FIT)


def screen(run: Path, out: Path) -> None:
    """Screen, or go on where a screen was stopped."""
    from vcelltools import spatial

    spatial.open_run(run, run.parent / "x.h5ad", threads=1).screen(KNOCKED, out, hops=2)


def kill_spatial(work: Path, seconds: float, seed: int) -> Drill:
    """SIGKILL fits and screens at their steps: the same call ends with the same bytes."""
    drill = Drill("spatial fits and screens, SIGKILL at steps")
    stride = 16 if seconds < 30 else 3
    command = [sys.executable, "-m", "tests.spatial_kill_walk", str(work), str(seed % stride), str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        drill.failures.append(done.stderr[-500:])
        return drill
    said = json.loads(done.stdout)
    drill.add("kills", said["kills"])
    drill.failures += [f"{what} after a kill at step {at}" for what in ("wrong", "left") for at in said[what]]
    return drill


def _damage_bytes(path: Path, rng: np.random.Generator) -> str:
    raw = bytearray(path.read_bytes())
    how = str(rng.choice(["bits", "cut", "zeros", "empty"]))
    if how == "bits":
        for at in rng.integers(0, len(raw), 3):
            raw[at] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        raw = raw[: int(rng.integers(len(raw)))]
    elif how == "zeros":
        at = int(rng.integers(len(raw)))
        raw[at : at + 16] = bytes(len(raw[at : at + 16]))
    path.write_bytes(b"" if how == "empty" else bytes(raw))
    return how


def _damage_text(path: Path, rng: np.random.Generator) -> str:
    """Put a value of another kind in the place of one value of a TOML or JSON file."""
    text = path.read_text(encoding="utf-8")
    places = [m.span(1) for m in re.finditer(r"[=:]\s*(\"[^\"\n]*\"|\[[^\]]*\]|[\w.+-]+)", text)]
    if not places:
        return _damage_bytes(path, rng)
    a, b = places[int(rng.integers(len(places)))]
    new = str(
        rng.choice(["-1", "1e400", "nan", '"x"', "[]", "[1, 2]", "true", "{}", '""', "9999999999999999999999", "0"])
    )
    path.write_text(text[:a] + new + text[b:], encoding="utf-8")
    return f"{text[a:b]} became {new}"


def _damage_table(path: Path, rng: np.random.Generator) -> str:
    """Change names, types or values of a table, and write it as a sound file."""
    import pandas as pd

    feather = path.suffix == ".feather"
    frame = pd.read_feather(path) if feather else pd.read_parquet(path)
    column = str(rng.choice(frame.columns))
    how = str(rng.choice(["drop", "rename", "text", "missing", "infinite", "twice", "none", "lists", "dates", "big"]))
    if how == "drop":
        frame = frame.drop(columns=column)
    elif how == "rename":
        names = {"beta_", "beta_$", "beta_A#", "", "beta_Tf0$Tf0", "Cluster", "é"} - {*frame.columns}
        frame = frame.rename(columns={column: str(rng.choice(sorted(names)))})
    elif how == "none":
        frame = frame.iloc[:0]
    elif how == "twice":
        frame = pd.concat([frame, frame.iloc[:1]])
    else:
        values = {
            "text": ["x"], "missing": [None], "infinite": [np.inf], "lists": [[1.0, 2.0]],
            "dates": [pd.Timestamp(0)], "big": [2**62],
        }[how]  # fmt: skip
        frame[column] = pd.Series(values * len(frame), index=frame.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = frame.reset_index(drop=True)
        frame.to_feather(path) if feather else frame.to_parquet(path)
    return f"{column}: {how}"


READERS = {
    "tables": ("run", "screen"), "toml": ("run", "config", "fit", "join"), "rows": ("fit",), "screen": ("screen",),
    "network": ("received", "fit"), "batch": ("batch",),
}  # fmt: skip


def _get_kind(path: Path) -> str:
    """Return what a file is, by its place in the folder of :func:`make_run`."""
    if len(path.parts) == 1:
        return "batch" if path.suffix == ".toml" else "network"
    if path.parts[0] == "screen":
        return "screen"
    return "rows" if ".rows" in path.parts else "toml" if path.suffix == ".toml" else "tables"


def _use(work: Path) -> dict[str, Callable[[], Any]]:
    """Return what reads each kind of file: the whole of the wing's commands on a run."""
    from vcelltools import spatial
    from vcelltools.spatial.report import _choose_targets, _read_summary
    from vcelltools.spatial.screen import read_batch
    from vcelltools.spatial.settings import load_toml

    def use_run() -> None:
        run = spatial.open_run(work / "run")
        for gene in run.genes:
            run.splash(gene)
        run.perturb({"Tf0": 0.0}, hops=2)
        run.interactions()
        _choose_targets(run, _read_summary(run))

    def use_config() -> None:
        loaded = load_toml(work / "run" / "spacetravlr_run_repro.toml")
        spatial.check(work / "x.h5ad", config=work / "run" / "spacetravlr_run_repro.toml")
        assert loaded.command is not None

    return {
        "run": use_run, "fit": lambda: fit(work / "run"), "join": lambda: spatial.join(work / "run"),
        "screen": lambda: screen(work / "run", work / "screen"), "config": use_config,
        "received": lambda: spatial.received(work / "x.h5ad", network=work / "mouse_network.parquet", radius=100.0),
        "batch": lambda: read_batch(work / "batch.toml", hops=2, scale=1.0),
    }  # fmt: skip


def damage_runs(work: Path, seconds: float, seed: int) -> Drill:
    """Damage a run, a screen, a configuration or a network: what reads them works, or says what is wrong."""
    from vcelltools.errors import VcellError

    drill = Drill("damaged spatial runs")
    rng = np.random.default_rng(seed)
    whole = work / "whole"
    whole.mkdir()
    make_run(whole)
    (whole / "batch.toml").write_text('genes = ["Tf0", "Lig0"]\ndesired_expr = [0, 1.5]\nn_propagation = 2\n')
    folder = work / "damaged"
    for number in rounds(seconds):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        toml = folder / "run" / "spacetravlr_run_repro.toml"
        toml.write_text(toml.read_text().replace(str(whole), str(folder)))
        job = folder / "screen" / "screen.json"
        job.write_text(job.read_text().replace(str(whole), str(folder)))
        files = sorted(
            p for p in folder.rglob("*") if p.is_file() and p.suffix in (".feather", ".parquet", ".toml", ".json")
        )
        path = files[int(rng.integers(len(files)))]
        if rng.random() < 0.3:
            how = _damage_bytes(path, rng)
        else:
            how = (_damage_table if path.suffix in (".feather", ".parquet") else _damage_text)(path, rng)
        drill.add("files mutated")
        if rng.random() < 0.5 and path.name != "summary.parquet":
            (folder / "run" / "summary.parquet").unlink()
        for table in ("effects.parquet", "scores.parquet"):  # so that the parts are read
            if rng.random() < 0.5 and path.name != table:
                (folder / "screen" / table).unlink()
        for name, use in _use(folder).items():
            if name not in READERS[_get_kind(path.relative_to(folder))]:
                continue
            try:
                use()
                drill.add("still good")
            except VcellError:
                drill.add("refused")
            except Exception as e:
                what = f"{path.relative_to(folder)} ({how[:80]}): {name}"
                drill.failures.append(f"{number}: {what}: {type(e).__name__}: {str(e)[:90]} at {_find_place(e)}")
    return drill


def _find_place(e: BaseException) -> str:
    import traceback

    ours = [
        f for f in traceback.extract_tb(e.__traceback__) if "vcelltools" in f.filename and ".venv" not in f.filename
    ]
    return f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "?"
