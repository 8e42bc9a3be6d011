"""Runs mutants one after another, telling the parent what it does before it does it.

python -m tests.fuzz.child SEED FIRST COUNT FOLDER
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.fuzz.mutations import mutate
from tests.fuzz.oracle import read_naively
from tests.fuzz.seeds import Seed, write_seed
from vcelltools.errors import VcellError
from vcelltools.io import probe

TOP = 8
PATIENCE = 60.0  # seconds for one mutant; they take some hundredths


def main() -> None:
    """Run ``COUNT`` mutants from number ``FIRST``; one line of JSON before and after each."""
    seed, first, count = (int(a) for a in sys.argv[1:4])
    folder = Path(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    warnings.simplefilter("ignore")
    probe.CPU_SECONDS = 2
    rank_naively(np.arange(24).reshape(6, 4) % 5, list("abcd"))  # imports and compiles
    say({"ready": True})
    for number in range(first, first + count):
        say({"start": number})
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        say({"done": number, **run_one(seed, number, folder)})


def say(body: dict) -> None:
    """Write one line to the parent."""
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def make_mutant(seed: int, number: int, folder: Path) -> tuple[Seed, list[str], np.random.Generator]:
    """Write mutant ``number``; number 0, 10, 20, ... is left undamaged."""
    rng = np.random.default_rng([seed, number])
    path = folder / "mutant.h5ad"
    path.unlink(missing_ok=True)
    made = write_seed(path, rng)
    return made, ([] if number % 10 == 0 else mutate(made, rng)), rng


def run_one(seed: int, number: int, folder: Path) -> dict:
    """Run one mutant; return its outcome and what was done to it."""
    made, names, rng = make_mutant(seed, number, folder)
    about = {"kind": made.kind, "mutations": names}
    with_batches = bool(rng.random() < 0.2) and made.kind in ("h5ad", "legacy", "h5mu")
    try:
        if rng.random() < 0.5:
            look_around(made.path)
        ours = rank(made.path, "batch" if with_batches else None, int(rng.integers(1, 3)))
    except VcellError as e:
        if not names:
            return {**about, "outcome": "refused undamaged", "said": str(e)}
        return {**about, "outcome": "refused", "said": str(e)}
    except Exception:
        return {**about, "outcome": "bug", "said": traceback.format_exc()}
    try:
        counts, genes = read_naively(made.path, made.kind, made.matrix, made.var)
    except Exception as e:
        names_before = [f"gene{j}" for j in range(made.counts.shape[1])]
        if not with_batches and ours == rank_naively(
            made.counts, names_before
        ):  # what is damaged does not matter, or was read around
            return {**about, "outcome": "same as undamaged"}
        return {**about, "outcome": "accepted invalid", "said": f"{type(e).__name__}: {e}"}
    if with_batches:
        return {**about, "outcome": "ranked by batch"}
    theirs = rank_naively(counts, genes)
    if ours != theirs:
        return {**about, "outcome": "different", "said": f"{ours}\n{theirs}"}
    return {**about, "outcome": "same"}


def look_around(path: Path) -> None:
    """Run ``inspect``, which reads everything that is not the matrix; it may refuse the file."""
    from vcelltools.pipelines.inspect import inspect

    try:
        inspect(path).to_json()
    except VcellError:
        pass


def rank(source: object, batch_key: str | None, threads: int) -> list[tuple[str, float]]:
    """Return the names and means of the selected genes."""
    from vcelltools.pipelines.hvg import compute_hvg

    r = compute_hvg([source], top=TOP, batch_key=batch_key, threads=threads)
    return [(str(r.genes[j]), float(r.columns["means"][j])) for j in r.order]


def rank_naively(counts: np.ndarray, genes: list[str]) -> list[tuple[str, float]]:
    """Rank the naive reader's dense matrix, from memory."""
    import pandas as pd

    n, g = counts.shape
    obs, var = pd.DataFrame(index=[str(i) for i in range(n)]), pd.DataFrame(index=pd.Index(genes, dtype=object))
    memory = SimpleNamespace(X=counts.astype(np.float64), raw=None, layers={}, obs=obs, var=var)
    assert var.shape[0] == g
    return rank(memory, None, 1)


if __name__ == "__main__":
    main()
