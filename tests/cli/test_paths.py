"""Paths that are something else: a folder where a file is to be, a file where a folder is, text that is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import run_cli
from tests.files import write_h5ad


@pytest.fixture
def here(tmp_path):
    write_h5ad(tmp_path / "x.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "folder.h5ad" / "mine").write_text("mine")
    (tmp_path / "file").write_text("hello\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    return tmp_path


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    "command",
    [
        ("hvg", "x.h5ad", "--top", "5", "--out", "folder.h5ad"),
        ("hvg", "x.h5ad", "--top", "5", "--plot", "folder.h5ad"),
        ("basis", "x.h5ad", "--top", "5", "--out", "folder.h5ad"),
        ("sample", "x.h5ad", "-n", "5", "--out", "folder.h5ad"),
        ("convert", "x.h5ad", "--out", "folder.h5ad"),
        ("normalize", "x.h5ad", "--out", "folder.h5ad"),
        ("de", "x.h5ad", "--pert-col", "batch", "--control", "b0", "--out", "folder.h5ad"),
        ("simulate", "--cells", "50", "--genes", "200", "--out", "folder.h5ad"),
    ],
    ids=lambda c: "-".join((c[0], *c[-2:-1])),
)
def test_a_folder_is_never_overwritten_by_a_file(here, command, force):
    done = run_cli(*command, *force, cwd=here)
    assert done.code == 2, done.stderr
    assert "folder.h5ad is a folder, but the output is a file" in done.stderr
    assert (here / "folder.h5ad" / "mine").read_text() == "mine"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_is_never_overwritten_by_a_folder(here, force):
    done = run_cli("demo", "--dir", "file", "--quick", *force, cwd=here)
    assert done.code == 2, done.stderr
    assert "file is a file, but the output is a folder" in done.stderr
    assert (here / "file").read_text() == "hello\n"


BUILD = ("--pert-col", "batch", "--control", "b0")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("build-store", "x.h5ad", "--basis", "folder.h5ad", *BUILD), "folder.h5ad is a folder, but a list of genes"),
        (("build-store", "x.h5ad", "--basis", "binary", *BUILD), "binary is not a text file, but a list of genes"),
        (("build-store", "x.h5ad", "--basis", "nope", *BUILD), "nope: the basis file does not exist"),
        (("basis", "x.h5ad", "--top", "5", "--aliases", "binary"), "binary is not a text file, but a table of genes"),
        (("build-store", "x.h5ad", "--basis", "file", "--out", "file", *BUILD), "a file has that name"),
    ],
    ids=["basis-folder", "basis-binary", "basis-missing", "aliases", "out"],
)
def test_what_stands_there_is_said_in_plain_words(here, command, says):
    done = run_cli(*command, cwd=here)
    assert done.code in (3, 4), done.stderr
    assert says in done.stderr and "Errno" not in done.stderr and "codec" not in done.stderr
    assert done.stderr.rstrip().endswith(")"), f"no remedy: {done.stderr}"


def test_a_broken_configuration_is_named(here):
    (here / "vcelltools.toml").write_bytes(b"\xff\xfe")
    done = run_cli("basis", cwd=here)
    assert done.code == 3 and "vcelltools.toml is not a text file, but a configuration in TOML" in done.stderr


POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("inspect", "x.h5ad"), "x.h5ad"),
        (("sample", "y.h5ad", "--by", "batch", "--matching", "x.h5ad", "--out", "new/q.h5ad"), "x.h5ad"),
        (("basis", "y.h5ad", "--aliases", "file", "--out", "new/b.txt"), "file"),
        (
            ("build-store", "y.h5ad", "--basis", "file", "--pert-col", "batch", "--control", "b0", "--out", "new"),
            "file",
        ),
        (("verify", "shut"), "shut/manifest.json"),
        (("lint", "file"), "file"),
        (("score", "y.h5ad", "--truth-pack", "file", "--pert-col", "batch", "--control", "b0"), "file"),
        (("normalize", "y.h5ad", "--out", "shut/q.h5ad"), "shut/q.h5ad"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else None,
)
def test_what_the_system_refuses_is_said_with_its_own_exit_code(here, command, file):
    write_h5ad(here / "y.h5ad")
    (here / "shut").mkdir()
    for name in ("x.h5ad", "file", "shut"):
        (here / name).chmod(0)
    before = sorted(os.listdir(here))
    prefix = () if os.geteuid() else POWERLESS
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("root may read all, and there is no setpriv")
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "vcelltools.cli.main", *command],
        cwd=here, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    (here / "shut").chmod(0o755)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {file}: "), done.stderr
    assert done.stderr.endswith(")\n"), "no remedy"
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize(
    "command",
    [
        ("prep", "x.h5ad", "--genes", "genes.csv", "--rules", "2025", "--pert-col", "batch", "--control", "b0",
         "--out", "new/a/x.vcc"),
        ("simulate", "--cells", "50", "--genes", "200", "--perturbations", "2", "--layout", "csc", "--out",
         "new/a/s.h5ad"),
        ("convert", "x.h5ad", "--layout", "csc", "--out", "new/a/x.h5ad"),
        ("hvg", "x.h5ad", "--top", "5", "--stats", "new/a/s", "--plot", "new/a/p.png", "--out", "new/a/h.txt"),
        ("de", "x.h5ad", "--pert-col", "batch", "--control", "b0", "--out", "new/a/d.csv"),
        ("init", "--out", "new/a/v.toml"),
    ],
    ids=lambda c: c[0],
)  # fmt: skip
def test_folders_of_outputs_are_made(here, command):
    (here / "genes.csv").write_text("".join(f"gene{j}\n" for j in range(30)))
    done = run_cli(*command, "-q", cwd=here)
    assert done.code == 0, done.stderr
    made = {p.name for p in (here / "new" / "a").iterdir()}
    wanted = {command[i + 1].rpartition("/")[2] for i, w in enumerate(command) if w in ("--out", "--plot", "--stats")}
    assert wanted <= made and not [n for n in made if n.startswith(".")], made


def test_names_that_are_not_text(here):
    name = os.fsdecode(b"odd\xff.h5ad")
    (here / "x.h5ad").rename(here / name)
    env = {"PYTHONUTF8": "1"}
    done = run_cli("hvg", name, "--top", 5, "--out", "h.txt", "--json", cwd=here, env=env)
    assert done.code == 0, done.stderr
    assert json.loads((here / "hvg_scores.json").read_text())["source"]
    assert run_cli("inspect", name, cwd=here, env=env).stdout.startswith("odd\\udcff.h5ad: h5ad")
    done = run_cli("init", cwd=here, env=env)
    assert done.code == 0 and "its name is not valid UTF-8" in done.stderr, done.stderr
