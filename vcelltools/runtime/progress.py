"""The interface by which long work reports its progress to the command line or a notebook."""

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
