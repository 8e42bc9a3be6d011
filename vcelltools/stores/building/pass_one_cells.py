"""Pass one over a file that is read cell by cell: CSR, or dense by rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io import CsrMatrix, DenseMatrix
from vcelltools.io.chunks import CsrChunk, DenseChunk, compress_rows
from vcelltools.io.faults import raise_fault
from vcelltools.io.matrix import Span
from vcelltools.io.stream import run_spans
from vcelltools.kernels import store as kernels
from vcelltools.kernels.faults import Fault
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import share_work
from vcelltools.stores.building.layout import Layout
from vcelltools.stores.building.work import Checkpoints, WorkFiles

OVER_CAP = 1 << 16
CHUNK_BYTES = 8 << 20  # bytes of work rows that a thread fills before it writes them, neighbours in one piece


def to_rows(chunk: CsrChunk | DenseChunk) -> CsrChunk:
    """Return a chunk of whole cells as CSR."""
    if isinstance(chunk, CsrChunk):
        return chunk
    indptr, indices, data = compress_rows(chunk.block)
    return CsrChunk(start=chunk.row_start, indptr=indptr, indices=indices, data=data, n_genes=chunk.block.shape[1])


def scatter_rows(
    layout: Layout,
    work: WorkFiles,
    start: int,
    stop: int | None = None,
    *,
    checkpoints: Checkpoints,
    progress: Progress = SILENT,
) -> None:
    """Scatter the cells ``start:stop`` of the source."""
    matrix = layout.ds.matrix
    assert isinstance(matrix, CsrMatrix | DenseMatrix)
    per_cell = (matrix.nnz or matrix.shape[0] * matrix.shape[1]) / matrix.shape[0]
    cells = max(1, CHUNK_BYTES // layout.row_bytes)
    most = min(
        layout.chunk_values, int(cells * max(per_cell, 1.0))
    )  # memory depends on the cells as well as on the values
    spans = matrix.plan(max_values=max(1, most), start=start, stop=stop)
    progress.start("counts", sum(s.n_bytes for s in spans), "bytes")

    def visit(state: dict[str, Any], chunk: Any, span: Span) -> None:
        scatter_chunk(layout, work, state, to_rows(chunk))

    states: list[dict[str, Any]] = []  # of threads that have ended: memory, and rows that are not written yet

    def take() -> dict[str, Any]:
        return states.pop() if states else {}

    group = max(4 * layout.threads, 16)
    for i in range(0, len(spans), group):
        some = spans[i : i + group]
        states += run_spans(matrix, some, take, visit, threads=layout.threads, progress=progress)
        work.sums.tidy()
        last = i + group >= len(spans)
        if last or checkpoints.due:
            share_work(states, [lambda state: _write_rows(work, state)] * layout.threads)
            if not last:
                checkpoints.offer(some[-1].stop)
    progress.finish()


def scatter_chunk(layout: Layout, work: WorkFiles, state: dict[str, Any], chunk: CsrChunk) -> None:
    """Scatter one chunk of cells."""
    plan, n_rows = layout.plan, chunk.n_rows
    cells = slice(chunk.start, chunk.start + n_rows)
    slots = work.slot_of_cell[cells]
    kept = np.flatnonzero(slots >= 0)
    by_slot = kept[np.argsort(slots[kept])]
    out_row = np.full(n_rows, -1, np.int64)
    out_row[by_slot] = np.arange(len(by_slot))
    rows = _take_rows(layout, work, state, slots[by_slot])
    over = _take(state, "over", (OVER_CAP, 3), np.int64)
    libsize = np.zeros(n_rows, np.int64)
    status = np.zeros(4, np.int64)
    kernels.csr_fill_work(
        chunk.indptr, chunk.indices, chunk.data, layout.basis_of_column, out_row, libsize, rows, over, status
    )
    fault, at = status[:2].tolist()
    if fault == Fault.FULL:
        raise DataError(
            f"{layout.ds.matrix.where}: more than {OVER_CAP:,} counts of 65,535 and above in one chunk, near cell "
            f"{chunk.locate(at)[0]:,}"
        )
    if fault:
        raise_fault(fault, chunk, at, layout.ds)
    if plan.libsize is not None:
        short = np.flatnonzero(plan.libsize[cells] < libsize)
        if len(short):
            i = chunk.start + int(short[0])
            raise DataError(
                f"{layout.ds.label}: cell {i:,} holds {int(libsize[short[0]]):,} counts, but its library size from "
                f"obs/{plan.spec.library_size} is {int(plan.libsize[i]):,}",
                hint="set library_size to the column of total counts",
            )
        libsize = plan.libsize[cells]
    work.write_libsize(libsize, chunk.start)
    if status[2]:
        found = over[: int(status[2])].copy()
        found[:, 0] = plan.order.row_of_cell[cells][by_slot][found[:, 0]]
        work.add_over(found)
    indptr, indices, data, measured = chunk.indptr, chunk.indices, chunk.data, layout.measured_of_column
    if status[3] or not layout.measured_is_plain:
        indptr, indices, data = _canonicalise(layout, work, chunk)
        measured = np.arange(len(layout.measured), dtype=np.int32)
    scale = plan.target_sum / np.maximum(libsize, 1)
    groups = plan.order.get_groups(cells.start, cells.stop)
    if not work.sums.spill(indptr, indices, data, scale, groups, measured):
        fixed = _take(state, "fixed", (len(data),), np.int32)
        kernels.csr_fixed_logs(indptr, data, scale, fixed)
        work.sums.add_cells(indptr, indices, fixed, groups, measured)


def _canonicalise(layout: Layout, work: WorkFiles, chunk: CsrChunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map columns to measured genes and sum duplicates in a cell."""
    from scipy import sparse

    shape = (chunk.n_rows, chunk.n_genes)
    m = sparse.csr_matrix((chunk.data.astype(np.int64), chunk.indices.astype(np.int64), chunk.indptr), shape=shape)
    m.sum_duplicates()
    work.add_over(np.empty((0, 3), np.int64), len(chunk.data) - m.nnz)
    mapped = layout.measured_of_column[m.indices]
    keep = mapped >= 0
    indptr = np.append(0, np.cumsum(keep))[m.indptr]
    m = sparse.csr_matrix((m.data[keep], mapped[keep], indptr), shape=(chunk.n_rows, len(layout.measured)))
    m.sum_duplicates()
    if m.nnz and m.data.max() > kernels.MAX_COUNT:
        cell = chunk.start + int(np.searchsorted(m.indptr, m.data.argmax(), side="right")) - 1
        raise DataError(
            f"{layout.ds.matrix.where}: the entries of cell {cell:,} for one gene sum to {int(m.data.max()):,}, above "
            f"the largest count, {kernels.MAX_COUNT:,}"
        )
    return m.indptr.astype(np.int64), m.indices.astype(np.int32), m.data


def _take_rows(layout: Layout, work: WorkFiles, state: dict[str, Any], slots: np.ndarray) -> np.ndarray:
    """Return uninitialised work rows from the memory of a thread; when it is full, write those that it holds first."""
    capacity = max(1, CHUNK_BYTES // layout.row_bytes, len(slots))
    held = state.get("held", 0)
    if held + len(slots) > len(state.get("rows", ())):
        _write_rows(work, state)
        held = 0
        if len(state.get("rows", ())) < capacity:
            state["rows"], state["slots"] = np.empty((capacity, layout.stride), np.uint16), np.empty(capacity, np.int32)
    state["held"] = held + len(slots)
    state["slots"][held : held + len(slots)] = slots
    return state["rows"][held : held + len(slots)]


def _write_rows(work: WorkFiles, state: dict[str, Any]) -> None:
    """Write the work rows that a thread holds."""
    held = state.get("held", 0)
    if held:
        work.write_rows(state["rows"], state["slots"][:held])
    state["held"] = 0


def _take(state: dict[str, Any], name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array from the reusable memory of a thread."""
    n = int(np.prod(shape))
    have = state.get(name)
    if have is None or len(have) < n:
        state[name] = have = np.empty(n + (n >> 3), dtype)
    return have[:n].reshape(shape)
