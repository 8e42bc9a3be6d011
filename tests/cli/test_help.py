"""The help of every command: each option explained, one voice; and the shell completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import run_cli
from vcelltools.cli.main import COMMANDS

WIDE = {"COLUMNS": "150", "TERMINAL_WIDTH": "150"}
FILES = {"hvg": "FILE...", "basis": "[FILE]...", "verify": "[STORE]...", "inspect": "FILE", "score": "PRED"}


@pytest.fixture(scope="module")
def helps():
    return {c: run_cli(c, "--help", env=WIDE) for c in COMMANDS}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_everything(helps, command):
    done = helps[command]
    assert done.code == 0 and done.stderr == ""
    text = done.stdout
    assert text.startswith("Usage: ") and f" {command} [OPTIONS]" in text.splitlines()[0]
    assert f"Example: vcelltools {command}" in text or f"; vcelltools {command}" in text, "an example"
    assert not re.search(r"<\w+|\(default|x>=|\{", text), "ranges and defaults are said in one way"
    for line in text[text.index("Options:") :].splitlines()[1:]:
        assert re.search(r"^\s+-.*\S(  \S|$)|^\s{12,}\S", line), f"{command}: {line!r}"
    options = text[text.index("Options:") :]
    entries = re.findall(r"^  (-\S.*?)(?:  +(.*))?$", options, re.M)
    lines = options.splitlines()
    for option, said in entries:
        if not said:  # too long for the column: it goes on below
            at = next(i for i, x in enumerate(lines) if x.startswith(f"  {option}"))
            said = lines[at + 1].strip()  # noqa: PLW2901
        assert said and not said.startswith("["), f"{command} {option} is not explained"


@pytest.mark.parametrize("command", list(FILES))
def test_usage_says_what_may_repeat(helps, command):
    assert helps[command].stdout.splitlines()[0].split("[OPTIONS] ")[1] == FILES[command]


def test_every_option_of_a_word_lists_its_values_or_names_them(helps):
    for command, word in (("hvg", "seurat_v3_paper"), ("score", "vcc2026"), ("train", "ridge"), ("convert", "zstd")):
        assert word in helps[command].stdout


def test_stated_defaults_are_true(helps):
    """Options whose defaults lie in the configuration say them by hand."""
    from vcelltools.config import BasisConfig, DatasetConfig, StoreConfig
    from vcelltools.io.write import h5ad
    from vcelltools.training.length import LONGEST, PASSES, SHORTEST
    from vcelltools.training.settings import TrainSettings

    train, basis = TrainSettings(), BasisConfig()
    wanted = [("train", f"--{k.replace('_', '-')}", getattr(train, k)) for k in
              ("out", "model", "size", "sets", "set_size", "seed", "learning_rate")]  # fmt: skip
    rule = f"each training cell is drawn {PASSES} times, in {SHORTEST} to {LONGEST:,} steps"
    wanted += [("train", "--steps", rule)]
    wanted += [("basis", "--top", basis.top), ("basis", "--out", basis.path), ("basis", "--rule", basis.rule)]
    wanted += [("build-store", "--out", StoreConfig().path), ("build-store", "--basis", basis.path)]
    wanted += [("build-store", "--min-cells", 1), ("build-store", "--sums", "auto")]
    assert DatasetConfig(name="x").min_cells == 1 and DatasetConfig(name="x").sums == "auto"
    wanted += [(c, "--chunk-len", h5ad._CHUNK_LEN) for c in ("convert", "simulate")]
    for command, option, value in wanted:
        said = re.search(rf"{option}\b.*?\[default:\s+([^\]]+)\]", helps[command].stdout.split("Options:")[1], re.S)
        assert said and said.group(1).split() == str(value).split(), f"{command} {option}: {value}"


def complete(**env: str) -> subprocess.CompletedProcess:
    """Run the command line under its own name, which completion goes by."""
    code = "import sys; sys.argv = ['vcelltools']; from vcelltools.cli.main import main; main()"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_commands(shell):
    instruction = {"bash": "complete_bash", "zsh": "complete_zsh", "fish": "complete_fish"}[shell]
    words = {"COMP_WORDS": "vcelltools ", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "vcelltools "}
    done = complete(**words, _VCELLTOOLS_COMPLETE=instruction, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert done.returncode == 0, done.stderr
    for command in ("hvg", "build-store", "score"):
        assert command in done.stdout


def test_completion_of_options():
    done = complete(COMP_WORDS="vcelltools hvg --fl", COMP_CWORD="2", _VCELLTOOLS_COMPLETE="complete_bash")
    assert done.returncode == 0 and "--flavor" in done.stdout, done.stderr
