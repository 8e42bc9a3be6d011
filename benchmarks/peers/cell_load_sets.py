"""cell-load's loader on an h5ad: python cell_load_sets.py WORK SETS; the last line is JSON.

Dense values in ``obsm/X_hvg``, as many workers as cores, controls at random: what it is documented with.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def prepare(work: Path) -> Path:
    """Make what it reads fastest: the values dense in obsm, as its own preparation leaves them."""
    import h5py

    path = work / "cl/screen.h5ad"
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.is_symlink():
        path.unlink(missing_ok=True)
        X = np.load(work / "X.npy", mmap_mode="r")
        tmp = work / "cl.tmp"
        tmp.write_bytes((work / "log.h5ad").read_bytes())
        with h5py.File(tmp, "r+") as f:
            dense = f.require_group("obsm").create_dataset("X_hvg", X.shape, "f4")
            dense.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for a in range(0, len(X), 10_000):
                dense[a : a + 10_000] = X[a : a + 10_000]
        tmp.rename(path)
    with open(path, "rb") as f:  # the page cache holds it
        while f.read(1 << 24):
            pass
    return path


def time_sets(work: Path, n_sets: int, *, consecutive: bool) -> float:
    """Return cells/s, perturbed and control, after the first batch."""
    from cell_load.data_modules import PerturbationDataModule

    toml = work / "cl.toml"
    toml.write_text(f'[datasets]\nscreen = "{work / "cl"}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
    module = PerturbationDataModule(
        str(toml), batch_size=8, num_workers=len(os.sched_getaffinity(0)), pert_col="gene", batch_col="batch",
        cell_type_key="cell_type", control_pert="non-targeting", embed_key="X_hvg", output_space="gene",
        cell_sentence_len=64, use_consecutive_loading=consecutive,
    )  # fmt: skip
    module.setup()
    cells = sets = 0
    known = np.load(work / "row_sums.npy")
    began = None
    for batch in module.train_dataloader():
        if began is None:  # the first batch is the warm-up, and is checked: every row is a row of the file
            for key in ("pert_cell_emb", "ctrl_cell_emb"):
                sums = batch[key].double().sum(-1).numpy().reshape(-1)
                at = np.clip(np.searchsorted(known, sums), 1, len(known) - 1)
                near = np.minimum(np.abs(known[at] - sums), np.abs(known[at - 1] - sums))
                assert near.max() < 1e-2, f"cell-load's {key} are no rows of the file"
            began = time.perf_counter()
            continue
        n = batch["pert_cell_emb"].reshape(-1, batch["pert_cell_emb"].shape[-1]).shape[0]
        cells += 2 * n
        sets += n // 64
        if sets >= n_sets:
            break
    assert began is not None
    return cells / (time.perf_counter() - began)


def main() -> None:
    work, n_sets = Path(sys.argv[1]), int(sys.argv[2])
    prepare(work)
    out = {
        "default": time_sets(work, n_sets, consecutive=False),
        "consecutive": time_sets(work, 4 * n_sets, consecutive=True),
    }
    sys.stdout.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
