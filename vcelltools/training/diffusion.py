"""``train --model diffusion``: masked diffusion on single cells of stores, compared with the marginal entropy of genes.

Individual cells are held out: a tenth to choose the model and a tenth to score it, fixed by the seed. The model never
trains on them. Stores need no perturbations. If they have some, cells are conditioned on them and on their cell line.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, InterruptedRun, UsageError, spell
from vcelltools.io.write.atomic import locked, write_json
from vcelltools.runtime.memory import peak_memory
from vcelltools.runtime.prefetch import Prefetch
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.cell_inputs import CellSetup, make_cell_setup, make_optimizer
from vcelltools.training.extend import describe_schedule
from vcelltools.training.in_flight import InFlight
from vcelltools.training.inherit import inherit_cells
from vcelltools.training.inputs import get_inputs
from vcelltools.training.outcome import Stop, TrainResult
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.settings import TrainSettings
from vcelltools.version import __version__

if TYPE_CHECKING:
    from vcelltools.stores.store import Store

_MOST_HELD = 1024  # cells per evaluation
_MOST_COUNTED = 1 << 16  # cells for the marginal distributions
_PSEUDOCOUNTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # candidates, in cells per gene
_RESAMPLES = 1000
_MASKS = 4  # masks per held-out cell


def get_marginals(setup: CellSetup) -> np.ndarray:
    """Return (g, vocab) float32 log-probabilities of each gene's tokens among training cells.

    Every token of a gene gets the same pseudocount. Their sum is the value of ``_PSEUDOCOUNTS`` with the highest
    leave-one-out likelihood of the training cells, so that the baseline is as strong as possible.
    """
    g, v = len(setup.genes), setup.tokenizer.vocab_size
    counts = np.zeros((g, v))
    cells = setup.parts["train"]
    if len(cells) > _MOST_COUNTED:
        cells = np.sort(np.random.default_rng([setup.settings.seed, 2]).choice(cells, _MOST_COUNTED, replace=False))
    for a in range(0, len(cells), 1024):
        tokens = setup.read(cells[a : a + 1024])["tokens"]
        flat = np.arange(g) * v + tokens
        counts += np.bincount(flat.ravel(), minlength=g * v).reshape(g, v)
    seen = counts > 0

    def leave_one_out(total: float) -> float:
        return float((counts[seen] * np.log((counts[seen] - 1 + total / v) / (len(cells) - 1 + total))).sum())

    counts += max(_PSEUDOCOUNTS, key=leave_one_out) / v
    return np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """Cross-entropies of hidden tokens per cell: sums in nats for the model and the marginals, and token numbers."""

    model: np.ndarray
    marginal: np.ndarray
    hidden: np.ndarray

    @property
    def loss(self) -> float:
        """Cross-entropy of the model, in nats per hidden token."""
        return float(self.model.sum() / max(self.hidden.sum(), 1))

    def to_json(self) -> dict[str, Any]:
        """Return the losses and the gain over the marginals, with a 95 % bootstrap interval over the cells."""
        n = self.hidden.sum()
        pick = np.random.default_rng(0).integers(0, len(self.hidden), (_RESAMPLES, len(self.hidden)))
        gains = (self.marginal - self.model)[pick].sum(axis=1) / np.maximum(self.hidden[pick].sum(axis=1), 1)
        return {
            "loss": self.loss,
            "marginal_entropy": float(self.marginal.sum() / max(n, 1)),
            "gain": float((self.marginal - self.model).sum() / max(n, 1)),
            "gain_ci95": np.quantile(gains, [0.025, 0.975]).round(6).tolist(),
            "n": len(self.hidden),
            "n_hidden": int(n),
        }


def _identity(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return batch


class DiffusionTrainer:
    """The training loop."""

    def __init__(
        self, setup: CellSetup, folder: RunFolder | None, progress: Progress = SILENT, *, devices: Any = None
    ) -> None:
        import jax

        from vcelltools.model import mesh
        from vcelltools.model.diffusion import make_diffusion_step, make_evaluation

        s = setup.settings
        if s.size == "moe-17b":
            raise UsageError(
                "moe-17b can only be planned, not trained",
                hint="vcelltools train --model diffusion --size moe-17b --dry-run --topology v5e-64",
            )
        self.setup, self._folder, self.progress = setup, folder, progress
        self.config = setup.make_config()
        self.n_cells = min(s.sets, len(setup.parts["train"]))
        if devices is None:  # several devices of a CPU would share its cores
            devices = jax.devices()[:1] if jax.default_backend() == "cpu" else jax.devices()
        self.mesh = mesh.make_mesh(devices[: math.gcd(self.n_cells, len(devices))])
        low = jax.default_backend() != "cpu" if s.precision == "auto" else s.precision == "bfloat16"
        self.optimizer = make_optimizer(s)
        self.step = make_diffusion_step(self.config, self.optimizer, seed=s.seed, ema=s.ema, bfloat16=low)
        self.entropies = make_evaluation(self.config)
        self.marginals = get_marginals(setup)
        self.best_loss, self.best_step, self.since = float("inf"), -1, 0
        self.start: dict[str, Any] | None = None  # the run whose weights this one began with

    @property
    def folder(self) -> RunFolder:
        """The run folder; sanity modes have none."""
        assert self._folder is not None
        return self._folder

    def init_state(self) -> Any:
        """Return the state before the first step."""
        from vcelltools.model.diffusion import init_diffusion_state

        return init_diffusion_state(self.config, self.optimizer, self.setup.settings.seed, ema=self.setup.settings.ema)

    def begin(self) -> Any:
        """Return the state before the first step, with the weights of the run that the settings name, if any."""
        from vcelltools.model.diffusion import begin_diffusion

        s, state = self.setup.settings, self.init_state()
        if s.from_run is None:
            return state
        params, self.start = inherit_cells(Path(s.from_run), self.setup, self.config, state.params, self.progress)
        return begin_diffusion(params, self.optimizer, ema=s.ema)

    def place(self, state: Any) -> Any:
        """Return the state, copied to every device."""
        from vcelltools.model import mesh

        return mesh.replicate(self.mesh, state) if self.mesh.size > 1 else state

    def put(self, batch: dict[str, np.ndarray]) -> Any:
        """Return a batch whose cells are spread over the devices."""
        from vcelltools.model import mesh

        return mesh.feed(self.mesh, batch, self.n_cells) if self.mesh.size > 1 else batch

    def evaluate(self, params: Any, part: str) -> Entropies:
        """Return the cross-entropies of the cells of a part; every evaluation hides the same genes."""
        cells = self.setup.parts[part]
        if len(cells) > _MOST_HELD:
            cells = np.sort(
                np.random.default_rng([self.setup.settings.seed, 3]).choice(cells, _MOST_HELD, replace=False)
            )
        size = min(64, len(cells))
        sums = np.zeros((3, len(cells)))
        for a in range(0, len(cells), size):
            at = np.arange(a, a + size) % len(cells)  # the last batch is padded with cells that are not counted
            keep = min(size, len(cells) - a)
            batch = self.setup.read(cells[at])
            for k in range(_MASKS):
                found = np.asarray(self.entropies(params, batch, self.marginals, a * _MASKS + k))
                sums[:, a : a + keep] += found[:, :keep]
        return Entropies(model=sums[0], marginal=sums[1], hidden=sums[2])

    def run(self, continued: bool) -> TrainResult:
        """Train to the last step or until there is a reason to stop."""
        import jax

        s = self.setup.settings
        steps, eval_every = s.length
        state, first = self._restore() if continued else (self.begin(), 0)
        state = self.place(state)
        pending: list[Any] = []
        saved = began = time.monotonic()
        done = first
        self.progress.start("train", steps - first, "steps")
        flight = InFlight(self.progress)
        with Stop(s.minutes) as stop, Prefetch(self.setup.make_batch, _identity, first, steps) as feed:
            for number in range(first, steps):
                state, metrics = self.step(state, self.put(next(feed)))
                pending.append(metrics)
                flight.add(metrics)
                done = number + 1
                evaluates = done % eval_every == 0 or done == steps
                reason = stop.due()
                timed = s.checkpoint_minutes and time.monotonic() - saved > 60 * s.checkpoint_minutes
                if done % s.log_every == 0 or evaluates or reason or timed:
                    flight.wait()
                    self._log(jax.device_get(pending), done, time.monotonic() - began)
                    pending, began = [], time.monotonic()
                if evaluates and not reason:
                    self._validate(state, done)
                if reason or timed or evaluates:
                    self.folder.checkpoints().save(done, jax.device_get(state), self._meta())
                    saved = time.monotonic()
                if reason and done < steps:
                    raise InterruptedRun(
                        f"stopped by {reason} after step {done:,}", hint="run the same command again to resume"
                    )
                if s.patience and self.since >= s.patience:
                    self.progress.note(f"stopped early: no improvement in {s.patience} evaluations")
                    break
        self.progress.finish()
        return self._finish(state, done)

    def _restore(self) -> tuple[Any, int]:
        import jax

        found = self.folder.load_state(jax.eval_shape(self.init_state))
        self.folder.cut_metrics(found.step if found else -1)
        if found is None:
            return self.begin(), 0
        if found.meta["identity"] != self.setup.identity:
            raise DataError(f"{self.folder.dpath}: the checkpoint of step {found.step} belongs to other stores")
        best = found.meta["best"]
        self.best_loss, self.best_step, self.since = best["loss"], best["step"], best["since"]
        self.start = found.meta.get("start")
        self._reopen(found.step, found.state)
        self.progress.note(f"continuing after step {found.step:,}")
        return jax.tree.map(jax.numpy.asarray, found.state), found.step

    def _reopen(self, step: int, state: Any) -> None:
        """Turn a finished run that is extended into an unfinished one."""
        s = self.setup.settings
        was = self.folder.reopen(self.setup)
        if was is None:
            return
        describe_schedule(s, was, step, self.progress)
        if s.patience and self.since >= s.patience:
            self.since = 0  # it was stopped early, and is asked to go on
            self.folder.checkpoints().save(step, state, self._meta())

    def _meta(self) -> dict[str, Any]:
        best = {"loss": self.best_loss, "step": self.best_step, "since": self.since}
        start = {"start": self.start} if self.start else {}
        return {"identity": self.setup.identity, "model": self.config.to_json(), "best": best, **start}

    def _log(self, values: list[dict[str, Any]], done: int, seconds: float) -> None:
        record = {k: float(np.mean([m[k] for m in values])) for k in values[0]} if values else {}
        if not all(np.isfinite(v) for v in record.values()):
            raise DataError(f"the loss is not finite before step {done:,}", hint=f"lower {spell('learning_rate')}")
        rate = self.setup.settings.sets * len(values) / max(seconds, 1e-9)
        self.folder.log({"step": done, **record, "cells_per_s": rate})

    def _validate(self, state: Any, done: int) -> None:
        import jax

        params = state.ema or state.params
        found = self.evaluate(params, "val").to_json()
        self.folder.log({"step": done, "eval": "val", **found})
        self.progress.note(
            f"step {done:,}: {found['loss']:.4f} nats per hidden gene on val, marginals {found['marginal_entropy']:.4f}"
        )
        if found["loss"] < self.best_loss:
            self.best_loss, self.best_step, self.since = found["loss"], done, 0
            self.folder.best().save(done, jax.device_get(state), self._meta())
        else:
            self.since += 1

    def _finish(self, state: Any, steps: int) -> TrainResult:
        import jax
        import optax

        from vcelltools.model.checkpoint import hash_params

        best = self.folder.best().load(jax.eval_shape(self.init_state))
        chosen = best.state if best is not None else state
        final = self.evaluate(chosen.ema or chosen.params, "test").to_json()
        s = self.setup.settings
        stores = {x.name: x.sha256 for x in self.setup.stores}
        summary = {
            "steps": steps,
            "seed": s.seed,
            "params_sha256": hash_params(jax.device_get(state.params)),
            "store_sha256": next(iter(stores.values())) if len(stores) == 1 else stores,
            "config": s.to_json(),
            "versions": {"vcelltools": __version__, "jax": jax.__version__, "optax": optax.__version__,
                         "numpy": np.__version__, "python": sys.version.split()[0]},
            "final": {"model": "diffusion", "part": "test", **final, "best_step": self.best_step},
            "baselines": {"marginal-entropy": {"loss": final["marginal_entropy"]}},
            "beats_baselines": final["gain_ci95"][0] > 0,
            "parameters": int(sum(x.size for x in jax.tree.leaves(state.params))),
            "peak_memory_bytes": peak_memory(),
            **({"start": self.start} if self.start else {}),
        }  # fmt: skip
        write_json(self.folder.summary_fpath, summary, force=True)
        return TrainResult(out=self.folder.dpath, summary=summary)


def train_diffusion(
    settings: TrainSettings,
    *,
    stores: Sequence[Store] | None = None,
    resume: bool = True,
    force: bool = False,
    extend: bool = False,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a masked diffusion model; see :func:`vcelltools.training.train.train`, which calls this."""
    folder = RunFolder(Path(settings.out))
    folder.guard(get_inputs(settings, stores))
    with locked(folder.dpath):
        setup = make_cell_setup(settings, stores, progress)
        continued = folder.open(setup, resume=resume, force=force, extend=extend)
        return DiffusionTrainer(setup, folder, progress).run(continued)
