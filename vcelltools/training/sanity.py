"""``train --sanity MODE``: short trainings whose outcome is known for a correct model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import UsageError, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.training.cell_inputs import CellSetup, make_cell_setup
from vcelltools.training.diffusion import DiffusionTrainer
from vcelltools.training.evaluate import evaluate
from vcelltools.training.in_flight import InFlight
from vcelltools.training.inputs import Setup, make_setup
from vcelltools.training.settings import SANITY, TrainSettings
from vcelltools.training.train import Trainer, final_part

if TYPE_CHECKING:
    from vcelltools.stores.store import Store

_TAIL = 20  # the mean over this many last steps is reported
_FEW_GENES = 4  # random-genes uses one gene in four


@dataclass(frozen=True, kw_only=True)
class SanityResult:
    """The result of a sanity mode.

    Attributes
    ----------
    mode
        Name of the mode.
    expected
        Description of the expected outcome.
    holds
        Whether the outcome was as expected.
    figures
        The measured values.
    """

    mode: str
    expected: str
    holds: bool
    figures: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"mode": self.mode, "expected": self.expected, "holds": self.holds, **self.figures}


def check_sanity(
    mode: str, settings: TrainSettings, *, stores: Sequence[Store] | None = None, progress: Progress = SILENT
) -> SanityResult:
    """Run one sanity mode on the stores of the settings.

    Raises
    ------
    UsageError
        If the mode is not known.
    """
    if mode not in SANITY:
        raise UsageError(f"{spell('sanity')} {mode!r} is not known", hint=f"one of: {', '.join(SANITY)}")
    if settings.model == "diffusion":
        if mode not in _OF_DIFFUSION:
            raise UsageError(
                f"{spell('sanity')} {mode} compares sets of cells with controls, which a diffusion model does not use",
                hint=f"modes for a diffusion model: {', '.join(_OF_DIFFUSION)}",
            )
        return _OF_DIFFUSION[mode](make_cell_setup(settings, stores), progress)
    setup = make_setup(settings, stores, sanity=mode, progress=progress)
    return {
        "overfit-batch": _overfit,
        "controls-same": _controls_same,
        "controls-resampled": _controls_resampled,
        "random-perturbations": _random_perturbations,
        "random-genes": _random_genes,
        "permutation": _permutation,
    }[mode](setup, progress)


def _train(setup: Setup, progress: Progress) -> tuple[Trainer, Any, dict[str, float]]:
    """Train for all steps, and return the mean metrics of the last ones."""
    import jax

    trainer = Trainer(setup, None, progress)
    state, steps = trainer.init_state(), setup.settings.length[0]
    tail = []
    progress.start("train", steps, "steps")
    flight = InFlight(progress)
    for number in range(steps):
        state, metrics = trainer.step(state, trainer.data, trainer.put(trainer.host_batch(number)))
        flight.add(metrics)
        if number >= steps - _TAIL:
            tail.append(metrics)
    flight.wait()
    progress.finish()
    values = jax.device_get(tail)
    return trainer, state, {k: float(np.mean([v[k] for v in values])) for k in values[0]}


def _pick(metrics: dict[str, float]) -> dict[str, float]:
    return {k: metrics[k] for k in ("energy", "floor", "excess", "effect_l1")}


def _overfit(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="overfit-batch",
        expected="when trained on one batch, the loss falls below the sampling floor",
        holds=m["excess"] < 0,
        figures=_pick(m),
    )


def _controls_same(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="controls-same",
        expected="when target cells are the control cells, no effect is predicted and the loss stays within the floor",
        holds=m["energy"] <= m["floor"] and m["effect_l1"] < 0.05,
        figures=_pick(m),
    )


def _controls_resampled(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="controls-resampled",
        expected="when the target cells are other control cells, the loss equals the floor and is not 0",
        holds=abs(m["excess"]) < 0.1 * m["floor"],
        figures=_pick(m),
    )


def _random_perturbations(setup: Setup, progress: Progress) -> SanityResult:
    trainer, state, _ = _train(setup, progress)
    part = final_part(setup)
    scores = evaluate(lambda p, c: trainer.predict_effects(state, p, c), setup.screen, part)
    error = float(np.sqrt(1 / 12 / len(scores.pds_k)))  # standard error of the mean of uniform ranks
    return SanityResult(
        mode="random-perturbations",
        expected="with shuffled labels, PDS on held-out groups is 0.5",
        holds=abs(scores.pds - 0.5) < 3 * error,
        figures={"pds": scores.pds, "pearson_delta": scores.pearson_delta, "standard_error": error},
    )


def _random_genes(setup: Setup, progress: Progress) -> SanityResult:
    n = setup.stores[0].n_genes
    few = max(2, n // _FEW_GENES)
    picks = {
        "first": np.arange(few),
        "random": np.random.default_rng(setup.settings.seed).choice(n, few, replace=False),
    }
    figures: dict[str, float] = {"genes": float(few)}
    part = final_part(setup)
    for name, genes in picks.items():
        visible = np.zeros(n, np.float32)
        visible[genes] = 1
        shown = replace(setup, visible_g=visible, mask_dg=setup.mask_dg * visible)
        trainer, state, _ = _train(shown, progress)
        scores = evaluate(partial(trainer.predict_effects, state), setup.screen, part)
        figures |= {f"pds_{name}": scores.pds, f"pearson_delta_{name}": scores.pearson_delta}
    return SanityResult(
        mode="random-genes",
        expected="with random genes of the basis, the model discriminates worse than with the first genes",
        holds=figures["pds_random"] < figures["pds_first"],
        figures=figures,
    )


def _permutation(setup: Setup, progress: Progress) -> SanityResult:
    import jax.numpy as jnp

    from vcelltools.model.step import make_predict

    trainer, state, _ = _train(setup, progress)
    predict = make_predict(trainer.model, replace(trainer.config, bfloat16=False))
    batch = setup.make_batch(setup.sampler.batch(0), cells=True)
    order = np.random.default_rng(0).permutation(setup.settings.set_size)
    tables = {k: jnp.asarray(np.asarray(v.addressable_data(0))) for k, v in trainer.tables.items()}
    straight = np.asarray(predict(state.params, tables, batch))
    permuted = np.asarray(predict(state.params, tables, batch | {"control": batch["control"][:, order]}))
    gap = float(np.abs(permuted - straight[:, order]).max())
    return SanityResult(
        mode="permutation",
        expected="permuting the cells of a set permutes the output, to 1e-5",
        holds=gap <= 1e-5,
        figures={"largest_difference": gap},
    )


def _train_cells(
    setup: CellSetup, progress: Progress, *, one_batch: bool = False
) -> tuple[DiffusionTrainer, Any, float]:
    """Train a diffusion model for all steps, and return (trainer, state, mean loss of the last steps)."""
    import jax

    trainer = DiffusionTrainer(setup, None, progress)
    state, steps, tail = trainer.place(trainer.init_state()), setup.settings.length[0], []
    progress.start("train", steps, "steps")
    flight = InFlight(progress)
    for number in range(steps):
        state, metrics = trainer.step(state, trainer.put(setup.make_batch(0 if one_batch else number)))
        flight.add(metrics)
        if number >= steps - _TAIL:
            tail.append(metrics["loss"])
    flight.wait()
    progress.finish()
    return trainer, state, float(np.mean(jax.device_get(tail)))


def _overfit_cells(setup: CellSetup, progress: Progress) -> SanityResult:
    _, _, loss = _train_cells(setup, progress, one_batch=True)
    tokens = setup.make_batch(0)["tokens"]
    shares = [np.unique(column, return_counts=True)[1] / len(tokens) for column in tokens.T]
    entropy = float(np.mean([-(p * np.log(p)).sum() for p in shares]))
    return SanityResult(
        mode="overfit-batch",
        expected="when trained on one batch, the loss falls below half the entropy of the genes in this batch",
        holds=loss < 0.5 * entropy,
        figures={"loss": loss, "entropy": entropy},
    )


def _random_perturbations_of_cells(setup: CellSetup, progress: Progress) -> SanityResult:
    if len(setup.perturbations) < 2:
        raise UsageError(
            f"{spell('sanity')} random-perturbations needs stores with perturbations",
            hint=f"choose {spell('sanity', 'overfit-batch')}",
        )
    rng = np.random.default_rng([setup.settings.seed, 6])
    trainer, state, _ = _train_cells(replace(setup, pert=rng.permutation(setup.pert)), progress)
    params = state.ema or state.params
    learnt = trainer.evaluate(params, "test")
    trainer.setup = replace(setup, pert=rng.permutation(setup.pert))
    other = trainer.evaluate(params, "test")
    gain = (other.model - learnt.model) / np.maximum(learnt.hidden, 1)
    mean, error = float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))
    return SanityResult(
        mode="random-perturbations",
        expected="with shuffled labels, other labels predict held-out cells equally well",
        holds=mean < 3 * error,
        figures={"gain": mean, "standard_error": error},
    )


def _permute_cells(setup: CellSetup, progress: Progress) -> SanityResult:
    import jax.numpy as jnp

    from vcelltools.model.diffusion import STEPS, run_diffusion

    trainer, state, _ = _train_cells(setup, progress)
    cells = setup.make_batch(0)
    cells["time"] = np.linspace(1, STEPS, len(cells["tokens"])).astype(np.int32)
    hidden = np.random.default_rng(0).random(cells["tokens"].shape) < 0.5
    cells["tokens"] = np.where(hidden, trainer.config.mask, cells["tokens"])
    batch = {k: jnp.asarray(v) for k, v in cells.items()}
    order = np.random.default_rng(1).permutation(len(hidden))
    straight = np.asarray(run_diffusion(state.params, trainer.config, batch)[0])
    permuted = np.asarray(run_diffusion(state.params, trainer.config, {k: v[order] for k, v in batch.items()})[0])
    gap = float(np.abs(permuted - straight[order]).max())
    return SanityResult(
        mode="permutation",
        expected="permuting the cells of a batch permutes the output, to 1e-5",
        holds=gap <= 1e-5,
        figures={"largest_difference": gap},
    )


_OF_DIFFUSION = {
    "overfit-batch": _overfit_cells,
    "random-perturbations": _random_perturbations_of_cells,
    "permutation": _permute_cells,
}
