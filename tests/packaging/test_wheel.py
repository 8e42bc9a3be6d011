"""The wheel, installed and run as other people do: from elsewhere, as nobody, from a place that cannot be written."""

from __future__ import annotations

import os
import shutil
import site
import stat
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOBODY = 65534


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("wheel")
    tree = d / "tree"  # built from a copy: setuptools leaves folders in the source
    for name in ("vcelltools", "cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(d.glob("vcelltools-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel) -> Iterator[Path]:
    """Make an environment with the wheel alone, which sees the packages of this one; where nobody may go too."""
    d = Path(tempfile.mkdtemp(prefix="vcelltools-wheel-"))
    d.chmod(0o755)
    venv.EnvBuilder(symlinks=True).create(d / "env")
    packages = next((d / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as z:  # what pip does with a pure wheel, --no-deps
        z.extractall(packages)
    seen = [p for p in {*site.getsitepackages(), sysconfig.get_paths()["purelib"], *sys.path} if "site-packages" in p]
    (packages / "others.pth").write_text("".join(f"{p}\n" for p in seen))
    yield d
    for path in d.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    shutil.rmtree(d)


def get_unprivileged(d: Path) -> dict:
    """Return what runs a process as nobody; where nobody may not reach this Python, as root without its powers."""
    options = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    try:
        probe = [d / "env/bin/python", "-c", "import numpy"]
        if subprocess.run(probe, cwd="/", capture_output=True, check=False, **options).returncode == 0:
            return options
    except PermissionError:
        pass
    if shutil.which("setpriv") is None:
        pytest.skip("nobody may not read this Python, and there is no setpriv")
    return {"prefix": ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]}


def run(d: Path, *args: str, cwd: Path, prefix: tuple = (), env: dict[str, str] | None = None, **options):
    """Run the installed command line in a clean environment."""
    command = [*prefix, str(d / "env/bin/python"), "-P", "-c", "from vcelltools.cli.main import main; main()", *args]
    clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vcelltools"}, tops
    assert "vcelltools/cli/main.py" in names and "vcelltools/py.typed" in names
    packed = {n for n in names if n.startswith("vcelltools/")}
    source = {
        str(Path("vcelltools") / p.relative_to(ROOT / "vcelltools"))
        for p in (ROOT / "vcelltools").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert source <= packed, source - packed


def test_it_runs_from_another_directory(installed, tmp_path):
    done = run(installed, "simulate", "--out", "s.h5ad", "--cells", "60", "--genes", "50", cwd=tmp_path,
               env={"HOME": str(tmp_path)}, )  # fmt: skip
    assert done.returncode == 2 and "perturbations" in done.stderr  # 100 perturbations of 50 genes: said, not a crash
    done = run(installed, "--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("vcelltools ")
    where = subprocess.run(
        [installed / "env/bin/python", "-P", "-c", "import vcelltools, vcelltools.cli as c; print(c.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    ).stdout  # fmt: skip
    assert str(installed) in where, where


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give its powers up")
def test_it_runs_unprivileged_read_only_and_homeless(installed):
    who = get_unprivileged(installed)
    work = Path(tempfile.mkdtemp(prefix="vcelltools-nobody-"))
    os.chown(work, who.get("user", 0), who.get("group", 0))
    for path in [*installed.rglob("*"), installed]:
        if not path.is_symlink():
            path.chmod((path.stat().st_mode | 0o444) & ~0o222 | (0o111 if path.is_dir() else 0))
    env = {"HOME": "/proc/nowhere"}
    sim = ("simulate", "--out", "s.h5ad", "--cells", "300", "--genes", "80", "--perturbations", "4", "-q")
    for args in (sim, ("hvg", "s.h5ad", "--top", "10", "--out", "h.txt", "--json"), ("inspect", "s.h5ad", "--json")):
        done = run(installed, *args, cwd=work, env=env, **who)
        assert done.returncode == 0, f"{args}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert len((work / "h.txt").read_text().split()) == 10
    assert not list(installed.rglob("*.nbi")), "something was written into site-packages"
    work.chmod(0o555)
    refused = run(installed, *sim, "--force", cwd=work, env=env, **who)
    assert refused.returncode == 4 and "read-only" in refused.stderr, refused.stderr
    work.chmod(0o755)
    shutil.rmtree(work)
