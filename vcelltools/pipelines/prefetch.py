"""Batches made ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Prefetch:
    """Calls ``make(first), make(first + 1), …`` in a thread, a few steps ahead; a context manager."""

    def __init__(self, make: Callable[[int], Any], first: int, stop: int, ahead: int = 3) -> None:
        self._make, self._first, self._stop = make, first, stop
        self._ready: queue.Queue = queue.Queue(maxsize=ahead)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="vcelltools-prefetch")

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def get(self) -> Any:
        """Return the next batch; raise what making it raised."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            for number in range(self._first, self._stop):
                if not self._offer(self._make(number)):
                    return
        except BaseException as e:
            self._offer(e)

    def _offer(self, item: Any) -> bool:
        while not self._over.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False
