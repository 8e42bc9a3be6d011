"""A few seconds of the fuzzer, and what it found before."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.harness import run

SECONDS = float(os.environ.get("VCELLTOOLS_FUZZ_SECONDS", "15"))


@pytest.mark.timeout(600)
def test_no_crash_no_hang_no_other_genes():
    report = run(seed=20_260_101, seconds=SECONDS, limit=2_000)
    print(report)
    assert not report.failures, str(report)
    assert report.n > 10
    assert report.outcomes["same"] > 0
    assert report.outcomes["refused"] > 0


# (seed, number): a heap that HDF5 walks for ever, an index of chunks on which it crashes, a scalar for names, ...
FOUND = [(1, 6), (1, 91), (1, 92), (3, 108)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "number"), FOUND)
def test_what_was_found_stays_found(seed, number):
    report = run(seed=seed, seconds=120, first=number, limit=1)
    assert report.n == 1
    assert not report.failures, str(report)
