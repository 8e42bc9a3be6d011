"""Compiled kernels on disk: whose folder, which files, and what becomes of a damaged one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vcelltools.kernels import cache

ROOT = Path(__file__).resolve().parents[3]
SORT = """
import json
from vcelltools.kernels import load_numba
load_numba()
import numpy as np
from vcelltools.kernels.lzf import lzf_unpack
out = np.zeros(5, np.uint8)
n = lzf_unpack(np.frombuffer(bytes([2, 97, 98, 99, 1, 100, 101]), np.uint8), out)
from vcelltools.kernels.cache import get_folder
print(json.dumps([bytes(out).decode(), sum(lzf_unpack.stats.cache_hits.values()), str(get_folder())]))
"""


def run(cwd, **env):
    """Run a kernel in a process of its own; return its result, its cache hits, its folder, and stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")} | {"PYTHONPATH": str(ROOT)} | env
    code = [sys.executable, "-c", SORT]
    p = subprocess.run(code, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert p.returncode == 0, p.stderr
    return (*json.loads(p.stdout), p.stderr)


def list_files(folder):
    return sorted(folder.rglob("*.nbc"))


def flip(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


DAMAGE = {
    "empty": lambda b: b"",
    "in the digest": lambda b: b[:20],
    "half": lambda b: b[: len(b) // 2],
    "longer": lambda b: b + b"\0",
    "a bit": flip,
    "zeros": lambda b: b"\0" * len(b),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_counts_as_absent(tmp_path, damage):
    files = cache._Files(tmp_path, "f")
    files.save(("key",), list(range(100)))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert files.load(("key",)) is None
    files.save(("key",), list(range(100)))
    assert path.read_bytes() == whole and files.load(("key",)) == list(range(100))


def test_a_damaged_file_is_built_again(tmp_path):
    d = tmp_path / "cache"
    assert run(tmp_path, NUMBA_CACHE_DIR=str(d))[:2] == ("abcde", 0)
    assert run(tmp_path, NUMBA_CACHE_DIR=str(d))[:2] == ("abcde", 1)
    (path,) = list_files(d)
    path.write_bytes(b"")
    out, hits, _, said = run(tmp_path, NUMBA_CACHE_DIR=str(d))
    assert (out, hits, said) == ("abcde", 0, "")
    assert run(tmp_path, NUMBA_CACHE_DIR=str(d))[:2] == ("abcde", 1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_others_may_write_or_that_is_none_is_not_loaded(tmp_path):
    files = cache._Files(tmp_path, "f")
    files.save(("key",), 1)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    path.chmod(0o606)
    assert files.load(("key",)) is None
    files.save(("key",), 1)
    assert path.stat().st_mode & 0o777 == 0o600 and files.load(("key",)) == 1
    (tmp_path / "elsewhere").write_bytes(content)
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to(tmp_path / "elsewhere")):
        path.unlink()
        make()
        assert files.load(("key",)) is None
        files.save(("key",), 1)
        assert path.is_file() and not path.is_symlink() and files.load(("key",)) == 1
    path.unlink()
    path.mkdir()
    assert files.load(("key",)) is None
    files.save(("key",), 1)
    assert files.load(("key",)) is None and sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", path.name]


def test_a_file_of_another_user_is_not_loaded(tmp_path, monkeypatch):
    files = cache._Files(tmp_path, "f")
    files.save(("key",), 1)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert files.load(("key",)) is None


def test_a_change_of_any_kernel_file_changes_the_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_HERE", tmp_path)
    stamps = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "x.py").write_text(text)
        stamps.append(cache.get_stamp.__wrapped__())
    (tmp_path / "x.py").rename(tmp_path / "y.py")
    stamps.append(cache.get_stamp.__wrapped__())
    assert len(set(stamps)) == 3


def test_a_full_disk_stops_nothing_and_leaves_nothing(tmp_path, monkeypatch):
    files = cache._Files(tmp_path, "f")
    assert files.load(("key",)) is None
    files.save(("key",), {"a": 1})
    assert files.load(("key",)) == {"a": 1}
    files.flush()
    assert list(tmp_path.iterdir()) == []

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    files.save(("key",), {"a": 1})
    assert list(tmp_path.iterdir()) == []
    cache._Files(tmp_path / "absent", "f").save(("key",), 1)
    assert list(tmp_path.iterdir()) == []


def test_whose_folder(tmp_path, monkeypatch):
    d = tmp_path / "a" / "b"
    d.mkdir(parents=True, mode=0o700)
    assert cache.find_flaw(d) is None
    d.chmod(0o707)
    assert cache.find_flaw(d) == f"other users may write to {d.resolve()}"
    d.chmod(0o700)
    d.parent.chmod(0o703)
    assert cache.find_flaw(d) == f"other users may write to {d.parent.resolve()}"
    d.parent.chmod(0o1703)  # the sticky bit: others cannot replace what is not theirs
    assert cache.find_flaw(d) is None
    (tmp_path / "link").symlink_to(d.parent)
    d.parent.chmod(0o703)
    assert cache.find_flaw(tmp_path / "link" / "b") == f"other users may write to {d.parent.resolve()}"
    d.parent.chmod(0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert cache.find_flaw(d) == f"{d.resolve()} belongs to another user"


def test_the_group_of_the_user_alone_is_no_other_user(tmp_path, monkeypatch):
    d = tmp_path / "a"
    d.mkdir()
    d.chmod(0o770)
    monkeypatch.setattr(cache, "_is_private_group", lambda gid: True)
    assert cache.find_flaw(d) is None
    monkeypatch.setattr(cache, "_is_private_group", lambda gid: False)
    assert cache.find_flaw(d) == f"other users may write to {d.resolve()}"


def test_a_refused_folder_is_named_once_and_a_private_one_used(tmp_path, monkeypatch, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache.get_folder.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "vcelltools"):
            found = cache.get_folder()
            assert cache.get_folder() == found
    finally:
        cache.get_folder.cache_clear()
    assert found.is_relative_to(tmp_path / "home/vcelltools/numba") and found.stat().st_mode & 0o777 == 0o700
    (said,) = caplog.messages
    assert f"other users may write to {shared.resolve()}" in said and str(found) in said


def test_a_configuration_file_of_the_working_folder_is_not_read(tmp_path):
    evil = tmp_path / "evil"
    (tmp_path / ".numba_config.yaml").write_text(f"cache_dir: {evil}\ndisable_jit: 1\n")
    out, _, where, said = run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "home"))
    assert out == "abcde" and said == "" and not evil.exists() and not Path(where).is_relative_to(evil)
    named = tmp_path / "named"
    _, _, where, said = run(tmp_path, NUMBA_CACHE_DIR=str(named))
    assert Path(where).is_relative_to(named) and said == "" and len(list_files(named)) == 1


@pytest.mark.parametrize("first", ["import numba", "import yaml, numba", "import yaml"])
def test_numba_forgets_a_configuration_file_that_it_has_read(tmp_path, first):
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: evil\ndeveloper_mode: 1\n")
    code = f"{first}\nfrom vcelltools.kernels import lzf\nfrom numba.core import config\n" \
        "config.reload_config()\nprint(repr(config.CACHE_DIR), config.DEVELOPER_MODE)"  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA")} | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True
    )
    assert ran.stdout == "'' 0\n" and ran.stderr == ""
