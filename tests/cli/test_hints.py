"""Every command that a command suggests next runs as it is printed, in the state that it leaves."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

import vcelltools
from tests.atlases import make_atlas
from tests.conftest import run_cli
from tests.tissues import make_tissue_adata, write_network
from vcelltools.cli.main import COMMANDS, GROUPS, make_app

SIM = ("--cells", 240, "--genes", 120, "--perturbations", 6, "--inert", 0, "--cell-lines", 2)


def get_next(ran):
    assert ran.code == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if "next: " in line]
    assert len(lines) <= 1
    if not lines:
        return None
    words = shlex.split(lines[0].split("next: ")[1])
    assert words[0] == "vcelltools" and not any(w.isupper() for w in words), f"a placeholder: {words}"
    return words[1:]


def follow(folder, *words, steps=20):
    """Run a command, then what it suggests, up to so many steps; return the commands that ran."""
    quick = {"train": ["--model", "perturbation-mean"]}  # the same command with a model that is trained at once
    ran = [list(map(str, words))]
    while (then := get_next(run_cli(*ran[-1], *quick.get(ran[-1][0], []), cwd=folder))) is not None:
        if then in ran or len(ran) > steps:
            break
        ran.append(then)
    return [r[0] for r in ran]


def test_the_way_through_a_new_folder(tmp_path):
    d = tmp_path / "my data"
    d.mkdir()
    way = follow(d, "simulate", "--out", "my atlas.h5ad", *SIM)
    assert way == ["simulate", "inspect", "hvg", "init", "basis", "build-store", "verify", "train", "predict"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("hints")
    for words in (
        ("simulate", "--out", "x.h5ad", *SIM),
        ("normalize", "x.h5ad", "--out", "n.h5ad"),
        ("hvg", "x.h5ad", "--top", 40, "--out", "b.txt"),
        ("build-store", "x.h5ad", "--basis", "b.txt", "--name", "x", "--pert-col", "target_gene", "--control",
         "non-targeting", "--cell-line-col", "cell_line"),
    ):  # fmt: skip
        assert run_cli(*words, "-q", cwd=d).code == 0, words
    return d


@pytest.mark.parametrize(
    "words",
    [
        ("baseline", "--truth", "n.h5ad", "--out", "a b.h5ad"),
        ("baseline", "--truth", "x.h5ad", "--out", "of counts.h5ad"),
        ("baseline", "--store", "stores/x", "--out", "learned.h5ad"),
        ("sample", "x.h5ad", "-n", 50, "--out", "a sample.h5ad"),
        ("convert", "x.h5ad", "--out", "a copy.h5ad"),
        ("normalize", "x.h5ad", "--out", "scaled cells.h5ad"),
        ("basis", "x.h5ad", "--top", 30, "--out", "other.txt"),
        ("hvg", "x.h5ad", "--top", 30, "--out", "other list.txt"),
        ("verify", "stores/x"),
        ("pseudobulk", "x.h5ad", "--by", "target_gene", "--out", "sums.h5ad"),
        ("features", "x.features.parquet", "--store", "stores/x", "--out", "of genes.parquet"),
    ],
    ids=lambda w: " ".join(map(str, w)),
)
def test_every_suggestion_runs(made, tmp_path, words):
    shutil.copytree(made, tmp_path / "d")
    follow(tmp_path / "d", *words, steps=1)


def test_the_way_through_a_tissue(tmp_path):
    fit = ("spatial", "fit", "t.h5ad", "--output-dir", "my run", "--network", "mouse_network.parquet", "--radius", 100)
    way = follow(tmp_path, "simulate", "--spatial", "--out", "my tissue.h5ad", "--cells", 200, "--genes", 70)
    assert way == ["simulate", "spatial"]
    make_tissue_adata().write_h5ad(tmp_path / "t.h5ad")
    write_network(tmp_path)
    for more in ((), ("--condition", "half", "--force")):
        assert follow(tmp_path, *fit, "--genes", "Gene0", *more) == ["spatial", "spatial"]


def test_the_way_through_an_atlas(tmp_path):
    make_atlas(tmp_path / "src", 3)
    assert follow(tmp_path, "atlas", "fetch", "src", "--out", "my atlas", "--all") == ["atlas", "atlas", "hvg"]
    (tmp_path / "genes.txt").write_text("".join(f"ENSG{i:011d}\n" for i in range(20)))
    merge = ("atlas", "merge", "my atlas", "--format", "store", "--genes", "genes.txt")
    assert follow(tmp_path, *merge, steps=1) == ["atlas", "verify"]
    assert follow(tmp_path, "atlas", "merge", "my atlas", "--format", "batches") == ["atlas"]


def test_a_prediction_by_the_rules_is_packed_and_checked(made, tmp_path):
    """predict, prep and lint: each command runs as the one before it prints it."""
    d = tmp_path / "d"
    shutil.copytree(made, d)
    genes = (d / "b.txt").read_text()
    (d / "genes.csv").write_text(genes)
    assert run_cli("train", "--store", "stores/x", "--model", "perturbation-mean", "--out", "r", cwd=d).code == 0
    predict = ("predict", "--run", "r", "--out", "my pred.h5ad", "--genes", "genes.csv", "--rules", 2025)
    assert follow(d, *predict) == ["predict", "prep", "lint"]
    assert follow(d, "predict", "--run", "r", "--out", "plain.h5ad") == ["predict"]
    truth = ("sample", "n.h5ad", "--by", "target_gene", "--matching", "plain.h5ad", "--out", "truth.h5ad")
    assert run_cli(*truth, cwd=d).code == 0
    (d / "vcelltools.toml").write_text('[score]\ntruth = "truth.h5ad"\n')
    assert follow(d, "predict", "--run", "r", "--out", "again.h5ad", steps=1)[:2] == ["predict", "score"]


FOLLOWED = {
    "simulate", "inspect", "hvg", "init", "basis", "build-store", "verify", "train", "predict", "prep", "baseline",
    "sample", "convert", "normalize", "spatial fit", "atlas fetch", "atlas merge", "spatial check", "pseudobulk",
    "features", "guides", "responders",  # the last two in tests/workflow/test_raw_screen.py
}  # fmt: skip
ENDS = {  # doctor names demo, which has a test of its own
    "demo", "doctor", "qc", "de", "evaluate", "score", "lint", "atlas list", "spatial received", "spatial splash",
    "spatial perturb", "spatial interactions", "spatial screen", "spatial field", "spatial report",
}  # fmt: skip


def test_every_command_is_followed_or_is_an_end():
    groups = {
        f"{group} {r.name}"
        for group, (module, _) in GROUPS.items()
        for r in importlib.import_module(f"vcelltools.cli.{module}").app.registered_commands
    }
    assert {*COMMANDS, *groups} == FOLLOWED | ENDS and not FOLLOWED & ENDS


def find_commands_in_messages():
    """Every text of the program that names a command: (where, command, what follows it)."""
    root = Path(vcelltools.__file__).parent
    for fpath in [*root.rglob("*.py"), *(root / "cli").glob("*.py"), *(root.parent / "cli").glob("*.py")]:
        for node in ast.walk(ast.parse(fpath.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            for found in re.finditer(r"\bvcelltools ([a-z][a-z-]+)((?: --[a-z0-9-]+| [a-z][a-z-]*| [A-Z]+)*)", text):
                yield fpath.name, found[1], found[2].split()


def test_every_command_that_a_message_names_exists_with_its_options():
    known = {*COMMANDS, *GROUPS}
    n = 0
    for where, command, words in find_commands_in_messages():
        flags = [w for w in words if w.startswith("--")]
        if command not in known:
            assert not flags, f"{where}: vcelltools {command} {words}"
            continue
        app, name = make_app(command), command
        found = typer.main.get_command(app)
        found = found.commands[name] if hasattr(found, "commands") else found
        if command in GROUPS and words and words[0] in found.commands:
            found = found.commands[words[0]]
        elif command in GROUPS and words and not words[0].startswith("-"):
            raise AssertionError(f"{where}: vcelltools {command} {words}")
        options = {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert set(flags) <= options, f"{where}: vcelltools {command} {words}"
        n += 1
    assert n > 30


def test_baseline_reads_the_columns_that_score_reads(made):
    config = made / "vcelltools.toml"
    before = config.read_text() if config.exists() else None
    config.write_text('[score]\npert_col = "cell_line"\ncontrol = "line1"\n')
    try:
        ran = run_cli("baseline", "--truth", "n.h5ad", "--out", "by line.h5ad", cwd=made)
        assert "--pert-col cell_line --control line1" in ran.stderr, ran.stderr
    finally:
        config.unlink() if before is None else config.write_text(before)


@pytest.mark.parametrize("words", [("inspect", "x.h5ad"), ("verify", "stores/x"), ("doctor",)])
def test_verbose_says_what_a_command_took(made, words):
    assert "peak memory" in run_cli(*words, "-v", cwd=made).stderr.splitlines()[-1]
    assert "GB" not in run_cli(*words, "-v", "-q", cwd=made).stderr
