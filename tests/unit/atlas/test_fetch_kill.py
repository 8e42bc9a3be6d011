"""Fetching that is killed at every step: no file is ever wrong, and a kill costs at most one chunk per job."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.atlases import make_atlas
from tests.conftest import ROOT
from tests.faulty_server import serve
from tests.fetch_kill_walk import CHUNK

pytest.importorskip("aiohttp", reason="the extra http is not installed")


@pytest.mark.slow
def test_kill_walk(tmp_path):
    origin = make_atlas(tmp_path / "o", 3, cells=60, genes=80)
    total = sum(p.stat().st_size for p in origin.rglob("*.h5ad"))
    with serve(origin) as (url, plan):
        done = subprocess.run(
            [sys.executable, "-m", "tests.fetch_kill_walk", url, origin, tmp_path / "w"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 10 and found["wrong"] == [] and found["unverified"] == 0, found
    sent = plan.sent(".h5ad")
    assert sent <= 3 * total + found["kills"] * 2 * CHUNK, (sent, total, found)
    whole = [e for e in plan.log if e["path"].endswith(".h5ad") and e["method"] == "GET" and e["start"] > 0]
    assert whole, "runs went on in the middle of a file"
