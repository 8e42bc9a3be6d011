"""How far from whole numbers the counts of the 2026 rules may be."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.kernels.labelings import csr_count


@pytest.mark.parametrize(
    ("value", "slack", "status"),
    [(3.0, 0.0, 0), (3 - 9e-7, 1e-6, 0), (3 + 9e-7, 1e-6, 0), (3 - 9e-7, 0.0, 4), (3 + 2e-6, 1e-6, 4), (2.5, 1e-6, 4)],
)
def test_counts_may_be_off_by_the_slack(value, slack, status):
    library, nnz, fault = np.zeros(1), np.zeros((1, 2), np.int32), np.zeros(4, np.int64)
    csr_count(
        np.array([0, 2]), np.array([0, 1], np.int32), np.array([5.0, value]), 2, 0, slack, np.zeros(1, np.int32),
        library, nnz, np.full(2, -1), fault,
    )  # fmt: skip
    assert fault[0] == status
    if status:
        assert fault[2] == 1
    else:
        assert library[0] == 5.0 + value  # unrounded
