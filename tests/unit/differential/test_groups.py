"""The groups that ``de`` compares."""

from __future__ import annotations

import numpy as np
import pytest

import vcelltools as vc
from tests.make import make_adata, make_counts
from vcelltools.errors import DataError


def test_controls_alone_are_no_comparison():
    adata = make_adata(make_counts(30, 10).astype(np.float32))
    adata.obs["target_gene"] = ["non-targeting"] * 20 + ["A"] * 10
    adata.obs["good"] = [True] * 20 + [False] * 10
    adata.obs["line"] = ["x"] * 10 + ["y"] * 20
    with pytest.raises(DataError, match="no cell selected by obs/good has a label"):
        vc.de(adata, keep="good")
    result = vc.de(adata, context_col="line")
    assert result.contexts == ["y"] and "contexts without a perturbation were left out: x" in result.notes
