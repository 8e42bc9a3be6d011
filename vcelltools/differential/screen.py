"""Read the cells of a screen for comparisons of cells with cells: the controls first, then batches of perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from vcelltools.differential.cell_labels import Cells
from vcelltools.differential.expression import Scale, Transform, find_scale, make_transform
from vcelltools.errors import DataError, UsageError, check_number
from vcelltools.genes.identity import NAME_COLUMNS
from vcelltools.io import Dataset, Matrix, select_columns
from vcelltools.io.chunks import Chunk
from vcelltools.io.faults import raise_fault
from vcelltools.io.stream import map_spans, plan_blocks, run_spans
from vcelltools.kernels.faults import Fault
from vcelltools.runtime.progress import Progress
from vcelltools.runtime.threads import get_threads, one_blas_thread, share_work

R = TypeVar("R")

MIN_CELLS = 10
"""Minimum number of controls."""
MAX_BYTES = 1 << 30
"""Largest memory for the cells of a batch."""


_LEAST = {"max_genes": 5, "max_controls": MIN_CELLS, "max_tested": 2, "permutations": 0, "seed": 0}


def check_limits(**given: int) -> None:
    """Raise a :class:`UsageError` if a limit of a comparison of cells, or its seed, is too low."""
    for name, value in given.items():
        check_number(name, value, low=_LEAST[name])


class Screen:
    """An open data set whose controls are in memory."""

    def __init__(
        self,
        ds: Dataset,
        cells: Cells,
        control: str,
        max_genes: int,
        max_controls: int,
        seed: int,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.ds, self.cells, self.threads, self.progress = ds, cells, threads, progress
        progress.start("reading values", ds.matrix.stored_bytes, "bytes")
        self.scale: Scale = find_scale(ds, threads=threads, progress=progress)
        progress.finish()
        counts = self.scale.kind == "counts"
        self.transform: Transform = make_transform(ds.matrix, self.scale, cp10k=counts, wide=True)
        code = cells.labels.index(control)
        self.perturbations = [k for k in range(len(cells.labels)) if k != code and cells.size_k[k]]
        if not self.perturbations:
            raise UsageError(
                "there is no perturbation other than the control", hint="set the column of the perturbations"
            )
        every = np.flatnonzero(cells.codes == code)
        if len(every) < MIN_CELLS:
            raise DataError(f"{ds.label} has {len(every)} control cells, but at least {MIN_CELLS} are needed")
        self.target_of = _find_targets(ds, cells.labels)
        self.genes = self._choose_genes(max_genes)
        self.matrix: Matrix = ds.matrix if len(self.genes) == ds.n_genes else select_columns(ds.matrix, self.genes)
        self.place = {int(g): i for i, g in enumerate(self.genes)}
        rng = np.random.default_rng([seed, 0])
        chosen = every if len(every) <= max_controls else np.sort(rng.choice(every, max_controls, replace=False))
        self.controls = self._read(chosen, "reading controls")
        self.control_mean_g = np.expm1(self.controls.astype(np.float64)).mean(axis=0)

    def _check_indices(self, chunk: Chunk) -> None:
        if (position := chunk.find_outside()) is not None:
            raise_fault(Fault.BAD_INDEX, chunk, position, self.ds)

    def _choose_genes(self, most: int) -> np.ndarray:
        """Return the most variable genes and the targets, in the order of the file."""
        g, n = self.ds.n_genes, self.ds.n_cells
        if g <= most:
            return np.arange(g)
        m = self.ds.matrix

        def add(chunk: Chunk, span: object) -> tuple[np.ndarray, np.ndarray]:
            self._check_indices(chunk)
            values, at = self.transform(chunk).reshape(-1), chunk.locate_values()[1]
            return np.bincount(at, values, g), np.bincount(at, values * values, g)

        total, square = np.zeros(g), np.zeros(g)
        self.progress.start("choosing genes", m.stored_bytes, "bytes")
        for a, b in map_spans(m, plan_blocks(m), add, threads=self.threads, progress=self.progress):
            total += a
            square += b
        self.progress.finish()
        variance = square / n - (total / n) ** 2
        top = np.argsort(-variance, kind="stable")[:most]
        return np.unique(np.concatenate([top, [t for t in self.target_of if t >= 0]]).astype(np.int64))

    def _read(self, rows: np.ndarray, phase: str) -> np.ndarray:
        """Return (len(rows), genes) float32 log1p values."""
        m, width = self.matrix, len(self.genes)
        out = np.zeros((len(rows), width), np.float32)
        flat = out.reshape(-1)
        place = np.full(m.shape[0], -1, np.int64)
        place[rows] = np.arange(len(rows))

        def visit(_: None, chunk: Chunk, span: object) -> None:
            self._check_indices(chunk)
            cells, genes = chunk.locate_values()
            at = place[cells]
            used = at >= 0
            values = self.transform(chunk).reshape(-1)[used].astype(np.float32, copy=False)
            np.add.at(flat, at[used] * width + genes[used], values)  # duplicate entries are summed

        self.progress.start(phase, m.stored_bytes, "bytes")
        run_spans(m, m.plan(), lambda: None, visit, threads=self.threads, progress=self.progress)
        self.progress.finish()
        return out

    def compare(self, work: Callable[[int, np.ndarray, np.ndarray], R]) -> dict[int, R]:
        """Return ``work(code, rows, values)`` for the cells of every perturbation, by its code.

        ``values`` are (cells, genes) log1p values. Perturbations whose cells fit in memory together are read at once,
        and threads share them.
        """
        found: dict[int, R] = {}
        for codes, rows in self._cut():
            values = self._read(np.concatenate(rows), "reading cells")
            ends = np.cumsum([len(r) for r in rows])

            def one(i: int, codes=codes, rows=rows, values=values, ends=ends) -> None:
                found[codes[i]] = work(codes[i], rows[i], values[ends[i] - len(rows[i]) : ends[i]])
                self.progress.advance(1)

            self.progress.start("comparing perturbations", len(codes), "perturbations")
            with one_blas_thread():
                share_work(range(len(codes)), [one] * get_threads(self.threads))
            self.progress.finish()
        return found

    def _cut(self) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Yield the codes of perturbations whose cells fit in memory together, and the rows of each."""
        room = max(1, MAX_BYTES // (4 * len(self.genes)))
        size = self.cells.size_k
        order = np.argsort(self.cells.codes, kind="stable")
        ends = np.searchsorted(self.cells.codes[order], np.arange(len(self.cells.labels) + 1))
        part: list[int] = []
        for k in [*self.perturbations, -1]:
            if part and (k < 0 or size[part].sum() + size[k] > room):
                yield part, [order[ends[i] : ends[i + 1]] for i in part]
                part = []
            part.append(k)


def _find_targets(ds: Dataset, labels: tuple[str, ...]) -> list[int]:
    """Return the position of each label's gene, by names and symbols; -1 if there is none or several."""
    place: dict[str, int] = {}
    columns = [ds.var.index, *(ds.var.column(c).labels() for c in NAME_COLUMNS if c in ds.var.columns)]
    for names in columns:
        for i, v in enumerate(names.tolist()):
            if v is not None and place.setdefault(v, i) != i:
                place[v] = -1
    return [place.get(v, -1) for v in labels]
