"""Numbers that are not finite or of no sane size, and configurations nested too deep, are refused everywhere alike."""

from __future__ import annotations

import json
import typing

import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.files import write_h5ad
from vcelltools.errors import UsageError, check_number


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp("numbers")
    write_h5ad(d / "x.h5ad")
    return d


def find_numbers():
    """Every option of every command that takes a number."""
    import importlib
    import inspect

    from vcelltools.cli.main import COMMANDS, GROUPS

    functions = {c: getattr(importlib.import_module(f"vcelltools.cli.{m}"), f) for c, (m, f, _) in COMMANDS.items()}
    for group, (module, _) in GROUPS.items():
        for registered in importlib.import_module(f"vcelltools.cli.{module}").app.registered_commands:
            functions[f"{group} {registered.name}"] = registered.callback
    for command, found in functions.items():
        hints = typing.get_type_hints(found)
        for name in inspect.signature(found).parameters:
            kinds = {hints[name], *typing.get_args(hints[name])}
            if kinds & {float, int} and bool not in kinds:
                yield command, name, float in kinds


@pytest.mark.parametrize(("command", "name", "is_float"), list(find_numbers()))
def test_every_number_is_checked(command, name, is_float):
    from typer.testing import CliRunner

    from vcelltools.cli.main import make_app

    app = make_app(command.split()[0])
    params = {p.name: p for p in _get_command(app, command).params}
    flag = max(params[name].opts, key=len)
    words = ["x.h5ad" for p in params.values() if p.required and not p.opts[0].startswith("-")]
    for p in params.values():
        if p.required and p.opts[0].startswith("-") and p.name != name:
            words += [p.opts[0], "x.h5ad"]
    for value in ("nan", "inf", "1e300") if is_float else ("99999999999999999999",):
        result = CliRunner().invoke(app, [*command.split(), *words, f"{flag}={value}"])
        error = result.exception
        assert isinstance(error, UsageError) or result.exit_code == 2, (value, result.output, error)
        if isinstance(error, UsageError):
            assert error.field == name


def _get_command(app, name):
    import typer

    found = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word] if hasattr(found, "commands") else found
    return found


@pytest.mark.parametrize("line", ["learning_rate = nan", "minutes = inf", "weight_decay = 1e300", "steps = 10e30"])
def test_the_configuration_too(here, line):
    (here / "vcelltools.toml").write_text(f"[train]\n{line}\n")
    done = run_cli("train", "--json", cwd=here)
    assert done.code == 3, done.stderr
    assert json.loads(done.stdout)["error"]["message"].startswith(f"vcelltools.toml: train.{line.split()[0]} is ")


@pytest.mark.parametrize("text", ["x = " + "[" * 5000 + "]" * 5000, f"x = {'9' * 5000}", "#" * (1 << 25)])
def test_a_monstrous_configuration_is_refused(here, text):
    (here / "vcelltools.toml").write_text(text)
    done = run_cli("basis", "--json", cwd=here)
    assert done.code == 3 and json.loads(done.stdout)["error"]["kind"] == "data"
    (here / "vcelltools.toml").unlink()


def test_a_deeply_nested_manifest_is_damage(here):
    (here / "store").mkdir()
    (here / "store" / "manifest.json").write_text("[" * 100_000)
    done = run_cli("verify", "store", "--json", cwd=here)
    assert done.code == 3, done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, 2**64])
def test_functions_too(here, value):
    with pytest.raises(UsageError, match="must be a finite number of at most"):
        check_number("theta", value)
    with pytest.raises(UsageError) as e:
        vc.de(here / "x.h5ad", pert_col="batch", control="b0", epsilon=value)
    assert e.value.field == "epsilon"


def test_a_text_is_no_number(here):
    with pytest.raises(UsageError, match=r"span is '0.3', but must be a number"):
        vc.hvg(here / "x.h5ad", top=5, span="0.3")


def test_settings_that_were_not_used_are_not_recorded(here):
    result = vc.de(here / "x.h5ad", pert_col="batch", control="b0", test="nb")
    assert {"continuity", "exact"}.isdisjoint(result.settings)
