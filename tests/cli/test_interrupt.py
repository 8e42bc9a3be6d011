"""Ctrl-C in the middle of writing: exit code 5, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_ctrl_c(tmp_path, layout):
    # a parent that ignores SIGINT (a shell's background job) would have the child ignore it too
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start += "; from vcelltools.cli.main import main; main()"
    command = [sys.executable, "-c", start, "simulate", "--out", "x.h5ad", "--layout", layout]
    child = subprocess.Popen(
        [*command, "--cells", "200000", "--genes", "3000", "--depth", "1000", "--threads", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
