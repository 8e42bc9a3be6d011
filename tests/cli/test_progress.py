"""The lines and the bar of long work: no time is said to be left before a pace is measured."""

from __future__ import annotations

import io

import pytest

from vcelltools.cli import output
from vcelltools.cli.output import _BarProgress, _PlainProgress


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(output, "time", found)
    return found


def test_a_compilation_of_a_minute_is_not_the_pace_of_all_steps(clock, capsys):
    progress = _PlainProgress()
    progress.start("train", 1001, "steps")
    clock.now = 60.0
    progress.advance(1)
    for _ in range(100):
        clock.now += 0.125
        progress.advance(1)
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 1 of 1,001 steps"
    assert lines[1].startswith("train: 41 of 1,001 steps, 8.00 steps/s, 120 s left"), lines


def test_a_second_phase_measures_its_own_pace(clock, capsys):
    progress = _PlainProgress()
    for phase, seconds in (("read", 1.0), ("count", 2.0)):
        progress.start(phase, 8e3, "cells")
        for _ in range(8):
            clock.now += seconds
            progress.advance(1e3)
    assert [line.split(", ")[1:] for line in capsys.readouterr().err.splitlines()] == [
        ["1.00 k cells/s", "3 s left"], ["0.50 k cells/s", "10 s left"], ["0.50 k cells/s", "4 s left"],
    ]  # fmt: skip


def test_the_bar_says_no_pace_after_the_first_report(clock, monkeypatch):
    progress = _BarProgress()
    progress._console.file = io.StringIO()
    progress.start("train", 10, "steps")
    try:
        clock.now = 30.0
        progress.advance(1)
        task = progress._bar.tasks[0]
        assert task.fields["rate"] == "" and task.completed == 1
        clock.now = 31.0
        progress.advance(2)
        assert task.fields["rate"] == "2.00 steps/s" and task.completed == 3
    finally:
        progress.finish()
