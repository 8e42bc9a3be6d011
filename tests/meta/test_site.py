"""The documentation builds as a site without a warning, and its pages are all in the navigation."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not here (pip install -e '.[docs]')")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "site").glob("*/index.html"))) >= 14
    for page in (ROOT / "docs").glob("*.md"):  # a block whose first line is not understood becomes a paragraph
        name = "" if page.stem == "index" else page.stem
        built = (tmp_path / "site" / name / "index.html").read_text()
        blocks = len(re.findall(r"^```\w*$", page.read_text(), re.M)) // 2
        assert built.count('<div class="highlight">') >= blocks and "```" not in built, page.name


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in config, page.name


def test_what_the_dockerfile_copies_is_there():
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
