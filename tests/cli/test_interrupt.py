"""Ctrl-C in the middle of writing: exit code 5, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.conftest import start_cli


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_ctrl_c(tmp_path, layout):
    size = ("--cells", 200_000, "--genes", 3000, "--depth", 1000)
    child = start_cli("simulate", "--out", "x.h5ad", "--layout", layout, *size, "--threads", 1, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".x.h5ad.*.tmp")) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 5, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_ctrl_c_takes_nothing_apart_under_threads_that_are_still_at_work(tmp_path):
    """A compiler's thread inside its library, at exit, is a segmentation fault: neither waited for nor unloaded."""
    start = (
        "import atexit, os, signal, threading, time\n"
        "threading.Thread(target=time.sleep, args=(300,)).start()\n"
        "atexit.register(os.abort)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 3)\n"
        "from vcelltools.cli.main import run; run()\n"
    )
    command = [sys.executable, "-c", start, "simulate", "--out", "x.h5ad", "--cells", "2000000", "--genes", "3000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 5, done.stderr
    assert "error: interrupted (run the same command again)" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("module", ["typer", "vcelltools.cli.help", "vcelltools.cli.inspect", "numpy"])
def test_ctrl_c_twice_at_the_very_start(tmp_path, module):
    start = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Loading:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            finally:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Loading())\n"
        "from vcelltools.cli.main import run; run()"
    )
    command = [sys.executable, "-c", start, "inspect", "x.h5ad"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (5, "error: interrupted (run the same command again)\n")


def run_with_load(folder, body: str) -> subprocess.CompletedProcess[str]:
    """Run ``doctor`` in a process that executes ``body`` where the command's module is to be loaded."""
    start = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Loading:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vcelltools.cli.doctor':\n"
        f"{textwrap.indent(textwrap.dedent(body).strip(), ' ' * 12)}\n"
        "sys.meta_path.insert(0, Loading())\n"
        "from vcelltools.cli.main import run; run()"
    )
    command = [sys.executable, "-c", start, "doctor"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_ctrl_c_while_a_library_is_loaded_that_makes_an_import_error_of_it(tmp_path):
    done = run_with_load(
        tmp_path,
        """
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as e:
            raise ImportError('initialization failed') from e
        """,
    )
    assert (done.returncode, done.stderr) == (5, "error: interrupted (run the same command again)\n")


def test_ctrl_c_is_not_lost_in_a_finalizer(tmp_path):
    done = run_with_load(
        tmp_path,
        """
        class Finalized:
            def __del__(self):
                raise KeyboardInterrupt
        Finalized()
        time.sleep(60)
        raise SystemExit(9)
        """,
    )
    assert (done.returncode, done.stderr) == (5, "error: interrupted (run the same command again)\n")
