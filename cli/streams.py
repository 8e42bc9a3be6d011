"""Make the standard streams safe to use when the caller closed them or stopped reading."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Lasting(io.TextIOWrapper):
    """A text output that drops what is written once its reader is gone, so that the work still finishes."""

    _forgiven: type[OSError] = BrokenPipeError

    def write(self, text: str) -> int:
        """Write the text, or drop it if nobody reads."""
        try:
            return super().write(text)
        except self._forgiven:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the text, or drop it if nobody reads."""
        try:
            super().flush()
        except self._forgiven:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class _Notes(_Lasting):
    """The error output: no note that cannot be written, such as to a full disk, makes a result a failure."""

    _forgiven = OSError


def open_all() -> None:
    """Open closed streams on the null device, so that no file gets their descriptor, and wrap the outputs.

    File names may not be valid text: characters that cannot be encoded are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
    sys.stdin = sys.stdin if sys.stdin is not None else open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _wrap(sys.stdout, 1)
    sys.stderr = _wrap(sys.stderr, 2)


def _wrap(stream: Any, number: int) -> Any:
    if stream is None:
        return open(number, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    settings = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
    stream.flush()
    kind = _Notes if number == 2 else _Lasting
    return kind(stream.detach(), errors="backslashreplace", **settings)  # type: ignore[arg-type]
