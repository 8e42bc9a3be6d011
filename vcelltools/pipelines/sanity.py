"""``train --sanity MODE``: short trainings whose outcome is known beforehand; a model that fails one is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import UsageError
from vcelltools.pipelines.evaluate import evaluate
from vcelltools.pipelines.train import Trainer, final_part
from vcelltools.pipelines.train_settings import SANITY, TrainSettings
from vcelltools.pipelines.train_setup import Setup, make_setup
from vcelltools.progress import SILENT, Progress

if TYPE_CHECKING:
    from vcelltools.pipelines.store import Store

_TAIL = 20  # steps that the closing figures are the mean of
_FEW_GENES = 4  # random-genes shows the model one gene in so many


@dataclass(frozen=True, kw_only=True)
class SanityResult:
    """What a sanity mode found.

    Attributes
    ----------
    mode
        Its name.
    expected
        What must happen, in words.
    holds
        Whether it did.
    figures
        The numbers behind the answer.
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
        For an unknown mode.
    """
    if mode not in SANITY:
        raise UsageError(f"--sanity {mode}: unknown", hint=f"one of: {', '.join(SANITY)}")
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
    """Train for all steps; return the mean metrics of the last ones."""
    import jax

    trainer = Trainer(setup, None, progress)
    state, steps = trainer.init_state(), setup.settings.steps
    tail = []
    progress.start("train", steps, "steps")
    for number in range(steps):
        state, metrics = trainer.step(state, trainer.data, trainer.put(trainer.host_batch(number)))
        progress.advance(1)
        if number >= steps - _TAIL:
            tail.append(metrics)
    progress.finish()
    values = jax.device_get(tail)
    return trainer, state, {k: float(np.mean([v[k] for v in values])) for k in values[0]}


def _pick(metrics: dict[str, float]) -> dict[str, float]:
    return {k: metrics[k] for k in ("energy", "floor", "excess", "effect_l1")}


def _overfit(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="overfit-batch",
        expected="one batch, repeated: the loss goes below the sampling floor",
        holds=m["excess"] < 0,
        figures=_pick(m),
    )


def _controls_same(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="controls-same",
        expected="target cells are the very control cells: no effect is invented, and the loss stays within the floor",
        holds=m["energy"] <= m["floor"] and m["effect_l1"] < 0.05,
        figures=_pick(m),
    )


def _controls_resampled(setup: Setup, progress: Progress) -> SanityResult:
    _, _, m = _train(setup, progress)
    return SanityResult(
        mode="controls-resampled",
        expected="target cells are other control cells: the loss is the floor, and never 0",
        holds=abs(m["excess"]) < 0.1 * m["floor"],
        figures=_pick(m),
    )


def _random_perturbations(setup: Setup, progress: Progress) -> SanityResult:
    trainer, state, _ = _train(setup, progress)
    part = final_part(setup)
    scores = evaluate(lambda p, c: trainer.predict_effects(state, p, c), setup.screen, part)
    error = float(np.sqrt(1 / 12 / len(scores.pds_k)))  # of the mean of ranks that are uniform
    return SanityResult(
        mode="random-perturbations",
        expected="with shuffled labels nothing is learnt of a perturbation: PDS on held-out groups is 0.5",
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
        expected="shown random genes of the basis, the model tells perturbations apart worse than shown the first ones",
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
