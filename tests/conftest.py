"""Shared fixtures: the real data, and the command line in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def run_cli(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300) -> Ran:
    """Run ``vcelltools ARGS`` in a new process."""
    command = [sys.executable, "-m", "vcelltools.cli.main", *map(str, args)]
    full_env = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=cwd, env=full_env, capture_output=True, text=True, timeout=timeout, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


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
