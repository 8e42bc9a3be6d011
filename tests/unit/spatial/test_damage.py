"""After a kill at any step, the same call gives the same bytes; damaged files are named, without other errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.torture.spatial import damage_runs, fit, make_run, screen
from vcelltools import spatial
from vcelltools.errors import DataError, UsageError
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.spatial.report import write_report
from vcelltools.spatial.screen import read_batch
from vcelltools.spatial.settings import load_toml


def test_killed_at_steps_the_same_call_ends_with_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "tests.spatial_kill_walk", str(tmp_path), "2", "19"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 6 and found["wrong"] == found["left"] == [], found


def test_what_is_damaged_is_refused(tmp_path):
    drill = damage_runs(tmp_path, 1.5, 11)
    assert drill.failures == [] and drill.counts["refused"] > 0 and drill.counts["still good"] > 0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize("body", ["", "[]", '{"rows": 3, "stability": []}', '{"rows": [{"gene": 4}], "stability": []}'])
def test_a_finished_gene_that_is_damaged(work, body):
    path = work / "run" / ".rows" / "Gene0.json"
    kept = path.read_text()
    path.write_text(body)
    with pytest.raises(DataError, match=r"Gene0\.json.*same command makes it again"):
        fit(work / "run")
    path.unlink()
    fit(work / "run")
    assert path.read_text() == kept


def test_a_part_of_a_screen_that_is_damaged(work):
    effects, path = work / "screen" / "effects.parquet", work / "screen" / ".parts" / "Tf0.json"
    kept = effects.read_bytes()
    effects.unlink()
    path.write_text('{"perturbation": ["Tf0"], "cell_type": [], "score": [], "n_genes": []}')
    with pytest.raises(DataError, match=r"Tf0\.json.*same command makes it again"):
        screen(work / "run", work / "screen")
    path.unlink()
    screen(work / "run", work / "screen")
    assert effects.read_bytes() == kept


def test_values_of_another_kind(work, tmp_path):
    for text, said in (
        ("[training]\ngenes = 5\n", r"\[training\] genes is 5; a list of names"),
        ("[data]\nadata_path = true\n", "adata_path is True; text"),
        ("[clusters]\nx = 'y'\n", "invalid literal"),
        ("[grn]\nextra_lr = [1]\n", "a list of names"),
        ("[grn]\nnetwork = 7\n", "network is 7; text"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(DataError, match=said):
            load_toml(tmp_path / "c.toml")
    for text in ("genes = [true]\n", "genes = ['A']\nn_propagation = 1e400\n", "compound_genes = [[1]]\n"):
        (tmp_path / "b.toml").write_text(text)
        with pytest.raises(DataError, match=r"b\.toml"):
            read_batch(tmp_path / "b.toml", hops=4, scale=1.0)
    (tmp_path / "raw.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not a text file"):
        load_toml(tmp_path / "raw.toml")


def test_tables_of_another_kind(work, tmp_path):
    import pandas as pd

    from vcelltools.spatial.betadata import read_betas
    from vcelltools.spatial.regulatory_network import read_network

    frame = pd.read_parquet(work / "mouse_network.parquet").assign(weight=pd.Timestamp(0))
    frame.to_parquet(tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n\.parquet: does not hold"):
        read_network(tmp_path / "n.parquet")
    pd.DataFrame({"Cluster": [0], "beta0": [[1.0]], "beta_Tf0": [1.0]}).to_feather(tmp_path / "G_betadata.feather")
    with pytest.raises(DataError, match="'beta0' does not hold numbers"):
        read_betas(tmp_path / "G_betadata.feather", "G", {})
    path = work / "run" / "summary.parquet"
    kept = path.read_bytes()
    pd.read_parquet(path).drop(columns="gain").to_parquet(path)
    with pytest.raises(DataError, match=r"summary\.parquet"):
        write_report(spatial.open_run(work / "run"), tmp_path / "r.html")
    path.write_bytes(kept)


def test_what_a_killed_writer_left_makes_no_folder_foreign(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".finish.lock").touch()
    (folder / ".spacetravlr_run_repro.toml.17.0123abcd.tmp").touch()
    target = Target(folder, "run", owns=lambda _: False, reuse=True)
    guard_outputs([target])
    (folder / "thesis.tex").touch()
    with pytest.raises(UsageError, match="contains other files"):
        guard_outputs([target])
