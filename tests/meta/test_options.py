"""Every option, argument and configuration key that a message, a docstring, a help text or the docs name exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import typer

import vcelltools as vc
from tests.conftest import ROOT
from vcelltools.cli.help import Command
from vcelltools.cli.main import COMMANDS, GROUPS

FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9]|n)\b(?!\.)")
LIBRARY = sorted((ROOT / "vcelltools").rglob("*.py"))
FACE = sorted((ROOT / "cli").glob("*.py"))
ALL = (*COMMANDS, *GROUPS)
# flags of other programs
FOREIGN = {
    "--help", "--version", "--install-completion", "--upgrade", "--no-deps", "--extra-index-url", "--recursive",
    "--scopes", "--newest", "--scaling", "--seeds", "--zone", "--accelerator-type", "--project", "--command",
    "--worker", "--nworkers", "--nthreads",
}  # fmt: skip


@cache
def get_params(name: str) -> list:
    """Return the arguments and options of a command, or of all the commands of a group."""
    if name in GROUPS:
        group = typer.main.get_command(importlib.import_module(f"vcelltools.cli.{GROUPS[name][0]}").app)
        return [p for command in group.commands.values() for p in command.params]  # type: ignore[attr-defined]
    module, function, _ = COMMANDS[name]
    app = typer.Typer(add_completion=False)
    app.command(name, cls=Command)(getattr(importlib.import_module(f"vcelltools.cli.{module}"), function))
    return typer.main.get_command(app).params


@cache
def get_flags(name: str) -> frozenset[str]:
    found = {"--help"}
    for p in get_params(name):
        found |= {*p.opts, *p.secondary_opts}
    return frozenset(f for f in found if f.startswith("--"))


def get_all_flags() -> set[str]:
    return {f for name in ALL for f in get_flags(name)} | {"--version"}


def get_arguments() -> set[str]:
    """Every argument of a public function, option of a command and key of the configuration."""
    from msgspec import structs

    from vcelltools import config
    from vcelltools.training.settings import TrainSettings

    found = {p.name for name in ALL for p in get_params(name)}
    found |= {p for name in vc.__all__ if callable(f := getattr(vc, name)) for p in inspect.signature(f).parameters}
    kinds = [v for v in vars(config).values() if isinstance(v, type) and issubclass(v, config.msgspec.Struct)]
    return found | {f.name for kind in (*kinds, TrainSettings) for f in structs.fields(kind)}


def iterate_strings(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def find_unknown(text: str) -> list[str]:
    """Return the flags in a text that the command before them, or no command at all, has."""
    out, known = [], get_all_flags()
    text = text.replace("\\\n", " ")
    for found in FLAG.finditer(text):
        flag = found.group(0)
        before = re.findall(r"vcelltools ([a-z][a-z-]*)(?: [^`|;&.()\n]*)?$", text[: found.start()])
        allowed = get_flags(before[-1]) if before and before[-1] in ALL else known
        if flag not in allowed and flag not in FOREIGN:
            out.append(f"{flag} of {before[-1] if before else 'any command'}")
    return out


BENCHMARK = re.compile(r"`(?:python|\.venv/bin/python) -m (benchmarks\.\w+)([^`]*)`")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_names_arguments_that_exist(path):
    """It spells them by ``spell``; only a whole command line, such as ``vcelltools hvg --stats DIR``, holds a flag."""
    arguments = get_arguments()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "spell" and path.name != "errors.py":
            first = node.args[0]
            if isinstance(first, ast.Constant):
                assert first.value in arguments, f"{path}:{node.lineno}: no argument {first.value!r}"
        for keyword in getattr(node, "keywords", []):
            if keyword.arg == "field" and isinstance(keyword.value, ast.Constant):
                assert keyword.value.value in arguments, f"{path}:{node.lineno}: {keyword.value.value!r}"
    for line, text in iterate_strings(path) if path.name != "errors.py" else ():
        assert not find_unknown(text), f"{path}:{line}: {find_unknown(text)}"


@pytest.mark.parametrize("path", FACE, ids=lambda p: p.name)
def test_the_command_line_names_options_that_exist(path):
    for line, text in iterate_strings(path):
        assert not find_unknown(text), f"{path}:{line}: {find_unknown(text)}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_the_docs_name_options_that_exist(page):
    """Those of the benchmarks are in their own files."""
    text = page.read_text(encoding="utf-8")
    for module, rest in BENCHMARK.findall(text):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert f'"{option}"' in source, f"{page.name}: {module} {option}"
    assert not (unknown := find_unknown(BENCHMARK.sub("", text))), unknown


def test_a_message_names_the_option_or_the_argument(tmp_path):
    from tests.conftest import run_cli
    from tests.files import write_h5ad
    from vcelltools.errors import UsageError

    path = write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(UsageError, match=r"^base sets the base of the logarithm, which log=False turns off"):
        vc.normalize(path, tmp_path / "o.h5ad", base=2, log=False)
    done = run_cli("normalize", path, "--out", tmp_path / "o.h5ad", "--base", 2, "--no-log")
    assert "--base sets the base of the logarithm, which --no-log turns off" in done.stderr


def test_what_has_no_option_is_named_as_in_the_configuration():
    from vcelltools.errors import speak_flags, spell

    try:
        speak_flags({"layer": "--layer", "log": "--log"})
        assert spell("layer", "my counts") == "--layer 'my counts'" and spell("log", False) == "--no-log"
        assert spell("unperturbed") == "unperturbed" and spell("keep", "a") == "keep = 'a'"
    finally:
        speak_flags(None)
    assert spell("layer", "counts") == "layer='counts'" and spell("force", True) == "force=True"


def test_whatever_takes_a_modality_takes_a_feature_type_and_a_genome():
    """``simulate`` writes the modality, and ``guides`` reads guides, which are of no genome."""
    for name in ALL:
        if "--modality" in get_flags(name) and name != "simulate":
            assert "--feature-type" in get_flags(name), name
            assert "--genome" in get_flags(name) or name == "guides", name
