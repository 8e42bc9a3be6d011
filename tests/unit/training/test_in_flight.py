"""Steps count as done when they are computed, and only some are in flight."""

from __future__ import annotations

import jax.numpy as jnp

from vcelltools.training.in_flight import AHEAD, InFlight


class Counts:
    """A progress that keeps the phases and the number of steps."""

    def __init__(self):
        self.totals, self.done = {}, {}

    def start(self, phase, total, unit):
        self.phase = phase
        self.totals[phase], self.done[phase] = total, 0

    def advance(self, n):
        self.done[self.phase] += n

    def note(self, text):
        pass

    def finish(self):
        pass


def test_a_step_is_reported_after_those_behind_it_are_called():
    progress = Counts()
    progress.start("train", 5, "steps")
    flight = InFlight(progress)
    seen = []
    for k in range(5):
        flight.add({"loss": jnp.ones(()) * k})
        seen.append(progress.done["train"])
    assert AHEAD == 2 and seen == [0, 0, 1, 2, 3]
    flight.wait()
    flight.wait()
    assert progress.done["train"] == 5
