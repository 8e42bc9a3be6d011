"""A command compiles each kernel once: no second compilation for read-only views, other threads, other chunks.

Each pipeline runs in a process of its own, and every kernel of the package is then asked for what it was compiled for.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COUNT = """
import importlib, json, pkgutil, sys, warnings
from pathlib import Path
import vcelltools as vc, vcelltools.kernels as kernels
from numba.core.types import unliteral

def run():
    d = Path(sys.argv[1])
    {body}

warnings.simplefilter("ignore")
run()
found = {{}}
for m in pkgutil.iter_modules(kernels.__path__):
    name = "vcelltools.kernels." + m.name
    if name in sys.modules:
        for k, v in vars(sys.modules[name]).items():
            if hasattr(v, "py_func") and v.py_func.__module__ == name and v.signatures:
                # numba tries a constant as a literal first, when it compiles the kernel that calls this one
                found[m.name + "." + k] = sorted({{str(tuple(unliteral(t) for t in s)) for s in v.signatures}})
print(json.dumps(found))
"""
FILES = """
from vcelltools.files.convert import convert
from vcelltools.simulation.simulate import simulate
from pathlib import Path
import sys
d = Path(sys.argv[1])
simulate(d / "csr.h5ad", cells=1500, genes=200, perturbations=6, batches=2, seed=1)
for layout in ("csc", "dense"):
    convert(d / "csr.h5ad", d / f"{layout}.h5ad", layout=layout)
"""
BUILD = "vc.build_store(d / '{0}.h5ad', basis=[f'GENE{{i:05d}}' for i in range(60)], out=d / 'st-{0}', name='s', \
pert_col='target_gene', control='non-targeting', group_by=['batch'])"
PIPELINES = {
    **{f"hvg-{k}": f"vc.hvg(d / '{k}.h5ad', top=50, threads=2)" for k in ("csr", "csc", "dense")},
    **{f"hvg-batches-{k}": f"vc.hvg(d / '{k}.h5ad', top=50, batch_key='batch', threads=2)" for k in ("csr", "csc")},
    "hvg-pearson": "vc.hvg(d / 'csr.h5ad', top=50, flavor='pearson_residuals', threads=2)",
    **{f"normalize-{k}": f"vc.normalize(d / '{k}.h5ad', d / 'n-{k}.h5ad', threads=2)" for k in ("csr", "csc", "dense")},
    **{f"build-store-{k}": BUILD.format(k) for k in ("csr", "csc", "dense")},
    "de-wilcoxon": "vc.de(d / 'csr.h5ad', threads=2)",
    "de-nb": "vc.de(d / 'csr.h5ad', test='nb', threads=2)",
    "score": "vc.score(d / 'csr.h5ad', d / 'csr.h5ad', allow_discrete=True, threads=2)",
    "convert": "from vcelltools.files.convert import convert; convert(d / 'csr.h5ad', d / 'c.h5ad', layout='csc')",
    "simulate": "vc.simulate(d / 'sim.h5ad', cells=1500, genes=200, perturbations=6, threads=2)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("compile")
    subprocess.run([sys.executable, "-c", FILES, d], check=True, cwd=ROOT)
    return d


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_pipeline_compiles_each_kernel_once(folder, name):
    code = COUNT.format(body=PIPELINES[name])
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found, "no kernel ran"
    assert {k: v for k, v in found.items() if len(v) > 1} == {}
