"""Steps in flight: a call of a compiled step returns before the step is computed."""

from __future__ import annotations

from collections import deque
from typing import Any

from vcelltools.runtime.progress import Progress

AHEAD = 2
"""Maximum number of steps in flight; each keeps its batch in memory."""


class InFlight:
    """Limits the steps in flight, and reports those that are computed as progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._held: deque[Any] = deque()

    def add(self, result: Any) -> None:
        """Take the arrays that a step returns, and wait until at most ``AHEAD`` steps are in flight."""
        self._held.append(result)
        self._wait(AHEAD)

    def wait(self) -> None:
        """Wait until every step is computed."""
        self._wait(0)

    def _wait(self, left: int) -> None:
        import jax

        while len(self._held) > left:
            jax.block_until_ready(self._held.popleft())
            self._progress.advance(1)
