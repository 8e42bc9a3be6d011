"""The inputs of a run: stores, split, sampler, effects, priors and the configuration of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.config import CONFIG_NAME
from vcelltools.descriptors import read_networks
from vcelltools.errors import DataError
from vcelltools.io.fingerprint import hash_text
from vcelltools.model.registry import MODELS, fit_model, is_nested, needs_pseudobulk
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.effects import Screen, add_validation, choose_split, make_screen, read_features
from vcelltools.sampling.lines import name_line
from vcelltools.sampling.pseudobulk import measure_pseudobulk
from vcelltools.sampling.repeated import refuse_repeated_cells
from vcelltools.sampling.sampler import Batch, Sampler
from vcelltools.sampling.splits import Split, read_split
from vcelltools.stores.store import Store, find_stores, open_store
from vcelltools.training.length import set_length
from vcelltools.training.settings import TrainSettings

if TYPE_CHECKING:
    from vcelltools.model.baselines import EffectModel, Effects, PerturbationMean
    from vcelltools.model.direction import Views
    from vcelltools.model.network import ModelConfig
    from vcelltools.model.step import StepConfig

N_RIVALS = 15
"""Number of groups of the same line that the effect of a set is compared with."""
_HIDDEN_SHARE = 0.3  # with features: share of the sets whose perturbation is treated as unmeasured
_TARGETS = {"controls-same": "control-same", "controls-resampled": "control"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """The part of a run that does not depend on the devices.

    Attributes
    ----------
    sampler
        Sampler of the training sets; its contexts are the cell lines.
    effect_kg
        (groups + 1, g) float32: measured effects; row 0 is zero.
    features_pf
        (p, f) float32, standardised, zero for perturbations without features; None without a feature file.
    mask_dg
        (stores, g) float32: genes that count in the loss.
    relabel_cp
        (lines, perturbations) label that each training group is trained with. It is the group's own label, except in
        the sanity mode that shuffles the labels within each line. Evaluation always uses the true labels.
    visible_g
        Genes that the network sees and changes (1 or 0), or None for all. A sanity mode hides some genes.
    raw_features_pf
        The features in the file; NaN for perturbations without features.
    """

    settings: TrainSettings
    stores: tuple[Store, ...]
    sampler: Sampler
    screen: Screen
    effects: Effects
    effect_kg: np.ndarray
    features_pf: np.ndarray | None
    mask_dg: np.ndarray
    relabel_cp: np.ndarray
    sanity: str | None
    visible_g: np.ndarray | None = None
    raw_features_pf: np.ndarray | None = None

    @cached_property
    def offsets(self) -> np.ndarray:
        """(stores + 1,) int64: first global row of each store."""
        return np.cumsum([0, *[s.n_cells for s in self.stores]])

    @cached_property
    def fitted(self) -> EffectModel:
        """The model of effects that the settings name."""
        return self.fit(self.effects)

    def fit(self, effects: Effects) -> EffectModel:
        """Fit the model of effects that the settings name to other effects."""
        return fit_model(self.settings.model, effects, self.settings.objective)

    @cached_property
    def views(self) -> Views:
        """The training groups as seen from each direction of perturbations."""
        from vcelltools.model.direction import Views

        return Views(self.effects)

    @cached_property
    def get_prior(self) -> Callable[[int], tuple[EffectModel, PerturbationMean] | None]:
        """Return the model of the priors and the mean effects for a direction; None if nothing was measured in it."""
        from vcelltools.model.baselines import PerturbationMean, fit_prior

        @cache
        def get(direction: int) -> tuple[EffectModel, PerturbationMean] | None:
            view = self.views.get(direction)
            return None if view is None else (fit_prior(self.settings.prior, view), PerturbationMean(view))

        return get

    def get_shared(self, pert_k: np.ndarray, line_k: np.ndarray) -> np.ndarray:
        """Return the mean effect (k, g) of all perturbations in lines, without the requested groups themselves."""
        out = np.zeros((len(pert_k), self.effects.effect_kg.shape[1]))
        for rows, direction in self.views.split(pert_k, line_k):
            if (prior := self.get_prior(direction)) is not None:
                out[rows] = prior[1].common(pert_k[rows], line_k[rows])
        return out

    @cached_property
    def evidence(self) -> dict[str, np.ndarray]:
        """Tables of :func:`vcelltools.model.evidence.make_tables` for the training groups.

        Row 0 of the runs is zero, and row ``i + 1`` belongs to group ``i`` of the sampler. With features, a second
        block of rows follows, as if the perturbations had been measured nowhere. Hidden genes are zero.
        """
        line = self.sampler.groups["context_id"].to_numpy(np.int64)
        pert = self.relabel_cp[line, self.sampler.groups["perturbation_id"].to_numpy(np.int64)]
        parts = [self.judge(pert, line)]
        if self.features_pf is not None:
            parts.append(self.judge(pert, line, unseen=True))
        by_run = {k: np.concatenate([np.zeros_like(parts[0][k][:1]), *[p[k] for p in parts]]) for k in parts[0]}
        by_run["target_k"][0] = -1
        return self.hide_genes(self.make_tables(by_run))

    def hide_genes(self, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return tables of evidence with the effects of hidden genes set to zero."""
        if self.visible_g is None:
            return tables
        return tables | {k: tables[k] * self.visible_g.astype(np.float32) for k in ("prior", "shared")}

    def make_tables(self, by_run: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the tables of evidence: those by run from :meth:`judge`, and those by line and by gene."""
        from vcelltools.model.evidence import make_tables

        by_gene = {"variance_g": self.screen.variance_g, "ratio_g": self._ratio_g}
        return make_tables(**by_run, control_cg=self.screen.control_cg, **by_gene)

    @cached_property
    def _ratio_g(self) -> np.ndarray:
        from vcelltools.model.baselines import Ridge

        return Ridge(self.views.largest).ratio_g

    def judge(self, pert_k: np.ndarray, line_k: np.ndarray, *, unseen: bool = False) -> dict[str, np.ndarray]:
        """Return the arguments of :func:`vcelltools.model.evidence.make_tables` for perturbations in lines.

        ``unseen`` ignores all measurements of the perturbations themselves.
        """
        from vcelltools.model.baselines import Ridge

        shared_kg = self.get_shared(pert_k, line_k)
        prior_kg, cells_k = np.zeros_like(shared_kg), np.zeros(len(pert_k))
        for rows, direction in self.views.split(pert_k, line_k):
            if (prior := self.get_prior(direction)) is None:
                continue
            (model, mean), some = prior, (pert_k[rows], line_k[rows])
            if unseen and isinstance(model, Ridge):
                prior_kg[rows] = model.predict_unseen(*some)
            else:
                prior_kg[rows] = model.predict(*some)
            if not unseen:
                cells_k[rows] = mean.elsewhere(*some)[1]
        if self.settings.prior == "none":
            shared_kg[:] = 0.0
        return {
            "prior_kg": prior_kg, "shared_kg": shared_kg, "cells_k": cells_k, "target_k": self.screen.target_p[pert_k],
        }  # fmt: skip

    def finish_effects(
        self, effect_kg: np.ndarray, prior_kg: np.ndarray, pert_k: np.ndarray, line_k: np.ndarray
    ) -> np.ndarray:
        """Return the final effects of the network, with restored spread if the settings say so."""
        from vcelltools.model.baselines import restore_spread

        if not self.settings.restore_spread:
            return effect_kg
        return restore_spread(effect_kg, prior_kg, self.get_shared(pert_k, line_k))

    @property
    def genes(self) -> list[str]:
        """The basis."""
        return [str(g) for g in self.stores[0].genes]

    @property
    def vocabulary(self) -> dict[str, list[str]]:
        """The names behind the hashes of :attr:`identity`."""
        groups = self.screen.groups
        parts = [f"{r.perturbation} in {r.line}: {r.part}" for r in groups.itertuples()]
        return {
            "genes": self.genes,
            "perturbations": self.screen.perturbations,
            "lines": self.screen.lines,
            "split": parts,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that a checkpoint must share: stores, scale, vocabularies, parts of the groups, and features."""
        return {
            "stores": {s.name: s.sha256 for s in self.stores},
            "target_sum": float(self.stores[0].manifest["target_sum"]),
            **{key: hash_text(names) for key, names in self.vocabulary.items()},
            "features": None if self.features_pf is None else hash_text([self.features_pf.tobytes().hex()]),
            **(
                {}
                if self.effects.network_pp is None
                else {"network": hash_text([self.effects.network_pp.tobytes().hex()])}
            ),
        }

    def model_config(self) -> ModelConfig:
        """Return the configuration of the transformer for these stores."""
        from vcelltools.model.network import make_config

        s = self.settings
        rows = self.screen.rows("train")
        scale = float(np.sqrt(np.mean(np.square(self.screen.effect_kg[rows], dtype=np.float64))))
        return make_config(
            s.size,
            genes=self.stores[0].n_genes,
            perturbations=len(self.sampler.perturbations),  # a prediction may have more
            contexts=len(self.screen.lines) if s.batch_embedding else 0,
            features=0 if self.features_pf is None else self.features_pf.shape[1],
            identity=(self.features_pf is None and s.prior == "none") if s.identity is None else s.identity,
            effect_scale=round(max(scale, 1e-3), 6),
            nonnegative=s.nonnegative,
        )

    def step_config(self, platform: str) -> StepConfig:
        """Return the settings of the step for a platform (``cpu``, ``gpu``, ``tpu``)."""
        from vcelltools.model.step import StepConfig

        s = self.settings
        shared = {k: getattr(s, k) for k in StepConfig.__dataclass_fields__ if hasattr(s, k)}
        shared["learning_rate"] = s.peak_rate
        low = platform != "cpu" if s.precision == "auto" else s.precision == "bfloat16"
        return StepConfig(**shared, bfloat16=low, scan=platform == "tpu")

    def make_batch(self, batch: Batch, share: slice = slice(None), *, cells: bool) -> dict[str, np.ndarray]:
        """Return the share of a batch of one process: row numbers, or the cells themselves if ``cells`` is true."""
        from vcelltools.model.network import check_ids

        store = batch.store_id[share]
        groups = batch.group_id[share]
        out = {
            "pert": self.relabel_cp[batch.context_id[share], batch.perturbation_id[share]].astype(np.int32),
            "context": batch.context_id[share],
            "measured": np.where(batch.perturbation_id[share] > 0, groups + 1, 0).astype(np.int32),
            "dataset": store,
        }
        rng = np.random.Generator(np.random.Philox(key=np.array([self.settings.seed, batch.step], np.uint64)).jumped())
        out["prior"] = out["measured"]
        if len(self.evidence["prior"]) > len(self.effect_kg):
            hide = (rng.random(len(batch.group_id)) < _HIDDEN_SHARE)[share] & (out["measured"] > 0)
            out["prior"] = (out["measured"] + np.where(hide, len(self.effect_kg) - 1, 0)).astype(np.int32)
        if self._has_rivals:
            uniform = rng.random((len(batch.group_id), N_RIVALS))[share]
            out["rivals"] = self._draw_rivals(groups, uniform)
        check_ids("perturbation", out["pert"], len(self.screen.perturbations))
        check_ids("line", out["context"], len(self.screen.lines))
        check_ids("prior", out["prior"], len(self.evidence["prior"]))
        check_ids("store", out["dataset"], len(self.stores))
        if cells:
            out["target"], out["control"] = (self.hide_cells(v) for v in batch.load(share))
            return out
        for name, rows in (("control", batch.control_rows[share]), ("target", batch.perturbed_rows[share])):
            out[name] = (rows + self.offsets[store][:, None]).astype(np.int32)
        return out

    @cached_property
    def _has_rivals(self) -> bool:
        """Whether a loss compares with other groups of the line."""
        from vcelltools.model.loss_registry import need_rivals

        return need_rivals(self.step_config("cpu").weights)

    def _draw_rivals(self, groups: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return rows (b, rivals) in the table of effects: other training groups of the same line."""
        first, length, order = self._line_groups
        line = self.sampler.groups["context_id"].to_numpy(np.int64)[groups]
        picked = first[line][:, None] + (uniform * length[line][:, None]).astype(np.int64)
        return (order[picked] + 1).astype(np.int32)

    @cached_property
    def _line_groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, number) of each line's groups in the third array, which lists all groups by line."""
        line = self.sampler.groups["context_id"].to_numpy(np.int64)
        length = np.bincount(line, minlength=len(self.screen.lines))
        return np.cumsum(length) - length, length, np.argsort(line, kind="stable")

    def release_stores(self) -> None:
        """Release the memory pages of the stores."""
        for store in self.stores:
            store.release()

    def read_cells(self, store_b: np.ndarray, rows_bs: np.ndarray) -> np.ndarray:
        """Return the cells (b, s, g) float16 of rows of stores; each row is verified once."""
        return self.hide_cells(self.sampler.reader.read(rows_bs, store_b))

    def hide_cells(self, values_bsg: np.ndarray) -> np.ndarray:
        """Return cells with the hidden genes set to zero."""
        return values_bsg if self.visible_g is None else values_bsg * self.visible_g.astype(np.float16)

    def draw_controls(self, line_ids: np.ndarray, n_cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return store ids (k,) and control rows (k, n_cells) of lines, which depend only on the seed and the line."""
        store_k = np.zeros(len(line_ids), np.int64)
        rows = np.empty((len(line_ids), n_cells), np.int64)
        drawn: dict[int, tuple[int, np.ndarray]] = {}
        for i, line in enumerate(line_ids.tolist()):
            if line not in drawn:
                store, pool = self._pools[self.screen.lines[line]]
                rng = np.random.default_rng([seed, line])
                drawn[line] = store, rng.choice(pool, n_cells, replace=len(pool) < n_cells)
            store_k[i], rows[i] = drawn[line]
        return store_k, rows

    @cached_property
    def _pools(self) -> dict[str, tuple[int, np.ndarray]]:
        pools = {}
        for k, s in enumerate(self.stores):
            runs = s.runs[s.runs["is_control"]]
            for line, members in runs.groupby("cell_line"):
                rows = [np.arange(r.start, r.start + r.length) for r in members.itertuples()]
                pools[name_line(s.name, line)] = (k, np.concatenate(rows))
        return pools


def get_inputs(settings: TrainSettings, stores: Sequence[Store] | None = None) -> list[Path]:
    """Return every file and folder that a training with these settings reads."""
    paths = [s.path for s in stores] if stores is not None else [Path(p) for p in settings.stores] or find_stores()
    files = [settings.split, settings.features, *settings.network, settings.from_run]
    return [*paths, *(Path(p) for p in files if p), Path(CONFIG_NAME)]


def open_stores(settings: TrainSettings) -> tuple[Store, ...]:
    """Open the stores of the settings, or all those of ``vcelltools.toml``.

    If a store is missing, a store of the same name in the store folder of ``vcelltools.toml`` is used.
    """
    if not settings.stores:
        return tuple(open_store(p) for p in find_stores())
    found = []
    for path in map(Path, settings.stores):
        moved = [] if path.exists() else [p for p in find_stores(missing_ok=True) if p.name == path.name]
        found.append(open_store(moved[0] if moved else path))
    return tuple(found)


def make_setup(
    settings: TrainSettings,
    stores: Sequence[Store] | None = None,
    *,
    sanity: str | None = None,
    split: Split | None = None,
    validate: bool = True,
    progress: Progress = SILENT,
) -> Setup:
    """Open the stores, split them, measure the effects and prepare the priors.

    ``split`` replaces the split file of the settings. ``validate`` moves some training groups to the validation groups.

    Raises
    ------
    DataError
        If stores, split or features do not match.
    """
    opened = tuple(stores) if stores is not None else open_stores(settings)
    refuse_repeated_cells(opened)
    scales = {float(s.manifest["target_sum"]) for s in opened}
    if len(scales) > 1:
        raise DataError(
            f"the stores are scaled to different totals: {sorted(scales)}", hint="build them with the same target sum"
        )
    if split is not None:
        pass
    elif settings.split:
        split = read_split(settings.split, names=[s.name for s in opened])
    else:
        split = choose_split(opened, seed=settings.seed, unseen=settings.features is not None)
    given = split
    if validate and (settings.model not in MODELS or not is_nested(settings.model, settings.objective)):
        split = add_validation(split, opened, seed=settings.seed)  # other models hold out training groups themselves
    sampler = Sampler(
        opened,
        set_size=settings.set_size,
        sets_per_batch=settings.sets,
        seed=settings.seed,
        store_weights=settings.weights,
        split=split,
        part="train",
        level="cell_line",
        short="replace",
        target=_TARGETS.get(sanity or "", "perturbed"),  # type: ignore[arg-type]
    )
    if settings.model == "transformer":
        n_cells = int(sampler.groups["length"].sum())
        settings = set_length(settings, n_cells, settings.sets * settings.set_size, progress)
    screen = make_screen(opened, split, sampler.perturbations, sampler.contexts, progress=progress)
    if split is not given and (n := len(screen.rows("val"))):
        progress.note(
            f"{given.where} names no validation groups, so {n:,} of the {n + len(screen.rows('train')):,} training "
            "groups are used to choose the model and not to train it"
        )
    relabel = np.tile(np.arange(len(screen.perturbations)), (len(sampler.contexts), 1))
    if sanity == "random-perturbations":
        rng = np.random.default_rng(settings.seed)
        relabel[:, 1:] = rng.permuted(relabel[:, 1:], axis=1)  # the same permutation in all lines would change nothing
    raw = read_features(Path(settings.features), screen.perturbations, progress) if settings.features else None
    network = read_networks(settings.network, screen.perturbations) if settings.network else None
    if needs_pseudobulk(settings.model):
        screen = replace(screen, pseudobulk=measure_pseudobulk(screen, progress=progress))
    effects = screen.get_effects(raw, network_pp=network, relabel_cp=relabel)
    mask = sampler.present.astype(np.float32)
    pert = sampler.groups["perturbation_id"].to_numpy(np.int64)
    line = sampler.groups["context_id"].to_numpy(np.int64)
    return Setup(
        settings=settings,
        stores=opened,
        sampler=sampler,
        screen=screen,
        effects=effects,
        effect_kg=_measure_groups(screen, pert, line),
        features_pf=None if raw is None else standardise(raw),
        mask_dg=mask,
        relabel_cp=relabel,
        sanity=sanity,
        raw_features_pf=raw,
    )


def _measure_groups(screen: Screen, pert: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return a row of zeros and the measured effects of the sampler's groups."""
    ids = screen.ids(np.arange(len(screen.groups)))
    row = {key: k for k, key in enumerate(zip(*(i.tolist() for i in ids), strict=True))}
    picked = [row[key] for key in zip(pert.tolist(), line.tolist(), strict=True)]
    return np.concatenate([np.zeros((1, screen.effect_kg.shape[1]), np.float32), screen.effect_kg[picked]])


def standardise(features_pf: np.ndarray, n: int | None = None) -> np.ndarray:
    """Return features standardised over the first ``n``, and zeros for perturbations without any."""
    known = np.isfinite(features_pf).all(axis=1)
    first = features_pf[:n][known[:n]]
    mean, scale = first.mean(axis=0), first.std(axis=0)
    out = np.where(known[:, None], (features_pf - mean) / np.where(scale > 0, scale, 1.0), 0.0)
    return out.astype(np.float32)
