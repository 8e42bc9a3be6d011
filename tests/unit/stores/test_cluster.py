"""The passes on a Dask cluster: the bytes of one machine, whatever becomes of the workers."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import vcelltools as vc
from tests.clusters import Killer, run_cluster
from tests.screens import BUILD, make_screen, write
from tests.unit.stores.test_store import BASIS, hashes
from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.runtime.cluster import cut

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    with run_cluster() as c:
        yield c


pytestmark = pytest.mark.filterwarnings("ignore")  # dask's own, of sockets that close with lost workers


def test_cut():
    assert cut(0, 10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert cut(0, 10, 4, [(4, 8)]) == [(0, 4), (8, 10)]
    assert cut(0, 10, 3, [(0, 2), (7, 10)]) == [(2, 5), (5, 7)]
    assert cut(0, 10, 4, [(0, 10)]) == []


def test_a_store_has_the_same_bytes(tmp_path, client):
    path = write(make_screen(n=700, deep=True), tmp_path / "s.h5ad", dtype="float64", compression="gzip")
    vc.build_store(path, basis=BASIS, out=tmp_path / "one", name="s", **BUILD)
    vc.build_store(path, basis=BASIS, out=tmp_path / "many", name="s", dask=client, part_cells=60, **BUILD)
    assert hashes(tmp_path / "one/s") == hashes(tmp_path / "many/s")


@pytest.mark.parametrize("sums", ["auto", "all"])
@pytest.mark.parametrize("layout", ["csc", "dense", "dense-columns"])
def test_a_store_of_any_layout_has_the_same_bytes(tmp_path, client, layout, sums):
    adata = make_screen(n=300, deep=True)
    adata.obs["total"] = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.var["gene_ids"] = adata.var["gene_ids"].where(adata.var_names != "GENE8", adata.var.at["GENE5", "gene_ids"])
    path = write(adata, tmp_path / "s.h5ad", layout, dtype="float64")
    for i, more in enumerate(({}, {"library_size": "total"})):
        options = {"basis": BASIS, "sums": sums, **BUILD, **more}
        vc.build_store(path, out=tmp_path / f"one{i}", name="s", **options)
        vc.build_store(path, out=tmp_path / f"many{i}", name="s", dask=client, part_cells=1 << 13, **options)
        assert hashes(tmp_path / f"one{i}/s") == hashes(tmp_path / f"many{i}/s")
        assert sorted(p.name for p in (tmp_path / f"many{i}").iterdir()) == ["s"]
        assert vc.verify_store(tmp_path / f"many{i}/s").ok


@pytest.mark.parametrize("layout", ["csr", "csc", "dense-columns"])
def test_statistics_are_the_same(tmp_path, client, layout):
    from vcelltools.io import open_dataset
    from vcelltools.selection.distributed import scan_on_cluster
    from vcelltools.selection.statistics import save_statistics, scan

    screen = make_screen(n=700)
    screen.X[3, 5] = 70_000  # beyond the bins of its gene
    path = write(screen, tmp_path / "s.h5ad", layout)
    with open_dataset(path) as ds:
        one = scan(ds, batch_key="batch")
    many = scan_on_cluster(path, client, batch_key="batch", part_cells=64)
    for name in ("library_size", "genes_per_cell", "batch_n"):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name
    assert one.batches == many.batches and one.n_duplicates == many.n_duplicates
    assert np.array_equal(one.histograms.n_cells_k, many.histograms.n_cells_k)
    for k in range(len(one.batches)):
        assert np.array_equal(one.histograms.expressing(k), many.histograms.expressing(k))
        for mine, theirs in zip(one.histograms.moments(k), many.histograms.moments(k), strict=True):
            assert np.array_equal(mine, theirs)
    save_statistics(one, tmp_path / "a")
    save_statistics(many, tmp_path / "b")
    a, b = (vc.hvg(tmp_path / n, top=20) for n in "ab")
    assert a.attrs["genes"] == b.attrs["genes"]
    np.testing.assert_array_equal(a["variances_norm"].to_numpy(), b["variances_norm"].to_numpy())


def test_a_worker_is_lost_in_the_middle(tmp_path, client):
    path = write(make_screen(n=700, deep=True), tmp_path / "s.h5ad", dtype="float64")
    vc.build_store(path, basis=BASIS, out=tmp_path / "one", name="s", **BUILD)
    killer = Killer(client, 150)
    options = {"basis": BASIS, "out": tmp_path / "many", "name": "s", "dask": client, "part_cells": 20, **BUILD}
    vc.build_store(path, progress=killer, **options)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["s"]
    assert killer.killed and hashes(tmp_path / "one/s") == hashes(tmp_path / "many/s")


def test_finished_parts_are_not_computed_again(tmp_path, client):
    path = write(make_screen(n=700), tmp_path / "s.h5ad")
    options = {"basis": BASIS, "name": "s", "part_cells": 100, **BUILD}

    class Stop(Exception):
        pass

    class Watch:
        def __init__(self, at):
            self.at, self.said = at, []

        def start(self, phase, total, unit):
            pass

        def advance(self, n):
            self.said.append(n)
            if len(self.said) == self.at:
                raise Stop

        def note(self, text):
            pass

        def finish(self):
            pass

    with pytest.raises(Stop):
        vc.build_store(path, out=tmp_path, dask=client, progress=Watch(4), **options)
    again = Watch(-1)
    vc.build_store(path, out=tmp_path, dask=client, progress=again, **options)
    assert again.said[0] >= 200 and len([n for n in again.said if n == 100]) <= 5
    vc.build_store(path, out=tmp_path / "clean", **options)
    assert hashes(tmp_path / "s") == hashes(tmp_path / "clean/s")


def test_what_a_cluster_cannot_do_is_said(tmp_path, client):
    with pytest.raises(UsageError, match="in memory"):
        vc.build_store(make_screen(n=80), basis=BASIS, out=tmp_path, name="t", dask=client, **BUILD)
    with pytest.raises(EnvironmentFault, match="no Dask scheduler"):
        vc.build_store(
            write(make_screen(n=80), tmp_path / "r.h5ad"), basis=BASIS, out=tmp_path, name="u", dask="bad://x", **BUILD
        )


def list_listeners(pids: set[int]) -> set[str]:
    """The addresses, in hexadecimal, on which these processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(fd))
    out = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                out.add(fields[1].split(":")[0])
    return out


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="no /proc")
def test_a_local_cluster_listens_on_the_loopback_alone(client):
    pids = {os.getpid(), *client.run(os.getpid).values()}
    assert list_listeners(pids) == {"0100007F"}  # 127.0.0.1


@contextlib.contextmanager
def run_scheduler():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = ["--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", *args], **quiet)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield f"tcp://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def test_a_lost_scheduler_and_no_worker_are_said(tmp_path, monkeypatch):
    from vcelltools.runtime import cluster

    monkeypatch.setattr(cluster, "_LOST_SECONDS", 3.0)
    path = write(make_screen(n=80), tmp_path / "s.h5ad")
    with run_scheduler() as (address, process):
        with pytest.raises(EnvironmentFault, match="has had no worker for 3 s"):
            vc.hvg(path, top=5, dask=address)
        threading.Timer(2, process.kill).start()
        with pytest.raises(EnvironmentFault, match=f"the Dask scheduler at {address} was lost"):
            vc.hvg(path, top=5, dask=address)


def check_that_nothing_is_left(threads):
    """A finalizer that waits for the lock of Dask's loops would block the thread that holds it."""
    from distributed.utils import LoopRunner

    collector = threading.Thread(target=gc.collect, daemon=True)
    with LoopRunner._lock:
        collector.start()
        collector.join(60)
        assert not collector.is_alive()
    for _ in range(100):
        if threading.active_count() <= threads:
            break
        time.sleep(0.1)
    assert threading.active_count() <= threads, [t.name for t in threading.enumerate()]


ANSWERS = {
    "silence": None,
    "a refusal": None,
    "goodbye": b"",
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": bytes(64),
    "an endless frame": struct.pack("<Q", 1 << 62),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_listener_that_is_not_dask(answer, monkeypatch):
    from vcelltools.runtime import cluster

    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 2.0)
    stop = threading.Event()
    threads = threading.active_count()

    def serve():
        while not stop.is_set():
            with contextlib.suppress(OSError):
                c, _ = s.accept()
                with c:
                    if ANSWERS[answer] is None:
                        stop.wait(20)
                    else:
                        c.sendall(ANSWERS[answer])

    with socket.create_server(("127.0.0.1", 0)) as s:
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
        if answer == "a refusal":
            s.close()
            stop.set()
        else:
            s.settimeout(0.2)
        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        try:
            with (
                pytest.raises(EnvironmentFault, match="no Dask scheduler answers at"),
                cluster.open_cluster(address),
            ):
                pass
        finally:
            stop.set()
            thread.join()
    assert time.monotonic() - began < 10
    check_that_nothing_is_left(threads)


def test_from_the_command_line(tmp_path, cli):
    path = write(make_screen(n=300), tmp_path / "s.h5ad")
    assert cli("hvg", path, "--top", 10, "--out", "a.txt", "--dask", "local", cwd=tmp_path).code == 0
    assert (tmp_path / "a.txt").read_text().split() == vc.hvg(path, top=10).attrs["genes"]
    args = ("--basis", "a.txt", "--pert-col", "target", "--control", "non-targeting", "--group-by", "batch")
    vc.build_store(
        path, basis=tmp_path / "a.txt", out=tmp_path / "one", name="s", pert_col="target", control="non-targeting",
        group_by=["batch"],
    )  # fmt: skip
    ran = cli("build-store", path, *args, "--out", "many", "--name", "s", "--dask", "local", "-q", cwd=tmp_path)
    assert ran.code == 0 and ran.stderr == ""
    assert hashes(tmp_path / "one/s") == hashes(tmp_path / "many/s")
