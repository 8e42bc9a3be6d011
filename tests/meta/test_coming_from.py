"""Every command in the tables of docs/coming_from.md is one that the command line accepts, with its options."""

from __future__ import annotations

import importlib
import re
import shlex
from typing import Any

import pytest
import typer

from tests.conftest import ROOT
from vcelltools.cli.help import Command
from vcelltools.cli.main import COMMANDS, GROUPS

PAGE = (ROOT / "docs" / "coming_from.md").read_text()
ROWS = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "vcelltools " in line]
SHOWN = [re.findall(r"`(vcelltools [^`]+)`", row[1]) for row in ROWS]


def parse(text: str) -> Any:
    """Parse a command as the command line does, without running it."""
    _, name, *words = shlex.split(text)
    if name in GROUPS:
        group = typer.main.get_command(importlib.import_module(f"vcelltools.cli.{GROUPS[name][0]}").app)
        name, *words = words
        return group.commands[name].make_context(name, words)  # type: ignore[attr-defined]
    module, function, _ = COMMANDS[name]
    app = typer.Typer(add_completion=False)
    app.command(name, cls=Command)(getattr(importlib.import_module(f"vcelltools.cli.{module}"), function))
    return typer.main.get_command(app).make_context(name, words)


def test_every_row_shows_one_command():
    sections = re.findall(r"^## From (.+)$", PAGE, re.M)
    assert sections == ["scanpy", "cell-load", "cell-eval", "pertpy"] and len(ROWS) >= 30
    assert all(len(commands) == 1 for commands in SHOWN)
    assert all(row[0].count("`") % 2 == 0 and len(row) == 3 for row in ROWS)


@pytest.mark.parametrize("command", sorted({c for commands in SHOWN for c in commands}))
def test_a_shown_command_is_accepted(command):
    with parse(command) as context:
        assert context.params


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("vcelltools hvg x.h5ad --tops 3", "No such option: --tops"), ("vcelltools normalize --out y.h5ad", "FILE")],
)
def test_a_wrong_command_would_be_noticed(wrong, said):
    with pytest.raises(Exception) as e:
        parse(wrong)
    assert said in e.value.format_message()
