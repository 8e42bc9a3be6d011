"""Prefetch results in a thread, in two stages: items are begun early and finished later, in order."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")
_BEGUN = 2  # number of items begun before the first is finished, so that the disk stays busy


class Prefetch(Generic[T, U]):
    """Calls ``finish(begin(first)), finish(begin(first + 1)), ...`` in a thread; a context manager, and an iterator.

    Parameters
    ----------
    first, stop
        The range of numbers; without ``stop``, it never ends.
    ahead
        Number of results to keep ready.
    """

    def __init__(
        self, begin: Callable[[int], T], finish: Callable[[T], U], first: int, stop: int | None, *, ahead: int = 3
    ) -> None:
        self._begin, self._finish = begin, finish
        self._numbers = itertools.count(first) if stop is None else range(first, stop)
        self._ready: queue.Queue = queue.Queue(maxsize=max(1, ahead))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="vcelltools-prefetch")

    def __enter__(self) -> Prefetch[T, U]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __iter__(self) -> Iterator[U]:
        return self

    def __next__(self) -> U:
        """Return the next result, or raise the exception of its computation."""
        item, error = self._ready.get()
        if error is not None:
            raise error
        return item

    def _work(self) -> None:
        begun: deque[T] = deque()
        try:
            for number in self._numbers:
                begun.append(self._begin(number))
                if len(begun) >= _BEGUN and not self._offer(self._finish(begun.popleft())):
                    return
            while begun:
                if not self._offer(self._finish(begun.popleft())):
                    return
            self._offer(None, StopIteration())
        except BaseException as e:
            self._offer(None, e)

    def _offer(self, item: Any, error: BaseException | None = None) -> bool:
        while not self._over.is_set():
            try:
                self._ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
