"""The bytes of an output do not depend on threads, on hash seeds, or on whether kernels were compiled before."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.screens import make_screen, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("bytes")
    write(make_screen(600, 80), d / "x.h5ad")
    (d / "basis.txt").write_text("".join(f"GENE{i}\n" for i in range(30)))
    return d


def hash_all(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


COLUMNS = ("--pert-col", "target", "--control", "non-targeting")
OUTPUTS = [
    (("convert", "x.h5ad", "--layout", "csc", "--compression", "gzip"), "c.h5ad"),
    (("normalize", "x.h5ad", "--compression", "gzip"), "n.h5ad"),
    (("de", "x.h5ad", *COLUMNS), "d.parquet"),
    (("hvg", "x.h5ad", "--top", 30, "--batch-key", "batch"), "h.txt"),
    (("score", "x.h5ad", "--truth", "x.h5ad", *COLUMNS, "--profile", "minimal"), "scored"),
    (("build-store", "x.h5ad", "--basis", "basis.txt", *COLUMNS, "--name", "s"), "st"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "out"), OUTPUTS, ids=lambda v: v if isinstance(v, str) else v[0])
def test_threads_and_hash_seeds_change_no_byte(made, tmp_path, words, out):
    """The second run has another hash seed and other threads; that of a test compiles anew, in an empty cache."""
    cold = {"NUMBA_CACHE_DIR": str(tmp_path / "empty")} if words[0] == "de" else {}
    runs = [
        ({"PYTHONHASHSEED": "1", "OPENBLAS_NUM_THREADS": "1"}, 1),
        ({"PYTHONHASHSEED": "77", "OPENBLAS_NUM_THREADS": "4", **cold}, 3),
    ]
    found = []
    for k, (env, threads) in enumerate(runs):
        target = tmp_path / str(k) / out
        target.parent.mkdir()
        done = run_cli(*words, "--threads", threads, "--out", target, "-q", cwd=made, env=env)
        assert done.code == 0, done.stderr
        found.append(hash_all(target))
    if out == "st":  # it says how long it took and where it was built
        found = [{n: h for n, h in f.items() if n != "manifest.json"} for f in found]
    assert found[0] == found[1] and found[0]
