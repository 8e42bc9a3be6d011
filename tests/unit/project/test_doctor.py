"""``doctor`` tells what is there and what is missing, and leaves nothing behind."""

from __future__ import annotations

import h5py

from vcelltools.project.doctor import check_machine


def test_the_facts_are_there(tmp_path):
    r = check_machine(tmp_path, accelerators=False)
    assert r.versions["h5py"] == h5py.__version__
    assert r.versions["HDF5"] == h5py.version.hdf5_version
    assert r.system["threads"] >= 1
    assert r.filters["gzip"] is True
    assert r.disk["free_bytes"] > 0
    assert r.disk["write_per_s"] > 0
    assert r.disk["read_per_s"] > 0
    assert "backend" not in r.accelerators
    assert list(tmp_path.iterdir()) == []


def test_each_problem_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("vcelltools.io.hdf5.limits.list_filters", lambda: {"gzip": True, "blosc": False})
    monkeypatch.setenv("VCELLTOOLS_THREADS", "many")
    monkeypatch.setattr("os.access", lambda *a, **k: False)
    r = check_machine(tmp_path, accelerators=False)
    text = "\n".join(f"{p} -> {remedy}" for p, remedy in r.problems)
    for part in ("pip install hdf5plugin", "VCELLTOOLS_THREADS", "NUMBA_CACHE_DIR"):
        assert part in text
    assert r.to_json()["ok"] is False


def test_the_command_asks_jax_and_ends_with_0(cli, tmp_path):
    ran = cli("doctor", "--json", cwd=tmp_path)
    assert ran.code == 0
    body = ran.json
    assert body["accelerators"]["backend"] in ("cpu", "gpu", "tpu")
    assert len(body["accelerators"]["devices"]) >= 1
    ran = cli("doctor", "--no-accelerators", cwd=tmp_path)
    assert ran.code == 0
    assert "HDF5 filters" in ran.stdout
    assert "not asked" in ran.stdout
