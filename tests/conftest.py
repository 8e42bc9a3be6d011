"""Shared fixtures: the real data, and the command line in a subprocess."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

# many tests, here and in processes of their own, compile the same small programs
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# a tree passes or fails whatever seed is drawn; ``make explore`` draws new examples
settings.register_profile("fixed", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@dataclass(frozen=True)
class Ran:
    """What a finished command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class _Starter:
    """Runs commands as forks of one process; see :mod:`tests.starter`."""

    def __init__(self) -> None:
        self._dir = tempfile.TemporaryDirectory()
        self._path = f"{self._dir.name}/starter"
        self.env = _get_env()
        self._process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "starter.py"), self._path], cwd=ROOT)
        self._n = itertools.count()
        atexit.register(self._process.kill)

    def run(self, args: list[str], cwd: Path, timeout: float) -> Ran:
        """Run a command; raise ``TimeoutExpired`` as ``subprocess.run`` does."""
        out, err = (Path(self._dir.name) / f"{next(self._n)}.{name}" for name in ("out", "err"))
        request = {"args": args, "cwd": str(cwd), "env": dict(os.environ), "stdout": str(out), "stderr": str(err)}
        with socket.socket(socket.AF_UNIX) as peer:
            while peer.connect_ex(self._path):  # the libraries are still being imported
                assert self._process.poll() is None, "the process that starts commands ended"
                time.sleep(0.01)
            peer.settimeout(timeout)
            peer.sendall(json.dumps(request).encode() + b"\n")
            with peer.makefile("r") as lines:
                pid = int(lines.readline())
                try:
                    code = int(lines.readline())
                except TimeoutError:
                    os.kill(pid, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(args, timeout) from None
        ran = Ran(code, out.read_text(), err.read_text())
        out.unlink()
        err.unlink()
        return ran


def _get_env() -> dict[str, str]:
    """Return the environment that commands see, without what pytest notes there."""
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}


@functools.cache
def _get_starter() -> _Starter:
    return _Starter()


def run_cli(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300) -> Ran:
    """Run ``vcelltools ARGS`` in a process of its own, and in a new interpreter if ``env`` changes anything."""
    words = [str(a) for a in args]
    if env is None and _get_env() == _get_starter().env:
        ran = _get_starter().run(words, Path(cwd or Path.cwd()), timeout)
    else:
        command = [sys.executable, "-m", "vcelltools.cli.main", *words]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        ran = Ran(done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran


def start_cli(*args: object, cwd: Path) -> subprocess.Popen[str]:
    """Start ``vcelltools ARGS`` in a process that hears Ctrl-C.

    A parent that ignores SIGINT (a shell's background job) has its children ignore it. The child takes that back
    itself: ``preexec_fn`` would fork this process, in which JAX may run threads, and JAX warns of that.
    """
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start += "; from vcelltools.cli.main import run; run()"
    command = [sys.executable, "-c", start, *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def python_names():
    """Messages name Python's arguments, whatever command ran in this process before."""
    from vcelltools.errors import speak_flags

    speak_flags(None)


@pytest.fixture
def cli():
    """The command line: ``cli("hvg", path, "--json")`` returns a :class:`Ran`."""
    return run_cli


def need_data(relative: str) -> Path:
    """Return a file or folder of the real data, or skip the test where it is absent."""
    path = DATA / relative
    if not path.exists():
        pytest.skip(f"real data is absent: {relative}")
    return path


@pytest.fixture(scope="session")
def thp1() -> Path:
    """The THP-1 CRISPR screen (20,729 × 299, CSR, int32)."""
    return need_data("papalexi_thp1_eccite/papalexi_thp1_20729x299.h5ad")


@pytest.fixture(scope="session")
def papalexi() -> Path:
    """The Papalexi MuData file (modality gene: 7,108 × 299, float64)."""
    return need_data("papalexi_h5mu/papalexi_7108_gene_guide.h5mu")


@pytest.fixture(scope="session")
def pbmc() -> Path:
    """The PBMC CITE-seq MuData file (modality rna: 892 × 36,601)."""
    return need_data("pbmc1k_citeseq_10x/pbmc_1k_citeseq.h5mu")
