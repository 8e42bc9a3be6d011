"""The outputs of ``atlas`` and ``spatial``: none is, holds or lies inside what the command reads."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import typing
from pathlib import Path

import pytest

from tests.atlases import make_atlas
from tests.cli.test_outputs import MINE, look
from tests.conftest import run_cli
from tests.tissues import make_tissue_adata, write_network
from vcelltools.cli.main import GROUPS

# The options and arguments of every command that are paths: what it reads, and what it writes.
READS = {
    "atlas list": set(),
    "atlas fetch": set(),
    "atlas merge": {"folder", "genes"},
    "spatial check": {"file", "config", "network", "network_dir", "tf_prior"},
    "spatial fit": {"file", "h5ad", "config", "network", "network_dir", "tf_prior", "join_output_dir"},
    "spatial received": {"file", "config", "network", "network_dir"},
    "spatial splash": {"run_toml", "h5ad"},
    "spatial perturb": {"run_toml", "h5ad", "cells_csv"},
    "spatial interactions": {"run_toml", "h5ad"},
    "spatial screen": {"run_toml", "h5ad", "cells_csv", "batch_toml"},
    "spatial field": {"run_toml", "h5ad", "cells_csv"},
    "spatial report": {"run_toml", "h5ad"},
}
WRITES = {
    "atlas fetch": {"out"},
    "atlas merge": {"out"},
    "spatial fit": {"output_dir"},
    "spatial received": {"out"},
    "spatial splash": {"out"},
    "spatial perturb": {"out"},
    "spatial interactions": {"out"},
    "spatial screen": {"out"},
    "spatial field": {"out", "grid_out"},
    "spatial report": {"out"},
}

FIT = ("spatial", "fit", "t.h5ad", "--network", "mouse_network.parquet", "--radius", 100, "--genes", "Gene0,Gene1")
RUN = ("--run-toml", "run")
KO = ("--gene", "Tf0", "--cells-csv", "cells.csv")
RECEIVED = ("spatial", "received", "t.h5ad", "--network", "mouse_network.parquet")
SPLASH = ("spatial", "splash", *RUN, "--gene", "Gene0")
PERTURB = ("spatial", "perturb", *RUN, *KO)
INTERACTIONS = ("spatial", "interactions", *RUN, "--by", "cell_type")
SCREEN = ("spatial", "screen", *RUN, "--genes", "Tf0")
FIELD = ("spatial", "field", *RUN, *KO, "--basis", "spatial")
REPORT = ("spatial", "report", *RUN)
FETCH = ("atlas", "fetch", "src", "--all")
MERGE = ("atlas", "merge", "a", "--genes", "genes.txt")
RAW = "a/raw/SRX0001.h5ad"
BETAS = "run/Gene0_betadata.feather"

CASES = [
    (FETCH, "--out", "src"),
    (FETCH, "--out", "src/a"),
    (FETCH, "--out", "."),
    (FETCH, "--out", "thesis"),
    (FETCH, "--out", "notes.txt"),
    (MERGE, "--out", RAW),
    (MERGE, "--out", "genes.txt"),
    (MERGE, "--out", "a/manifest.json"),
    (MERGE, "--out", "a/samples.parquet"),
    ((*MERGE, "--format", "zarr"), "--out", "a"),
    ((*MERGE, "--format", "zarr"), "--out", "a/raw"),
    ((*MERGE, "--format", "batches"), "--out", "thesis"),
    ((*MERGE, "--format", "store"), "--out", "a"),
    ((*MERGE, "--format", "store"), "--out", "thesis"),
    (FIT, "--output-dir", "."),
    (FIT, "--output-dir", "t.h5ad"),
    (FIT, "--output-dir", "thesis"),
    (RECEIVED, "--out", "t.h5ad"),
    (RECEIVED, "--out", "mouse_network.parquet"),
    (SPLASH, "--out", BETAS),
    (SPLASH, "--out", "t.h5ad"),
    (SPLASH, "--out", "thesis"),
    (PERTURB, "--out", "t.h5ad"),
    (PERTURB, "--out", "cells.csv"),
    (PERTURB, "--out", "linked.h5ad"),
    (PERTURB, "--out", "run/spacetravlr_run_repro.toml"),
    (INTERACTIONS, "--out", "run/summary.parquet"),
    (INTERACTIONS, "--out", "mouse_network.parquet"),
    (SCREEN, "--out", "thesis"),
    (SCREEN, "--out", "."),
    (SCREEN, "--out", "t.h5ad"),
    (FIELD, "--out", BETAS),
    (FIELD, "--out", "cells.csv"),
    ((*FIELD, "--out", "new.csv"), "--grid-out", "t.h5ad"),
    ((*FIELD, "--out", "new.json"), "--grid-out", "new.json"),
    (REPORT, "--out", "t.h5ad"),
    (REPORT, "--out", "page.html"),
    (REPORT, "--out", BETAS),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("groups")
    make_atlas(d / "src", 3)
    adata = make_tissue_adata()
    adata.write_h5ad(d / "t.h5ad")
    write_network(d)
    (d / "genes.txt").write_text("".join(f"ENSG{i:011d}\n" for i in range(20)))
    (d / "cells.csv").write_text("cell_id\ncell1\ncell2\n")
    (d / "notes.txt").write_text(MINE)
    (d / "page.html").write_text("<!doctype html>\n<title>mine</title>\n")
    (d / "thesis").mkdir()
    (d / "thesis" / "samples.parquet").write_text(MINE)
    (d / "linked.h5ad").symlink_to("t.h5ad")
    for command in ((*FETCH, "--out", "a"), (*FIT, "--output-dir", "run")):
        done = run_cli(*command, "-q", cwd=d)
        assert done.code == 0, f"{command}\n{done.stderr}"
    return d


@pytest.mark.parametrize(
    ("command", "option", "path"), CASES, ids=lambda v: v if isinstance(v, str) else " ".join(v[:2])
)
def test_an_output_never_touches_what_is_not_its_own(made, command, option, path):
    before = look(made)
    force = [] if command[:2] == ("atlas", "fetch") else ["--force"]
    done = run_cli(*command, option, path, "--json", *force, cwd=made)
    assert done.code == 2, (done.code, done.stderr)
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert look(made) == before


def find_commands() -> dict[str, set[str]]:
    """Return every command of the groups, and its options that are paths."""
    out = {}
    for group, (module, _) in GROUPS.items():
        for registered in importlib.import_module(f"vcelltools.cli.{module}").app.registered_commands:
            hints = typing.get_type_hints(registered.callback)
            names = inspect.signature(registered.callback).parameters
            out[f"{group} {registered.name}"] = {n for n in names if "Path" in str(hints[n])}
    return out


def test_every_path_of_every_command_is_in_the_table():
    assert find_commands() == {c: reads | WRITES.get(c, set()) for c, reads in READS.items()}
    for name, options in WRITES.items():
        tried = {o.removeprefix("--").replace("-", "_") for c, o, _ in CASES if " ".join(c[:2]) == name}
        assert tried == options, f"{name}: an output that no case tries"


def test_what_a_run_holds_of_its_own_is_replaced(made, tmp_path):
    """Tables may lie in the folder of a run, and are replaced with --force."""
    d = tmp_path / "d"
    shutil.copytree(made, d, symlinks=True)
    for command in ((*SPLASH, "--out", "run/s.feather"), (*MERGE, "--out", "a/merged.h5ad")):
        for force in ((), ("--force",)):
            done = run_cli(*command, *force, "-q", cwd=d)
            assert done.code == 0, f"{command}\n{done.stderr}"
    assert Path(d / "run" / "s.feather").exists()
