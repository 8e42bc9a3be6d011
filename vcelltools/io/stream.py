"""Run threads that read, decompress and compute in parallel, each with its own state.

Workers take spans from one queue; each reads its span into its own buffers and runs the kernel on it, so
decompression in one thread overlaps with the kernel in another. The caller merges the states. A result must not
depend on which worker saw which span; integer accumulators guarantee it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from vcelltools.io.chunks import Chunk
from vcelltools.io.matrix import Buffers, Matrix, Span
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import get_threads, share_work

S = TypeVar("S")
R = TypeVar("R")
_MAX_BLOCKS = 256


def plan_blocks(matrix: Matrix) -> list[Span]:
    """Divide a matrix into at most a few hundred spans of a million values or more.

    This bounds the size of data that is kept for every span, however large the matrix is.
    """
    total = matrix.shape[0] * matrix.shape[1] if matrix.nnz is None else matrix.nnz
    return matrix.plan(max_values=min(max(1 << 20, total // _MAX_BLOCKS), 1 << 23))


def _count_workers(matrix: Matrix, spans: Sequence[Span], threads: int | None) -> int:
    """Return the number of workers: more than threads if some of them are usually waiting for the disk."""
    return min(get_threads(threads) + 2 * matrix.cold, max(len(spans), 1))


def run_spans(
    matrix: Matrix,
    spans: Sequence[Span],
    make_state: Callable[[], S],
    visit: Callable[[S, Chunk, Span], None],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[S]:
    """Visit every span once; return the states of the workers.

    Parameters
    ----------
    make_state
        Called once per worker, in the calling thread.
    visit
        ``visit(state, chunk, span)``; the chunk is valid only during the call.
    progress
        Advanced by the bytes of each span; the caller starts and finishes the phase.

    Raises
    ------
    Exception
        The first exception of a worker, after all workers have stopped.
    """
    n = _count_workers(matrix, spans, threads)
    states = [make_state() for _ in range(n)]

    def make_worker(state: S) -> Callable[[Span], None]:
        buffers = Buffers()

        def work(span: Span) -> None:
            visit(state, matrix.read(span, buffers), span)
            progress.advance(span.n_bytes)

        return work

    share_work(spans, [make_worker(s) for s in states])
    return states


def map_spans(
    matrix: Matrix,
    spans: Sequence[Span],
    make: Callable[[Chunk, Span], R],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[R]:
    """Yield ``make(chunk, span)`` for every span, in order; reading and ``make`` run in threads, a few spans ahead.

    The chunk is valid only during the call, so the result of ``make`` must own its arrays.
    """
    n = _count_workers(matrix, spans, threads)
    local = threading.local()

    def work(span: Span) -> R:
        if not hasattr(local, "buffers"):
            local.buffers = Buffers()
        return make(matrix.read(span, local.buffers), span)

    pending: deque[tuple[Future[R], Span]] = deque()

    def take() -> R:
        future, span = pending.popleft()
        out = future.result()
        progress.advance(span.n_bytes)
        return out

    with ThreadPoolExecutor(n, thread_name_prefix="span") as pool:
        try:
            for span in spans:
                pending.append((pool.submit(work, span), span))
                if len(pending) > n + 1:
                    yield take()
            while pending:
                yield take()
        finally:
            for future, _ in pending:
                future.cancel()
