"""How fast steps follow each other, counted alike on both sides of a comparison: the standard library alone."""

from __future__ import annotations

import json
import time


class StepClock:
    """Counts training steps for a time; the first two, which compile, allocate and warm up, do not count.

    Parameters
    ----------
    began
        ``time.perf_counter()`` when the side began, imports included.
    cells
        Cells of a step, controls among them.
    seconds
        How long to go on.
    """

    def __init__(self, began: float, cells: int, seconds: float) -> None:
        self._began, self._cells, self._seconds = began, cells, seconds
        self._steps, self._first, self._start, self._now = 0, 0.0, 0.0, 0.0

    def tick(self) -> bool:
        """Count a step that is done; True once the time is over."""
        self._now = time.perf_counter()
        self._steps += 1
        if self._steps == 1:
            self._first = self._now - self._began
        if self._steps == 2:
            self._start = self._now
        return self._steps > 2 and self._now - self._start > self._seconds

    def report(self, peak_bytes: int) -> str:
        """Return the line of JSON that a side ends with."""
        rate = (self._steps - 2) * self._cells / (self._now - self._start)
        body = {"cells_per_s": rate, "steps": self._steps, "first_step_s": self._first}
        return json.dumps(body | {"peak_mb": round(peak_bytes / 1e6)})
