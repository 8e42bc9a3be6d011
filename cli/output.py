"""Print results to stdout, and progress, notes, errors and the closing line to stderr."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

from vcelltools.names import show
from vcelltools.runtime.progress import SILENT, Pace, Progress

_PLAIN_SECONDS = 5.0
_SCALES = {"bytes": (1e9, "GB"), "cells": (1e3, "k cells"), "non-zeros": (1e6, "M non-zeros")}


class Output:
    """The output of one command, as ``--json``, ``-q`` and ``-v`` set it."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self._progress: Progress | None = None

    @property
    def progress(self) -> Progress:
        """A bar on a terminal, a plain line every few seconds elsewhere, and nothing with ``-q``."""
        if self._progress is None:
            if self.quiet:
                self._progress = SILENT
            elif sys.stderr.isatty():
                self._progress = _BarProgress()
            else:
                self._progress = _PlainProgress()
        return self._progress

    def result(self, obj: dict[str, Any], *lines: str) -> None:
        """Print the result: one JSON object with ``--json``, otherwise ``lines``."""
        if self.json:
            from vcelltools.io.write.atomic import dump_json

            sys.stdout.write(dump_json(obj) + "\n")
        else:
            sys.stdout.write("".join(f"{show(line)}\n" for line in lines))
        sys.stdout.flush()

    def table(
        self,
        columns: list[str],
        rows: list[list[Any]],
        *,
        title: str = "",
        left: bool = False,
        grey: Collection[int] = (),
    ) -> None:
        """Print a table to stdout, unless ``--json`` was given (``left``: the cells are text, not numbers).

        On a terminal, cells are folded and the rows whose numbers are in ``grey`` are dimmed. Otherwise each row is
        one line, and rich is not loaded.
        """
        if self.json:
            return
        columns = [_cell(c) if c[:1] != "\n" else f"\n{_cell(c[1:])}" for c in columns]
        cells = [[_cell(v) for v in row] for row in rows]
        if not sys.stdout.isatty():
            sys.stdout.write((f"{title}\n" if title else "") + _align(columns, cells, left=left))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, c in enumerate(columns):
            table.add_column(c, justify="left" if left or i == 0 else "right", overflow="fold")
        for i, row in enumerate(cells):
            table.add_row(*row, style="dim" if i in grey else None)
        Console(file=sys.stdout, highlight=False, markup=False).print(table)

    def note(self, *lines: str) -> None:
        """Print each line on stderr, unless ``-q`` was given."""
        for line in lines if not self.quiet else ():
            self.progress.note(line)

    def error(self, text: str) -> None:
        """Print an error that does not end the command on stderr, even with ``-q``."""
        if self.quiet:
            sys.stderr.write(f"error: {show(text)}\n")
        else:
            self.progress.note(f"error: {text}")

    def detail(self, text: str) -> None:
        """Print one line on stderr if ``-v`` was given."""
        if self.verbose:
            self.note(text)

    def warn(self, warnings: list[str] | tuple[str, ...]) -> None:
        """Print each warning on stderr."""
        for w in warnings:
            self.note(f"warning: {w}")

    def done(self, text: str, then: Sequence[object] = ()) -> None:
        """Print the closing line: what was written, where, and the next command.

        The next command runs as printed, on the files that this one leaves.
        """
        command = shlex.join(["vcelltools", *map(str, then)])
        self.note(f"{text}; next: {command}" if then else text)


def _align(columns: list[str], rows: list[list[str]], *, left: bool) -> str:
    """Return the table as text, with numbers aligned right; a cell may hold several lines."""
    table = [[cell.split("\n") for cell in row] for row in (columns, *rows)]
    widths = [max(len(part) for row in table for part in row[i]) for i in range(len(columns))]
    out = []
    for row in table:
        for parts in zip_longest(*row, fillvalue=""):
            cells = [
                part.ljust(w) if left or i == 0 else part.rjust(w)
                for i, (part, w) in enumerate(zip(parts, widths, strict=True))
            ]
            out.append("  ".join(cells).rstrip() + "\n")
    return "".join(out)


def _cell(v: Any) -> str:
    if v is None:
        return "–"
    if isinstance(v, bool):
        return "yes" if v else "no"
    if isinstance(v, float):
        return "–" if v != v else f"{v:.4g}"
    if isinstance(v, int):
        return f"{v:,}"
    return show(v)


def _scale(unit: str, total: float) -> tuple[float, str]:
    """Return what to divide by and the name of the result: MB, not 0.0 GB, of a small file."""
    if unit == "bytes" and total < 1e9:
        return 1e6, "MB"
    return _SCALES.get(unit, (1.0, unit))


class _PlainProgress:
    """Print a line every few seconds; short work prints none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset("", 0, "")

    def _reset(self, phase: str, total: float, unit: str) -> None:
        self._phase, self._total, self._unit, self._pace = phase, total, unit, Pace()
        self._said = time.monotonic()

    def start(self, phase: str, total: float, unit: str) -> None:
        with self._lock:
            self._reset(show(phase), total, unit)

    def advance(self, n: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._pace.report(n, at=now)
            if now - self._said < _PLAIN_SECONDS:
                return
            self._said = now
            by, name = _scale(self._unit, self._total)
            done, rate = self._pace.done, self._pace.measure(at=now)
            digits = 0 if by == 1.0 else 1  # steps and files are integers
            line = f"{self._phase}: {done / by:,.{digits}f} of {self._total / by:,.{digits}f} {name}"
            if rate is not None:
                left = max(self._total - done, 0) / rate
                line += f", {rate / by:,.2f} {name}/s, {left:,.0f} s left"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        sys.stderr.write(f"{show(text)}\n")
        sys.stderr.flush()

    def finish(self) -> None:
        pass


class _BarProgress:
    """A rich progress bar with speed and time left."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False)
        self._bar: Any = None
        self._task: Any = None
        self._by = 1.0

    def start(self, phase: str, total: float, unit: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.finish()
        self._by, name = _scale(unit, total)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._name, self._pace = name, Pace()
        self._bar.start()
        self._task = self._bar.add_task(show(phase), total=max(total, 1e-9) / self._by, rate="")

    def advance(self, n: float) -> None:
        if self._bar is not None:
            now = time.monotonic()
            self._pace.report(n, at=now)
            rate = self._pace.measure(at=now)
            said = "" if rate is None else f"{rate / self._by:,.2f} {self._name}/s"
            self._bar.update(self._task, advance=n / self._by, rate=said)

    def note(self, text: str) -> None:
        self._console.print(show(text), soft_wrap=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
