"""``vcelltools spatial`` end to end, on a simulated tissue."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_cli, start_cli

FIT = ["--network", "mouse_network.parquet", "--radius", "100", "--genes", "Gene1,Gene2,Gene3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("spatial")
    made = run_cli("simulate", "--spatial", "--out", "sim.h5ad", "--cells", 300, "--genes", 70, "--json", cwd=d)
    assert made.code == 0, made.stderr
    done = run_cli("spatial", "fit", "--h5ad", "sim.h5ad", "--output-dir", "run", *FIT, "--json", cwd=d)
    assert done.code == 0, done.stderr
    assert done.json["n_fitted"] == 3 and done.json["largest_kkt"] <= 1e-6
    return d


def test_the_simulation_is_complete(folder):
    import anndata as ad
    import pandas as pd

    truth = pd.read_parquet(folder / "sim.truth.parquet")
    network = pd.read_parquet(folder / "mouse_network.parquet")
    edges = set(zip(network.source, network.target, strict=True))
    planted = truth[truth.kind != "none"]
    assert len(planted) and all(tuple(m.split("$")) in edges for m in planted.modulator if "$" in m)
    assert all((m, t) in edges for m, t in zip(planted.modulator, planted.target, strict=True) if "$" not in m)
    knock = ad.read_h5ad(folder / "sim.knockouts.h5ad")
    for gene in knock.uns["knockouts"]:
        delta = knock.layers[f"delta_{gene}"]
        assert (delta[~knock.obs.in_scope.to_numpy(), knock.var_names.get_loc(gene)] >= -1e-9).all()


def test_every_command(folder):
    d = folder
    check = run_cli("spatial", "check", "sim.h5ad", *FIT, "--json", cwd=d).json
    assert set(check["modulators"]) == {"Gene1", "Gene2", "Gene3"} and check["edges"]["grn"] > 0
    for command, out in (
        (["splash", "--gene", "Gene1"], "splash.feather"),
        (["perturb", "--gene", "Tf1", "--gene", "Lig1=2"], "ko.h5ad"),
        (["perturb", "--gene", "Tf1", "--response", "exact", "--where", "cell_type=type1"], "exact.feather"),
        (["interactions", "--by", "cell_type"], "interactions.csv"),
        (["interactions", "--cell", "cell7", "--neighbors", "5", "--how", "max"], "near.csv"),
        (["field", "--gene", "Tf1", "--basis", "spatial", "--grid-out", "grid.json"], "field.csv"),
        (["screen", "--genes", "Tf1,Lig1", "--keep-deltas", "--workers", "2"], "screen"),
        (["report", "--perturbation", "Tf1"], "report.html"),
    ):
        done = run_cli("spatial", *command, "--run-toml", "run", "--out", out, "--json", cwd=d)
        assert done.code == 0, f"{command}: {done.stderr}"
        assert (d / out).exists() and isinstance(done.json, dict)
    for command in (["splash", "--gene", "Gene1"], ["interactions"]):
        out = "splash.feather" if command[0] == "splash" else "interactions.csv"
        assert run_cli("spatial", *command, "--run-toml", "run", "--out", out, cwd=d).code == 2, "it exists"
    done = run_cli("spatial", "received", "sim.h5ad", *FIT[:4], "--out", "received.parquet", cwd=d)
    assert done.code == 0, done.stderr


def test_full_mode_from_the_tissue_to_a_knockout(folder):
    d = folder
    full = ["--training-mode", "full", "--epochs", "4", "--lr", "0.01", "--genes", "Gene3"]
    done = run_cli("spatial", "fit", "--h5ad", "sim.h5ad", "--output-dir", "full", *FIT, *full, "--json", cwd=d)
    assert done.code == 0, done.stderr
    assert isinstance(done.json["n_per_cell"], int)
    toml = (d / "full" / "spacetravlr_run_repro.toml").read_text()
    assert 'mode = "full"' in toml and "epochs = 4" in toml and "learning_rate = 0.01" in toml
    for command, out in ((["perturb", "--gene", "Tf1"], "full.feather"), (["report"], "full.html")):
        done = run_cli("spatial", *command, "--run-toml", "full", "--out", out, "--json", cwd=d)
        assert done.code == 0, f"{command}: {done.stderr}"
    assert "r2_cell" in (d / "full.html").read_text()


def test_tables_hold_what_they_say(folder):
    import pandas as pd

    from vcelltools.spatial import open_run

    d = folder
    run = open_run(d / "run")
    if not (d / "screen").exists():
        test_every_command(folder)
    effects = pd.read_parquet(d / "screen" / "effects.parquet")
    assert list(effects) == ["perturbation", "cell_type", "gene", "mean_delta", "share_changed"]
    p = run.perturb({"Tf1": 0})
    kept = pd.read_feather(d / "screen" / "Tf1_4n_0x.feather").set_index("CellID")
    np.testing.assert_allclose(kept.to_numpy(), p.to_frame()[kept.columns].to_numpy(), rtol=1e-12, atol=1e-13)
    mine = effects[(effects.perturbation == "Tf1") & (effects.cell_type == "0") & (effects.gene == "Tf1")]
    cells = run.tissue.clusters == 0
    np.testing.assert_allclose(mine.mean_delta.item(), p.delta[cells, p.genes.index("Tf1")].mean(), rtol=1e-12)
    i = pd.read_csv(d / "interactions.csv")
    assert set(i.interaction_type) <= {"tf", "ligand-receptor", "ligand-tf"} and (i.beta != 0).all()
    b = run.betas("Gene1")
    row = i[i.gene == "Gene1"].iloc[0]
    at = b.names.index(row.interaction)
    types = run.tissue.column("cell_type").labels()
    np.testing.assert_allclose(row.beta, b.values[run.tissue.clusters[types == row.cell_type], at].mean(), rtol=1e-12)


def test_a_field_by_its_definition(folder):
    from vcelltools.spatial import open_run

    run = open_run(folder / "run")
    p = run.perturb({"Tf1": 0})
    k, temperature = 20, 0.05
    f = run.field({"Tf1": 0}, basis="spatial", n_neighbors=k, temperature=temperature)
    e, x, delta = run.tissue.xy, p.change.before, p.delta
    for i in (0, 17, 200):
        order = np.argsort(((e - e[i]) ** 2).sum(1), kind="stable")
        near = order[order != i][:k]
        r = np.array([np.corrcoef(delta[i], x[j] - x[i])[0, 1] if delta[i].std() > 0 else 1.0 for j in near])
        prob = np.exp(r / temperature) / np.exp(r / temperature).sum()
        prob = np.maximum(prob - 1 / k, 0)
        prob = prob / prob.sum() if prob.sum() > 0 else prob
        np.testing.assert_allclose(f.vectors[i], prob @ (e[near] - e[i]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fit", "--h5ad", "absent.h5ad", "--output-dir", "x"], 3),
        (["fit", "sim.h5ad"], 2),
        (["fit", "--h5ad", "sim.h5ad", "--output-dir", "x", "--layer", "nothing", *FIT], 3),
        (["fit", "--h5ad", "sim.h5ad", "--output-dir", "run", *FIT, "--l1-reg", "1"], 2),
        (["fit", "--h5ad", "sim.h5ad", "--output-dir", "x", *FIT, "--kernel", "slow"], 2),
        (["fit", "--h5ad", "sim.h5ad", "--output-dir", "x", *FIT, "--epochs", "9"], 2),
        (["fit", "--h5ad", "sim.h5ad", "--output-dir", "x", *FIT, "--training-mode", "full", "--no-validate"], 2),
        (["perturb", "--run-toml", "run", "--gene", "Tf1=-1", "--out", "n.feather"], 2),
        (["perturb", "--run-toml", "run", "--gene", "tf1", "--out", "n.feather"], 3),
        (["perturb", "--run-toml", "nothing", "--gene", "Tf1", "--out", "n.feather"], 3),
        (["perturb", "--run-toml", "run", "--gene", "Tf1", "--where", "nothing=1", "--out", "n.feather"], 3),
        (["screen", "--run-toml", "run", "--out", "y"], 2),
        (["splash", "--run-toml", "run", "--gene", "Tf1", "--out", "n.xyz"], 3),
        (["field", "--run-toml", "run", "--gene", "Tf1", "--out", "n.csv"], 3),
    ],
)
def test_exit_codes(folder, arguments, code):
    done = run_cli("spatial", *arguments, "--json", cwd=folder)
    assert done.code == code and done.json["error"]["exit_code"] == code, done.stderr
    assert done.stderr.count("error:") == 1 and not list(folder.glob("n.*"))


def test_configuration_of_the_working_folder(folder, tmp_path):
    (tmp_path / "spaceship_config.toml").write_text(
        f'[data]\nadata_path = "{folder / "sim.h5ad"}"\n[spatial]\nradius = 100\n[lasso]\nn_iter = 5\n'
        f'[grn]\nnetwork_data_dir = "{folder}"\n[training]\ngenes = ["Gene1"]\nepochs = 7\n'
        '[execution]\noutput_dir = "out"\n'
    )
    done = run_cli("spatial", "fit", "--l1-reg", "0.05", "--standardize", "--no-validate", "--json", cwd=tmp_path)
    assert done.code == 0 and "not used here: lasso.n_iter, training.epochs" in done.stderr, done.stderr
    assert (tmp_path / "out" / "spacetravlr_run_repro.toml").exists()
    joined = run_cli("spatial", "fit", "--join-output-dir", "out", "--json", cwd=tmp_path)
    assert joined.json["n_skipped"] == 1, joined.stderr


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.slow
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(folder, tmp_path):
    genes = ["--genes", ",".join(f"Gene{i}" for i in range(1, 13)), *FIT[:4]]
    command = ["spatial", "fit", "--h5ad", folder / "sim.h5ad", "--parallel", "2", "--l1-reg", "0.05", *genes]
    command[command.index("mouse_network.parquet")] = folder / "mouse_network.parquet"
    assert run_cli(*command, "--output-dir", "whole", cwd=tmp_path).code == 0
    for delay in (1.5, 3.0, 5.0):
        process = start_cli(*map(str, command), "--output-dir", "killed", cwd=tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()  # its helper may still run; the next run shares the work with it, or takes it over
        process.stdout.close()
        process.stderr.close()
    done = run_cli(*command, "--output-dir", "killed", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
