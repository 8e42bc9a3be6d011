"""cell-load's default loader on an h5ad: python cell_load_sets.py WORK SETS; the last line is JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def main() -> None:
    from cell_load.data_modules import PerturbationDataModule

    work, n_sets = Path(sys.argv[1]), int(sys.argv[2])
    (work / "cl").mkdir(exist_ok=True)
    link = work / "cl/screen.h5ad"
    if not link.exists():
        link.symlink_to(work / "log.h5ad")
    toml = work / "cl.toml"
    toml.write_text(f'[datasets]\nscreen = "{work / "cl"}"\n[training]\nscreen = "train"\n[zeroshot]\n[fewshot]\n')
    module = PerturbationDataModule(
        str(toml), batch_size=8, num_workers=0, pert_col="gene", batch_col="batch", cell_type_key="cell_type",
        control_pert="non-targeting", output_space="all", basal_mapping_strategy="batch", cell_sentence_len=64,
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
        n = batch["pert_cell_emb"].shape[0]
        cells += 2 * n
        sets += n // 64
        if sets >= n_sets:
            break
    sys.stdout.write(json.dumps({"default": cells / (time.perf_counter() - began)}) + "\n")


if __name__ == "__main__":
    main()
