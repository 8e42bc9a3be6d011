"""``predict``: write the prediction of a run as an h5ad file, in blocks of cells.

Predicted cells are control cells of the same line, shifted so that their mean equals the mean of all controls of the
line plus the predicted effect, with the sparsity of cells (:mod:`vcelltools.prediction.shifted_cells`). They vary as
cells do, and the random draw of controls does not change the mean. Genes outside the basis are shifted by their
training effects (:mod:`vcelltools.prediction.genes_outside`), or keep the values of the control cells.

Counts (rules of 2026) are the predicted CP10K times the library size of the control cell over 10,000, rounded up or
down at random so that the expectation is kept. Genes without an effect keep the original counts of the cell, so that no
noise is added.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.io import open_dataset
from vcelltools.io.origin import describe_origin
from vcelltools.io.textfile import read_text
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.model.baselines import BASELINES
from vcelltools.model.combination import Interaction, combine
from vcelltools.names import read_lines
from vcelltools.prediction.emission import EMISSIONS, draw_counts, estimate_dispersion, get_factors
from vcelltools.prediction.emitter import Emitter, fit_emitter
from vcelltools.prediction.genes_outside import Fill, Panel, make_panel, open_source, read_cells
from vcelltools.prediction.result import PredictResult
from vcelltools.prediction.shifted_cells import ControlStats, make_stats, move_cells
from vcelltools.prediction.unseen import MEASURED, Vocabulary, extend
from vcelltools.runtime.memory import peak_memory, trim_heap
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.lines import find_line
from vcelltools.stores.directions import get_senses, parse_direction
from vcelltools.training.inputs import Setup, get_inputs, make_setup
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.train import final_part, load_best, predict_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy import sparse

    from vcelltools.stores.store import Store
    from vcelltools.training.settings import TrainSettings

_BLOCK_BYTES = 8 << 20  # dense float64 cells per block
_STATS_CELLS = 256
_POOL = 2000  # maximum number of control cells per line


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The options of a prediction; see :func:`predict`."""

    perturbations: str | os.PathLike | None = None
    lines: tuple[str, ...] = ()
    cells: int | None = None
    rules: int | None = None
    genes: str | os.PathLike | None = None
    source: str | os.PathLike | None = None
    basis_only: bool = False
    pert_col: str = "target_gene"
    control: str | None = None
    context_col: str = "context"
    emission: str = "resampled"
    fit_emission: bool = True
    direction: str | None = None
    seed: int = 0

    def get_control(self, store: Store) -> str:
        """Return the label of control cells."""
        return self.control or ("non-targeting" if self.rules else str(store.manifest["labels"]["control"]))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One perturbation in one line, and its number of cells."""

    perturbation: str
    line: str
    n_cells: int


@checked
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
    emission: str = "resampled",
    fit_emission: bool = True,
    direction: str | None = None,
    stores: Sequence[Store] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> PredictResult:
    """Write the prediction of a run.

    Parameters
    ----------
    perturbations
        A ``pert_counts.csv`` (``target_gene``, ``n_cells``, ``context``). By default the held-out groups, with the same
        numbers of cells as in the stores.
    lines
        Cell lines to predict in, as ``STORE.LINE`` or only the line; by default those with held-out groups.
    cells
        Number of cells per perturbation if the file has no such column.
    rules
        2025: log1p CP10K with controls. 2026: integer counts without controls. None: as 2025, but only the values are
        checked.
    genes
        List of the genes to write, in order; by default those of the source.
    source
        The source of the store, if it has moved.
    basis_only
        Write only the basis genes, which needs no source.
    emission
        How cells are generated from an effect: ``resampled`` (shifted controls), ``counts`` (negative binomial, with
        the dispersions of the line) or ``pseudobulk`` (one profile repeated).
    fit_emission
        Shrink small effects so that predicted cells have as many significant genes as true ones; see
        :mod:`vcelltools.prediction.emitter`.
    direction
        How the perturbations to predict change their targets, such as ``crispri`` or ``crispra``. By default it is that
        of the held-out group, or of the other perturbations in the line. It needs stores that record directions.

    Raises
    ------
    DataError
        If run and stores do not match, or the result breaks the rules.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.predict("runs/mean", "predicted.h5ad", basis_only=True)
    >>> result.n_genes
    30
    """
    options = _Options(
        perturbations=perturbations, lines=tuple(lines), cells=cells, rules=rules, genes=genes, source=source,
        basis_only=basis_only, pert_col=pert_col, control=control, context_col=context_col, emission=emission,
        fit_emission=fit_emission, direction=direction, seed=seed,
    )  # fmt: skip
    if emission not in EMISSIONS:
        raise UsageError(
            f"emission {emission!r} is not known", hint=f"one of: {', '.join(EMISSIONS)}", field="emission"
        )
    folder = RunFolder(Path(run))
    settings = folder.read_settings()
    if settings.model == "diffusion":
        from vcelltools.prediction.diffusion import draw_cells

        given = {"rules": rules, "genes": genes, "source": source, "basis_only": basis_only, "control": control}
        given["direction"] = direction
        given["emission"] = emission if emission != EMISSIONS[0] else None
        if refused := [spell(k) for k, v in given.items() if v]:
            raise UsageError(
                f"{', '.join(refused)} cannot be used with a diffusion model, which only draws counts of its basis"
            )
        return draw_cells(
            folder, settings, out, stores=stores, perturbations=_read_names(perturbations), lines=lines, cells=cells,
            pert_col=pert_col, context_col=context_col, force=force, seed=seed, progress=progress,
        )  # fmt: skip
    reads = [run, perturbations, genes, source, *get_inputs(settings, stores)]
    _check_request(out, rules, force, reads)
    setup = make_setup(settings, stores, progress=progress)
    folder.compare_vocabulary(setup)
    return _predict(setup, folder, Path(out), options, force=force, progress=progress)


def _read_names(fpath: str | os.PathLike | None) -> list[str] | None:
    """Return the names in a list with one name per line."""
    if fpath is None:
        return None
    return read_lines(read_text(fpath, what="a list of perturbations, one per line,"))


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

    ``kind`` is ``control-mean``, ``perturbation-mean`` or ``ridge``. Errors are as in :func:`predict`.
    """
    if kind not in BASELINES:
        raise UsageError(f"baseline {kind!r} is not known", hint=f"one of: {', '.join(BASELINES)}")
    _check_request(out, rules, force, get_inputs(settings, stores))
    setup = make_setup(msgspec.structs.replace(settings, model=kind), stores, progress=progress)
    return _predict(setup, None, Path(out), _Options(rules=rules), force=force, progress=progress)


def _check_request(out: str | os.PathLike, rules: int | None, force: bool, reads: Sequence[object]) -> None:
    if rules not in (None, 2025, 2026):
        raise UsageError(f"there are no rules for {rules}", hint="choose 2025 or 2026")
    guard_outputs([Target(out, "hdf5")], reads=reads, force=force)


def _predict(
    setup: Setup, folder: RunFolder | None, target: Path, options: _Options, *, force: bool, progress: Progress
) -> PredictResult:
    requests = _make_requests(setup, options)
    used = {setup.screen.places[r.line][0] for r in requests}
    if len(used) > 1:
        wanted = sorted({r.line for r in requests})
        raise UsageError(
            f"the held-out groups are in {len(used)} stores with different genes: {', '.join(wanted)}"
            if not options.lines
            else f"the lines are in {len(used)} stores with different genes: {', '.join(wanted)}",
            hint=f"predict from one store at a time: {spell('lines')} {shlex.quote(wanted[0])}",
        )
    store = setup.stores[used.pop()]
    writer = _Writer(setup, folder, store, requests, options)
    vocabulary = extend(setup, [(r.perturbation, r.line) for r in requests], _read_direction(setup, options.direction))
    effects = _predict_effects(folder, vocabulary, requests)
    writer.warnings += vocabulary.warn()
    writer.evidence, writer.vocabulary = vocabulary.evidence, vocabulary
    if options.fit_emission:
        writer.emitter = fit_emitter(
            setup, store, partial(_get_effects, folder, setup), seed=options.seed, progress=progress
        )
    n_cells = writer.write(target, effects, force=force, progress=progress)
    warnings = check_rules(target, writer, n_cells, progress)
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
        rules=options.rules,
        warnings=(*writer.warnings, *warnings),
        peak_memory_bytes=peak_memory(),
    )


def _read_direction(setup: Setup, text: str | None) -> int | None:
    """Return the direction of the option; raise a UsageError if it is not known, or the stores have no directions."""
    if text is None:
        return None
    try:
        name = parse_direction(text, where=spell("direction"))
    except DataError as e:
        raise UsageError(e.message, hint=e.hint, field="direction") from e
    if setup.effects.direction_k is None:
        raise UsageError(
            f"{spell('direction', text)}: no store records the direction of its perturbations",
            hint=f"build the stores with {spell('direction')} or {spell('direction_col')}", field="direction",
        )  # fmt: skip
    return int(get_senses(np.array([name]))[0])


def _make_requests(setup: Setup, options: _Options) -> list[Request]:
    """Return the requests, in order.

    Raises
    ------
    DataError
        If a line is not known, or nothing is held out.
    """
    groups = setup.screen.groups
    wanted = [find_line(setup.screen.places, name) for name in options.lines]
    held = groups[groups["part"] == final_part(setup)]
    path, cells = options.perturbations, options.cells
    if path is None:
        picked = held[held["line"].isin(wanted)] if wanted else held
        if not len(picked):
            raise DataError(f"nothing is held out in {', '.join(options.lines)}", hint=f"pass {spell('perturbations')}")
        return [
            Request(perturbation=r.perturbation, line=r.line, n_cells=cells or int(r.cells))
            for r in picked.itertuples()
        ]
    from vcelltools.challenge.checks import read_perturbations

    wanted = wanted or sorted(held["line"].unique())
    label = options.control or str(setup.stores[0].manifest["labels"]["control"])
    table = read_perturbations(path, label)
    out = []
    for context, perts in table.items():
        places = wanted if context is None else [find_line(setup.screen.places, context)]
        out += [
            Request(perturbation=p, line=line, n_cells=n or cells or 400) for line in places for p, n in perts.items()
        ]
    return out


def get_effects(folder: RunFolder | None, setup: Setup, requests: list[Request]) -> np.ndarray:
    """Return the predicted effects (requests, g) on the basis.

    If no store has a perturbation, it is predicted from its features or network. Without them it gets the mean effect
    of all perturbations in its line (or in all lines, if none was measured in it), as scaled by the model. A
    combination, ``A+B`` or ``A|B``, is predicted from its parts (:mod:`vcelltools.model.combination`).
    """
    return _predict_effects(folder, extend(setup, [(r.perturbation, r.line) for r in requests]), requests)


def _predict_effects(folder: RunFolder | None, vocabulary: Vocabulary, requests: list[Request]) -> np.ndarray:
    line_id = {name: i for i, name in enumerate(vocabulary.setup.screen.lines)}
    pert = np.array([vocabulary.position[r.perturbation] for r in requests], np.int64)
    line = np.array([line_id[r.line] for r in requests], np.int64)
    return _get_effects(folder, vocabulary.setup, pert, line, shared=vocabulary.shared)


def _get_effects(
    folder: RunFolder | None,
    setup: Setup,
    pert: np.ndarray,
    line: np.ndarray,
    *,
    shared: frozenset[tuple[int, int]] = frozenset(),
) -> np.ndarray:
    """Return the effects (k, g) of perturbations in lines; those of ``shared`` are predicted by the mean effect."""
    kind = setup.settings.model
    if folder is None or kind != "transformer":
        return setup.fitted.predict(pert, line)
    if setup.effects.parts_p:
        ask = partial(_run_network, folder, setup, shared=shared)
        effects = combine(setup.effects, Interaction(setup.effects), ask, pert, line)
    else:
        effects = _run_network(folder, setup, pert, line, shared=shared)
    setup.release_stores()
    gc.collect()
    trim_heap()  # returns more than 100 MB that compiling freed
    return effects


def _run_network(
    folder: RunFolder, setup: Setup, pert: np.ndarray, line: np.ndarray, *, shared: frozenset[tuple[int, int]]
) -> np.ndarray:
    """Return the effects (k, g) that a transformer predicts; those of ``shared`` are predicted by the mean effect."""
    import jax

    from vcelltools.model.step import make_effect

    known = np.array([pair not in shared for pair in zip(pert.tolist(), line.tolist(), strict=True)], bool)
    effects = np.zeros((len(pert), len(setup.genes)))
    effects[~known] = setup.get_shared(pert[~known], line[~known])
    if known.any():
        model = setup.model_config()
        effect = make_effect(model, setup.step_config(jax.default_backend()))
        best = load_best(folder, model)
        effects[known] = predict_effects(setup, effect, best.params, pert[known], line[known], [float(best.share)])[0]
    return effects


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """The control cells of one line that predictions start from.

    Attributes
    ----------
    counts
        (n, m) CSR float32: counts over all genes of the panel.
    library
        (n,) float64: total counts of each cell, at least 1.
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
    def variance_m(self) -> np.ndarray:
        """(m,) float64: variance of log1p CP10K between cells."""
        square = np.zeros(self.counts.shape[1])
        for a in range(0, self.n_cells, _STATS_CELLS):
            values = self.log1p(np.arange(a, min(a + _STATS_CELLS, self.n_cells)))
            square += np.bincount(values.indices, values.data**2, len(square))
        return np.maximum(square / self.n_cells - self.stats.mean_m**2, 0.0)

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of the total counts, and dispersion, of each gene; both (m,)."""
        total = np.asarray(self.counts.sum(axis=0, dtype=np.float64)).ravel()
        square = np.bincount(self.counts.indices, self.counts.data.astype(np.float64) ** 2, self.counts.shape[1])
        return total / self.library.sum(), estimate_dispersion(total, square, self.library)

    @cached_property
    def stats(self) -> ControlStats:
        """Statistics of all cells."""
        return self.make_stats(np.arange(self.n_cells))

    def make_stats(self, rows: np.ndarray) -> ControlStats:
        """Return the statistics of some cells."""
        total, expressing = np.zeros((2, self.counts.shape[1]))
        for a in range(0, len(rows), _STATS_CELLS):
            values = self.log1p(rows[a : a + _STATS_CELLS])
            total += np.bincount(values.indices, values.data, len(total))
            expressing += np.bincount(values.indices, minlength=len(total))
        one = float(np.log1p(self.target_sum / np.median(self.library)))
        return make_stats(total, expressing, len(rows), one)


class _Writer:
    """Generates the cells in blocks and writes them."""

    def __init__(
        self, setup: Setup, folder: RunFolder | None, store: Store, requests: list[Request], options: _Options
    ) -> None:
        self.setup, self.store, self.requests, self.options = setup, store, requests, options
        self.origin = [*([] if folder is None else [folder.dpath]), *(s.path for s in setup.stores)]
        self.control, self.counts = options.get_control(store), options.rules == 2026
        self.warnings: list[str] = []
        self.emitter = Emitter()
        self.evidence: dict[tuple[str, str], str] = {}
        self.vocabulary: Vocabulary | None = None
        self._source = Path(options.source) if options.source else None
        if options.basis_only:
            genes = setup.genes
            everything = np.arange(len(genes))
            self.panel = Panel(names=genes, basis_m=everything, sums_m=np.full(len(genes), -1), keys=[])
            self.get_fill: Callable[[int], Fill] | None = None
        else:
            with open_source(store, self._source) as file:
                self.panel = make_panel(store, file)
            assert setup.sampler.split is not None
            self.get_fill = cache(partial(Fill, setup.stores, setup.sampler.split, self.panel))
        self.names = self.panel.names
        self.order: np.ndarray | None = None
        self.moved_m = np.zeros(len(self.panel.names), bool)
        self._choose_genes(options.genes)

    def _read_pool(self, line: str) -> Pool:
        """Read up to 2,000 control cells of a line: counts over all genes, and library sizes."""
        _, pool = self.setup._pools[line]
        rng = np.random.default_rng([self.options.seed, self.setup.screen.lines.index(line)])
        rows = np.sort(rng.choice(pool, min(_POOL, len(pool)), replace=False))
        if self.options.basis_only:
            counts = self.store.counts(rows).astype(np.float32)
        else:
            with open_source(self.store, self._source, compare=False) as file:  # its content was compared before
                counts = read_cells(self.store, file, self.panel, rows)
        library = np.maximum(np.asarray(self.store.library_size[rows], np.float64), 1.0)
        return Pool(counts=counts, library=library, target_sum=float(self.store.manifest["target_sum"]))

    def _choose_genes(self, path: str | os.PathLike | None) -> None:
        """Keep the genes of a list, in its order; genes that the source lacks are zero, with a warning."""
        if path is None:
            return
        from vcelltools.challenge.checks import read_genes

        self.names = read_genes(path)
        at = {g: j for j, g in reversed(list(enumerate(self.panel.names)))}
        self.order = np.array([at.get(g, -1) for g in self.names], np.int64)
        lacking = int((self.order < 0).sum())
        if lacking == len(self.names):
            raise DataError(
                f"{path}: none of its {lacking:,} genes is in the source", hint="compare the gene names of both files"
            )
        if lacking:
            self.warnings.append(f"{lacking:,} genes of {path} are not in the source and are set to zero")

    def write(self, target: Path, effects: np.ndarray, *, force: bool, progress: Progress) -> int:
        """Write all cells, and return their number."""
        import pandas as pd

        from vcelltools.io.write.h5ad import H5adWriter

        parts: list[tuple[str, str, int]] = []
        total = sum(r.n_cells for r in self.requests)
        progress.start("predict", total, "cells")
        var = pd.DataFrame(index=pd.Index(self.names, name=None))
        facts = {
            "model": self.setup.settings.model, "values": "counts" if self.counts else "log1p CP10K",
            "emission": self.options.emission,
        }  # fmt: skip
        uns = {"vcelltools": {**facts, **describe_origin(self.origin)}}
        dtype = "int32" if self.counts else "float32"
        with H5adWriter(
            target, n_genes=len(self.names), var=var, force=force, layout="csr", dtype=dtype, uns=uns
        ) as file:
            for line in sorted(
                {r.line for r in self.requests}
            ):  # only the controls of one line are in memory at a time
                pool = self._read_pool(line)
                if not self.counts:
                    for rows in self._blocks(np.arange(pool.n_cells)):
                        file.append_csr(*self._pack(pool.log1p(rows).toarray()))
                    parts.append((self.control, line, pool.n_cells))
                for i, request in enumerate(self.requests):
                    if request.line != line:
                        continue
                    for block in self._cells(i, request, effects[i], pool):
                        file.append_csr(*block)
                        progress.advance(len(block[0]) - 1)
                    parts.append((request.perturbation, line, request.n_cells))
                del pool
            sizes = [n for _, _, n in parts]
            contexts = np.repeat([self.setup.screen.places[line][1] for _, line, _ in parts], sizes)
            obs = pd.DataFrame(
                {
                    self.options.pert_col: pd.Categorical(np.repeat([p for p, _, _ in parts], sizes)),
                    self.options.context_col: pd.Categorical(contexts),
                },
                index=[f"cell_{i}" for i in range(sum(sizes))],
            )
            if set(self.evidence.values()) - {MEASURED}:  # a column is written unless everything was measured
                said = [self.evidence.get((p, line), "controls") for p, line, _ in parts]
                obs["evidence"] = pd.Categorical(np.repeat(said, sizes))
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
        """Yield blocks of predicted cells: randomly drawn control cells, shifted by the effect."""
        rng = np.random.default_rng([self.options.seed, 1, i])
        rounds = [rng.permutation(pool.n_cells) for _ in range(-(-request.n_cells // pool.n_cells))]
        picked = np.concatenate(rounds)[: request.n_cells]
        basis = self.panel.basis_m
        effect = np.zeros(len(basis))
        if self.get_fill is not None:
            effect = self.get_fill(self._get_direction(request)).effect(request.perturbation)
        effect[basis >= 0] = effect_g[basis[basis >= 0]]
        self.moved_m |= effect != 0
        if self.options.fit_emission:
            fitted = self.emitter.apply(effect, pool.variance_m, request.n_cells, pool.n_cells)
            effect = np.where(basis >= 0, fitted, effect)  # other genes have effects that are already shrunken
        if self.options.emission == "counts":
            yield from self._draw(effect, pool, picked, rng)
            return
        if self.options.emission == "pseudobulk":
            profile = np.clip(pool.stats.mean_m + effect, 0.0, None)
            for rows in self._blocks(picked):
                cells = np.broadcast_to(profile, (len(rows), len(profile)))
                yield self._pack(self._round(cells, pool, rows, rng) if self.counts else cells)
            return
        stats = pool.stats
        if not self.counts:  # corrects the mean of the drawn cells to that of the line
            drawn = pool.make_stats(picked)
            effect, stats = effect + stats.mean_m - drawn.mean_m, drawn
        for rows in self._blocks(picked):
            cells = move_cells(pool.log1p(rows).toarray(), effect, stats, rng)
            yield self._pack(self._round(cells, pool, rows, rng) if self.counts else cells)

    def _get_direction(self, request: Request) -> int:
        """Return the direction in which a perturbation is requested, -1 if it is unknown."""
        assert self.vocabulary is not None
        setup = self.vocabulary.setup
        line = np.array([setup.screen.lines.index(request.line)])
        return int(setup.effects.get_directions(np.array([self.vocabulary.position[request.perturbation]]), line)[0])

    def _round(self, cells: np.ndarray, pool: Pool, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return log1p CP10K as counts with the library sizes of the cells, rounded at random."""
        rate = np.expm1(cells.astype(np.float64)) * (pool.library[rows] / pool.target_sum)[:, None]
        whole = np.rint(rate)  # removes the rounding of log1p and expm1
        rate = np.where(np.abs(rate - whole) < 1e-4 * np.maximum(whole, 1.0), whole, rate)
        return np.floor(rate + rng.random(rate.shape)).astype(np.int32)

    def _draw(
        self, effect: np.ndarray, pool: Pool, picked: np.ndarray, rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield blocks of negative binomial counts, or of their log1p CP10K, with the library sizes of the controls."""
        share, dispersion = pool.moments
        share = share * get_factors(pool.stats, effect)
        for rows in self._blocks(picked):
            counts = draw_counts(share, dispersion, pool.library[rows], rng)
            if self.counts:
                yield self._pack(counts)
            else:
                yield self._pack(np.log1p(counts * (pool.target_sum / pool.library[rows])[:, None]))

    def _pack(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a block as CSR, in the requested order of genes."""
        if self.order is not None:
            cells = np.where(self.order >= 0, cells[:, np.maximum(self.order, 0)], 0)
        rows, columns = np.nonzero(cells)
        indptr = np.zeros(len(cells) + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(cells)), out=indptr[1:])
        dtype = np.int32 if self.counts else np.float32
        return indptr, columns.astype(np.int32), cells[rows, columns].astype(dtype)


def check_rules(target: Path, writer: _Writer, n_cells: int, progress: Progress) -> tuple[str, ...]:
    """Check the written file against the rules, and return the warnings.

    Raises
    ------
    DataError
        If the file breaks rules, all of which are listed. The file is deleted.
    """
    from vcelltools.challenge.checks import check_2025, check_2026, read_genes, read_perturbations
    from vcelltools.scoring.rules import RULES_2026, get_rules_2025

    o, control = writer.options, writer.control
    names = read_genes(o.genes) if o.genes is not None else None
    with open_dataset(target, layer="X") as data:
        if o.rules == 2026:
            contexts = tuple(sorted({writer.setup.screen.places[r.line][1] for r in writer.requests}))
            report = check_2026(
                data, RULES_2026, genes=names, pert_col=o.pert_col, control=control,
                context_col=o.context_col, contexts=contexts,
                perturbations=read_perturbations(o.perturbations, control) if o.perturbations else None,
                progress=progress,
            )  # fmt: skip
        else:
            rules = get_rules_2025() if o.rules else replace(get_rules_2025(), max_cells=n_cells)
            report = check_2025(
                data, rules, genes=names, pert_col=o.pert_col, control=control, allow_discrete=False, progress=progress
            )
    if report.problems:
        target.unlink()
    report.raise_problems(f"{target} was deleted because it breaks the rules")
    return tuple(report.warnings) if o.rules else ()
