"""What ``--json`` prints is one object with the fields that scripts rely on; errors are objects too."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from tests.conftest import run_cli

NUMBER = (int, float)
SCHEMAS = {
    "simulate": {"out": str, "truth": str, "n_cells": int, "n_genes": int, "nnz": int, "pert_col": str, "control": str},
    "hvg": {
        "n_cells": int, "n_genes": int, "n_selected": int, "flavor": str, "batches": list, "bytes_read": int,
        "seconds": NUMBER, "peak_memory_bytes": int, "out": str, "warnings": list,
    },
    "normalize": {"out": str, "n_cells": int, "n_genes": int, "layout": str},
    "convert": {"out": str, "n_cells": int, "n_genes": int, "layout": str, "dtype": str},
    "sample": {"out": str, "n_cells": int},
    "basis": {"out": str, "json": str, "n_genes": int},
    "build-store": {"stores": list},
    "verify": {"ok": bool, "stores": list},
    "de": {"out": str},
    "de --test energy": {"out": str, "n_perturbations": int, "perturbations": list, "settings": dict, "notes": list},
    "pseudobulk": {"out": str, "n_groups": int, "n_genes": int, "n_cells": int, "smallest": int},
    "init": {"out": str, "datasets": list},
    "train": {
        "out": str, "steps": int, "seed": int, "store_sha256": (str, dict), "config": dict, "versions": dict,
        "final": dict, "baselines": dict, "beats_baselines": bool,
    },
    "predict": {"out": str, "n_cells": int, "n_genes": int, "n_perturbations": int, "warnings": list},
    "score": {"compat": str, "profile": str, "components": dict, "avg_score": NUMBER, "warnings": list},
    "prep": {"out": str, "rules": str, "n_cells": int, "warnings": list},
    "lint": {"ok": bool, "problems": list},
}  # fmt: skip
COMPONENT = {"value", "baseline", "ceiling", "score", "score_unclipped", "ci95", "n"}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    d = tmp_path_factory.mktemp("json")
    out = {}

    def run(*args):
        done = run_cli(*args, "--json", "-q", cwd=d)
        assert done.code == 0, f"{args}\n{done.stderr}"
        assert done.stderr == "", f"{args}: -q is quiet\n{done.stderr}"
        out[args[0]] = json.loads(done.stdout)
        return out[args[0]]

    sim = ("--cells", 400, "--genes", 150, "--perturbations", 6, "--cell-lines", 2, "--inert", 0)
    run("simulate", "--out", "x.h5ad", *sim)
    run("init")
    run("hvg", "x.h5ad", "--top", 50, "--out", "h.txt")
    run("basis", "x.h5ad", "--top", 60, "--out", "basis.txt")
    columns = ("--pert-col", "target_gene", "--control", "non-targeting", "--cell-line-col", "cell_line")
    run("build-store", "x.h5ad", "--basis", "basis.txt", *columns)
    run("verify", "stores/x")
    run("de", "x.h5ad", "--out", "de.csv")
    genes = out["de"]
    out["de --test energy"] = run("de", "x.h5ad", "--test", "energy", "--permutations", 9, "--out", "energy.csv")
    out["de"] = genes
    run("pseudobulk", "x.h5ad", "--by", "target_gene,batch", "--out", "bulk.h5ad")
    run("convert", "x.h5ad", "--layout", "csc", "--out", "c.h5ad")
    run("sample", "x.h5ad", "-n", 50, "--out", "s.h5ad")
    run("normalize", "x.h5ad", "--out", "n.h5ad")
    run("train", "--model", "ridge", "--store", "stores/x", "--out", "run")
    run("predict", "--run", "run", "--out", "p.h5ad")
    run("score", "n.h5ad", "--truth", "n.h5ad", "--out", "scored")
    genes = json.loads((d / "hvg_scores.json").read_text())["genes"]["gene"]
    (d / "genes.csv").write_text("gene_name\n" + "\n".join(genes) + "\n")
    run("prep", "n.h5ad", "--genes", "genes.csv", "--rules", 2025, "--out", "x.vcc")
    run("lint", "x.vcc")
    return out


@pytest.mark.parametrize("command", SCHEMAS)
def test_fields_and_types(bodies, command):
    body = bodies[command]
    for key, kind in SCHEMAS[command].items():
        assert key in body, f"{command}: {key!r} is missing from {sorted(body)}"
        assert isinstance(body[key], kind), f"{command}: {key} is {body[key]!r}"


def test_inner_fields(bodies):
    assert all({"path", "ok", "problems"} <= set(s) for s in bodies["verify"]["stores"])
    row = {"perturbation": str, "n_cells": int, "n_controls": int, "e_distance": float, "p_value": float, "fdr": float}
    for found in bodies["de --test energy"]["perturbations"]:
        assert {k: type(v) for k, v in found.items()} == row
    assert all(set(c) >= COMPONENT for c in bodies["score"]["components"].values())


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (("hvg", "none.h5ad"), 3, "data"),
        (("hvg", "none.h5ad", "--top", "0"), 2, "usage"),
        (("hvg",), 2, "usage"),
        (("hvg", "none.h5ad", "--tops", "9"), 2, "usage"),
        (("score", "none.h5ad"), 2, "usage"),
        (("train", "--store", "none"), 3, "data"),
        (("predict", "--run", "none", "--out", "p.h5ad"), 3, "data"),
        (("train", "--dry-run"), 2, "usage"),
    ],
)
def test_errors_are_objects_too(tmp_path, args, code, kind):
    done = run_cli(*args, "--json", cwd=tmp_path)
    assert done.code == code, done.stderr
    error = done.json["error"]
    assert set(error) == {"kind", "message", "hint", "exit_code"}
    assert error["kind"] == kind and error["exit_code"] == code
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def run_on_terminal(*args: str, env: dict[str, str]) -> str:
    """Return what a command prints when stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "vcelltools.cli.main", *args], stdin=follower, stdout=follower, stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(follower)
    out = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says so when the last writer has gone
            break
        if not part:
            break
        out += part
    os.close(leader)
    assert child.wait() == 0
    return out.decode()


def test_colours_on_a_terminal_alone_and_never_with_no_color(tmp_path):
    sim = ("--cells", "60", "--genes", "60", "--perturbations", "3", "-q")
    path = str(tmp_path / "x.h5ad")
    assert run_cli("simulate", "--out", path, *sim).code == 0
    env = {k: "" for k in ("NO_COLOR", "FORCE_COLOR") if k in os.environ}
    assert "\x1b[1m" in run_on_terminal("inspect", path, env=env)
    colours = [f"\x1b[{n}m" for n in range(30, 38)]
    plain = run_on_terminal("inspect", path, env={"NO_COLOR": "1"})
    assert not any(c in plain for c in colours)
    piped = run_cli("inspect", path)
    assert "\x1b" not in piped.stdout + piped.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell, tmp_path):
    words = {"bash": {"COMP_WORDS": "vcelltools bui", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "vcelltools bui", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    env = {"_VCELLTOOLS_COMPLETE": f"complete_{shell}", **words}
    code = "import sys; sys.argv[0] = 'vcelltools'; from vcelltools.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert "build-store" in done.stdout, done.stdout + done.stderr


def test_every_help_teaches():
    from vcelltools.cli.main import make_app

    for command in make_app().registered_commands:
        text = command.callback.__doc__ or ""
        assert f"Example: vcelltools {command.name}" in text or f"; vcelltools {command.name}" in text, command.name
        assert command.short_help and len(command.short_help) <= 50, command.name
