"""``evaluate``: score every held-out group for all models and splits, and write one table with paired intervals.

The stores are read once. The result of each model on each split is kept in ``parts/``, so that a stopped evaluation can
continue. The baselines are always among the models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from vcelltools.errors import DataError, UsageError, checked
from vcelltools.evaluation.external import read_effects
from vcelltools.evaluation.splits import RULES, NamedSplit, make_splits
from vcelltools.evaluation.table import METRICS, make_table
from vcelltools.io.fingerprint import hash_text
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Result
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import locked, write_json
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.model.baselines import BASELINES
from vcelltools.model.metrics import correlate_rows, evaluate_effects
from vcelltools.model.nested import check_objective
from vcelltools.model.registry import MODELS, fit_model, is_nested, needs_pseudobulk
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import one_blas_thread
from vcelltools.sampling.pseudobulk import measure_pseudobulk
from vcelltools.sampling.splits import Split
from vcelltools.training.inputs import Setup, get_inputs, make_setup, open_stores
from vcelltools.training.request import read_settings
from vcelltools.training.settings import TrainSettings
from vcelltools.version import __version__

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.sampling.effects import Screen
    from vcelltools.stores.store import Store

MANIFEST = "evaluation.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation(Result):
    """The scores of models on splits.

    Attributes
    ----------
    out
        The folder with ``table.parquet``, ``table.csv``, ``groups.parquet`` and ``groups.csv``.
    table
        One row for each family of splits, model and metric.
    groups
        One row for each split, model and held-out group.
    n_reused
        Number of results (of a model on a split) from an earlier run of the same evaluation.
    """

    out: Path
    table: pd.DataFrame
    groups: pd.DataFrame
    n_splits: int
    n_models: int
    n_reused: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the table as records."""
        body = parse_json(self.table.to_json(orient="records"))
        counts = {k: getattr(self, k) for k in ("n_splits", "n_models", "n_reused")}
        return {"out": str(self.out), **counts, "table": body}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A requested model with its objective, such as ``transfer`` or ``transfer:error``."""

    label: str
    kind: str
    objective: str | None


@checked
@one_blas_thread()
def evaluate(
    models: Sequence[str] = ("ridge",),
    splits: Sequence[str | os.PathLike] = (RULES[0],),
    out: str | os.PathLike = "evaluation",
    *,
    stores: Sequence[str | os.PathLike | Store] = (),
    features: str | os.PathLike | None = None,
    network: Sequence[str | os.PathLike] = (),
    predictions: Mapping[str, str | os.PathLike] | None = None,
    pert_col: str = "target_gene",
    control: str | None = None,
    context_col: str = "context",
    seen: float = 1 / 3,
    repeats: int = 1,
    seed: int = 0,
    force: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score models and the baselines on the held-out groups of splits.

    Parameters
    ----------
    models
        Names of models; ``NAME:OBJECTIVE`` sets the objective, such as ``transfer:error``.
    splits
        ``leave-one-perturbation-out``, ``leave-one-context-out``, ``few-shot``, or TOML files as in ``train``.
    out
        The folder. The same call continues an evaluation that was stopped.
    stores, features, network
        As in ``train``.
    predictions
        Predictions of any tool: name and h5ad file of cells, which is scored on the held-out groups that it has.
    pert_col, control, context_col
        For the predictions: the obs columns of perturbation and cell line, and the label of the control cells.
    seen, repeats, seed
        For ``few-shot``: the share of a line's perturbations used for training, the number of draws, and the seed.

    Raises
    ------
    UsageError
        If a model or objective is not known, or the folder holds other files.
    DataError
        If stores, splits, features or predictions are invalid or do not match.

    Examples
    --------
    >>> import vcelltools as vc
    >>> found = vc.evaluate(["ridge"], ["leave-one-context-out"], "compared", stores=["stores/atlas"])
    >>> sorted(set(found.table["model"]))
    ['control-mean', 'perturbation-mean', 'ridge']
    """
    asked = _read_models(models)
    given = {"stores": [], "features": features and os.fspath(features), "network": [os.fspath(n) for n in network]}
    settings = msgspec.structs.replace(read_settings(given), split=None, seed=seed)
    opened = _open(stores, settings)
    target, files = Path(out), dict(predictions or {})
    reads = [*get_inputs(settings, opened), *splits, *files.values()]
    owns = [Target(target, "evaluation", owns=_is_evaluation, reuse=True)]
    guard_outputs(owns, reads=[r for r in reads if not isinstance(r, str) or r not in RULES], force=force)
    with locked(target):
        job = _Job(settings, opened, asked, target, force=force, progress=progress)
        wanted = [
            s
            for rule in splits
            for s in make_splits(os.fspath(rule), opened, job.screen, seen=seen, repeats=repeats, seed=seed)
        ]
        others = {
            name: read_effects(path, job.screen, pert_col=pert_col, control=control, context_col=context_col)
            for name, path in files.items()
        }
        return job.run(wanted, others)


def _open(stores: Sequence[str | os.PathLike | Store], settings: TrainSettings) -> tuple[Store, ...]:
    from vcelltools.stores.store import Store, open_store

    return tuple(s if isinstance(s, Store) else open_store(s) for s in stores) or open_stores(settings)


def _is_evaluation(dpath: Path) -> bool:
    return (dpath / MANIFEST).exists()


def _read_models(models: Sequence[str]) -> list[_Asked]:
    """Return the baselines and the requested models, each once."""
    out = {kind: _Asked(label=kind, kind=kind, objective=None) for kind in BASELINES}
    for text in models:
        kind, _, objective = text.partition(":")
        if kind not in MODELS and kind != "transformer":
            known = ", ".join([*MODELS, "transformer"])
            raise UsageError(f"model {kind!r} is not known", hint=f"one of: {known}", field="models")
        if objective:
            check_objective(objective)
            if kind in ("control-mean", "transformer"):
                raise UsageError(
                    f"{text}: {kind} has no objective", hint=f"pass {kind} without an objective", field="models"
                )
        out[text] = _Asked(label=text, kind=kind, objective=objective or None)
    return list(out.values())


class _Job:
    """A running evaluation."""

    def __init__(
        self, settings: TrainSettings, stores: tuple[Store, ...], models: list[_Asked], out: Path, *, force: bool,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.models, self.out, self.force, self.progress = models, out, force, progress
        self.settings = msgspec.structs.replace(settings, model="control-mean", objective=None)
        self.setup: Setup = make_setup(
            self.settings, stores, split=Split(where="the evaluation"), validate=False, progress=progress
        )
        self.screen: Screen = self.setup.screen
        if any(needs_pseudobulk(m.kind) for m in models):
            self.screen = replace(self.screen, pseudobulk=measure_pseudobulk(self.screen, progress=progress))

    def run(self, splits: list[NamedSplit], others: dict[str, np.ndarray]) -> Evaluation:
        """Score every model on every split, then write and return the tables."""
        import pandas as pd
        import pyarrow as pa

        scored = [r for name, effects in others.items() for r in self._score_external(name, effects, splits)]
        every = [(s, m) for s in splits for m in self.models]
        self.progress.start("evaluate", len(every), "models × splits")
        records: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / MANIFEST, self._describe(splits), force=True)
        reused = 0
        for split, model in every:
            signed = hash_text([self._sign(model), split.key, split.family, split.name])
            fpath = self.out / "parts" / f"{signed[:24]}.json"
            rows = None if self.force else self._read(fpath)
            if rows is None:
                rows = self._ask(split, model)
                write_json(fpath, rows, force=True, indent=None)
            else:
                reused += 1
            records += rows
            self.progress.advance(1)
        self.progress.finish()
        groups = pd.DataFrame(records + scored)
        table = make_table(groups)
        for label, frame in (("groups", groups), ("table", table)):
            columns = {c: pa.array(frame[c], from_pandas=True) for c in frame.columns}
            for extension in (".parquet", ".csv"):
                write_frame(self.out / f"{label}{extension}", columns, force=True)
        return Evaluation(
            out=self.out, table=table, groups=groups, n_splits=len(splits), n_models=len(self.models) + len(others),
            n_reused=reused,
        )  # fmt: skip

    def _describe(self, splits: list[NamedSplit]) -> dict[str, Any]:
        return {
            "version": __version__,
            "stores": {s.name: s.sha256 for s in self.setup.stores},
            "lines": self.screen.lines,
            "features": self.setup.identity["features"],
            "network": self.setup.identity.get("network"),
            "models": [m.label for m in self.models],
            "splits": [{"family": s.family, "name": s.name, "sha256": s.key} for s in splits],
        }

    def _sign(self, model: _Asked) -> str:
        """Return a hash of everything except the split that a result depends on."""
        body = self._describe([])
        del body["models"], body["splits"]
        settings = msgspec.structs.replace(self.settings, model=model.kind).to_json()
        settings = settings if model.kind == "transformer" else {}
        for key in ("out", "stores", "features", "network"):
            settings.pop(key, None)
        return repr((sorted(body.items(), key=lambda x: x[0]), model.label, sorted(settings.items())))

    def _read(self, fpath: Path) -> list[dict[str, Any]] | None:
        try:
            found = parse_json(fpath.read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, list) else None

    def _ask(self, split: NamedSplit, model: _Asked) -> list[dict[str, Any]]:
        """Return the scores of a model on the held-out groups of a split, one row per group."""
        screen = self.screen.with_split(split.split)
        rows = screen.rows("test")
        if not len(rows) or not len(screen.rows("train")):
            what = "test group" if not len(rows) else "training group"
            raise DataError(f"{split.split.where}: {split.name} has no {what}", hint="choose another split")
        ids = screen.ids(rows)
        more: dict[str, Any] = {}
        if model.kind == "transformer":
            predicted = self._train(split, ids)
        else:
            setup = self.setup
            effects = screen.get_effects(setup.raw_features_pf, network_pp=setup.effects.network_pp)
            fitted: Any = fit_model(model.kind, effects, model.objective)
            predicted = fitted.predict(*ids)
            if is_nested(model.kind, model.objective):
                more = {"choice": str(fitted.describe(*ids))}
        return [r | more for r in self._score(screen, rows, predicted, split, model.label)]

    def _train(self, split: NamedSplit, ids: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Train a transformer on a split, or resume it, and return its effects on the held-out groups."""
        from vcelltools.training.train import train_and_predict

        settings = msgspec.structs.replace(
            self.settings, model="transformer", out=str(self.out / "runs" / f"transformer-{split.key[:16]}")
        )
        return train_and_predict(settings, self.setup.stores, split.split, ids, progress=self.progress)

    def _score(
        self, screen: Screen, rows: np.ndarray, predicted: np.ndarray, split: NamedSplit, label: str
    ) -> list[dict[str, Any]]:
        measured = screen.effect_kg[rows].astype(np.float64)
        pert, line = screen.ids(rows)
        others = np.setdiff1d(np.arange(len(screen.groups)), rows) if split.among_all else np.zeros(0, np.int64)
        scores = evaluate_effects(
            predicted, measured, line, screen.target_p[pert], rival_rg=screen.effect_kg[others],
            rival_context_r=screen.ids(others)[1],
        )  # fmt: skip
        pearson = correlate_rows(predicted, measured)
        square, nothing = ((predicted - measured) ** 2).sum(axis=1), (measured**2).sum(axis=1)
        picked = screen.groups.iloc[rows]
        return [
            {
                "family": split.family, "split": split.name, "model": label, "line": r.line,
                "perturbation": r.perturbation, "cells": int(r.cells), "pds": float(scores.pds_k[i]),
                "pearson_delta": float(pearson[i]), "mae": float(scores.mae_k[i]), "square": float(square[i]),
                "nothing": float(nothing[i]),
            }
            for i, r in enumerate(picked.itertuples())
        ]  # fmt: skip

    def _score_external(self, name: str, effects: np.ndarray, splits: list[NamedSplit]) -> list[dict[str, Any]]:
        """Return the rows of a prediction on the held-out groups that it contains.

        Raises
        ------
        DataError
            If it contains none of them.
        """
        records: list[dict[str, Any]] = []
        for split in splits:
            screen = self.screen.with_split(split.split)
            rows = screen.rows("test")
            rows = rows[np.isfinite(effects[rows]).all(axis=1)]
            if len(rows):
                records += self._score(screen, rows, effects[rows], split, name)
        if not records:
            raise DataError(
                f"the prediction {name} contains none of the held-out groups",
                hint="predict perturbations that a split holds out, named as in the stores",
            )
        return records


def summarise(table: pd.DataFrame, family: str) -> list[list[Any]]:
    """Return the rows of a printed table: model, the metrics, and the paired gains in PDS and Pearson Δ."""
    part = table[table["family"] == family]
    out = []
    for model, rows in part.groupby("model", sort=False):
        by = rows.set_index("metric")
        row: list[Any] = [model, *(float(by.loc[m, "value"]) for m in METRICS)]
        for m in ("pds", "pearson_delta"):
            low, high = by.loc[m, "gain_low"], by.loc[m, "gain_high"]
            row.append(f"{low:+.3f} to {high:+.3f}" if np.isfinite(low) else "")
        out.append(row)
    return out
