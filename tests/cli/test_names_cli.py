"""Names out of files on the terminal, in lists and in tables: no character acts, and every name comes back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.conftest import run_cli
from tests.make import make_counts
from vcelltools.names import read_lines

EVIL = "\x1b]0;owned\x07\x1b[31m"
GENES = ["line\nbreak", "sep\u2028arator", "next\x85line", f"esc{EVIL}", "cr\rhere", "#hash", '"quote"', "turn\u202eed"]
LABEL = f"lab{EVIL}el\nerror:\u2028forged"


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A small screen whose genes, labels, columns and layers have names that a terminal would act on."""
    counts = make_counts(160, 60, seed=4)
    counts[:, :8] = np.random.default_rng(0).poisson(3, (160, 8)) * np.random.default_rng(1).integers(0, 9, (160, 8))
    labels = np.array(["non-targeting", LABEL, "B", "C"], object)[np.arange(160) % 4]
    obs = pd.DataFrame({"target_gene": labels, f"col{EVIL}": labels, "batch": "b"}, index=[f"c{i}" for i in range(160)])
    var = pd.DataFrame(index=GENES + [f"g{i}" for i in range(52)])
    adata = ad.AnnData(counts.astype("float32"), obs, var, layers={f"lay{EVIL}": counts.astype("float32")})
    here = tmp_path_factory.mktemp("names")
    adata.write_h5ad(here / "x.h5ad")
    (here / f"path{EVIL}.h5ad").write_bytes((here / "x.h5ad").read_bytes())
    return here


def check(text: str) -> None:
    odd = [c for c in text if not c.isprintable() and c != "\n"]
    assert not odd, (odd, text)
    assert "error: forged" not in text.split("\n")


COMMANDS = [
    ("inspect", "x.h5ad", "-v"),
    ("inspect", f"path{EVIL}.h5ad"),
    ("hvg", "x.h5ad", "--top", "60", "--flavor", "seurat", "--out", "h.txt", "--plot", "h.png"),
    ("hvg", f"absent{EVIL}.h5ad", "--out", "h2.txt"),
    ("hvg", "x.h5ad", "--layer", EVIL, "--out", "h2.txt"),
    ("hvg", "x.h5ad", "--batch-key", "target_gene", "--plan", "--out", "h2.txt"),
    ("basis", "x.h5ad", "--top", "60", "--out", "b.txt"),
    ("sample", "x.h5ad", "--per-group", "9", "--by", "target_gene", "--out", "s.h5ad"),
    ("sample", "x.h5ad", "--where", "target_gene=absent", "--out", "s.h5ad"),
    ("convert", "x.h5ad", "--layers", "all", "--out", "c.h5ad"),
    ("convert", "x.h5ad", "--out", "c2.h5ad"),
    ("normalize", "x.h5ad", "--out", "n.h5ad"),
    ("de", "x.h5ad", "--out", "d.csv"),
    ("de", "x.h5ad", "--control", "absent", "--out", "d2.csv"),
    ("build-store", "x.h5ad", "--basis", "b.txt", "--pert-col", "target_gene", "--control", "non-targeting", "--plan"),
    ("build-store", "x.h5ad", "--basis", "b.txt", "--pert-col", "target_gene", "--control", "non-targeting", "--out",
     "st", "--name", "s"),
    ("init", "."),
    ("baseline", "x.h5ad", "--kind", EVIL),
]  # fmt: skip


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["text", "json"])
def test_no_character_of_a_name_acts(screen, extra):
    for command in COMMANDS:
        force = ("--force",) if command[0] not in ("inspect",) and "--plan" not in command else ()
        done = run_cli(*command, *force, *extra, cwd=screen)
        check(done.stdout)
        check(done.stderr)
        if extra:
            assert isinstance(json.loads(done.stdout), dict), command


def test_no_character_of_a_name_acts_on_a_terminal(screen):
    for command in (COMMANDS[0], COMMANDS[3], COMMANDS[9], COMMANDS[10], COMMANDS[12]):
        main, side = pty.openpty()
        force = [] if command[0] == "inspect" else ["--force"]
        env = {**os.environ, "COLUMNS": "400", "TERM": "dumb"}
        args = [sys.executable, "-m", "vcelltools.cli.main", *command, *force]
        process = subprocess.Popen(args, cwd=screen, stdout=side, stderr=side, env=env)
        os.close(side)
        seen = b""
        while True:
            try:
                piece = os.read(main, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        process.wait()
        os.close(main)
        text = seen.decode()
        assert "\x1b]" not in text and "\x1b[31m" not in text and "\x07" not in text and "\u2028" not in text, text
        assert "\r\nerror: forged" not in text


def test_every_name_comes_back_from_lists_and_tables(screen):
    run_cli("hvg", "x.h5ad", "--top", "60", "--flavor", "seurat", "--out", "h.txt", "--force", cwd=screen)
    names = ad.read_h5ad(screen / "x.h5ad").var_names.tolist()
    assert sorted(read_lines((screen / "h.txt").read_text())) == sorted(names)
    options = ("--pert-col", "target_gene", "--control", "non-targeting", "--out", "st", "--name", "s", "--force")
    done = run_cli("build-store", "x.h5ad", "--basis", "h.txt", *options, cwd=screen)
    assert done.code == 0, done.stderr
    done = run_cli("de", "x.h5ad", "--out", "d.csv", "--force", cwd=screen)
    assert done.code == 0, done.stderr
    table = pd.read_csv(screen / "d.csv", lineterminator="\n")
    assert set(GENES) <= set(table["gene"]) and LABEL in set(table["perturbation"])


def test_too_little_memory_is_said_and_no_traceback(tmp_path):
    code = (
        "import sys, numpy as np; sys.argv = ['vcelltools', 'doctor', '--json']\n"
        "from vcelltools.cli import main\n"
        "def fail(*a): np.empty(1 << 62, np.uint8)\n"
        "main.make_app = fail\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    body = json.loads(done.stdout)["error"]
    assert "not enough memory" in body["message"] and body["exit_code"] == 4 and body["hint"]
