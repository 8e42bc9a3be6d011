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
from typing import Any

import numpy as np
from zarr.core.sync import cleanup_resources

from tests.fuzz.mutations import make_zarr, mutate
from tests.fuzz.oracle import LARGEST, lacks_modality, read_naively
from tests.fuzz.seeds import Seed, write_seed
from vcelltools.errors import VcellError
from vcelltools.io.hdf5 import probe

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
        cleanup_resources()  # zarr's threads would keep the next HDF5 file from a quick look in a forked child


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
    whole = number % 10 == 0
    if made.kind == "zarr":
        return *make_zarr(made, rng, whole=whole), rng
    return made, ([] if whole else mutate(made, rng)), rng


def run_one(seed: int, number: int, folder: Path) -> dict:
    """Run one mutant; return its outcome and what was done to it."""
    made, names, rng = make_mutant(seed, number, folder)
    verb = str(rng.choice(["hvg", "hvg", "hvg", "normalize", "convert"]))
    about = {"kind": made.kind, "mutations": names, "verb": verb}
    with_batches = verb == "hvg" and bool(rng.random() < 0.2) and made.kind in ("h5ad", "legacy", "h5mu")
    out = folder / "out.h5ad"
    out.unlink(missing_ok=True)
    try:
        if rng.random() < 0.5:
            look_around(made.path)
        threads = int(rng.integers(1, 3))
        ours = run_verb(verb, made.path, out, "batch" if with_batches else None, threads)
    except VcellError as e:
        if out.exists():
            return {**about, "outcome": "bug", "said": f"refused, and the output is there: {e}"}
        return {**about, "outcome": "refused" if names else "refused undamaged", "said": str(e)}
    except Exception:
        return {**about, "outcome": "bug", "said": traceback.format_exc()}
    try:
        counts, genes = read_naively(made.path, made.kind, made.matrix, made.var, largest=LARGEST[verb])
    except Exception as e:
        if lacks_modality(made.path, made.matrix):
            return {**about, "outcome": "another modality"}
        if not with_batches:  # what is damaged does not matter, or was read around
            before = [f"gene{j}" for j in range(made.counts.shape[1])]
            if agree(ours, run_verb_naively(verb, made.counts, before)):
                return {**about, "outcome": "same as undamaged"}
        return {**about, "outcome": "accepted invalid", "said": f"{type(e).__name__}: {e}"}
    if with_batches:
        return {**about, "outcome": "ranked by batch"}
    theirs = run_verb_naively(verb, counts, genes)
    if not agree(ours, theirs):
        return {**about, "outcome": "different", "said": f"{ours}\n{theirs}"}
    return {**about, "outcome": "same"}


def run_verb(verb: str, path: Path, out: Path, batch_key: str | None, threads: int) -> Any:
    """Run hvg, normalize or convert; return the genes' ranking, or what was written."""
    if verb == "hvg":
        return rank(path, batch_key, threads)
    if verb == "normalize":
        from vcelltools.files.normalize import normalize

        normalize(path, out, threads=threads)
    else:
        from vcelltools.files.convert import convert

        convert(path, out, threads=threads)
    return read_naively(out, "h5ad", "X", "var", largest=None)


def run_verb_naively(verb: str, counts: np.ndarray, genes: list[str]) -> Any:
    """Do the same to the naive reader's dense matrix."""
    if verb == "hvg":
        return rank_naively(counts, genes)
    if verb == "normalize":
        size = counts.sum(axis=1, keepdims=True, dtype=np.float64)
        return np.log1p(counts * (1e4 / np.where(size > 0, size, 1))), genes
    return counts.astype(np.float64), genes


def agree(ours: Any, theirs: Any) -> bool:
    """Return whether two results are one: rankings to the bit, matrices to float32."""
    if isinstance(ours, list):
        return ours == theirs
    (a, names), (b, wanted) = ours, theirs
    return names == wanted and a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0, equal_nan=True)


def look_around(path: Path) -> None:
    """Run ``inspect``, which reads everything that is not the matrix; it may refuse the file."""
    from vcelltools.files.inspect import inspect

    try:
        inspect(path).to_json()
    except VcellError:
        pass


def rank(source: object, batch_key: str | None, threads: int) -> list[tuple[str, float]]:
    """Return the names and means of the selected genes."""
    from vcelltools.selection.hvg import compute_hvg

    r = compute_hvg([source], top=TOP, batch_key=batch_key, threads=threads)
    return [(str(r.genes[j]), float(r.columns["means"][j])) for j in r.order]


def rank_naively(counts: np.ndarray, genes: list[str]) -> list[tuple[str, float]]:
    """Rank the naive reader's dense matrix, from memory."""
    import pandas as pd

    n, g = counts.shape
    obs, var = pd.DataFrame(index=[str(i) for i in range(n)]), pd.DataFrame(index=pd.Index(genes, dtype=object))
    memory = SimpleNamespace(X=counts.astype(np.float64), raw=None, layers={}, uns={}, obs=obs, var=var)
    assert var.shape[0] == g
    return rank(memory, None, 1)


if __name__ == "__main__":
    main()
