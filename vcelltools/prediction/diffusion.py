"""Draw new cells from a trained diffusion model, as counts of the basis genes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io import H5adWriter
from vcelltools.io.origin import describe_origin
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.prediction.result import PredictResult
from vcelltools.runtime.memory import peak_memory
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.lines import find_line, list_lines
from vcelltools.training.cell_inputs import CellSetup, make_cell_setup
from vcelltools.training.diffusion import DiffusionTrainer
from vcelltools.training.inputs import get_inputs
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import TrainSettings

if TYPE_CHECKING:
    from vcelltools.stores.store import Store

CELLS = 100
_BATCH = 64


def draw_cells(
    folder: RunFolder,
    settings: TrainSettings,
    out: str | os.PathLike,
    *,
    stores: Sequence[Store] | None = None,
    perturbations: Sequence[str] | None = None,
    lines: Sequence[str] = (),
    cells: int | None = None,
    pert_col: str = "target_gene",
    context_col: str = "context",
    force: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PredictResult:
    """Draw cells of each perturbation in each line and write them as counts.

    Library sizes are drawn with replacement from the training cells of the line. A token is replaced by the middle of
    its range of counts.

    Parameters
    ----------
    perturbations, lines
        Names in the stores; by default all of them. A line is ``STORE.LINE``, or only the cell line.
    cells
        Number of cells per perturbation and line; 100 by default.

    Raises
    ------
    UsageError
        If the stores do not have a perturbation or line.
    DataError
        If the run has no checkpoint, or belongs to other stores.
    """
    import jax

    from vcelltools.model.diffusion import sample_cells

    guard_outputs([Target(out, "hdf5")], reads=[folder.dpath, *get_inputs(settings, stores)], force=force)
    setup = make_cell_setup(settings, stores, progress)
    folder.compare_vocabulary(setup)
    trainer = DiffusionTrainer(setup, folder, progress)
    best = folder.best().load(jax.eval_shape(trainer.init_state))
    if best is None:
        raise DataError(f"{folder.dpath} has no evaluated model yet", hint="train it to its first evaluation")
    params = jax.tree.map(jax.numpy.asarray, best.state.ema or best.state.params)
    perts = _find(perturbations, setup.perturbations)
    places = list_lines(setup.stores)
    contexts = [setup.contexts.index(x) for x in ([find_line(places, x) for x in lines] or places)]
    n_each = CELLS if cells is None else cells
    pert = np.tile(np.repeat(perts, n_each), len(contexts))
    context = np.repeat(contexts, n_each * len(perts))
    library = _draw_libraries(setup, context, seed)
    draw = jax.jit(lambda batch, key: sample_cells(params, trainer.config, batch, key))
    g = len(setup.genes)
    origin = describe_origin([folder.dpath, *(s.path for s in setup.stores)])
    uns = {"vcelltools": {"model": "diffusion", "values": "counts", **origin}}
    with H5adWriter(
        out, n_genes=g, var=_make_var(setup), dtype="float32", compression="gzip", uns=uns, force=force
    ) as writer:
        progress.start("drawing", len(pert), "cells")
        for number, a in enumerate(range(0, len(pert), _BATCH)):
            at = np.arange(a, a + _BATCH) % len(pert)  # all calls have the same shape
            batch = {"tokens": np.zeros((_BATCH, g), np.int32), "log_library": library[at],
                     "pert": pert[at].astype(np.int32), "context": context[at].astype(np.int32)}  # fmt: skip
            if setup.features_pf is not None:
                batch["features"] = setup.features_pf[batch["pert"]]
            tokens = np.asarray(draw(batch, jax.random.fold_in(jax.random.key(seed), number)))
            keep = min(_BATCH, len(pert) - a)
            writer.append_dense(np.rint(setup.tokenizer.decode(tokens[:keep])))
            progress.advance(keep)
        writer.finish(obs=_make_obs(setup, pert, context, pert_col, context_col))
        progress.finish()
    return PredictResult(
        out=writer.path,
        model="diffusion",
        n_cells=len(pert),
        n_genes=g,
        n_perturbations=len(perts),
        n_basis=g,
        n_filled=0,
        n_control_genes=0,
        lines=tuple(setup.contexts[i] for i in contexts),
        rules=None,
        warnings=(),
        peak_memory_bytes=peak_memory(),
    )


def _find(wanted: Sequence[str] | None, known: list[str]) -> list[int]:
    if wanted is None:
        return list(range(len(known)))
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"{spell('perturbations')}: no store of the run has {name!r}",
                hint=f"the stores have, for example, {known[-1]!r}",
            )
    return [known.index(name) for name in wanted]


def _draw_libraries(setup: CellSetup, context: np.ndarray, seed: int) -> np.ndarray:
    """Return (n,) float32 log library sizes, drawn from training cells of each cell's context."""
    train = setup.parts["train"]
    sizes = np.concatenate([np.asarray(s.library_size) for s in setup.stores])[train]
    rng = np.random.default_rng(seed)
    out = np.empty(len(context), np.float32)
    for k in np.unique(context).tolist():
        mine = context == k
        pool = sizes[setup.context[train] == k]
        out[mine] = np.log1p(rng.choice(pool if len(pool) else sizes, int(mine.sum())))
    return out


def _make_obs(setup: CellSetup, pert: np.ndarray, context: np.ndarray, pert_col: str, context_col: str):
    import pandas as pd

    columns = {
        pert_col: pd.Categorical.from_codes(pert, categories=setup.perturbations),  # type: ignore[arg-type]
        context_col: pd.Categorical.from_codes(context, categories=setup.contexts),  # type: ignore[arg-type]
    }
    return pd.DataFrame(columns, index=[f"drawn{i}" for i in range(len(pert))])


def _make_var(setup: CellSetup):
    import pandas as pd

    table = setup.stores[0].gene_table
    return pd.DataFrame({"gene_symbols": table["symbol"].astype(str).tolist()}, index=setup.genes)
