"""``train --from RUN``: start from the weights of a finished run of the same model, on the same or on other stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.lines import list_lines
from vcelltools.training.cell_inputs import CellSetup, make_optimizer
from vcelltools.training.run_folder import BestState, RunFolder
from vcelltools.training.settings import TrainSettings

if TYPE_CHECKING:
    from vcelltools.model.diffusion import DiffusionConfig
    from vcelltools.model.network import ModelConfig, Params
    from vcelltools.training.inputs import Setup


def inherit(
    run: Path, setup: Setup, model: ModelConfig, fresh: Params, progress: Progress = SILENT
) -> tuple[Params, dict[str, Any]]:
    """Return the weights to start from, and where they come from (``run``, ``step``, ``params_sha256``).

    The weights are those of the run's best evaluation. Genes are matched by name. So are the embeddings of
    perturbations and lines, if the model has them; those that the run does not know keep the values in ``fresh``.

    Raises
    ------
    UsageError
        If the run is not a finished run of a transformer, or has another size or other parts.
    DataError
        If the folder holds no run or is damaged, or its genes differ from those of the stores.
    """
    import jax

    from vcelltools.model.checkpoint import hash_params
    from vcelltools.model.network import ModelConfig, init_params

    folder, meta, names = _open_run(run, setup.settings)
    genes = _match_genes(run, names["genes"], setup.genes)
    was = ModelConfig(**meta["model"])
    _compare_parts(run, was, model)
    template = jax.eval_shape(lambda: init_params(was, jax.random.key(0)))
    found = folder.best().load(BestState(template, jax.ShapeDtypeStruct((), np.float32)))
    assert found is not None  # its manifest was read
    params = jax.tree.map(np.asarray, found.state.params)
    params = _order_genes(params, genes)
    known = {}
    if model.identity:  # the control is the first in both
        rows = _match(["", *names["perturbations"][1:]], ["", *setup.sampler.perturbations[1:]])
        params["identity"] = _take(params["identity"], rows, np.asarray(fresh["identity"]))
        known["perturbations"] = rows[1:]
    if model.contexts:
        rows = _match_lines(names["lines"], setup.screen.places)
        params["context"] = _take(params["context"], rows, np.asarray(fresh["context"]))
        known["lines"] = rows
    _say_start(run, found.step, known, progress)
    _warn_of_seen_groups(run, names["split"], setup, progress)
    start = {"run": str(run), "step": found.step, "params_sha256": hash_params(found.state.params)}
    return params, start


def inherit_cells(
    run: Path, setup: CellSetup, config: DiffusionConfig, fresh: Params, progress: Progress = SILENT
) -> tuple[Params, dict[str, Any]]:
    """Return the weights of a diffusion model to start from, and where they come from; see :func:`inherit`."""
    import jax

    from vcelltools.model.checkpoint import hash_params
    from vcelltools.model.diffusion import DiffusionConfig, init_diffusion_state

    folder, meta, names = _open_run(run, setup.settings)
    genes = _match_genes(run, names["genes"], setup.genes)
    was = DiffusionConfig(**meta["model"])
    if was.features and config.features:
        _compare_features(run, was.features, config.features)
    old = folder.read_settings()
    template = jax.eval_shape(lambda: init_diffusion_state(was, make_optimizer(old), old.seed, ema=old.ema))
    found = folder.best().load(template)
    assert found is not None  # its manifest was read
    weights = found.state.ema or found.state.params
    params = jax.tree.map(np.asarray, {k: weights.get(k, v) for k, v in fresh.items()})
    params["gene"] = params["gene"][genes]
    known = {}
    tables = {
        "perturbation": ("perturbations", _match(["", *names["perturbations"][1:]], ["", *setup.perturbations[1:]])),
        "context": ("lines", _match_lines(names["lines"], list_lines(setup.stores))),
    }
    for table, (what, rows) in tables.items():
        if table in fresh and table in weights:
            params[table] = _take(params[table], rows, np.asarray(fresh[table]))
            known[what] = rows[1:] if table == "perturbation" else rows
    _say_start(run, found.step, known, progress)
    shared = set(meta["identity"]["stores"].values()) & {s.sha256 for s in setup.stores}
    if shared and (old.seed != setup.settings.seed or meta["identity"]["stores"] != setup.identity["stores"]):
        progress.note(
            f"warning: {run} was trained on {len(shared):,} of these stores with other held-out cells, so it has seen "
            "cells that are held out here; the same stores and seed hold out the same cells"
        )
    return params, {"run": str(run), "step": found.step, "params_sha256": hash_params(weights)}


def _open_run(run: Path, settings: TrainSettings) -> tuple[RunFolder, dict[str, Any], dict[str, list[str]]]:
    """Return a finished run of the same model and size, what is known of its best state, and its vocabulary."""
    folder = RunFolder(run)
    old = folder.read_settings()
    if old.model != settings.model:
        what = "transformer" if settings.model == "transformer" else "diffusion model"
        raise UsageError(f"{run} is a run of {old.model}, but {spell('from_run')} needs one of a {what}")
    if not folder.summary_fpath.exists():
        raise UsageError(f"{run} is not finished", hint="run its command again to resume it")
    if old.size != settings.size:
        raise UsageError(f"{run} has the size {old.size}, but here it is {settings.size}", hint=spell("size", old.size))
    meta = folder.best().read_meta()
    if meta is None:
        raise DataError(f"{run} has no evaluated model", hint="train it again")
    return folder, meta, folder.read_vocabulary()


def _say_start(run: Path, step: int, known: dict[str, np.ndarray], progress: Progress) -> None:
    counts = "".join(f", with {int((r >= 0).sum()):,} of {len(r):,} {what}" for what, r in known.items())
    progress.note(f"starting from step {step:,} of {run}{counts}")


def _match_genes(run: Path, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Return the position in the run of every gene of the stores."""
    rows = _match(old, new)
    lacking, extra = [g for g, row in zip(new, rows, strict=True) if row < 0], sorted(set(old) - set(new))
    if lacking or extra:
        parts = [
            f"{len(x):,} {what}, such as {x[0]}"
            for x, what in ((extra, "are missing here"), (lacking, "are unknown to the run"))
            if x
        ]
        raise DataError(
            f"{run} was trained on other genes than those of the stores: {' and '.join(parts)}",
            hint="build the stores with the basis of the run",
        )
    return rows


def _compare_parts(run: Path, old: ModelConfig, new: ModelConfig) -> None:
    for key, what in (("identity", "embeddings of perturbations"), ("contexts", "embeddings of lines")):
        if bool(getattr(old, key)) != bool(getattr(new, key)):
            has, setting = bool(getattr(old, key)), "batch_embedding" if key == "contexts" else key
            raise UsageError(
                f"{run} has {'' if has else 'no '}{what}, but this training has {'none' if has else 'them'}",
                hint=spell(setting, has),
            )
    _compare_features(run, old.features, new.features)


def _compare_features(run: Path, old: int, new: int) -> None:
    if old != new:
        raise UsageError(
            f"{run} reads {old:,} features of perturbations, but here there are {new:,}",
            hint=f"give {spell('features')} of the same kind as for the run" if old else "",
        )


def _order_genes(params: Params, genes: np.ndarray) -> Params:
    """Return the weights with the genes in another order."""
    first, *others = params["cell"]
    *inner, last = params["decoder"]
    return {
        **params,
        "cell": [{**first, "w": first["w"][genes]}, *others],
        "prior": params["prior"][genes],
        "decoder": [*inner, {"w": last["w"][:, genes], "b": last["b"][genes]}],
    }


def _match(old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """Return the position in ``old`` of every name in ``new``, or -1."""
    at = {name: i for i, name in enumerate(old)}
    return np.array([at.get(name, -1) for name in new])


def _match_lines(old: Sequence[str], places: Mapping[str, tuple[int, str]]) -> np.ndarray:
    """Return the position in the run of every line, or -1: by ``STORE.LINE``, or by a LINE that is unique there."""
    rows = []
    for name, (_, line) in places.items():
        found = [i for i, x in enumerate(old) if x.endswith(f".{line}")]
        rows.append(old.index(name) if name in old else found[0] if len(found) == 1 else -1)
    return np.array(rows)


def _take(old: np.ndarray, rows: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """Return ``fresh`` with the known rows of ``old``."""
    out = fresh.copy()
    out[rows >= 0] = old[rows[rows >= 0]]
    return out


def _warn_of_seen_groups(run: Path, split: Sequence[str], setup: Setup, progress: Progress) -> None:
    """Warn if the run was trained on groups that are held out here."""
    trained = {x.removesuffix(": train") for x in split if x.endswith(": train")}
    held = [f"{r.perturbation} in {r.line}" for r in setup.screen.groups.itertuples() if r.part in ("val", "test")]
    if seen := [x for x in held if x in trained]:
        progress.note(
            f"warning: {run} was trained on {len(seen):,} of the {len(held):,} groups that are held out here, such as "
            f"{seen[0]}; their scores do not show how well unseen groups are predicted"
        )
