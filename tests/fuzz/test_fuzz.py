"""A few seconds of the fuzzer; what it found before has tests of its own in ``tests.unit.io.test_faults``."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.harness import run

SECONDS = float(os.environ.get("VCELLTOOLS_FUZZ_SECONDS", "15"))


@pytest.mark.timeout(600)
def test_no_crash_no_hang_no_other_genes():
    report = run(seed=20_260_101, seconds=SECONDS, limit=2_000, least=25)
    print(report)
    assert not report.failures, str(report)
    assert report.n > 10
    assert report.outcomes["same"] > 0
    assert report.outcomes["refused"] > 0
