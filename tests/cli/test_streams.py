"""A closed stdout or stderr, and a reader that goes away, neither end the work nor show a traceback."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tests.files import write_h5ad

VCELLTOOLS = f"{shlex.quote(sys.executable)} -m vcelltools.cli.main"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp("streams")
    write_h5ad(d / "x.h5ad")
    return d


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("hvg x.h5ad --top 5 --out {out} >&-", 0),
        ("hvg x.h5ad --top 5 --out {out} 2>&-", 0),
        ("hvg x.h5ad --top 5 --out {out} >&- 2>&- <&-", 0),
        ("hvg x.h5ad --top 5 --out {out} | true", 0),
        ("hvg x.h5ad --top 5 --out {out} --json | true", 0),
        ("hvg x.h5ad --top 5 --out {out} 2> >(true)", 0),
        ("inspect x.h5ad | true", 0),
        ("inspect x.h5ad --json 2>/dev/full", 0),
        ("inspect nope.h5ad --json 2>/dev/full", 3),
        ("inspect nope.h5ad --json | true", 3),
        ("inspect nope.h5ad --json >&-", 3),
        ("inspect nope.h5ad 2>&-", 3),
        ("--help | true", 0),
        ("--version >&-", 0),
    ],
)
def test_who_does_not_listen_stops_nothing(here, command, code):
    out = here / f"{abs(hash(command))}.txt"
    line = f"{VCELLTOOLS} {command.format(out=out)}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert out.exists() == ("{out}" in command)
    assert done.stdout.count("\n") <= 1 or "--json" not in command
