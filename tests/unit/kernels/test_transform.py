"""Element-wise kernels, against exact arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np

from vcelltools.kernels.transform import expm1_small


def test_expm1_is_within_two_units_in_the_last_place():
    x = np.concatenate([[0.0], np.geomspace(1e-12, 20, 400), np.arange(1, 41) * (np.log(2) / 2), [600.0]])
    out, bits = np.empty(len(x)), np.empty(len(x), np.int64)
    expm1_small(x, len(x), bits, bits.view(np.float64), out)
    assert out[0] == 0
    with localcontext() as context:
        context.prec = 60
        for a, got in zip(x.tolist(), out.tolist(), strict=True):
            assert abs(Decimal(got) - (Decimal(a).exp() - 1)) <= 2 * Decimal(float(np.spacing(got))), a
