"""Paths that are something else: a folder where a file is to be, a file where a folder is, text that is none."""

from __future__ import annotations

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
    assert "folder.h5ad is a folder, and a file is to be written" in done.stderr
    assert (here / "folder.h5ad" / "mine").read_text() == "mine"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_is_never_overwritten_by_a_folder(here, force):
    done = run_cli("demo", "--dir", "file", "--quick", *force, cwd=here)
    assert done.code == 2, done.stderr
    assert "file is a file, and a folder is to be written" in done.stderr
    assert (here / "file").read_text() == "hello\n"


BUILD = ("--pert-col", "batch", "--control", "b0")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("build-store", "x.h5ad", "--basis", "folder.h5ad", *BUILD), "folder.h5ad: is a folder; a list of genes"),
        (("build-store", "x.h5ad", "--basis", "binary", *BUILD), "binary: is not text; a list of genes"),
        (("build-store", "x.h5ad", "--basis", "nope", *BUILD), "nope: no such basis file"),
        (("basis", "x.h5ad", "--top", "5", "--aliases", "binary"), "binary: is not text; a table of aliases"),
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
    assert done.code == 3 and "vcelltools.toml: is not text; a configuration in TOML" in done.stderr
