"""The same digits whatever the number of threads, of BLAS's and of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# a score hides most of it by rounding: the sums of distances that it is made of are compared bit by bit
SCORE = """
import hashlib, json, sys
import anndata as ad, numpy as np, pandas as pd
from scipy import sparse
from vcelltools.scoring.cell_eval import edistance
import vcelltools as vc

def make(seed):
    rng = np.random.default_rng(seed)
    labels = np.repeat(["non-targeting", "A", "B", "C"], [1000, 257, 200, 64])
    X = sparse.csr_matrix(np.log1p(rng.poisson(1.0, (len(labels), 1501))).astype(np.float32))
    obs = pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(1501)]))

sums, call = [], edistance._Workshop.add_up

def keep(*a):
    out = call(*a)
    sums.append(hashlib.sha256(out.tobytes()).hexdigest())
    return out

edistance._Workshop.add_up = keep
r = vc.score(make(0), make(1), profile="full", threads=int(sys.argv[1]))
print(json.dumps([sums, r.to_frame().to_csv()]))
"""


def run(code, blas, *args):
    env = os.environ | {"OPENBLAS_NUM_THREADS": str(blas), "MKL_NUM_THREADS": str(blas)}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_scores_do_not_depend_on_threads():
    one = json.loads(run(SCORE, 1, 1))
    assert len(one[0]) > 2
    assert json.loads(run(SCORE, 2, 1)) == one
    assert json.loads(run(SCORE, 2, 3)) == one


PRODUCT = """
import sys, numpy as np
from vcelltools.runtime.threads import one_blas_thread
a = np.random.default_rng(0).normal(size=(257, 1501))
if sys.argv[1] == "1":
    with one_blas_thread():
        print((a @ a.T[:, :64]).tobytes().hex())
else:
    print((a @ a.T[:, :64]).tobytes().hex())
"""


def test_one_blas_thread_fixes_the_digits_of_a_product():
    assert run(PRODUCT, 1, 1) == run(PRODUCT, 2, 1) == run(PRODUCT, 4, 1) == run(PRODUCT, 1, 0)
    if run(PRODUCT, 2, 0) == run(PRODUCT, 1, 0):
        pytest.skip("this BLAS gives the same digits with any number of threads")
