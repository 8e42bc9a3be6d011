"""numba loaded lean: cached kernels come without the compiler, new ones compile, and both give the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

CODE = """
import json, sys
from vcelltools.kernels import load_numba
load_numba(alone=True)
import numpy as np
from vcelltools.kernels.labelings import csc_append, sort_genes

def sort(kind):
    v = np.array([3.0, 1.0, 2.0, 1.0, 5.0])
    order, tied = np.empty(5, np.int32), np.empty(5, np.uint8)
    keys = np.empty(5, np.uint64), np.empty(5, np.uint64), np.empty((3, 2048), np.int64)
    sort_genes(np.array([0, 3, 5], kind), np.arange(5, dtype=np.int32), v.view(np.uint64), order, tied, *keys)
    return order.tolist(), tied.tolist()

first = sort(np.int64)
heavy = [m for m in ("numba.np.arrayobj", "numba.np.linalg", "numba.typed.typedlist", "scipy") if m in sys.modules]
loaded = sum(sort_genes.stats.cache_hits.values())
print(json.dumps([first, sort(np.int32) if len(sys.argv) > 1 else first, heavy, loaded]))
"""


def run(folder, *more):
    env = os.environ | {"NUMBA_CACHE_DIR": str(folder), "NUMBA_DISABLE_JIT": "0"}
    env = {k: v for k, v in env.items() if k not in ("COVERAGE_PROCESS_START",)}
    p = subprocess.run([sys.executable, "-c", CODE, *more], capture_output=True, text=True, env=env, check=False)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout)


def test_a_cached_kernel_loads_without_the_compiler_and_a_new_one_compiles(tmp_path):
    expected = [[1, 2, 0, 3, 4], [0, 0, 0, 0, 0]]
    first, _, _, hits = run(tmp_path)
    assert (first, hits) == (expected, 0)
    first, other, heavy, hits = run(tmp_path, "compile a new signature too")
    assert first == other == expected
    assert hits == 1
    assert heavy == []
