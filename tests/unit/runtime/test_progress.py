"""The pace of a phase leaves out what happens once, before its first report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcelltools.runtime.progress import Pace


def test_the_first_report_starts_the_clock():
    pace = Pace()
    assert pace.measure(at=90.0) is None
    pace.report(3, at=100.0)
    assert pace.done == 3 and pace.measure(at=100.0) is None and pace.measure(at=101.0) is None
    pace.report(5, at=102.0)
    assert pace.done == 8 and pace.measure(at=102.0) == 2.5 and pace.measure(at=105.0) == 1.0


@given(st.floats(0, 1e4), st.floats(0.01, 10), st.integers(2, 50))
def test_even_work_has_its_own_pace_whatever_precedes_it(before, seconds, n):
    pace = Pace()
    for k in range(n):
        pace.report(2, at=before + k * seconds)
    assert pace.measure(at=before + (n - 1) * seconds) == pytest.approx(2 / seconds, rel=1e-6)
