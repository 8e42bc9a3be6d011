"""Choose the number of threads, and run threads that take work from one queue until it is empty or one fails."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from vcelltools.errors import UsageError

T = TypeVar("T")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run BLAS only in the calling thread; also a decorator.

    The last digits of a product depend on how BLAS divides it among threads. For products that are worth several
    threads, our own threads each compute a part whose size does not depend on their number.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def get_threads(threads: int | None = None) -> int:
    """Return the number of worker threads: the argument, ``VCELLTOOLS_THREADS``, or the usable cores."""
    text = os.environ.get("VCELLTOOLS_THREADS", "")
    if threads is None and text:
        if not text.isdigit() or int(text) < 1:
            raise UsageError(f"VCELLTOOLS_THREADS is {text!r}, but must be a whole number of at least 1")
        threads = int(text)
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise UsageError(f"threads is {threads}, but must be a whole number of at least 1")
    return min(threads, 64)


def share_work(items: Iterable[T], workers: Sequence[Callable[[T], None]]) -> None:
    """Pass every item to a free worker; a single worker runs in the calling thread.

    Parameters
    ----------
    workers
        Functions of one item, each always called by the same thread, so that it may own buffers.

    Raises
    ------
    BaseException
        The exception of the first item that failed, after every worker has stopped; the items after it are skipped. An
        interrupt (Ctrl-C) is raised at once, and each worker stops after its current item.
    """
    todo = enumerate(items)
    lock = threading.Lock()
    failed: list[tuple[int, BaseException]] = []

    def work(visit: Callable[[T], None]) -> None:
        while not failed:
            with lock:
                at, item = next(todo, (-1, None))
            if at < 0:
                return
            try:
                visit(item)  # type: ignore[arg-type]
            except BaseException as e:
                failed.append((at, e))

    if len(workers) == 1:
        work(workers[0])
    else:
        threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in workers]
        for t in threads:
            t.start()
        try:
            for t in threads:
                while t.is_alive():
                    t.join(0.2)  # short waits, so that Ctrl-C is handled
        except BaseException as e:
            failed.append((-1, e))
            raise
    if failed:
        raise min(failed, key=lambda f: f[0])[1]
