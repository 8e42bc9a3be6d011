"""Threads that take work from one queue until it is empty or one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def share_work(items: Iterable[T], workers: Sequence[Callable[[T], None]]) -> None:
    """Give every item to whichever worker is free; a single worker runs in the calling thread.

    Parameters
    ----------
    workers
        Called with one item at a time, each always by the same thread, so that it may own buffers.

    Raises
    ------
    BaseException
        Of the items that failed the first one's, after every worker has stopped; the items after it are left. An
        interrupt (Ctrl-C) is raised at once, and the workers stop after the item that they are at.
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
                    t.join(0.2)  # short waits, so that Ctrl-C is answered
        except BaseException as e:
            failed.append((-1, e))
            raise
    if failed:
        raise min(failed, key=lambda f: f[0])[1]
