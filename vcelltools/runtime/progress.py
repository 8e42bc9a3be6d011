"""The interface by which long work reports its progress to the command line or a notebook, and the pace of the work."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of long work; every method must be safe to call from any thread."""

    def start(self, phase: str, total: float, unit: str) -> None:
        """Begin a phase of ``total`` units (``"cells"``, ``"bytes"``, ``"steps"``)."""

    def advance(self, n: float) -> None:
        """Report ``n`` more units of the current phase as done."""

    def note(self, text: str) -> None:
        """Print one line: a warning or a fact that the user should see now."""

    def finish(self) -> None:
        """End the current phase."""


class Pace:
    """The pace of a phase, measured from its first report: what precedes it, such as compilation, happens only once.

    Times are in seconds, from any clock.

    Examples
    --------
    >>> pace = Pace()
    >>> pace.report(1, at=60.0)  # a minute of compilation
    >>> pace.measure(at=60.0) is None
    True
    >>> pace.report(4, at=62.0)
    >>> pace.done, pace.measure(at=62.0)
    (5.0, 2.0)
    """

    def __init__(self) -> None:
        self.done = 0.0
        self._first: tuple[float, float] | None = None

    def report(self, n: float, *, at: float) -> None:
        """Count ``n`` more units as done."""
        self.done += n
        if self._first is None:
            self._first = self.done, at

    def measure(self, *, at: float) -> float | None:
        """Return units per second, or None before the second report."""
        if self._first is None:
            return None
        done, since = self._first
        return (self.done - done) / (at - since) if self.done > done and at > since else None


class Silent:
    """A progress that prints nothing."""

    def start(self, phase: str, total: float, unit: str) -> None:
        """Ignore."""

    def advance(self, n: float) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


SILENT = Silent()
