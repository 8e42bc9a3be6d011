"""The trend of variance on mean, where loess has few genes, ties or an absurd span: never the end of the process."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from vcelltools.errors import UsageError
from vcelltools.selection.trend import fit_trend

# in a process of its own: without the guard skmisc's Fortran code ends it
GRID = """
import json, numpy as np
from vcelltools.selection.trend import fit_trend
rng = np.random.default_rng(0)
out = []
for n in (1, 2, 3, 4, 5, 8, 20, 56, 99, 150):
    mean = rng.gamma(1, 1, n) + 0.1
    for kind, m in (("random", mean), ("tied", np.round(mean) + 1), ("equal", np.ones(n))):
        for span in (1e-300, 1e-9, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, *(np.nextafter(k / n, 0) for k in (1, 3))):
            if span <= 1:
                fitted, reason = fit_trend(m, m + m * m * rng.gamma(1, 1, n), span=span)
                out.append([n, kind, span, bool(np.isfinite(fitted).all()) and len(fitted) == n, reason])
print(json.dumps(out))
"""


def test_every_span_gives_a_trend_or_a_reason():
    ran = subprocess.run([sys.executable, "-c", GRID], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, f"exit {ran.returncode}: {ran.stderr}"
    rows = json.loads(ran.stdout)
    assert all(ok for *_, ok, _ in rows)
    for n, kind, span, _, reason in rows:
        if n < 4:
            assert reason == f"only {n} {'gene varies' if n == 1 else 'genes vary'}"
        elif int(span * n) < 3:
            assert (
                reason
                == f"a span of {span} leaves {int(span * n)} of {n} genes for a local fit, which needs at least 3"
            )
        elif kind == "random" and span >= 0.5:
            assert reason is None


@pytest.mark.parametrize("span", [float("nan"), float("inf"), -0.1, 0.0, 1.0000001, 1e300])
def test_a_span_that_is_no_fraction(span):
    with pytest.raises(UsageError, match="span is"):
        fit_trend(np.ones(10), np.ones(10), span=span)
    from tests.make import as_layout, make_adata, make_counts
    from vcelltools import hvg

    for flavor in ("seurat_v3", "dispersion"):
        with pytest.raises(UsageError, match="span is"):
            hvg(make_adata(as_layout(make_counts(40, 30), "csr")), top=5, flavor=flavor, span=span)


def test_small_spans_in_batches_fall_back_with_a_warning():
    from tests.make import as_layout, make_adata, make_counts
    from vcelltools import hvg

    adata = make_adata(as_layout(make_counts(60, 50), "csr"))
    adata.obs["batch"] = np.array(["a", "b"])[np.arange(60) % 2]
    result = hvg(adata, top=5, span=0.01, batch_key="batch")
    assert len(result.attrs["genes"]) == 5
    assert sum("a span of 0.01 leaves 0 of" in w for w in result.attrs["warnings"]) == 2


def test_lowess_on_genes_of_equal_mean_says_nothing():
    import anndata as ad
    from scipy import sparse

    from vcelltools import hvg

    X = np.tile(np.eye(6, dtype=np.float32) * 3, (5, 1)) + (np.arange(30)[:, None] % 2)
    assert len(hvg(ad.AnnData(sparse.csr_matrix(X)), top=3, flavor="vcell_lowess").attrs["genes"]) == 3
