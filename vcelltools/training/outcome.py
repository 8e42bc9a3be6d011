"""The end of a run: its result, and the signals and limits that stop it."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run.

    Attributes
    ----------
    out
        The run folder.
    summary
        Content of ``summary.json``.
    """

    out: Path
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"out": str(self.out), **self.summary}


class Stop:
    """A context manager that records the reason to stop a run: SIGTERM, SIGINT or the time limit."""

    def __init__(self, minutes: float) -> None:
        self.reason: str | None = None
        self._deadline = time.monotonic() + 60 * minutes if minutes else None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.reason = signal.Signals(number).name

    def due(self) -> str | None:
        """Return the reason to stop, or None."""
        if self.reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "the time limit"
        return self.reason
