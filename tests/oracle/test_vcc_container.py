"""Containers against the challenge's own tools: theirs pass our lint, ours pass theirs and hold the same prediction."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zstandard
from scipy import sparse

from tests.peers import peer_python
from vcelltools.challenge.vcc import lint, prep
from vcelltools.errors import DataError

GENES = [f"G{i}" for i in range(60)]


def make_2025(path: Path, *, counts: bool, shuffle: bool = False) -> Path:
    rng = np.random.default_rng(0)
    X = rng.poisson(2.0, (90, len(GENES))).astype(np.float32)
    if not counts:
        X = np.log1p(X / X.sum(1, keepdims=True) * 1e4)
    obs = pd.DataFrame({"target_gene": (["non-targeting"] * 30 + ["G1"] * 30 + ["G2"] * 30)})
    obs.index = [f"cell{i}" for i in range(90)]
    a = ad.AnnData(sparse.csr_matrix(X), obs, pd.DataFrame(index=GENES))
    if shuffle:
        a = a[:, rng.permutation(len(GENES))].copy()
    a.write_h5ad(path)
    return path


def make_2026(path: Path, *, drop: str = "", dense: bool = False) -> Path:
    rng = np.random.default_rng(1)
    labels = [(c, p) for c in "ABC" for p in ("G1", "G2", "G3") for _ in range(5)]
    if drop:
        labels = [x for x in labels if x[1] != drop or x[0] != "B"]
    X = rng.poisson(1.5, (len(labels), len(GENES))).astype(np.float32)
    obs = pd.DataFrame({"target_gene": [p for _, p in labels], "context": [c for c, _ in labels]})
    obs.index = [str(i) for i in range(len(labels))]
    ad.AnnData(X if dense else sparse.csr_matrix(X), obs, pd.DataFrame(index=GENES)).write_h5ad(path)
    return path


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "genes.csv").write_text("\n".join(GENES) + "\n")
    (tmp_path / "gene_names.csv").write_text("gene_name\n" + "\n".join(GENES) + "\n")
    (tmp_path / "pert_counts.csv").write_text("target_gene\nG1\nG2\nG3\n")
    return tmp_path


def read_inner(vcc: Path) -> ad.AnnData:
    with tarfile.open(vcc) as tar:
        data = tar.extractfile("pred.h5ad.zst").read()
    raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    inner = vcc.with_suffix(".inner.h5ad")
    inner.write_bytes(raw)
    return ad.read_h5ad(inner)


def run(python: Path, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(python), *map(str, args)], capture_output=True, text=True, timeout=200, check=False)


def assert_same(ours: ad.AnnData, theirs: ad.AnnData, tolerance: float = 0.0) -> None:
    assert list(ours.var_names) == list(theirs.var_names)
    assert list(ours.obs_names) == list(theirs.obs_names)
    assert list(ours.obs.columns) == list(theirs.obs.columns)
    for c in ours.obs.columns:
        assert list(ours.obs[c].astype(str)) == list(theirs.obs[c].astype(str))
    assert ours.X.format == theirs.X.format == "csr"
    assert ours.X.dtype == theirs.X.dtype
    np.testing.assert_allclose(ours.X.toarray(), theirs.X.toarray(), rtol=tolerance)


@pytest.mark.peer
@pytest.mark.parametrize(("counts", "shuffle"), [(False, False), (True, True)])
def test_2025_equals_cell_eval_prep(lists, counts, shuffle):
    python = peer_python("cell-eval-0.8.2")
    pred = make_2025(lists / "pred.h5ad", counts=counts, shuffle=shuffle)
    cell_eval = python.parent / "cell-eval"
    done = run(cell_eval, "prep", "-i", pred, "-g", lists / "genes.csv", "-o", lists / "theirs.vcc")
    assert done.returncode == 0, done.stderr[-1500:]
    prep(pred, lists / "ours.vcc", genes=lists / "genes.csv")
    assert_same(read_inner(lists / "ours.vcc"), read_inner(lists / "theirs.vcc"), tolerance=3e-7)
    with tarfile.open(lists / "ours.vcc") as a, tarfile.open(lists / "theirs.vcc") as b:
        assert a.getnames() == b.getnames()
        assert [m.mode for m in a] == [m.mode for m in b]
    assert (lists / "ours.vcc").read_bytes()[257:265] == (lists / "theirs.vcc").read_bytes()[257:265] == b"ustar  \0"
    for name in ("ours.vcc", "theirs.vcc"):
        result = lint(lists / name, genes=lists / "genes.csv")
        assert result.ok, result.problems


@pytest.mark.peer
@pytest.mark.parametrize("dense", [False, True])
def test_2026_equals_vcc_prep(lists, dense):
    python = peer_python("cell-eval2-0.20.0")
    pred = make_2026(lists / "pred.h5ad", dense=dense)
    given = ["-g", lists / "gene_names.csv", "--perts", lists / "pert_counts.csv"]
    done = run(python.parent / "vcc", "prep", pred, *given, "--contexts", "A,B,C", "--cells-per-pert", 5,
               "-o", lists / "theirs.vcc")  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    prep(pred, lists / "ours.vcc", genes=lists / "gene_names.csv", perturbations=lists / "pert_counts.csv",
         cells_per_perturbation=5)  # fmt: skip
    assert_same(read_inner(lists / "ours.vcc"), read_inner(lists / "theirs.vcc"))
    metas = []
    for name in ("ours.vcc", "theirs.vcc"):
        with tarfile.open(lists / name) as tar:
            assert tar.getnames() == ["meta.json", "pred.h5ad.zst"]
            assert {(m.uid, m.gid, m.mtime, m.uname) for m in tar} == {(0, 0, 0, "")}
            meta = json.load(tar.extractfile("meta.json"))
        meta.pop("cli_version")
        metas.append(meta)
        result = lint(lists / name, genes=lists / "gene_names.csv", perturbations=lists / "pert_counts.csv",
                      cells_per_perturbation=5)  # fmt: skip
        assert result.ok, result.problems
    assert metas[0] == metas[1]
    code = "import sys\nfrom vcc.vccfile import *\nvalidate_vcc(sys.argv[1]); print(nnz_from_vcc(sys.argv[1]))"
    checked = run(python, "-c", code, lists / "ours.vcc")
    assert checked.returncode == 0, checked.stderr
    assert int(checked.stdout) == metas[1]["nnz"]


@pytest.mark.peer
def test_2026_refuses_what_vcc_refuses(lists):
    """Each of their refusals has one of ours, that names the culprit."""
    python = peer_python("cell-eval2-0.20.0")

    def spoil(name, change):
        a = ad.read_h5ad(make_2026(lists / "good.h5ad"))
        a = change(a) or a
        a.write_h5ad(lists / f"{name}.h5ad")

    def fraction(a):
        a.X.data[7] = 0.5

    def negative(a):
        a.X.data[7] = -1

    def nan(a):
        a.X.data[7] = np.nan

    def heavy(a):
        a.X.data[7] = 2e6

    def control(a):
        a.obs["target_gene"] = ["non-targeting" if i == 0 else v for i, v in enumerate(a.obs["target_gene"])]

    def unknown(a):
        a.obs["target_gene"] = ["G1-1" if v == "G1" else v for v in a.obs["target_gene"]]

    def empty(a):
        a.X = sparse.csr_matrix(a.X.multiply((a.obs["target_gene"] != "G2").to_numpy()[:, None]))

    def context(a):
        a.obs["context"] = ["D" if v == "C" else v for v in a.obs["context"]]

    cases = {
        "fraction": (fraction, "not a whole number"),
        "negative": (negative, "which is negative"),
        "nan": (nan, "holds nan"),
        "heavy": (heavy, "more than 1,000,000 counts"),
        "control": (control, "1 cells are the control"),
        "unknown": (unknown, "G1-1"),
        "empty": (empty, "all zero in every cell (G2)"),
        "context": (context, "contexts are missing: C"),
        "fewer": (lambda a: a[1:].copy(), "G1 has 4 cells, not 5"),
        "gene": (lambda a: a[:, 1:].copy(), "1 genes of the list are missing (G0)"),
    }
    options = ["-g", lists / "gene_names.csv", "--perts", lists / "pert_counts.csv", "--contexts", "A,B,C",
               "--cells-per-pert", "5"]  # fmt: skip
    for name, (change, says) in cases.items():
        spoil(name, change)
        with pytest.raises(DataError) as e:
            prep(lists / f"{name}.h5ad", lists / f"{name}.vcc", genes=lists / "gene_names.csv",
                 contexts=("A", "B", "C"), perturbations=lists / "pert_counts.csv",
                 cells_per_perturbation=5)  # fmt: skip
        assert says in str(e.value), (name, str(e.value))
        assert not (lists / f"{name}.vcc").exists()
    script = "import sys\nfrom vcc.cli import cli\nfor i in sys.argv[1].split(','):\n" \
             "    try:\n        cli(['prep', i, *sys.argv[2:], '--dry-run'])\n" \
             "    except SystemExit as e:\n        print(e.code)"  # fmt: skip
    done = run(python, "-c", script, ",".join(str(lists / f"{n}.h5ad") for n in cases), *options)
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert len(codes) == len(cases)
    assert "0" not in codes
