"""What happens to a store when processes die, disks fill, bits flip and files vanish."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import vcelltools as vc
from tests.screens import BUILD, make_screen, write
from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.write import atomic
from vcelltools.sampling.sampler import Sampler
from vcelltools.stores.building import builder
from vcelltools.stores.format import MANIFEST, PARTS

ROOT = Path(__file__).resolve().parents[3]
BASIS = [f"GENE{i}" for i in range(20)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    vc.build_store(write(make_screen(), path / "s.h5ad"), basis=BASIS, out=path, name="s", **BUILD)
    return path / "s"


@pytest.mark.parametrize(("layout", "first", "stride", "kills"), [("csr", 0, 3, 40), ("csc", 1, 8, 20)])
def test_kill_9_at_every_step(tmp_path, layout, first, stride, kills):
    command = [sys.executable, "-m", "tests.kill_walk", layout, tmp_path, first, stride]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["wrong"] == [] and said["half"] == [] and said["left"] == []
    assert said["kills"] >= kills and said["steps"] > 30


@pytest.mark.parametrize("same", [True, False])
def test_a_resume_does_not_start_anew_unless_the_work_files_changed(tmp_path, monkeypatch, same):
    path = write(make_screen(), tmp_path / "s.h5ad")
    options = {"basis": BASIS, "out": tmp_path, "name": "s", "bucket_bytes": 1, **BUILD}

    class Stop(Exception):
        pass

    seen = []

    def stop(name):
        seen.append(name)
        if seen.count("values") == 5:
            raise Stop

    monkeypatch.setattr(atomic, "on_step", stop)
    with pytest.raises(Stop):
        vc.build_store(path, **options)
    again = []
    monkeypatch.setattr(atomic, "on_step", again.append)
    if not same:
        monkeypatch.setattr(builder, "WORK_FORMAT", builder.WORK_FORMAT + 1)
    vc.build_store(path, **options)
    assert "state" in seen and ("state" in again) != same  # the source is not read again
    n_frames = 20 + 5  # 400 cells in buckets of 16 and their runs' ends
    assert again.count("frames") == n_frames - (seen.count("frames") if same else 0)


@pytest.mark.parametrize("name", [*PARTS, "X.f16", MANIFEST])
def test_a_flipped_bit_anywhere_is_found(tmp_path, whole, name):
    size = (whole / name).stat().st_size
    for at in sorted({0, size // 3, size // 2, size - 1}):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        raw = bytearray((copy / name).read_bytes())
        raw[at] ^= 0x10
        (copy / name).write_bytes(raw)
        found = vc.verify_store(copy)
        assert not found.ok, (name, at)
        assert any(name in p for p in found.problems), found.problems
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read_everything(copy)
        shutil.rmtree(copy)


def read_everything(path: Path) -> None:
    """Read every part through the store and the sampler, as training does."""
    store = vc.open_store(path)
    _ = store.genes, store.obs, store.runs, store.library_size[:], store.sums[:], store.measured
    store.counts()
    sampler = Sampler(store, set_size=4, sets_per_batch=64, short="replace")
    for step in range(40):
        sampler.batch(step).load()
    store.check_rows()


@pytest.mark.parametrize("name", [*PARTS, "X.f16", MANIFEST])
@pytest.mark.parametrize("how", ["gone", "short", "long"])
def test_a_missing_or_cut_file_is_found(tmp_path, whole, name, how):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    raw = (copy / name).read_bytes()
    if how == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(raw[:-2] if how == "short" else raw + b"\0")
    found = vc.verify_store(copy)
    assert not found.ok and any(name in p for p in found.problems)
    with pytest.raises(DataError):
        vc.open_store(copy)


def test_damage_in_values_is_found_when_they_are_read(tmp_path, whole):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    with open(copy / "X.f16", "r+b") as f:
        f.seek(2 * 128 * 2 * 16 + 10)
        f.write(b"\x55")
    store = vc.open_store(copy)
    store.check_rows(np.array([0, 15, 200]))
    with pytest.raises(DataError, match="rows 32 to 47"):
        store.check_rows(np.array([40]))
    with pytest.raises(DataError, match="damaged"):
        vc.open_store(copy).to_memory()
    assert vc.open_store(whole).to_memory().is_checked(np.arange(400))


def test_counts_that_do_not_give_the_values_are_found(tmp_path, whole):
    """Every checksum right, but the values of another target sum: only the comparison sees it."""
    from vcelltools.stores.format import hash_file, hash_units, make_manifest, read_manifest

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    X = np.fromfile(copy / "X.f16", np.float16).reshape(400, -1)
    X[100] *= 2
    X.tofile(copy / "X.f16")
    np.save(copy / "X.xxh3.npy", hash_units(X))
    body = read_manifest(copy)
    body.pop("sha256")
    body["files"]["X.xxh3.npy"]["sha256"] = hash_file(copy / "X.xxh3.npy")
    (copy / MANIFEST).write_text(make_manifest(body))
    assert vc.verify_store(copy).problems == ("X.f16: row 100 does not match its counts",)


def test_a_file_that_does_not_belong_is_named(tmp_path, whole):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "notes.txt").write_text("x")
    assert vc.verify_store(copy).problems == ("notes.txt does not belong to the store",)


def test_a_full_disk_leaves_the_old_store(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad")
    vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    before = vc.open_store(tmp_path / "s").sha256
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # X.f16 needs 102,400 bytes
    try:
        with pytest.raises(EnvironmentFault, match="the disk is full"):
            vc.build_store(path, basis=BASIS[:10], out=tmp_path, name="s", force=True, **BUILD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert vc.open_store(tmp_path / "s").sha256 == before and vc.verify_store(tmp_path / "s").ok


def test_space_is_checked_before_the_work(tmp_path, monkeypatch):
    path = write(make_screen(), tmp_path / "s.h5ad")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(EnvironmentFault, match="are free"):
        vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.h5ad"]


def test_of_two_writers_one_is_told(tmp_path, monkeypatch):
    path = write(make_screen(), tmp_path / "s.h5ad")
    inside, go = threading.Event(), threading.Event()

    def wait(name):
        if name == "scattered-by-first" or not inside.is_set():
            inside.set()
            assert go.wait(30)

    monkeypatch.setattr(atomic, "on_step", wait)
    results = []
    first = threading.Thread(
        target=lambda: results.append(vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD))
    )
    first.start()
    assert inside.wait(30)
    with pytest.raises(EnvironmentFault, match="being written by another process"):
        vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    go.set()
    first.join()
    assert len(results) == 1 and vc.verify_store(tmp_path / "s").ok


def test_a_changed_source_is_not_continued(tmp_path, monkeypatch):
    path = write(make_screen(), tmp_path / "s.h5ad")
    options = {"basis": BASIS, "out": tmp_path, "name": "s", **BUILD}

    class Stop(Exception):
        pass

    def stop(name):
        if name == "frames":
            raise Stop

    monkeypatch.setattr(atomic, "on_step", stop)
    with pytest.raises(Stop):
        vc.build_store(path, **options)
    monkeypatch.setattr(atomic, "on_step", None)
    other = make_screen(seed=9)
    other.obs = make_screen().obs  # the same cells, other counts
    write(other, path)
    vc.build_store(path, **options)
    vc.build_store(path, **{**options, "out": tmp_path / "clean"})
    assert vc.open_store(tmp_path / "s").sha256 == vc.open_store(tmp_path / "clean/s").sha256


def test_a_reader_keeps_its_store_while_it_is_replaced(tmp_path):
    path = write(make_screen(), tmp_path / "s.h5ad")
    vc.build_store(path, basis=BASIS, out=tmp_path, name="s", **BUILD)
    store = vc.open_store(tmp_path / "s")
    before = np.array(store.X)
    vc.build_store(path, basis=BASIS[::-1], out=tmp_path, name="s", force=True, **BUILD)
    assert np.array_equal(store.X, before)


def test_a_read_only_folder_is_said_before_the_work(tmp_path, monkeypatch):
    path = write(make_screen(), tmp_path / "s.h5ad")
    monkeypatch.setattr(atomic.os, "access", lambda *a: False)
    with pytest.raises(EnvironmentFault, match=r"read-only|permission"):
        vc.build_store(path, basis=BASIS, out=tmp_path / "out", name="s", **BUILD)


@pytest.mark.parametrize(
    "change",
    [
        {"n_cells": "many"}, {"n_cells": -1}, {"n_genes": 1.5}, {"files": []}, {"files": {"../x": {"bytes": 1}}},
        {"labels": {}}, {"labels": None}, {"source": [1]}, {"basis": "x"}, {"target_sum": None}, {"arithmetic": "f16"},
        {"name": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_wrong_types_is_damage(tmp_path, change):
    from vcelltools.stores.format import make_manifest, read_manifest

    body = {
        "schema": 1, "name": "s", "plan": "p", "n_cells": 1, "n_genes": 1, "stride": 128, "target_sum": 1e4,
        "arithmetic": "float32", "basis": {}, "source": {}, "labels": {"control": "c"}, "genes": {},
        "duplicate_entries": 0,
        "files": {n: {"bytes": 1, "sha256": "x"} for n in PARTS} | {"X.f16": {"bytes": 256}},
    }  # fmt: skip
    (tmp_path / MANIFEST).write_text(make_manifest(body))
    assert read_manifest(tmp_path)["name"] == "s"
    (tmp_path / MANIFEST).write_text(make_manifest({**body, **change}))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("[" * 100_000 + json.dumps(body))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
