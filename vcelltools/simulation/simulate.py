"""``simulate``: stream a realistic Perturb-seq atlas with known effects, in any layout and size.

The counts are negative binomial. Every cell has its own random stream, so the file does not depend on the
block size or the number of threads. The truth and the features of the perturbations are written beside the file.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import UsageError, check_number, checked, spell
from vcelltools.io.results import Result
from vcelltools.io.write.atomic import atomic_file, put_beside, to_plain
from vcelltools.io.write.guard import Target, get_kind, guard_outputs
from vcelltools.io.write.h5ad import H5adWriter, get_value_dtype
from vcelltools.io.write.transpose import ColumnSpill
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads, one_blas_thread
from vcelltools.simulation.world import (
    DEPTH_SD,
    MEDIAN_DEPTH,
    World,
    get_batch_depth,
    get_density,
    make_world,
    rng,
)

if TYPE_CHECKING:
    import pandas as pd

LIKES = ("generic", "kolf")
GUIDES = "guide"  # the modality of an h5mu with the guide counts
_FULL_PANEL = 12_000  # with fewer genes, the depth shrinks with the panel
_BLOCK_VALUES = 1_000_000
_PLAN, _GUIDES = 20, 21


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a simulated file; see :func:`simulate`."""

    cells: int = 10_000
    genes: int = 36_000
    perturbations: int = 100
    perturbation_universe: int | None = None
    cell_lines: int = 1
    first_cell_line: int = 1
    batches: int = 2
    multiplets: float | None = None
    unassigned: float | None = None
    control_share: float = 0.12
    inert: float = 0.2
    escape: float = 0.0
    shared: float = 0.7
    lineages: int = 0
    activated: int = 0
    genes_drop: float = 0.0
    depth: float | None = None
    density: float | None = None
    seed: int = 0
    effect_seed: int | None = None
    like: str = "generic"

    def check(self) -> None:
        """Raise a :class:`UsageError` for invalid settings."""
        for name in ("cells", "genes", "cell_lines", "first_cell_line", "batches"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.perturbations < 0:
            raise UsageError(f"perturbations is {self.perturbations}, but must be at least 0")
        for name in ("multiplets", "unassigned", "control_share", "inert", "escape", "shared", "genes_drop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}, but must be a fraction between 0 and 1")
        check_number("lineages", self.lineages, low=0)
        check_number("activated", self.activated, low=0, high=self.cell_lines)
        check_number("depth", self.depth)
        check_number("density", self.density)
        check_number("seed", self.seed)
        check_number("effect_seed", self.effect_seed)
        if self.universe < self.perturbations:
            raise UsageError(
                f"{self.perturbations} perturbations cannot be drawn from {self.universe}",
                hint=f"use a larger {spell('perturbation_universe')}, or fewer {spell('perturbations')}",
            )
        if self.universe > self.genes:
            raise UsageError(
                f"{self.universe} perturbations need as many genes, but there are only {self.genes}",
                hint=f"use more {spell('genes')}, or fewer {spell('perturbations')}",
            )
        if self.genes_drop == 1:
            raise UsageError("genes_drop is 1, so no gene would be left")
        if self.depth is not None and self.density is not None:
            raise UsageError("depth and density cannot both be set", hint="remove one of the two")
        if self.depth is not None and self.depth <= 0:
            raise UsageError(f"depth is {self.depth}, but must be above 0")
        if self.density is not None and not 0 < self.density < 0.95:
            raise UsageError(f"density is {self.density}, but must be between 0 and 0.95")
        if self.like not in LIKES:
            raise UsageError(f"like {self.like!r} is not known", hint=f"one of: {', '.join(LIKES)}")
        if self.seed < 0 or (self.effect_seed or 0) < 0:
            raise UsageError("a seed must be a whole number of at least 0")

    @property
    def universe(self) -> int:
        """Number of perturbations from which those of this atlas are drawn."""
        return self.perturbations if self.perturbation_universe is None else self.perturbation_universe

    @property
    def control(self) -> str:
        """The label of the control."""
        return "Non-Targeting" if self.like == "kolf" else "non-targeting"

    @property
    def pert_col(self) -> str:
        """The obs column of the perturbation labels."""
        return "feature_call" if self.like == "kolf" else "target_gene"

    def get_share(self, name: str) -> float:
        """Return the fraction of multiplets or unassigned cells, by default that of ``like``."""
        value = getattr(self, name)
        typical = {"multiplets": 0.1, "unassigned": 0.02} if self.like == "kolf" else {}
        return typical.get(name, 0.0) if value is None else value


@dataclass(frozen=True, kw_only=True)
class SimulateResult(Result):
    """The files that were written.

    Attributes
    ----------
    out, truth, truth_cells, features
        Paths of the atlas; of the log2 fold changes per (perturbation, cell line) × gene, with the means of the lines;
        of the true state of every cell; and of an embedding of every gene.
    n_cells, n_genes, nnz, density, median_depth
        The counts, as written.
    pert_col, control
        The obs column of the perturbation, and the label of the control.
    settings
        The arguments.
    seconds
        Wall time.
    """

    out: Path
    truth: Path
    truth_cells: Path
    features: Path
    n_cells: int
    n_genes: int
    nnz: int
    density: float
    median_depth: float
    pert_col: str
    control: str
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The identity of every cell: line, batch, guides (-1 control, -2 none), active perturbation, expected depth."""

    line_n: np.ndarray
    batch_n: np.ndarray
    first_n: np.ndarray
    second_n: np.ndarray
    acts_n: np.ndarray
    depth_n: np.ndarray


def _make_plan(s: Settings) -> _Plan:
    r = rng(s.seed, _PLAN)
    n = s.cells
    share_b = np.exp(0.2 * r.normal(size=s.batches))
    batch = r.choice(s.batches, n, p=share_b / share_b.sum()).astype(np.int16)
    line = r.integers(0, s.cell_lines, n).astype(np.int16)
    # group sizes: log-normal, as in real screens
    weight_p = np.exp(0.6 * r.normal(size=s.perturbations)) if s.perturbations else np.zeros(0)
    control = s.control_share if s.perturbations else 1.0
    share = np.concatenate([[control], weight_p / max(weight_p.sum(), 1e-12) * (1 - control)])
    share /= share.sum()
    first = r.choice(len(share), n, p=share).astype(np.int32) - 1
    second = np.full(n, -2, np.int32)
    multiplet = r.random(n) < s.get_share("multiplets")
    other = r.choice(len(share), n, p=share).astype(np.int32) - 1
    multiplet &= other != first
    second[multiplet] = other[multiplet]
    nobody = r.random(n) < s.get_share("unassigned")
    first[nobody], second[nobody] = -2, -2
    acts = r.random(n) >= s.escape
    batch_depth = np.array([get_batch_depth(s.seed, b) for b in range(s.batches)])
    depth = batch_depth[batch] * np.exp(DEPTH_SD * r.normal(size=n))
    depth *= np.where(second > -2, 1.6, 1.0)  # two cells in one droplet
    depth /= np.median(depth)
    return _Plan(line_n=line, batch_n=batch, first_n=first, second_n=second, acts_n=acts, depth_n=depth)


def _make_depth(s: Settings, world: World, relative_n: np.ndarray) -> tuple[float, float]:
    """Return the median depth and the expected density, from the settings."""
    spread = np.quantile(relative_n, (np.arange(16) + 0.5) / 16)

    def get(depth: float) -> float:
        return get_density(depth * spread, world.profile_kg, world.dispersion_g)

    if s.density is None:
        depth = MEDIAN_DEPTH * min(1.0, s.genes / _FULL_PANEL) if s.depth is None else s.depth
        return depth, get(depth)
    low, high = 1.0, 1e8
    if get(high) < s.density:
        raise UsageError(f"a density of {s.density} is not possible with these genes", hint="use a lower density")
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if get(middle) < s.density else (low, middle)
    return high, s.density


class _Draw:
    """Draws blocks of cells in threads, in order."""

    def __init__(self, s: Settings, world: World, plan: _Plan, density: float, threads: int) -> None:
        self.s, self.world, self.plan, self.threads = s, world, plan, threads
        g = len(world.gene_ids)
        self.per_cell = max(density * g, 1.0)
        self.rows = int(max(1, min(_BLOCK_VALUES // self.per_cell, 8_000_000 // g or 1, s.cells)))

    def block(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (indptr, indices, data) of the cells from ``start``."""
        from vcelltools.kernels.simulate import FULL, csr_simulate

        p, w = self.plan, self.world
        sl = slice(start, min(start + self.rows, self.s.cells))
        n, g = sl.stop - sl.start, len(w.gene_ids)
        line = p.line_n[sl].astype(np.int32)
        profile = line * self.s.batches + p.batch_n[sl]

        def get_rows(guide: np.ndarray) -> np.ndarray:
            acts = p.acts_n[sl] & (guide >= 0)
            return np.where(acts, guide * self.s.cell_lines + line, -1).astype(np.int32)

        first, second = get_rows(p.first_n[sl]), get_rows(p.second_n[sl])
        capacity = int(1.3 * n * self.per_cell) + g
        while True:
            indptr = np.empty(n + 1, np.int64)
            indices, data = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
            nnz = csr_simulate(
                np.uint64(start),
                np.uint64(self.s.seed),
                p.depth_n[sl],
                profile,
                first,
                second,
                w.profile_kg,
                w.dispersion_g,
                w.effects.indptr,
                w.effects.indices,
                w.effects.data,
                w.state_indptr,
                w.state_indices,
                w.state_data,
                np.empty(g, np.float32),
                indptr,
                indices,
                data,
            )
            if nnz != FULL:
                return indptr, indices[:nnz], data[:nnz]
            capacity *= 2

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        pending: deque[Future] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="draw") as pool:
            try:
                for start in range(0, self.s.cells, self.rows):
                    pending.append(pool.submit(self.block, start))
                    if len(pending) > self.threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for f in pending:
                    f.cancel()


def _make_barcodes(n: int, seed: int) -> np.ndarray:
    """Return n distinct 16-letter barcodes: the number of the cell, mapped by a bijection of 32 bits, in base four."""
    mask = np.uint64(0xFFFFFFFF)
    x = (np.arange(n, dtype=np.uint64) + np.uint64((seed * 40503 + 12345) & 0xFFFFFFFF)) & mask
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (0x9E3779B1, 16)):  # each step is a bijection
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & mask
    letters = np.frombuffer(b"ACGT", np.uint8)
    out = np.empty((n, 16), np.uint8)
    for i in range(16):
        out[:, i] = letters[(x >> np.uint64(2 * i)) & np.uint64(3)]
    return out.view("S16").ravel().astype("U16").astype(object)  # np.char.decode swallows Ctrl-C


def _make_obs(s: Settings, world: World, plan: _Plan) -> pd.DataFrame:
    import pandas as pd

    names = [s.control, *world.symbols[world.targets]]
    first, second = plan.first_n.astype(np.int64), plan.second_n.astype(np.int64)
    # a label is a sorted pair of guides; pairs become categories "A|B"
    low, high = np.minimum(first, second), np.maximum(first, second)
    low, high = np.where(low == -2, high, low), np.where(low == -2, -2, high)
    key = np.where(low == -2, -1, (low + 1) * (len(names) + 1) + np.where(high == -2, 0, high + 2))
    levels, codes = np.unique(key[key >= 0], return_inverse=True)
    labels = []
    for k in levels:
        a, b = divmod(int(k), len(names) + 1)
        labels.append(names[a] if b == 0 else f"{names[a]}|{names[b - 1]}")
    full = np.full(len(key), -1, np.int64)
    full[key >= 0] = codes
    order = np.argsort(np.array(labels, dtype=object))
    place = np.append(np.argsort(order), -1)
    call = pd.Categorical.from_codes(place[full], categories=[labels[i] for i in order])
    lines = [f"line{i}" for i in range(s.first_cell_line, s.first_cell_line + s.cell_lines)]
    n_guides = (plan.first_n > -2).astype(np.int64) + (plan.second_n > -2)
    columns: dict[str, Any] = {s.pert_col: call, "num_features": n_guides}
    batches = [f"batch{i + 1}" for i in range(s.batches)]
    columns["batch"] = pd.Categorical.from_codes(plan.batch_n, categories=batches)
    if s.like != "kolf" or s.cell_lines > 1:
        columns["cell_line"] = pd.Categorical.from_codes(plan.line_n, categories=lines)
    if s.activated:
        raised = plan.line_n >= s.cell_lines - s.activated
        columns["direction"] = pd.Categorical(np.where(raised, "crispra", "crispri"))
    return pd.DataFrame(columns, index=_make_barcodes(s.cells, s.seed))


def _write_truth(path: Path, s: Settings, world: World, plan: _Plan, force: bool) -> None:
    import pandas as pd

    p, c = len(world.targets), s.cell_lines
    e = world.effects
    group = np.repeat(np.arange(p), c), np.tile(np.arange(c), p)
    alone = (plan.first_n >= 0) & (plan.second_n == -2)
    n_cells = np.bincount(plan.first_n[alone] * c + plan.line_n[alone], minlength=p * c)
    shift = np.zeros(p * c)
    for k in range(p * c):
        j = slice(e.indptr[k], e.indptr[k + 1])
        base = world.cp10k_cg[group[1][k]] / world.cp10k_cg[group[1][k]].sum()
        shift[k] = np.log2(1 + np.sum(base[e.indices[j]] * np.expm1(e.data[j].astype(np.float64))))
    lines = [f"line{i}" for i in range(s.first_cell_line, s.first_cell_line + c)]
    names = world.symbols[world.targets]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(names[group[0]]),
            "cell_line": pd.Categorical.from_codes(group[1], categories=lines),
            "strength": e.strength_p[group[0]],
            "n_direct": e.n_direct[group[0]],
            "log2_total": shift,
            "n_cells": n_cells,
        },
        index=[f"{names[a]}@{lines[b]}" for a, b in zip(*group, strict=True)],
    )
    var = pd.DataFrame({"gene_ids": world.gene_ids, "dispersion": world.dispersion_g}, index=world.symbols)
    uns = {
        "settings": json.dumps(to_plain(asdict(s))),
        "units": "X: log2 fold change of the absolute rate; minus obs.log2_total it is the fold change in CP10K. "
        "varm.cp10k: mean of unperturbed cells by cell line (uns.cell_lines), before batch shifts",
        "cell_lines": np.array(lines, dtype=object),
    }
    with H5adWriter(
        path,
        n_genes=len(var),
        obs=obs,
        var=var,
        force=force,
        uns=uns,
        varm={"cp10k": world.cp10k_cg.T.copy(), "embedding": world.features_gf},
    ) as w:
        w.append_csr(e.indptr, e.indices, (e.data / np.log(2)).astype(np.float32))


def _write_tables(cells: Path, features: Path, s: Settings, world: World, plan: _Plan, obs: Any, force: bool) -> None:
    import pandas as pd

    names = np.append(
        np.array([*world.symbols[world.targets]], dtype=object), [None, s.control]
    )  # -2 for none, -1 for the control
    frame = pd.DataFrame(
        {
            "guide_1": pd.Categorical(names[plan.first_n]),
            "guide_2": pd.Categorical(names[plan.second_n]),
            "responds": plan.acts_n,
            "expected_depth": plan.depth_n,
        },
        index=obs.index,
    )
    embedding = pd.DataFrame(
        world.features_gf,
        index=pd.Index(world.symbols, name="gene"),
        columns=[f"f{i}" for i in range(world.features_gf.shape[1])],
    )
    for path, table in ((cells, frame), (features, embedding)):
        with atomic_file(path, force=force) as tmp:
            table.to_parquet(tmp)


@checked
@one_blas_thread()
def simulate(
    out: str | os.PathLike,
    *,
    cells: int = 10_000,
    genes: int = 36_000,
    perturbations: int = 100,
    perturbation_universe: int | None = None,
    cell_lines: int = 1,
    first_cell_line: int = 1,
    batches: int = 2,
    multiplets: float | None = None,
    unassigned: float | None = None,
    control_share: float = 0.12,
    inert: float = 0.2,
    escape: float = 0.0,
    shared: float = 0.7,
    lineages: int = 0,
    activated: int = 0,
    genes_drop: float = 0.0,
    depth: float | None = None,
    density: float | None = None,
    seed: int = 0,
    effect_seed: int | None = None,
    like: str = "generic",
    layout: str = "csr",
    dtype: str = "float32",
    index_dtype: str = "int32",
    compression: str | None = None,
    level: int | None = None,
    chunk_len: int | None = None,
    contiguous: bool = False,
    modality: str | None = None,
    guides: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SimulateResult:
    """Simulate a Perturb-seq atlas and write it, its truth and its features.

    Parameters
    ----------
    out
        ``*.h5ad`` or ``*.h5mu``; ``*.truth.h5ad``, ``*.truth_cells.parquet`` and ``*.features.parquet`` are written
        beside it.
    layout, dtype, index_dtype, compression, level, chunk_len, contiguous
        As in :class:`vcelltools.io.write.h5ad.H5adWriter`.
    modality
        Modality of an h5mu; ``rna`` by default.
    guides
        Whether to write a second modality ``guide`` with the guide counts to an h5mu.
    cells, genes, perturbations, cell_lines, batches
        Sizes (10,000; 36,000; 100; 1; 2 by default); the control is not counted as a perturbation.
    perturbation_universe, first_cell_line, genes_drop, effect_seed
        For several atlases that share one biology: with the same ``effect_seed``, ``genes`` and universe, genes, lines
        and perturbations with the same name are identical. Each atlas has some of the perturbations, lines from
        ``first_cell_line`` on, and lacks a fraction ``genes_drop`` of the genes.
    multiplets, unassigned, control_share
        Fractions of cells with two guides (0; kolf 0.1), without a guide (0; kolf 0.02), and with a control guide
        (0.12).
    inert, shared, escape
        Fraction of perturbations that only lower their target (0.2); fraction of an effect common to all
        lines (0.7); fraction of perturbed cells that do not respond (0).
    lineages
        Number of lineages (0: lines are independent). Lines of a lineage have similar expression and the same
        line-specific effects, and each lineage does not express a quarter of the targets, whose perturbations then do
        nothing.
    activated
        Number of cell lines, the last ones, that are screened by CRISPRa instead of CRISPRi: targets rise, and the
        effects on other genes are reversed, 0.7 times as large. The obs column ``direction`` is then written.
    depth, density
        Median number of molecules per cell (6,819, or less with fewer than 12,000 genes), or the fraction of non-zeros.
    seed
        Random seed for the cells of this atlas.
    like
        ``"kolf"``: obs ``feature_call``, ``num_features``, ``batch``, control ``Non-Targeting``, multiplets.

    Returns
    -------
    SimulateResult

    Raises
    ------
    UsageError
        If settings are invalid, or the output exists and ``force`` is off.
    EnvironmentFault
        If space or permission is missing.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.simulate("sim.h5ad", cells=100, genes=60, perturbations=3).n_cells
    100
    """
    import time

    began = time.monotonic()
    s = Settings(
        cells=cells,
        genes=genes,
        perturbations=perturbations,
        perturbation_universe=perturbation_universe,
        cell_lines=cell_lines,
        first_cell_line=first_cell_line,
        batches=batches,
        multiplets=multiplets,
        unassigned=unassigned,
        control_share=control_share,
        inert=inert,
        escape=escape,
        shared=shared,
        lineages=lineages,
        activated=activated,
        genes_drop=genes_drop,
        depth=depth,
        density=density,
        seed=seed,
        effect_seed=effect_seed,
        like=like,
    )
    s.check()
    path = Path(out)
    if path.suffix not in (".h5ad", ".h5mu"):
        raise UsageError(f"{path}: the name ends in neither .h5ad nor .h5mu", hint="end the name in .h5ad or .h5mu")
    item = get_value_dtype(dtype).itemsize
    if contiguous and layout != "dense":
        raise UsageError(
            "only a dense file can be written contiguously", hint="rewrite a sparse one with vcelltools convert"
        )
    if path.suffix == ".h5ad" and (modality or guides):
        raise UsageError(f"{path}: an h5ad has no modalities", hint="name it .h5mu")
    modality = modality or ("rna" if path.suffix == ".h5mu" else None)
    if modality is not None and (not re.fullmatch(r"[\w.:+ -]+", modality) or (guides and modality == GUIDES)):
        what = (
            "is used for the guides"
            if modality == GUIDES
            else "may only hold letters, digits and characters such as . _ -"
        )
        raise UsageError(f"{spell('modality')} {modality}: the name {what}", hint="choose another name")
    beside = [put_beside(path, end) for end in (".truth.h5ad", ".truth_cells.parquet", ".features.parquet")]
    guard_outputs([Target(p, get_kind(p)) for p in (path, *beside)], force=force)

    world = make_world(
        n_genes=s.genes,
        n_perturbations=s.perturbations,
        n_universe=s.universe,
        lines=range(s.first_cell_line, s.first_cell_line + s.cell_lines),
        n_batches=s.batches,
        shared=s.shared,
        inert=s.inert,
        lineages=s.lineages,
        activated=s.activated,
        drop=s.genes_drop,
        seed=s.seed,
        effect_seed=s.seed if s.effect_seed is None else s.effect_seed,
    )
    plan = _make_plan(s)
    median_depth, density = _make_depth(s, world, plan.depth_n)
    np.multiply(plan.depth_n, median_depth, out=plan.depth_n)
    obs = _make_obs(s, world, plan)
    n_genes = len(world.gene_ids)
    nnz = int(density * s.cells * n_genes)
    per_value = item + (0 if layout == "dense" else (8 if index_dtype == "int64" else 4))
    need = (s.cells * n_genes if layout == "dense" else nnz) * per_value // (1 if compression in (None, "none") else 4)
    need += nnz * 12 if layout == "csc" else 0
    import pandas as pd

    var = pd.DataFrame({"gene_ids": world.gene_ids}, index=world.symbols)
    n_threads = get_threads(threads)
    draw = _Draw(s, world, plan, density, n_threads)
    storage: dict[str, Any] = {"layout": layout, "dtype": dtype, "index_dtype": index_dtype}
    storage |= {"chunk_len": chunk_len, "contiguous": contiguous}
    total = 0
    progress.start("simulate", s.cells, "cells")
    with H5adWriter(
        path,
        n_genes=n_genes,
        n_cells=s.cells,
        obs=obs,
        var=var,
        compression=compression,
        level=level,
        modality=modality,
        force=force,
        need_bytes=need,
        threads=n_threads,
        **storage,
    ) as w:
        if guides:
            _add_guides(w, s, world, plan, obs)
        if layout == "csc":
            total = _write_csc(w, draw, path.parent, n_genes, nnz, progress)
        else:
            for indptr, indices, data in draw:
                w.append_csr(indptr, indices, data)
                total += len(data)
                progress.advance(len(indptr) - 1)
        progress.finish()
        _write_truth(beside[0], s, world, plan, force)
        _write_tables(beside[1], beside[2], s, world, plan, obs, force)
    return SimulateResult(
        out=path,
        truth=beside[0],
        truth_cells=beside[1],
        features=beside[2],
        n_cells=s.cells,
        n_genes=n_genes,
        nnz=total,
        density=total / (s.cells * n_genes),
        median_depth=float(np.median(plan.depth_n)),
        pert_col=s.pert_col,
        control=s.control,
        seconds=time.monotonic() - began,
        settings=to_plain(asdict(s)),
    )


def _write_csc(w: H5adWriter, draw: _Draw, folder: Path, n_genes: int, nnz: int, progress: Progress) -> int:
    with ColumnSpill(folder, n_minor=n_genes, nnz=nnz) as spill:
        for indptr, indices, data in draw:
            spill.append(indptr, indices, data)
            progress.advance(len(indptr) - 1)
        progress.finish()
        progress.start("transpose", n_genes, "genes")
        for indptr, indices, data in spill.blocks():
            w.append_csc(indptr, indices, data)
            progress.advance(len(indptr) - 1)
        return spill.nnz


def _add_guides(w: H5adWriter, s: Settings, world: World, plan: _Plan, obs: Any) -> None:
    """Write a modality of guide counts: about 60 molecules of the guides of a cell, and few of others."""
    import pandas as pd
    from scipy import sparse

    names = [s.control, *world.symbols[world.targets]]
    r = rng(s.seed, _GUIDES)
    cells = np.arange(s.cells)
    has = [plan.first_n > -2, plan.second_n > -2, r.random(s.cells) < 0.3]
    which = [plan.first_n + 1, plan.second_n + 1, r.integers(0, len(names), s.cells)]
    n = [1 + r.poisson(60, s.cells), 1 + r.poisson(60, s.cells), np.ones(s.cells, np.int64)]
    matrix = sparse.csr_matrix(
        (
            np.concatenate([v[h] for v, h in zip(n, has, strict=True)]).astype(np.float32),
            (np.concatenate([cells[h] for h in has]), np.concatenate([v[h] for v, h in zip(which, has, strict=True)])),
        ),
        shape=(s.cells, len(names)),
    )
    matrix.sum_duplicates()
    var = pd.DataFrame({"target": names}, index=[f"guide_{v}" for v in names])
    part = w.add_modality(GUIDES, n_genes=len(names), n_cells=s.cells, obs=pd.DataFrame(index=obs.index), var=var)
    part.X.append_csr(matrix.indptr, matrix.indices, matrix.data)
