"""``predict``: a run's prediction as an h5ad, streamed in blocks of cells.

Predicted cells are control cells of the same line, moved so that their mean becomes the mean of all the line's
controls plus the predicted effect, and their sparsity stays that of cells (:mod:`vcelltools.pipelines.move_cells`):
cells spread as cells do, and the luck of which controls were drawn is no part of the prediction. Genes outside the
basis move by what the perturbation did to them in training (:mod:`vcelltools.pipelines.fill`), else they are the
control cells' own.

Counts (the 2026 rules) are the predicted CP10K times the control cell's library size over 10,000, rounded at random
so that the expectation is kept (down or up with the probability of the fraction). Genes without an effect are not
touched then: a cell keeps its very counts, and no noise is added to noise.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io import open_dataset
from vcelltools.io.atomic import check_output
from vcelltools.pipelines.fill import Fill, Panel, make_panel, open_source, read_rows
from vcelltools.pipelines.memory import peak_memory, trim_heap
from vcelltools.pipelines.move_cells import ControlStats, make_stats, move_cells
from vcelltools.pipelines.train import final_part, load_best, predict_effects
from vcelltools.pipelines.train_run import RunFolder
from vcelltools.pipelines.train_setup import Setup, make_setup
from vcelltools.progress import SILENT, Progress
from vcelltools.results import Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy import sparse

    from vcelltools.pipelines.store import Store
    from vcelltools.pipelines.train_settings import TrainSettings

_BLOCK_BYTES = 8 << 20  # of dense float64 cells that are made at a time
_STATS_CELLS = 256
_POOL = 2000  # control cells of a line that predictions are made from


@dataclass(frozen=True, kw_only=True)
class PredictResult(Result):
    """What was written.

    Attributes
    ----------
    n_filled, n_control_genes
        Genes outside the basis that move by a training effect for some perturbation, and that never move.
    rules
        The challenge whose rules were checked, if any.
    """

    out: Path
    model: str
    n_cells: int
    n_genes: int
    n_perturbations: int
    n_basis: int
    n_filled: int
    n_control_genes: int
    lines: tuple[str, ...]
    rules: int | None
    warnings: tuple[str, ...]
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One perturbation in one line, and how many cells of it."""

    perturbation: str
    line: str
    n_cells: int


def predict(
    run: str | os.PathLike,
    out: str | os.PathLike,
    *,
    perturbations: str | os.PathLike | None = None,
    lines: Sequence[str] = (),
    cells: int | None = None,
    rules: int | None = None,
    genes: str | os.PathLike | None = None,
    source: str | os.PathLike | None = None,
    basis_only: bool = False,
    pert_col: str = "target_gene",
    control: str | None = None,
    context_col: str = "context",
    stores: Sequence[Store] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PredictResult:
    """Write a run's prediction.

    Parameters
    ----------
    perturbations
        A ``pert_counts.csv`` (``target_gene``, ``n_cells``, ``context``); by default the held-out groups, as large
        as they are in the stores.
    lines
        Cell lines to predict in; by default those with held-out groups.
    cells
        Cells a perturbation where the file states none.
    rules
        2025: log1p CP10K with controls. 2026: integer counts without controls. None: as 2025, no rules but for the
        values.
    genes
        The genes wanted, in order; by default the source's.
    source
        The file behind the store, where it has moved.
    basis_only
        Write the basis genes alone; needs no source.

    Raises
    ------
    DataError
        Where run and stores disagree, a perturbation cannot be predicted, or the result breaks the rules.
    """
    options = {k: v for k, v in locals().items() if k not in ("run", "out", "stores")}
    _check_request(out, rules, force)
    folder = RunFolder(Path(run))
    setup = make_setup(folder.read_settings(), stores, progress=progress)
    folder.compare_vocabulary(setup)
    return _predict(setup, folder, out, **options)


def predict_baseline(
    kind: str,
    out: str | os.PathLike,
    *,
    settings: TrainSettings,
    stores: Sequence[Store] | None = None,
    rules: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> PredictResult:
    """Fit a baseline on the stores of ``settings`` and write its prediction of the held-out groups.

    ``kind`` is ``control-mean``, ``perturbation-mean`` or ``ridge``; errors as in :func:`predict`.
    """
    from vcelltools.model.baselines import BASELINES

    if kind not in BASELINES:
        raise UsageError(f"baseline {kind}: unknown", hint=", ".join(BASELINES))
    _check_request(out, rules, force)
    setup = make_setup(msgspec.structs.replace(settings, model=kind), stores, progress=progress)
    return _predict(setup, None, out, rules=rules, force=force, progress=progress)


def _check_request(out: str | os.PathLike, rules: int | None, force: bool) -> None:
    if rules not in (None, 2025, 2026):
        raise UsageError(f"there are no rules for {rules}", hint="2025 or 2026")
    check_output(out, force=force)


def _predict(
    setup: Setup,
    folder: RunFolder | None,
    out: str | os.PathLike,
    *,
    perturbations: str | os.PathLike | None = None,
    lines: Sequence[str] = (),
    cells: int | None = None,
    rules: int | None = None,
    genes: str | os.PathLike | None = None,
    source: str | os.PathLike | None = None,
    basis_only: bool = False,
    pert_col: str = "target_gene",
    control: str | None = None,
    context_col: str = "context",
    force: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PredictResult:
    target = Path(out)
    requests = _make_requests(setup, perturbations, tuple(lines), cells, control)
    store_id = {
        name: k for k, s in enumerate(setup.stores) for name in setup.screen.lines if name.startswith(f"{s.name} / ")
    }
    used = {store_id[r.line] for r in requests}
    if len(used) > 1:
        wanted = sorted({r.line for r in requests})
        raise UsageError(
            f"the held-out groups lie in {len(used)} stores, whose genes differ: {', '.join(wanted)}"
            if not lines
            else f"the lines belong to {len(used)} stores, whose genes differ: {', '.join(wanted)}",
            hint=f"one store a prediction: --line {shlex.quote(wanted[0])}",
        )
    store = setup.stores[used.pop()]
    writer = _Writer(
        setup, store, requests, rules=rules, source=Path(source) if source else None, basis_only=basis_only, seed=seed,
        labels={"pert_col": pert_col, "context_col": context_col, "control": control or _control_label(store, rules)},
    )  # fmt: skip
    writer.choose_genes(genes)
    effects = get_effects(folder, setup, requests)
    n_cells = writer.write(target, effects, force=force, progress=progress)
    warnings = check_rules(target, rules, writer, n_cells, genes, perturbations, progress)
    moved = writer.moved_m
    outside = writer.panel.basis_m < 0
    return PredictResult(
        out=target,
        model=setup.settings.model,
        n_cells=n_cells,
        n_genes=len(writer.names),
        n_perturbations=len({r.perturbation for r in requests}),
        n_basis=int((~outside).sum()),
        n_filled=int((moved & outside).sum()),
        n_control_genes=int((~moved & outside).sum()),
        lines=tuple(sorted({r.line for r in requests})),
        rules=rules,
        warnings=(*writer.warnings, *warnings),
        peak_memory_bytes=peak_memory(),
    )


def _control_label(store: Store, rules: int | None) -> str:
    return "non-targeting" if rules else str(store.manifest["labels"]["control"])


def _make_requests(
    setup: Setup, path: str | os.PathLike | None, lines: tuple[str, ...], cells: int | None, control: str | None
) -> list[Request]:
    """Return what is to be predicted, in order.

    Raises
    ------
    DataError
        For a perturbation or line that is not known, with the nearest one.
    """
    groups = setup.screen.groups
    wanted = [_find_line(setup.screen.lines, name) for name in lines]
    held = groups[groups["part"] == final_part(setup)]
    if path is None:
        picked = held[held["line"].isin(wanted)] if wanted else held
        if not len(picked):
            raise DataError(f"nothing is held out in {', '.join(lines)}", hint="--perturbations")
        return [
            Request(perturbation=r.perturbation, line=r.line, n_cells=cells or int(r.cells))
            for r in picked.itertuples()
        ]
    from vcelltools.scoring.checks import read_perturbations

    wanted = wanted or sorted(held["line"].unique())
    label = control or str(setup.stores[0].manifest["labels"]["control"])
    table = read_perturbations(path, label)
    out = []
    for context, perts in table.items():
        places = wanted if context is None else [_find_line(setup.screen.lines, context)]
        out += [
            Request(perturbation=p, line=line, n_cells=n or cells or 400) for line in places for p, n in perts.items()
        ]
    return out


def _find_line(lines: list[str], name: str) -> str:
    hits = [x for x in lines if name in (x, x.split(" / ", 1)[1])]
    if len(hits) != 1:
        raise DataError(
            f"{f'{len(hits)} lines are' if hits else 'no line is'} named {name!r}",
            hint=f"lines: {', '.join(lines[:12])}",
        )
    return hits[0]


def get_effects(folder: RunFolder | None, setup: Setup, requests: list[Request]) -> np.ndarray:
    """Return the predicted effects (requests, g) on the basis.

    Raises
    ------
    DataError
        For perturbations that the model has neither seen nor has features for.
    """
    position = {p: i for i, p in enumerate(setup.screen.perturbations)}
    line_id = {name: i for i, name in enumerate(setup.screen.lines)}
    unknown = sorted({r.perturbation for r in requests} - position.keys())
    if unknown:
        raise DataError(
            f"{len(unknown)} perturbations are not in the stores' vocabulary ({', '.join(unknown[:5])})",
            hint="only perturbations of some store, with or without cells to train on, can be predicted",
        )
    pert = np.array([position[r.perturbation] for r in requests], np.int64)
    line = np.array([line_id[r.line] for r in requests], np.int64)
    kind = setup.settings.model
    if folder is None or kind != "transformer":
        from vcelltools.model.baselines import fit_baseline

        return fit_baseline(kind, setup.effects).predict(pert, line)
    import jax

    from vcelltools.model.step import make_effect

    model = setup.model_config()
    effect = make_effect(model, setup.step_config(jax.default_backend()))
    best = load_best(folder, model)
    effects = predict_effects(setup, effect, best.params, pert, line, [float(best.share)])[0]
    setup.release_stores()
    gc.collect()
    trim_heap()  # compiling freed more than 100 MB
    return effects


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """The control cells that predictions of one line are made from.

    Attributes
    ----------
    counts
        (n, m) CSR float32: raw counts over all genes of the panel.
    library
        (n,) float64: molecules of each cell, at least 1.
    """

    counts: sparse.csr_matrix
    library: np.ndarray
    target_sum: float

    @property
    def n_cells(self) -> int:
        """Cells."""
        return int(self.counts.shape[0])

    def log1p(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some cells as log1p CP10K, float64."""
        out = self.counts[rows].astype(np.float64)
        out.data = np.log1p(out.data * np.repeat(self.target_sum / self.library[rows], np.diff(out.indptr)))
        return out

    @cached_property
    def stats(self) -> ControlStats:
        """The stats of all cells."""
        return self.make_stats(np.arange(self.n_cells))

    def make_stats(self, rows: np.ndarray) -> ControlStats:
        """Return the stats of the cells drawn."""
        total, expressing = np.zeros((2, self.counts.shape[1]))
        for a in range(0, len(rows), _STATS_CELLS):
            values = self.log1p(rows[a : a + _STATS_CELLS])
            total += np.bincount(values.indices, values.data, len(total))
            expressing += np.bincount(values.indices, minlength=len(total))
        one = float(np.log1p(self.target_sum / np.median(self.library)))
        return make_stats(total, expressing, len(rows), one)


class _Writer:
    """Makes the cells block by block and writes them."""

    def __init__(
        self,
        setup: Setup,
        store: Store,
        requests: list[Request],
        *,
        rules: int | None,
        source: Path | None,
        basis_only: bool,
        seed: int,
        labels: dict[str, str],
    ) -> None:
        self.setup, self.store, self.requests, self.rules = setup, store, requests, rules
        self.seed, self.labels = seed, labels
        self.counts = rules == 2026
        self.warnings: list[str] = []
        self.source, self.basis_only = source, basis_only
        if basis_only:
            genes = setup.genes
            everything = np.arange(len(genes))
            self.panel = Panel(names=genes, basis_m=everything, sums_m=np.full(len(genes), -1), keys=[])
            self.fill = None
        else:
            with open_source(store, source) as file:
                self.panel = make_panel(store, file)
            assert setup.sampler.split is not None
            self.fill = Fill(setup.stores, setup.sampler.split, self.panel)
        self.names = self.panel.names
        self.order: np.ndarray | None = None
        self.moved_m = np.zeros(len(self.panel.names), bool)

    def _read_pool(self, line: str) -> Pool:
        """Read up to 2,000 control cells of a line: counts over all genes, and library sizes."""
        _, pool = self.setup._pools[line]
        rng = np.random.default_rng([self.seed, self.setup.screen.lines.index(line)])
        rows = np.sort(rng.choice(pool, min(_POOL, len(pool)), replace=False))
        if self.basis_only:
            counts = self.store.counts(rows).astype(np.float32)
        else:
            with open_source(self.store, self.source) as file:
                counts = read_rows(file, self.store.obs["source_row"].to_numpy(np.int64)[rows])
        library = np.maximum(np.asarray(self.store.library_size[rows], np.float64), 1.0)
        return Pool(counts=counts, library=library, target_sum=float(self.store.manifest["target_sum"]))

    def choose_genes(self, path: str | os.PathLike | None) -> None:
        """Keep to a list of genes, in its order; genes that the source lacks are zero, and said."""
        if path is None:
            return
        from vcelltools.scoring.checks import read_genes

        self.names = read_genes(path)
        at = {g: j for j, g in reversed(list(enumerate(self.panel.names)))}
        self.order = np.array([at.get(g, -1) for g in self.names], np.int64)
        lacking = int((self.order < 0).sum())
        if lacking == len(self.names):
            raise DataError(f"{path}: none of its {lacking:,} genes is in the source", hint="compare the gene names")
        if lacking:
            self.warnings.append(f"{lacking:,} genes of {path} are not in the source; they are zero")

    def write(self, target: Path, effects: np.ndarray, *, force: bool, progress: Progress) -> int:
        """Stream all cells; return how many."""
        import pandas as pd

        from vcelltools.io.write import H5adWriter

        parts: list[tuple[str, str, int]] = []
        total = sum(r.n_cells for r in self.requests)
        progress.start("predict", total, "cells")
        var = pd.DataFrame(index=pd.Index(self.names, name=None))
        uns = {"vcelltools": {"model": self.setup.settings.model, "values": "counts" if self.counts else "log1p CP10K"}}
        dtype = "int32" if self.counts else "float32"
        with H5adWriter(
            target, n_genes=len(self.names), var=var, force=force, layout="csr", dtype=dtype, uns=uns
        ) as file:
            for line in sorted({r.line for r in self.requests}):  # one line's controls in memory at a time
                pool = self._read_pool(line)
                if not self.counts:
                    for rows in self._blocks(np.arange(pool.n_cells)):
                        file.append_csr(*self._pack(pool.log1p(rows).toarray()))
                    parts.append((self.labels["control"], line, pool.n_cells))
                for i, request in enumerate(self.requests):
                    if request.line != line:
                        continue
                    for block in self._cells(i, request, effects[i], pool):
                        file.append_csr(*block)
                        progress.advance(len(block[0]) - 1)
                    parts.append((request.perturbation, line, request.n_cells))
                del pool
            sizes = [n for _, _, n in parts]
            contexts = np.repeat([line.split(" / ", 1)[1] for _, line, _ in parts], sizes)
            obs = pd.DataFrame(
                {
                    self.labels["pert_col"]: pd.Categorical(np.repeat([p for p, _, _ in parts], sizes)),
                    self.labels["context_col"]: pd.Categorical(contexts),
                },
                index=[f"cell_{i}" for i in range(sum(sizes))],
            )
            file.finish(obs=obs)
        progress.finish()
        return sum(sizes)

    def _blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, _BLOCK_BYTES // (8 * len(self.panel.names)))
        for a in range(0, len(rows), step):
            yield rows[a : a + step]

    def _cells(
        self, i: int, request: Request, effect_g: np.ndarray, pool: Pool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield blocks of predicted cells: control cells drawn by the seed, moved by the effect."""
        rng = np.random.default_rng([self.seed, 1, i])
        rounds = [rng.permutation(pool.n_cells) for _ in range(-(-request.n_cells // pool.n_cells))]
        picked = np.concatenate(rounds)[: request.n_cells]
        basis = self.panel.basis_m
        effect = self.fill.effect(request.perturbation) if self.fill else np.zeros(len(basis))
        effect[basis >= 0] = effect_g[basis[basis >= 0]]
        self.moved_m |= effect != 0
        stats = pool.stats
        if not self.counts:  # to the mean of the line, from that of the cells drawn
            drawn = pool.make_stats(picked)
            effect, stats = effect + stats.mean_m - drawn.mean_m, drawn
        for rows in self._blocks(picked):
            cells = move_cells(pool.log1p(rows).toarray(), effect, stats, rng)
            if self.counts:
                rate = np.expm1(cells.astype(np.float64)) * (pool.library[rows] / pool.target_sum)[:, None]
                whole = np.rint(rate)  # a log1p and its inverse miss the integers by their rounding
                rate = np.where(np.abs(rate - whole) < 1e-4 * np.maximum(whole, 1.0), whole, rate)
                cells = np.floor(rate + rng.random(rate.shape)).astype(np.int32)
            yield self._pack(cells)

    def _pack(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a block as CSR, in the wanted order of genes."""
        if self.order is not None:
            cells = np.where(self.order >= 0, cells[:, np.maximum(self.order, 0)], 0)
        rows, columns = np.nonzero(cells)
        indptr = np.zeros(len(cells) + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(cells)), out=indptr[1:])
        dtype = np.int32 if self.counts else np.float32
        return indptr, columns.astype(np.int32), cells[rows, columns].astype(dtype)


def check_rules(
    target: Path,
    rules: int | None,
    writer: _Writer,
    n_cells: int,
    genes: str | os.PathLike | None,
    perturbations: str | os.PathLike | None,
    progress: Progress,
) -> tuple[str, ...]:
    """Check the written file by the table of rules; return the warnings.

    Raises
    ------
    DataError
        With every broken rule; the file is taken away.
    """
    from vcelltools.scoring.checks import check_2025, check_2026, read_genes, read_perturbations
    from vcelltools.scoring.rules import RULES_2026, get_rules_2025

    names = read_genes(genes) if genes is not None else None
    pert_col, control = writer.labels["pert_col"], writer.labels["control"]
    with open_dataset(target, layer="X") as data:
        if rules == 2026:
            contexts = tuple(sorted({r.line.split(" / ", 1)[1] for r in writer.requests}))
            report = check_2026(
                data, RULES_2026, genes=names, pert_col=pert_col, control=control,
                context_col=writer.labels["context_col"], contexts=contexts,
                perturbations=read_perturbations(perturbations, control) if perturbations else None,
                cells_per_perturbation=None, max_cells=None, progress=progress,
            )  # fmt: skip
        else:
            report = check_2025(
                data, get_rules_2025(), genes=names, pert_col=pert_col, control=control,
                max_cells=None if rules else n_cells, allow_discrete=False, progress=progress,
            )  # fmt: skip
    if report.problems:
        target.unlink()
    report.raise_problems(f"{target} was not kept: it breaks the rules")
    return tuple(report.warnings) if rules else ()
