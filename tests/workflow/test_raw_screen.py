"""From a raw screen to a scored report: the README's five commands, each the hint of the one before it."""

from __future__ import annotations

import re
import shlex
import shutil

import vcelltools as vc
from tests.conftest import DATA, ROOT, run_cli

PAPALEXI = DATA / "papalexi_h5mu" / "papalexi_7108_gene_guide.h5mu"


def get_commands():
    """Return the README's block that begins with ``guides``."""
    block = next(b for b in re.findall(r"```console[^\n]*\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if
                 "vcelltools guides" in b)  # fmt: skip
    return [shlex.split(line.removeprefix("$ vcelltools ")) for line in block.splitlines()]


def test_five_commands_each_the_hint_of_the_one_before(tmp_path):
    if PAPALEXI.exists():
        shutil.copy(PAPALEXI, tmp_path / "screen.h5mu")
    else:  # no real screen is at hand
        vc.simulate(tmp_path / "made.h5mu", cells=400, genes=120, perturbations=5, guides=True, seed=1)
        (tmp_path / "made.h5mu").rename(tmp_path / "screen.h5mu")
    commands = get_commands()
    assert len(commands) == 5
    done = run_cli("inspect", "screen.h5mu", cwd=tmp_path)
    assert shlex.split(done.stderr.split("next: vcelltools ")[1].strip()) == commands[0], done.stderr
    for words, after in zip(commands, [*commands[1:], None], strict=True):
        done = run_cli(*words, cwd=tmp_path)
        assert done.code == 0, done.stderr
        hint = re.search(r"next: vcelltools (.*)", done.stderr)
        if after is not None:
            assert hint and shlex.split(hint.group(1)) == after, f"{words[0]} suggests {hint and hint.group(1)}"
    assert "<html" in (tmp_path / "report.html").read_text()[:200]
