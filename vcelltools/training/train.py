"""``train``: train a model on stores, write checkpoints, and score the model and the baselines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, InterruptedRun, UsageError, spell
from vcelltools.io.write.atomic import locked, write_json
from vcelltools.model.baselines import BASELINES
from vcelltools.model.nested import OBJECTIVES
from vcelltools.model.registry import is_nested
from vcelltools.runtime.memory import peak_memory
from vcelltools.runtime.prefetch import Prefetch
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.boards import Boards
from vcelltools.training.evaluate import beats, choose_share, describe, evaluate, evaluate_baselines
from vcelltools.training.extend import describe_schedule
from vcelltools.training.in_flight import InFlight
from vcelltools.training.inputs import Setup, get_inputs, make_setup
from vcelltools.training.outcome import Stop, TrainResult
from vcelltools.training.run_folder import BestState, RunFolder
from vcelltools.training.settings import MODELS, TrainSettings
from vcelltools.training.stability import STABLE, Stability
from vcelltools.version import __version__

if TYPE_CHECKING:
    from vcelltools.sampling.sampler import Batch
    from vcelltools.sampling.splits import Split
    from vcelltools.stores.store import Store

_EVAL_BATCH = 8  # sets per call of the evaluation; more are not faster and need more memory
SHARES = (0.0, 0.5, 1.0)
"""Candidate shares of the transformer's change in a prediction; the best one on validation groups is used."""
_HELD_BATCHES = 8  # batches whose memory pages are kept


def train(
    settings: TrainSettings,
    *,
    stores: Sequence[Store] | None = None,
    resume: bool = True,
    force: bool = False,
    extend: bool = False,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train a model, or fit a baseline, and score it and the baselines.

    ``extend`` continues a finished run, with settings from :func:`vcelltools.training.extend.read_extension`.

    Raises
    ------
    UsageError
        If the folder holds a finished run, or settings contradict each other.
    DataError
        If stores, split, features or an earlier run do not match, or if the loss is not finite.
    InterruptedRun
        After SIGTERM or the time limit, once a checkpoint is written.
    """
    if settings.model not in MODELS:
        raise UsageError(f"model {settings.model!r} is not known", hint=f"one of: {', '.join(MODELS)}", field="model")
    folder = RunFolder(Path(settings.out))
    if resume and not force and folder.is_trained:
        settings = folder.complete(settings)
    if settings.model == "diffusion":
        from vcelltools.training.diffusion import train_diffusion

        return train_diffusion(settings, stores=stores, resume=resume, force=force, extend=extend, progress=progress)
    folder.guard(get_inputs(settings, stores))
    if settings.model != "transformer":
        with locked(folder.dpath):
            setup = make_setup(settings, stores, progress=progress)
            folder.open(setup, resume=False, force=force)
            return _finish_baseline(setup, folder)
    import jax

    main = jax.process_index() == 0
    with locked(folder.dpath if main else None):
        setup = make_setup(settings, stores, progress=progress)
        continued = _share(folder.open(setup, resume=resume, force=force, extend=extend) if main else False)
        return Trainer(setup, folder, progress if main else SILENT, main=main).run(continued)


def train_and_predict(
    settings: TrainSettings,
    stores: Sequence[Store],
    split: Split,
    ids: tuple[np.ndarray, np.ndarray],
    *,
    progress: Progress = SILENT,
) -> np.ndarray:
    """Train a transformer on a split, or resume it, and return its effects (k, g) for perturbations in lines."""
    import jax

    from vcelltools.model.step import make_effect

    folder = RunFolder(Path(settings.out))
    if folder.is_trained:
        settings = folder.complete(settings)
    setup = make_setup(settings, stores, split=split, progress=progress)
    if not folder.summary_fpath.exists():
        Trainer(setup, folder, progress).run(folder.open(setup, resume=True, force=False))
    model = setup.model_config()
    best = load_best(folder, model)
    effect = make_effect(model, setup.step_config(jax.default_backend()))
    return predict_effects(setup, effect, best.params, *ids, [float(best.share)])[0]


def _finish_baseline(setup: Setup, folder: RunFolder) -> TrainResult:
    part = final_part(setup)
    kind, objective = setup.settings.model, setup.settings.objective
    baselines = evaluate_baselines(setup.effects, setup.screen, part)
    more: dict[str, Any] = {}
    if is_nested(kind, objective):
        model: Any = setup.fitted  # nested, for each direction
        ids = setup.screen.ids(setup.screen.rows(part))
        more["objectives"] = {
            name: describe(evaluate(partial(model.predict_for, name), setup.screen, part)) for name in OBJECTIVES
        }
        more["choices"] = model.describe(*ids)
        objective = objective or "balanced"
        final = {**more["objectives"][objective], "objective": objective}
    else:
        final = baselines[kind]
    summary = make_summary(setup, steps=0, params_sha256=None, final=final, baselines=baselines, **more)
    write_json(folder.summary_fpath, summary, force=True)
    return TrainResult(out=folder.dpath, summary=summary)


def final_part(setup: Setup) -> str:
    """Return the part that the summary scores: ``test`` if the split has one, otherwise ``val``."""
    for part in ("test", "val"):
        if len(setup.screen.rows(part)):
            return part
    if setup.settings.split:
        raise DataError(
            f"{setup.settings.split}: the split holds out no groups, so there is nothing to score",
            hint="list test groups in [zeroshot], [fewshot] or [heldout]",
        )
    n = len(setup.screen.perturbations) - 1
    raise DataError(
        f"{n} {'perturbation is' if n == 1 else 'perturbations are'} too few to hold out some and train on the rest",
        hint="add a data set, or list the held-out groups in a split",
    )


def make_summary(
    setup: Setup,
    *,
    steps: int,
    params_sha256: str | None,
    final: dict[str, Any],
    baselines: dict[str, dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    import jax
    import optax

    parts = setup.screen.groups["part"].value_counts().to_dict()
    held = setup.screen.groups.iloc[setup.screen.rows(final_part(setup))]
    stores = {s.name: s.sha256 for s in setup.stores}
    return {
        "steps": steps,
        "seed": setup.settings.seed,
        "params_sha256": params_sha256,
        "store_sha256": next(iter(stores.values())) if len(stores) == 1 else stores,
        "config": setup.settings.to_json(),
        "versions": {
            "vcelltools": __version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        },
        "final": {"model": setup.settings.model, "part": final_part(setup), **final},
        "baselines": baselines,
        "beats_baselines": setup.settings.model not in BASELINES and beats(final, baselines),
        "groups": {k: int(v) for k, v in parts.items()},
        "held_out_lines": sorted(held["line"].unique()),
        "held_out_stores": sorted({setup.stores[k].name for k in held["store_id"]}),
        "peak_memory_bytes": peak_memory(),
        **more,
    }


@dataclass
class Best:
    """The best evaluation so far, which is part of a checkpoint."""

    score: float = float("-inf")
    step: int = -1
    since: int = 0
    share: float = 0.0

    def offer(self, score: float, step: int, share: float) -> bool:
        """Record a new score, and return whether it is the best so far."""
        if score > self.score:
            self.score, self.step, self.since, self.share = score, step, 0, share
            return True
        self.since += 1
        return False


class Trainer:
    """The training loop on the available devices."""

    def __init__(
        self, setup: Setup, folder: RunFolder | None, progress: Progress = SILENT, *, main: bool = True
    ) -> None:
        import jax

        from vcelltools.model import mesh, step

        self.setup, self.folder, self.progress, self.main = setup, folder, progress, main
        s = setup.settings
        self.mesh = mesh.make_mesh()
        self.model = setup.model_config()
        self.config = setup.step_config(jax.default_backend())
        self.share = mesh.local_share(self.mesh, s.sets)
        if s.accumulate and (s.sets // self.mesh.devices.size) % s.accumulate:
            raise DataError(
                f"{s.sets} sets cannot be divided into {s.accumulate} microbatches per device",
                hint=f"change {spell('sets')}",
            )
        rows, stride = int(setup.offsets[-1]), setup.stores[0].stride
        self.feed: str = s.feed
        if s.feed == "auto":
            self.feed = mesh.choose_feed(rows, stride, self.mesh.devices.size, mesh.device_memory())
        tables = {**setup.evidence, **step.make_masks(setup.mask_dg, setup.features_pf), "effect": setup.effect_kg}
        self.tables = mesh.replicate(self.mesh, tables)
        self.data = dict(self.tables)
        if self.feed != "host":
            for store in setup.stores:
                store.check_rows()
            self.data["rows"] = mesh.place_rows(self.mesh, [store.padded for store in setup.stores], self.feed)
            setup.release_stores()
        self.step = step.make_step(self.model, self.config, self.mesh, self.feed)
        self._effect = step.make_effect(self.model, self.config)
        self.best = Best()
        self.stability = Stability(s.stability, s.warmup)
        self.start: dict[str, Any] | None = None  # the run whose weights this one began with
        self.latest: dict[str, float] = {}
        self.boards = Boards()

    # -- single operations -------------------------------------------------------------------------------------

    def init_state(self) -> Any:
        """Return the state before the first step, on the devices."""
        from vcelltools.model import mesh, step

        s = self.setup.settings
        state = step.init_state(self.model, self.config, s.seed)
        if s.from_run:
            from vcelltools.training.inherit import inherit

            params, self.start = inherit(Path(s.from_run), self.setup, self.model, state.params, self.progress)
            state = step.begin(params, self.config)
        return mesh.replicate(self.mesh, state)

    def host_batch(self, number: int) -> dict[str, np.ndarray]:
        """Return this process's share of the batch of a step, which depends only on the seed and the step."""
        return self.finish_batch(self.begin_batch(number))

    def begin_batch(self, number: int) -> Batch:
        """Draw the batch of a step, and begin to read its cells if they come from the host."""
        if number % _HELD_BATCHES == 0:
            self.setup.release_stores()
        batch = self.setup.sampler.batch(0 if self.setup.sanity == "overfit-batch" else number)
        return batch.begin(self.share) if self.feed == "host" else batch

    def finish_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return this process's share of a batch that was begun."""
        return self.setup.make_batch(batch, self.share, cells=self.feed == "host")

    def feed_batches(self, first: int, stop: int) -> Prefetch[Batch, dict[str, np.ndarray]]:
        """Return the batches of the steps ``first`` to ``stop``, prepared ahead of time by a thread."""
        return Prefetch(self.begin_batch, self.finish_batch, first, stop)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Copy a batch to the devices."""
        from vcelltools.model import mesh

        return mesh.feed(self.mesh, batch, self.setup.settings.sets)

    def predict_effects(self, state: Any, pert_k: np.ndarray, line_k: np.ndarray) -> np.ndarray:
        """Return the effects (k, g) of perturbations in lines, predicted from fixed control cells with a share of 1."""
        from vcelltools.model.step import eval_params

        params = _to_host(eval_params(state))
        return predict_effects(self.setup, self._effect, params, pert_k, line_k, [1.0])[0]

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, continued: bool) -> TrainResult:
        """Train to the last step or until there is a reason to stop."""
        assert self.folder is not None
        if self.main:
            self.boards.open(self.setup.settings, self.folder.dpath)
        with Stop(self.setup.settings.minutes) as stop, closing(self.boards):
            state, first = self._restore() if continued else (self.init_state(), 0)
            if first == 0 and self.best.step < 0:
                self._evaluate(state, 0)
            state, last = self._loop(state, first, stop)
        return self._finish(state, last)

    def _restore(self) -> tuple[Any, int]:
        """Return the newest undamaged checkpoint, which the first process reads and sends to the others."""
        import jax

        from vcelltools.model import mesh, step

        assert self.folder is not None
        found = None
        if self.main:
            template = jax.eval_shape(lambda: step.init_state(self.model, self.config, 0))
            found = self.folder.load_state(template)
            self.folder.cut_metrics(found.step if found else -1)
        if not _share(found is not None):
            return self.init_state(), 0
        state, best = step.init_state(self.model, self.config, 0), Best()
        if found is not None:
            for text in found.skipped:
                self.progress.note(f"warning: {text}; the checkpoint of step {found.step} is used")
            if found.meta["identity"] != self.setup.identity:
                raise DataError(f"{self.folder.dpath}: the checkpoint of step {found.step} belongs to other stores")
            state, best, self.start = found.state, Best(**found.meta["best"]), found.meta.get("start")
            self._reopen(found.step, state, best)
        state = _share(state)
        score, at, since, part = _share(tuple(best.__dict__.values()))
        self.best = Best(float(score), int(at), int(since), float(part))
        self._restore_stability(int(state.step))
        self.progress.note(f"continuing after step {int(state.step):,}")
        return mesh.replicate(self.mesh, state), int(state.step)

    def _reopen(self, step: int, state: Any, best: Best) -> None:
        """Turn a finished run that is extended into an unfinished one."""
        assert self.folder is not None
        was = self.folder.reopen(self.setup)
        if was is None:
            return
        describe_schedule(self.setup.settings, was, step, self.progress)
        if self.setup.settings.patience and best.since >= self.setup.settings.patience:
            best.since = 0  # it was stopped early, and is asked to go on
            self.folder.checkpoints().save(step, state, self._meta(best))
        self._restore_stability(step)
        if self.stability.reached:
            self.stability.count = 0
            self.stability.save(self.folder.stability_fpath)

    def _restore_stability(self, step: int) -> None:
        assert self.folder is not None
        every = self.setup.settings.length[1]
        if self.stability.tolerance and _process_count() == 1:  # processes without the file would stop at other steps
            self.stability.load(self.folder.stability_fpath, step // every * every)

    def _loop(self, state: Any, first: int, stop: Stop) -> tuple[Any, int]:
        s = self.setup.settings
        steps, eval_every = s.length
        pending: list[tuple[int, Any]] = []
        began = saved = time.monotonic()
        waited = 0.0
        self.progress.start("train", steps - first, "steps")
        flight = InFlight(self.progress)
        with self.feed_batches(first, steps) as feed:
            for number in range(first, steps):
                asked = time.monotonic()
                batch = self.put(next(feed))
                waited += time.monotonic() - asked
                state, metrics = self.step(state, self.data, batch)
                pending.append((number, metrics))
                flight.add(metrics)
                done = number + 1
                evaluates = done % eval_every == 0 or done == steps
                reason = self._agree(stop.due(), done)
                timed = s.checkpoint_minutes and time.monotonic() - saved > 60 * s.checkpoint_minutes
                if done % s.log_every == 0 or evaluates or reason or timed:
                    flight.wait()
                    self._log(pending, time.monotonic() - began, waited)
                    pending, began, waited = [], time.monotonic(), 0.0
                if evaluates and not reason:
                    self._evaluate(state, done)
                    began = time.monotonic()
                over = self._find_end()
                if reason or timed or evaluates:
                    self._save(state, done)
                    saved = time.monotonic()
                if reason and done < steps:
                    raise InterruptedRun(
                        f"stopped by {reason} after step {done:,}", hint="run the same command again to resume"
                    )
                if over:
                    self.progress.note(f"stopped early: {over}")
                    self.progress.finish()
                    return state, done
        self.progress.finish()
        return state, steps

    def _find_end(self) -> str:
        """Return the reason to end the training after an evaluation, or an empty text."""
        s = self.setup.settings
        if s.patience and self.best.since >= s.patience:
            return f"no improvement in {s.patience} evaluations"
        if self.stability.reached:
            return f"predicted effects changed by less than {s.stability:.3g} of their size in {STABLE} evaluations"
        return ""

    def _agree(self, reason: str | None, number: int) -> str | None:
        """Return the reason to stop that all processes share at this step."""
        import jax

        if jax.process_count() == 1:
            return reason
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(number):
            return "SIGTERM"
        if self.setup.settings.minutes:  # clocks differ, so the first process decides
            due = multihost_utils.broadcast_one_to_all(np.int32(reason == "the time limit"))
            return "the time limit" if int(due) else None
        return None

    def _log(self, pending: list[tuple[int, Any]], seconds: float, waited: float) -> None:
        """Write the mean of the metrics since the last line, and raise an error if a loss is not finite."""
        import jax

        if not pending:
            return
        values = jax.device_get([m for _, m in pending])
        for (number, _), m in zip(pending, values, strict=True):
            if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])):
                raise DataError(
                    self._describe_failure(number, m), hint=f"lower {spell('learning_rate')}, or inspect the batch"
                )
        s = self.setup.settings
        record = {k: float(np.mean([m[k] for m in values])) for k in values[0]}
        sets = s.sets * len(pending) / max(seconds, 1e-9)
        record |= {
            "step": pending[-1][0] + 1,
            "sets_per_s": sets,
            "cells_per_s": 2 * s.set_size * sets,
            "data_wait_share": min(1.0, waited / max(seconds, 1e-9)),
        }
        self.latest = record
        if self.main and self.folder is not None:
            self.folder.log(record)
            self.boards.add(int(record["step"]), record)

    def _describe_failure(self, number: int, metrics: dict[str, Any]) -> str:
        batch = self.setup.sampler.batch(number)
        picked = self.setup.sampler.groups.iloc[np.unique(batch.group_id)]
        names = [f"{r.perturbation} in {r.context}" for r in picked.head(5).itertuples()]
        return (
            f"step {number + 1}: the loss is {float(metrics['loss'])} (gradient norm {float(metrics['grad_norm'])}); "
            f"the batch holds {', '.join(names)}{', …' if len(picked) > 5 else ''}"
        )

    def _evaluate(self, state: Any, number: int) -> None:
        from vcelltools.model.step import eval_params

        part = "val" if len(self.setup.screen.rows("val")) else "train"  # test groups must not choose the model
        params = _to_host(eval_params(state))
        ids = self.setup.screen.ids(self.setup.screen.rows(part))
        effects = predict_effects(self.setup, self._effect, params, *ids, SHARES)
        rivals = ("train",) if part == "val" else ()  # validation groups alone may be few
        every = [evaluate(lambda *_, e=e: e, self.setup.screen, part, rivals=rivals) for e in effects]
        k = choose_share(every)
        scores, share = every[k], SHARES[k]
        change = self.stability.add(effects[k], number) if self.stability.tolerance else None
        better = self.best.offer(scores.pds + scores.pearson_delta, number, share)
        self.progress.note(self._describe_progress(number, part, scores))
        if self.main and self.folder is not None:
            record: dict[str, Any] = {"part": part, "share": share, **scores.to_json()}
            if self.stability.tolerance:
                record["change"] = change
                self.stability.save(self.folder.stability_fpath)
            self.folder.log({"step": number, "eval": record})
            self.boards.add(number, record, "eval/")
            if better:
                self.folder.best().save(number, BestState(params, np.float32(share)), self._meta())

    def _describe_progress(self, number: int, part: str, scores: Any) -> str:
        r = self.latest
        speed = ""
        if r:
            speed = (
                f"; loss − floor {r['excess']:.4g}, effect {r['effect_l1']:.3g}, gradient {r['grad_norm']:.3g}, "
                f"update {r['update_norm']:.2g}, {r['sets_per_s']:,.0f} sets/s, {r['cells_per_s']:,.0f} cells/s, "
                f"{r['data_wait_share']:.0%} waiting for data"
            )
        return f"step {number:,}: PDS {scores.pds:.3f}, Pearson Δ {scores.pearson_delta:.3f} on {part}{speed}"

    def _meta(self, best: Best | None = None) -> dict[str, Any]:
        return {
            "identity": self.setup.identity,
            "model": self.model.to_json(),
            "best": dict((best or self.best).__dict__),
            "processes": _process_count(),
            "devices": int(self.mesh.devices.size),
            **({"start": self.start} if self.start else {}),
        }

    def _save(self, state: Any, number: int) -> None:
        if self.main and self.folder is not None:
            self.folder.checkpoints().save(number, _to_host(state), self._meta())
        if _process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"checkpoint {number}")

    def _finish(self, state: Any, steps: int) -> TrainResult:
        from vcelltools.model.checkpoint import hash_params

        assert self.folder is not None
        if not self.main:
            return TrainResult(out=self.folder.dpath, summary={"steps": steps})
        part = final_part(self.setup)
        best = load_best(self.folder, self.model)
        ids = self.setup.screen.ids(self.setup.screen.rows(part))
        predicted = predict_effects(self.setup, self._effect, best.params, *ids, [float(best.share)])[0]
        final = describe(evaluate(lambda *_: predicted, self.setup.screen, part))
        prior = evaluate(lambda *ids: self.setup.judge(*ids)["prior_kg"], self.setup.screen, part)
        summary = make_summary(
            self.setup,
            steps=steps,
            params_sha256=hash_params(_to_host(state.params)),
            final={**final, "best_step": self.best.step, "share": self.best.share, "untrained": prior.to_json()},
            baselines=evaluate_baselines(self.setup.effects, self.setup.screen, part),
            **({"start": self.start} if self.start else {}),
            feed=self.feed,
            devices=int(self.mesh.devices.size),
        )
        self.folder.plot()
        write_json(self.folder.summary_fpath, summary, force=True)
        return TrainResult(out=self.folder.dpath, summary=summary)


def _process_count() -> int:
    import jax

    return jax.process_count()


def _share(tree: Any) -> Any:
    """Send numbers, arrays or a pytree of them from the first process to every process."""
    if _process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    shared = multihost_utils.broadcast_one_to_all(tree)
    return bool(shared) if isinstance(tree, bool) else shared


def _to_host(tree: Any) -> Any:
    """Return the arrays of the first local device; every device holds the complete state."""
    import jax

    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), tree)


def load_best(folder: RunFolder, model: Any) -> BestState:
    """Return the parameters with the best score, as host arrays, and their share.

    Raises
    ------
    DataError
        If the run has none, or they are damaged.
    """
    import jax

    from vcelltools.model.network import init_params

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    template = BestState(params, jax.ShapeDtypeStruct((), np.float32))
    found = folder.best().load(template)
    if found is None:
        raise DataError(f"{folder.dpath} has no evaluated model yet", hint="train it first")
    return found.state


def predict_effects(
    setup: Setup, effect: Any, params: Any, pert_k: np.ndarray, line_k: np.ndarray, shares: Sequence[float]
) -> list[np.ndarray]:
    """Return the effects (k, g) for perturbations in lines, averaged over fixed sets of control cells.

    There is one array of effects per value of ``shares``: the judged prior, plus this share of the change that the
    transformer predicts.
    """
    import jax.numpy as jnp

    from vcelltools.model.evidence import BY_RUN

    s = setup.settings
    visible = 1.0 if setup.visible_g is None else setup.visible_g
    tables = setup.hide_genes(setup.make_tables(setup.judge(pert_k, line_k)))
    prior_kg = tables["prior"]
    store_k, rows = setup.draw_controls(line_k, s.eval_sets * s.set_size)
    out = np.zeros((2, len(pert_k), setup.stores[0].n_genes))
    if setup.features_pf is not None:
        tables["features"] = setup.features_pf
    for a in range(0, len(pert_k), _EVAL_BATCH):
        pick = np.minimum(
            np.arange(a, a + _EVAL_BATCH), len(pert_k) - 1
        )  # the last one is repeated, to keep the shapes static
        data = {**tables, **{k: jnp.asarray(tables[k][pick]) for k in BY_RUN}}
        total = np.zeros((2, _EVAL_BATCH, out.shape[2]))
        for k in range(s.eval_sets):
            columns = slice(k * s.set_size, (k + 1) * s.set_size)
            batch = {
                "control": setup.read_cells(store_k[pick], rows[pick, columns]),
                "pert": pert_k[pick].astype(np.int32),
                "context": line_k[pick].astype(np.int32),
                "prior": np.arange(_EVAL_BATCH, dtype=np.int32),
            }
            total += np.stack([np.asarray(x, np.float64) for x in effect(params, data, batch)])
        n = min(_EVAL_BATCH, len(pert_k) - a)
        out[:, a : a + n] = total[:, :n] / s.eval_sets * visible
    change_kg, judged_kg = out
    return [
        setup.finish_effects(judged_kg + share * (change_kg - judged_kg), prior_kg, pert_k, line_k) * visible
        for share in shares
    ]
