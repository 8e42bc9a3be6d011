"""``train`` and ``predict`` from end to end, in separate processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.smallstore import build_small_store
from vcelltools.stores.store import open_store

QUICK = ["--size", "tiny", "--sets", "8", "--set-size", "16", "--seed", "4"]
ENV = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true", "JAX_PLATFORMS": ""}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    dpath = tmp_path_factory.mktemp("project")
    build_small_store(dpath)
    (dpath / "vcelltools.toml").write_text(
        '[store]\npath = "stores"\n[train]\nout = "runs/a"\neval_every = 20\nlog_every = 5\nwarmup = 5\n'
    )
    return dpath


@pytest.fixture(scope="module")
def trained(project):
    from tests.conftest import run_cli

    done = run_cli("train", *QUICK, "--steps", "60", "--json", cwd=project, env=ENV)
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def predicted(trained, project):
    from tests.conftest import run_cli

    done = run_cli("predict", "--run", "runs/a", "--out", "pred.h5ad", "--json", cwd=project, env=ENV)
    assert done.code == 0, done.stderr
    return done


def test_train_writes_a_run_and_says_what_is_next(trained, project):
    assert trained.json["out"].endswith("runs/a")
    assert trained.json["steps"] == 60
    assert "next: vcelltools predict" in trained.stderr
    assert "warn" not in trained.stderr.lower()  # neither JAX nor a plug-in warns on a plain machine
    assert json.loads((project / "runs/a/summary.json").read_text())["params_sha256"] == trained.json["params_sha256"]


def test_sigterm_checkpoints_and_the_same_command_continues_to_the_same_bits(trained, project, cli):
    command = ["train", *QUICK, "--steps", "60", "--out", "runs/b"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vcelltools.cli.main", *command], cwd=project, env={**os.environ, **ENV},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = project / "runs/b/metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == 5, stderr
    assert "stopped by SIGTERM after step" in stderr
    done = cli(*command, "--json", cwd=project, env=ENV)
    assert done.code == 0, done.stderr
    assert "continuing after step" in done.stderr
    assert done.json["params_sha256"] == trained.json["params_sha256"]


def test_a_run_that_cannot_be_extended_or_started_from(trained, project, cli):
    for words, code, said in (
        (("--extend", "runs/a"), 2, "--extend needs the number of steps"),
        (("--extend", "runs/a", "--steps", 60), 2, "runs/a has 60 steps already, so it cannot be extended to 60"),
        (("--extend", "runs/a", "--steps", 70, "--sets", 4), 2, "--sets cannot be changed with --extend"),
        (("--extend", "runs/a", "--steps", 70, "--force"), 2, "--extend cannot be combined with --force"),
        (("--extend", "runs/none", "--steps", 70), 3, "runs/none does not exist"),
        (
            ("--from", "runs/a", "--model", "ridge"),
            2,
            "or a diffusion model, not to ridge",
        ),
    ):
        done = cli("train", *words, cwd=project, env=ENV)
        assert done.code == code and said in done.stderr, (words, done.stderr)
    assert json.loads((project / "runs/a/summary.json").read_text())["steps"] == 60
    again = cli("train", *QUICK, "--steps", 60, cwd=project, env=ENV)
    assert again.code == 2 and "train it further with --extend runs/a" in again.stderr.replace(str(project) + "/", "")


def test_predict_writes_cells_that_anndata_reads(predicted, project, cli):
    import anndata as ad

    done = predicted
    pred, source = ad.read_h5ad(project / "pred.h5ad"), ad.read_h5ad(project / "sim.h5ad")
    assert pred.var_names.tolist() == source.var_names.tolist()
    assert pred.n_obs == done.json["n_cells"]
    assert "non-targeting" in set(pred.obs["target_gene"])
    assert (done.json["n_basis"], done.json["n_genes"]) == (60, 200)
    assert done.json["n_filled"] > 100
    again = cli("predict", "--run", "runs/a", "--out", "pred.h5ad", cwd=project, env=ENV)
    assert again.code == 2
    # controls are real cells of the line, and predicted means shift by the effect
    line = pred.obs["context"].iloc[0]
    control = pred[(pred.obs["target_gene"] == "non-targeting") & (pred.obs["context"] == line)].to_memory()
    real = source[(source.obs["target_gene"] == "non-targeting") & (source.obs["cell_line"] == line)].to_memory()
    total = np.asarray(real.X.sum(axis=1))
    want = np.log1p(real.X.toarray() / total * 1e4)
    np.testing.assert_allclose(np.sort(control.X.toarray().sum(axis=1)), np.sort(want.sum(axis=1)), rtol=1e-5)


def test_predict_counts_for_the_2026_rules(predicted, project, cli):
    import anndata as ad

    genes = ad.read_h5ad(project / "sim.h5ad", backed="r").var_names.tolist()[::-1]
    (project / "genes.csv").write_text("\n".join(genes) + "\n")
    held = json.loads((project / "runs/a/summary.json").read_text())["groups"]
    assert held["test"] > 0
    targets = ad.read_h5ad(project / "pred.h5ad", backed="r").obs["target_gene"].unique().tolist()
    targets.remove("non-targeting")
    (project / "counts.csv").write_text("target_gene,n_cells\n" + "".join(f"{t},40\n" for t in targets))
    done = cli(
        "predict", "--run", "runs/a", "--out", "pred26.h5ad", "--rules", 2026, "--perturbations", "counts.csv",
        "--line", "line1", "--genes", "genes.csv", "--json", cwd=project, env=ENV,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    pred = ad.read_h5ad(project / "pred26.h5ad")
    assert pred.var_names.tolist() == genes
    assert pred.X.dtype == np.int32
    assert pred.X.data.min() >= 1
    assert "non-targeting" not in set(pred.obs["target_gene"])
    assert pred.obs["target_gene"].value_counts().unique().tolist() == [40]
    assert pred.obs["context"].unique().tolist() == ["line1"]


def test_predict_of_an_unknown_name_and_of_what_is_no_input(trained, project, cli):
    (project / "odd.csv").write_text("target_gene,n_cells\nNOSUCHGENE,5\n")
    done = cli("predict", "--run", "runs/a", "--out", "x.h5ad", "--perturbations", "odd.csv", cwd=project, env=ENV)
    assert done.code == 0, done.stderr  # the mean effect, with a warning
    assert "1 perturbation is in no store (NOSUCHGENE) and predicted by the mean effect" in done.stderr
    (project / "x.h5ad").unlink()
    (project / "odd.csv").write_bytes(b"\x89HDF\xff")
    done = cli("predict", "--run", "runs/a", "--out", "x.h5ad", "--perturbations", "odd.csv", cwd=project, env=ENV)
    assert done.code == 3 and "odd.csv is not a text file, but a table of perturbations is expected" in done.stderr
    done = cli("predict", "--run", "stores", "--out", "x.h5ad", cwd=project, env=ENV)
    assert done.code == 3
    assert "not a run" in done.stderr


def test_predict_over_several_stores_asks_for_a_line(tmp_path, cli):
    project = tmp_path
    build_small_store(project)
    genes = open_store(project / "stores" / "sim").genes.tolist()
    build_small_store(project, seed=5, name="other", basis=genes)
    two = ["--store", "stores/sim", "--store", "stores/other"]
    done = cli("train", *two, "--model", "ridge", "--out", "runs/two", cwd=project, env=ENV)
    assert done.code == 0, done.stderr
    assert "--line other.line" in done.stderr
    command = ["predict", "--run", "runs/two", "--out", "two.h5ad"]
    done = cli(*command, cwd=project, env=ENV)
    assert done.code == 2
    assert "are in 2 stores" in done.stderr
    assert "--line other.line1" in done.stderr
    done = cli(*command, "--line", "other.line1", "--json", cwd=project, env=ENV)
    assert done.code == 0, done.stderr
    assert done.json["lines"] == ["other.line1"]


def test_usage_and_environment(project, cli):
    assert cli("train", "--dry-run", cwd=project).code == 2
    assert cli("train", "--topology", "v5e-16", cwd=project).code == 2
    assert cli("train", "--dry-run", "--topology", "v5e-15", cwd=project).code == 2
    assert cli("train", "--model", "gpt", cwd=project).code == 2
    done = cli("train", "--tpu", "--json", cwd=project)
    assert done.code == 4
    assert done.json["error"]["kind"] == "environment"
