"""Damaged containers: lint always answers, and never with a crash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.challenge.test_vcc_container import GENES, make
from vcelltools.challenge.vcc import lint, prep
from vcelltools.errors import EnvironmentFault


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    box = tmp_path_factory.mktemp("fuzz")
    (box / "genes.csv").write_text("\n".join(GENES))
    prep(make(box / "p.h5ad"), box / "p.vcc", genes=box / "genes.csv")
    return box, (box / "p.vcc").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), head=st.booleans(), cut=st.booleans())
def test_lint_always_answers(whole, seed, n, head, cut):
    box, data = whole
    rng = np.random.default_rng(seed)
    raw = bytearray(data)
    for at in rng.integers(0, 512 if head else len(raw), n):
        raw[at] = rng.integers(0, 256)
    if cut:
        raw = raw[: rng.integers(0, len(raw))]
    (box / "x.vcc").write_bytes(bytes(raw))
    try:
        result = lint(box / "x.vcc", max_bytes=1 << 26)
    except EnvironmentFault:
        return
    assert result.ok == (not result.problems)
