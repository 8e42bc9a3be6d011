"""The inputs of a model of single cells: cells of stores as tokens, their conditions, and the held-out cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.fingerprint import hash_text
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.effects import read_features
from vcelltools.sampling.lines import list_lines, name_line
from vcelltools.sampling.repeated import refuse_repeated_cells
from vcelltools.sampling.tokens import Tokenizer
from vcelltools.training.inputs import open_stores, standardise
from vcelltools.training.length import set_length
from vcelltools.training.settings import TrainSettings

if TYPE_CHECKING:
    from optax import GradientTransformation

    from vcelltools.model.diffusion import DiffusionConfig
    from vcelltools.stores.store import Store

HELD_SHARE = 0.1  # share of the cells, for validation and for test


@dataclass(frozen=True, kw_only=True, eq=False)
class CellSetup:
    """Cells as tokens, with their conditions.

    Attributes
    ----------
    settings, stores
        The settings and the stores.
    perturbations, contexts
        Their vocabularies; the first perturbation is the control.
    pert, context
        (n,) int32 ids of every cell, in the order of the stores.
    features_pf
        (p, f) float32 standardised features of the perturbations, or None.
    parts
        ``train``, ``val`` and ``test``, each with the sorted positions of its cells.
    """

    settings: TrainSettings
    stores: tuple[Store, ...]
    perturbations: list[str]
    contexts: list[str]
    pert: np.ndarray
    context: np.ndarray
    features_pf: np.ndarray | None
    parts: dict[str, np.ndarray]
    tokenizer: Tokenizer

    @cached_property
    def offsets(self) -> np.ndarray:
        """(stores + 1,) int64: first cell of each store."""
        return np.cumsum([0, *[s.n_cells for s in self.stores]])

    @property
    def genes(self) -> list[str]:
        """Genes of the basis."""
        return [str(g) for g in self.stores[0].genes]

    @property
    def vocabulary(self) -> dict[str, list[str]]:
        """The names behind the hashes of :attr:`identity`."""
        sizes = [f"{part}: {len(rows)} cells" for part, rows in self.parts.items()]
        return {"genes": self.genes, "perturbations": self.perturbations, "lines": self.contexts, "split": sizes}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that a checkpoint must share with the stores."""
        return {
            "stores": {s.name: s.sha256 for s in self.stores},
            **{key: hash_text(names) for key, names in self.vocabulary.items()},
            "features": None if self.features_pf is None else hash_text([self.features_pf.tobytes().hex()]),
        }

    def make_config(self) -> DiffusionConfig:
        """Return the configuration of the network for these stores."""
        from vcelltools.model.diffusion import make_diffusion_config

        several = len(self.perturbations) > 1
        return make_diffusion_config(
            self.settings.size,
            genes=len(self.genes),
            vocab=self.tokenizer.vocab_size,
            perturbations=len(self.perturbations) if several and self.features_pf is None else 0,
            features=0 if self.features_pf is None else self.features_pf.shape[1],
            contexts=len(self.contexts) if len(self.contexts) > 1 else 0,
        )

    def read(self, cells: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tokens (b, g), log library sizes and conditions of some cells."""
        tokens = np.empty((len(cells), len(self.genes)), np.int32)
        library = np.empty(len(cells), np.float32)
        store = np.searchsorted(self.offsets, cells, side="right") - 1
        for k in np.unique(store).tolist():
            mine = np.flatnonzero(store == k)
            rows = cells[mine] - self.offsets[k]
            tokens[mine] = self.tokenizer.encode(self.stores[k].counts(rows).toarray())
            library[mine] = self.stores[k].library_size[rows]
        out = {"tokens": tokens, "log_library": np.log1p(library), "pert": self.pert[cells],
               "context": self.context[cells]}  # fmt: skip
        if self.features_pf is not None:
            out["features"] = self.features_pf[out["pert"]]
        return out

    def make_batch(self, number: int) -> dict[str, np.ndarray]:
        """Return the cells of a step, which depend only on the seed and the step; every cell is used once per epoch."""
        train = self.parts["train"]
        size = min(self.settings.sets, len(train))
        per_epoch = len(train) // size
        epoch, at = divmod(number, per_epoch)
        order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(len(train))
        return self.read(train[np.sort(order[at * size : (at + 1) * size])])


def make_optimizer(settings: TrainSettings) -> GradientTransformation:
    """Return the optimiser of a diffusion model."""
    from vcelltools.model.diffusion import make_diffusion_optimizer

    s = settings
    return make_diffusion_optimizer(
        steps=s.length[0], learning_rate=s.peak_rate, warmup=s.warmup, schedule=s.schedule,
        weight_decay=s.weight_decay, clip=s.clip,
    )  # fmt: skip


def make_cell_setup(
    settings: TrainSettings, stores: Sequence[Store] | None = None, progress: Progress = SILENT
) -> CellSetup:
    """Open the stores and hold out cells.

    Raises
    ------
    DataError
        If the stores have different genes or too few cells.
    UsageError
        If a setting does not apply to a diffusion model.
    """
    for key, value in (("split", settings.split), ("tensorboard", settings.tensorboard), ("wandb", settings.wandb)):
        if value:
            raise UsageError(
                f"{spell(key)} does not apply to a diffusion model", hint="the seed determines the held-out cells"
            )
    opened = tuple(stores) if stores is not None else open_stores(settings)
    refuse_repeated_cells(opened)
    genes = [list(map(str, s.genes)) for s in opened]
    if any(g != genes[0] for g in genes):
        raise DataError("the stores have different genes", hint="build them with the same basis")
    names = sorted({p for s in opened for p in s.runs.loc[~s.runs["is_control"], "perturbation"]})
    perturbations = ["control", *names]
    contexts = list(list_lines(opened))
    pert, context = [], []
    for s in opened:
        length = s.runs["length"].to_numpy()
        codes = [0 if r.is_control else perturbations.index(r.perturbation, 1) for r in s.runs.itertuples()]
        lines = [contexts.index(name_line(s.name, r.cell_line)) for r in s.runs.itertuples()]
        pert.append(np.repeat(codes, length).astype(np.int32))
        context.append(np.repeat(lines, length).astype(np.int32))
    n = sum(s.n_cells for s in opened)
    n_held = int(HELD_SHARE * n)
    if n_held < 2:
        raise DataError(f"{n:,} cells are too few to hold out some of them", hint="add stores")
    order = np.random.default_rng([settings.seed, 0]).permutation(n)
    cuts = {"val": order[:n_held], "test": order[n_held : 2 * n_held], "train": order[2 * n_held :]}
    raw = read_features(Path(settings.features), perturbations, progress) if settings.features else None
    n_train = len(cuts["train"])
    return CellSetup(
        settings=set_length(settings, n_train, min(settings.sets, n_train), progress),
        stores=opened,
        perturbations=perturbations,
        contexts=contexts,
        pert=np.concatenate(pert),
        context=np.concatenate(context),
        features_pf=None if raw is None else standardise(raw),
        parts={k: np.sort(v) for k, v in cuts.items()},
        tokenizer=Tokenizer("loglinear"),
    )
