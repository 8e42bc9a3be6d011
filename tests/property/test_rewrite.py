"""normalize, convert and sample: spans and threads never change a byte."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from vcelltools.files.convert import convert, sample
from vcelltools.files.normalize import normalize
from vcelltools.io.matrix import CscMatrix, CsrMatrix, DenseMatrix
from vcelltools.io.write import transpose

N, G = 150, 60


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    rng = np.random.default_rng(0)
    X = rng.poisson(0.5, (N, G)) * rng.integers(1, 200, (N, G))
    out = {}
    for layout in ("csr", "csc", "dense"):
        M = X.astype(np.float32) if layout == "dense" else sparse.csr_matrix(X.astype(np.int32)).asformat(layout)
        a = anndata.AnnData(
            M,
            obs=pd.DataFrame({"b": pd.Categorical(rng.choice(["x", "y"], N))}, index=[f"c{i}" for i in range(N)]),
            var=pd.DataFrame(index=[f"g{i}" for i in range(G)]),
        )
        out[layout] = tmp_path_factory.mktemp("rewrite") / f"{layout}.h5ad"
        a.write_h5ad(out[layout], compression="gzip")
    return out


def read_all(path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path) as f:
        f.visititems(lambda name, node: found.update({name: node[()]}) if isinstance(node, h5py.Dataset) else None)
    return found


RUNS = {
    "normalize": lambda a, b, layout, threads: normalize(a, b, threads=threads, force=True),
    "convert": lambda a, b, layout, threads: convert(a, b, layout=layout, threads=threads, force=True),
    "sample": lambda a, b, layout, threads: sample(a, b, n=70, threads=threads, force=True),
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=st.sampled_from(["csr", "csc", "dense"]),
    target=st.sampled_from(["csr", "csc", "dense"]),
    verb=st.sampled_from(sorted(RUNS)),
    values=st.integers(1, 3000),
    bucket=st.integers(50, 3000),
    threads=st.integers(1, 4),
)
def test_spans_and_threads_change_no_byte(tmp_path, sources, source, target, verb, values, bucket, threads):
    plain, cut = tmp_path / "plain.h5ad", tmp_path / "cut.h5ad"
    RUNS[verb](sources[source], plain, target, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transpose, "_BUCKET_VALUES", bucket)
        for cls in (CsrMatrix, CscMatrix, DenseMatrix):
            plan = cls.plan
            patch.setattr(cls, "plan", lambda self, plan=plan, **k: plan(self, **{**k, "max_values": values}))
        RUNS[verb](sources[source], cut, target, threads)
    a, b = read_all(plain), read_all(cut)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
