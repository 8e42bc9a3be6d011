"""The public functions: explicit signatures, examples that run, completion, and AnnData in and out."""

from __future__ import annotations

import ast
import doctest
import inspect
import os

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.conftest import ROOT, run_cli
from vcelltools.errors import UsageError

VERBS = [n for n in vc.__all__ if n not in ("__version__", *vc._ROOMS)]
STORE = {"pert_col": "target_gene", "control": "non-targeting", "cell_line_col": "cell_line"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the examples read."""
    d = tmp_path_factory.mktemp("public")
    vc.simulate(d / "atlas.h5ad", cells=200, genes=100, perturbations=4, cell_lines=2, seed=3)
    vc.simulate(d / "screen.h5mu", cells=300, genes=100, perturbations=4, guides=True, seed=4)
    vc.normalize(d / "atlas.h5ad", d / "truth.h5ad")
    vc.baseline(d / "pred.h5ad", truth=d / "truth.h5ad")
    pooled = ("--pooled", "--top", 10, "--out", "pooled.txt", "--hvg-info", "hvg_info.json")
    assert run_cli("hvg", "atlas.h5ad", *pooled, cwd=d).code == 0
    names = list(ad.read_h5ad(d / "atlas.h5ad").var_names)
    (d / "basis.txt").write_text("".join(f"{g}\n" for g in names[:30]))
    (d / "genes.csv").write_text("".join(f"{g}\n" for g in names))
    vc.build_store(d / "atlas.h5ad", basis=d / "basis.txt", out=d / "stores", **STORE)
    (d / "split.toml").write_text('[training]\natlas = "train"\n[zeroshot]\n"atlas.line2" = "test"\n')
    split = d / "split.toml"
    vc.train(d / "runs" / "mean", stores=[d / "stores" / "atlas"], split=split, model="perturbation-mean")
    return d


@pytest.mark.parametrize("name", VERBS)
def test_the_example_runs(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder(recurse=False).find(getattr(vc, name), name)
    assert found and found[0].examples, f"{name} has no example"
    assert "+SKIP" not in found[0].docstring
    out: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(found[0], out=out.append)
    assert failed.failed == 0, "".join(out)


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_is_written_out(name):
    f = getattr(vc, name)
    parameters = inspect.signature(f).parameters.values()
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert all(p.annotation is not p.empty for p in parameters if p.name != "self")
    assert "Raises\n" in (f.__doc__ or "") or name in {"verify_store", "inspect"}, "which errors does it raise?"


def test_every_command_that_computes_is_a_function():
    from vcelltools.cli.main import COMMANDS

    other = {"build-store": "build_store", "verify": "verify_store"}
    inside = {"demo", "doctor", "init"}  # of the command line alone
    assert {other.get(c, c) for c in COMMANDS} - inside <= set(VERBS)


def test_an_editor_completes_the_names():
    tree = ast.parse((ROOT / "vcelltools" / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    typed = {a.asname: f"{n.module}" for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert {k: v for k, v in typed.items() if k not in vc._ROOMS} == vc._PUBLIC
    assert set(typed) == set(VERBS) | set(vc._ROOMS)


@pytest.fixture
def adata(folder):
    return ad.read_h5ad(folder / "atlas.h5ad")


def test_hvg_in_place_fills_what_scanpy_fills(adata):
    import scanpy as sc

    expected = adata.copy()
    sc.pp.highly_variable_genes(expected, n_top_genes=20, flavor="seurat_v3")
    frame = vc.hvg(adata, top=20)
    assert vc.hvg(adata, top=20, inplace=True) is None
    assert adata.uns["hvg"] == dict(expected.uns["hvg"]) and set(adata.var) >= set(expected.var)
    assert adata.var["highly_variable"].dtype == bool and adata.var["highly_variable"].sum() == 20
    for name in ("means", "variances", "variances_norm"):
        np.testing.assert_allclose(adata.var[name], expected.var[name], rtol=1e-12)
    pd.testing.assert_series_equal(adata.var["highly_variable"], frame["highly_variable"], check_names=False)


def test_hvg_in_place_takes_an_anndata_alone(folder):
    with pytest.raises(UsageError, match="only an AnnData can be changed in place") as e:
        vc.hvg(folder / "atlas.h5ad", inplace=True)
    assert e.value.field == "inplace"


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("target_sum", [1e4, None])
def test_normalize_in_memory_is_scanpys(adata, layout, target_sum):
    import scanpy as sc

    adata.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x.toarray()}[layout](adata.X)
    counts, expected = adata.X.copy(), adata.copy()
    sc.pp.normalize_total(expected, target_sum=target_sum)
    sc.pp.log1p(expected)
    changed = vc.normalize(adata, target_sum=target_sum, inplace=False)
    assert (counts != adata.X).sum() == 0 and "log1p" not in adata.uns
    assert vc.normalize(adata, target_sum=target_sum, keep_counts=True) is None
    for got in (changed.X, adata.X):
        assert type(got) is type(counts) and got.dtype == np.float32
        np.testing.assert_allclose(_dense(got), _dense(expected.X), rtol=1e-6)
    assert (adata.layers["counts"] != counts).sum() == 0 and adata.uns["log1p"] == expected.uns["log1p"]


def _dense(x):
    return x.toarray() if sp.issparse(x) else x


def test_normalize_of_a_file_needs_an_output(folder):
    with pytest.raises(UsageError, match="no output file was given") as e:
        vc.normalize(folder / "atlas.h5ad")
    assert e.value.field == "out"


def test_a_path_loads_no_anndata(folder):
    code = (
        "import sys, vcelltools as vc\n"
        "frame = vc.hvg('atlas.h5ad', top=5)\n"
        "vc.normalize('atlas.h5ad', 'loads.h5ad', force=True)\n"
        "assert 'anndata' not in sys.modules and 'scanpy' not in sys.modules"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_arguments_of_the_other_rules_are_refused(folder):
    for options, says in (
        ({"continuity": False}, "continuity cannot be used with compat='ours'"),
        ({"compat": "vcc2026", "epsilon": 1.0}, "epsilon cannot be used with compat='vcc2026'"),
    ):
        with pytest.raises(UsageError, match=says):
            vc.score(folder / "pred.h5ad", folder / "truth.h5ad", **options)


def test_a_description_and_its_fields_are_not_both_taken(folder):
    from vcelltools.config import DatasetConfig

    spec = DatasetConfig(name="s", path=os.fspath(folder / "atlas.h5ad"), pert_col="target_gene")
    with pytest.raises(UsageError, match="spec and control are both given"):
        vc.build_store(folder / "atlas.h5ad", basis=["G1"], spec=spec, control="non-targeting")


def test_the_command_line_and_python_write_the_same(folder):
    done = run_cli("baseline", "--truth", "truth.h5ad", "--out", "cli.h5ad", "--json", "-q", cwd=folder)
    assert done.code == 0 and done.json == {"out": "cli.h5ad", "kind": "mean", "n_cells": 200}
    assert (ad.read_h5ad(folder / "cli.h5ad").X != ad.read_h5ad(folder / "pred.h5ad").X).sum() == 0


def test_a_wrong_model_or_split_is_a_usage_error(folder):
    from vcelltools.training.settings import TrainSettings
    from vcelltools.training.train import train

    store = vc.open_store(folder / "stores" / "atlas")
    with pytest.raises(UsageError) as e:
        vc.Sampler(store, set_size=8, sets_per_batch=2, split="split.toml")
    assert e.value.field == "split"
    with pytest.raises(UsageError) as e:
        train(TrainSettings(out=str(folder / "zz"), model="zz"), stores=[store])
    assert e.value.field == "model"
    with pytest.raises(UsageError):
        vc.train(folder / "zz", stores=[store], model="zz")
    with pytest.raises(UsageError):
        vc.baseline(folder / "zz.h5ad", stores=[folder / "stores" / "atlas"], kind="zz")


def test_inspect_of_what_cannot_be_read_is_not_a_success(tmp_path):
    import h5py

    with h5py.File(tmp_path / "x.h5ad", "w") as f:
        f["X"] = np.zeros(3)
    assert run_cli("inspect", "x.h5ad", "--json", cwd=tmp_path).code == 3
