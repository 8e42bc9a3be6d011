"""Reading drawn cells: the values are the same for every way of reading, file system and amount of free memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vcelltools as vc
from vcelltools.errors import DataError
from vcelltools.io.hdf5.direct import ALIGN, DirectFile, get_resident_share, make_aligned
from vcelltools.sampling import loader as sample_read
from vcelltools.sampling.loader import find_stretches
from vcelltools.sampling.sampler import Loaded, Sampler

WIDE, NARROW, ODD = 2000, 300, 301  # rows of 4,096 and 768 bytes, and a number of genes that is not a multiple of four


def build(folder: Path, n_genes: int, name: str, n: int = 700, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    X = sparse.csr_matrix(rng.poisson(0.6, (n, n_genes)).astype(np.float32))
    obs = pd.DataFrame(
        {"p": np.where(rng.random(n) < 0.3, "ctrl", rng.choice(["A", "B", "C"], n)), "b": rng.choice(["x", "y"], n)},
        index=[f"{name}{i}" for i in range(n)],
    )
    adata = ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]))
    basis = [f"G{i}" for i in range(n_genes)]
    vc.build_store(adata, basis=basis, out=folder, name=name, pert_col="p", control="ctrl", group_by=["b"])
    return folder / name


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    d = tmp_path_factory.mktemp("read")
    return {g: [build(d, g, f"a{g}"), build(d, g, f"b{g}", n=500, seed=1)] for g in (WIDE, NARROW, ODD)}


def is_equal(batch, loaded) -> bool:
    s = batch.sampler
    return all(
        np.array_equal(got[i], s.stores[k].X[rows[i]])
        for got, rows in ((loaded.perturbed, batch.perturbed_rows), (loaded.control, batch.control_rows))
        for i, k in enumerate(batch.store_id.tolist())
    )


@pytest.mark.parametrize("n_genes", [WIDE, NARROW, ODD])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("draw", ["blocks", "scatter"])
def test_every_way_gives_the_same_bits(paths, n_genes, verify, draw, monkeypatch):
    monkeypatch.setattr(sample_read, "SLAB_BYTES", 40_000)  # several slabs per batch
    monkeypatch.setattr(sample_read, "PIECE_BYTES", 8_192)
    found = []
    for read in ("memory", "disk", "auto"):
        options = {"short": "replace", "verify": verify, "draw": draw, "read": read, "seed": 3}
        s = Sampler([vc.open_store(p) for p in paths[n_genes]], set_size=40, sets_per_batch=9, **options)
        out = Loaded(*(np.full((9, 40, n_genes), 7, np.float16) for _ in range(2)))
        for batch, loaded in s.iterate(0, 6):
            assert loaded.perturbed.shape == (9, 40, n_genes) and is_equal(batch, loaded)
            into = s.load(batch, out)
            assert into.control is out.control and is_equal(batch, out)
        found.append(np.concatenate([b.load().perturbed.ravel() for b in map(s.batch, range(4))]))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_values_that_are_held_are_never_written_over(paths):
    s = Sampler(vc.open_store(paths[WIDE][0]), set_size=20, sets_per_batch=4, read="disk", draw="blocks")
    held = list(s.iterate(0, 12))
    part = s.load(s.batch(20)).perturbed[1, 3:5]  # a view keeps its memory too
    expected = part.copy()
    for t in range(30, 40):
        s.load(s.batch(t))
    assert all(is_equal(b, x) for b, x in held) and np.array_equal(part, expected)


def test_memory_of_values_is_used_again(paths):
    s = Sampler(vc.open_store(paths[WIDE][0]), set_size=20, sets_per_batch=4, read="disk", draw="blocks", verify=False)
    seen = {s.load(s.batch(t)).perturbed.ctypes.data for t in range(10)}
    assert len(seen) <= 2


@pytest.mark.parametrize("n_genes", [WIDE, NARROW])
def test_damage_is_found_on_the_way_past_the_page_cache(paths, n_genes, tmp_path):
    shutil.copytree(paths[n_genes][0], tmp_path / "s")
    x = tmp_path / "s/X.f16"
    raw = bytearray(x.read_bytes())
    raw[len(raw) // 2] ^= 4
    x.write_bytes(raw)
    store = vc.open_store(tmp_path / "s")
    s = Sampler(store, set_size=8, sets_per_batch=16, read="disk", short="replace", draw="blocks")
    with pytest.raises(DataError, match="damaged in rows"):
        for t in range(60):
            s.load(s.batch(t))
    bare = Sampler(store, set_size=8, sets_per_batch=16, read="disk", short="replace", verify=False)
    bare.load(bare.batch(0))


def test_a_file_cut_while_it_is_read_is_an_error(paths, tmp_path):
    shutil.copytree(paths[WIDE][0], tmp_path / "s")
    s = Sampler(vc.open_store(tmp_path / "s"), set_size=8, sets_per_batch=16, read="disk", verify=False)
    os.truncate(tmp_path / "s/X.f16", 5 * 4096 + 100)
    with pytest.raises(DataError, match="truncated"):
        s.load(s.batch(0))
    with pytest.raises(DataError, match="truncated"):
        list(s.iterate(0, 3))


def test_what_auto_chooses(paths, monkeypatch):
    def ways(free, share):
        monkeypatch.setattr(sample_read, "get_free_memory", lambda: free)
        monkeypatch.setattr("vcelltools.stores.store.get_resident_share", lambda mapped: share)
        s = Sampler(vc.open_store(paths[WIDE][0]), set_size=8, sets_per_batch=4)
        assert is_equal(s.batch(0), s.load(s.batch(0)))
        if s.reader._warming is not None:
            s.reader._warming.join()
        assert is_equal(s.batch(1), s.load(s.batch(1)))
        return s.reader.get_ways()[0], s.reader._warming is not None

    size = (paths[WIDE][0] / "X.f16").stat().st_size
    assert ways(10 * size, 1.0) == ("memory", False)  # all in memory
    assert ways(10 * size, 0.3) == ("memory", True)  # it fits and is fetched while the first batches come from disk
    assert ways(size - 1, 0.3) == ("disk", False)
    assert ways(size - 1, 1.0) == ("disk", False)
    monkeypatch.setattr(sample_read, "get_free_memory", lambda: 0)
    staged = Sampler(vc.open_store(paths[WIDE][0]).to_memory(), set_size=8, sets_per_batch=4)
    assert staged.reader.get_ways() == ["memory"]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory")
def test_a_file_system_that_refuses(paths):
    folder = Path("/dev/shm") / f"vcelltools-{os.getpid()}"
    shutil.copytree(paths[NARROW][0], folder)
    try:
        s = Sampler(vc.open_store(folder), set_size=8, sets_per_batch=16, read="disk")
        assert all(is_equal(b, x) for b, x in s.iterate(0, 5))
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_file_is_read_at_any_place(tmp_path, refuses, monkeypatch):
    raw = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8)
    path = tmp_path / "f"
    path.write_bytes(raw.tobytes())
    if refuses:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    file = DirectFile(path)
    assert not (refuses and file.direct)
    for offset, n in ((0, 10), (4095, 2), (4096, 4096), (5000, 9000), (49_000, 1001), (50_000, 1)):
        first, skip, n_room = (int(v[0]) for v in file.get_extents(np.array([offset]), np.array([n])))
        room = make_aligned(n_room)
        assert room.ctypes.data % ALIGN == 0 and n_room % ALIGN == 0
        file.fill(room, first, skip + n)
        assert np.array_equal(room[skip : skip + n], raw[offset : offset + n])
        assert not file.direct or first % ALIGN == 0
    with pytest.raises(DataError, match="truncated"):
        file.fill(make_aligned(ALIGN), 49_152, 2000)


def test_pages_in_memory_are_counted(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    mapped = np.memmap(path, np.uint8, "r")
    mapped.sum()
    assert get_resident_share(mapped) == 1.0


def test_stretches():
    rows = np.array([5, 6, 7, 9, 10, 3, 4, 5, 6])
    first, n = find_stretches(rows, np.arange(9), 100)
    assert first.tolist() == [0, 3, 5] and n.tolist() == [3, 2, 4]
    first, n = find_stretches(rows, np.arange(9), 3)
    assert first.tolist() == [0, 3, 5, 8] and n.tolist() == [3, 2, 3, 1]
    first, n = find_stretches(rows, np.array([0, 1, 5, 6, 7, 8, 9, 10, 11]), 100)
    assert first.tolist() == [0, 2, 3, 5] and n.tolist() == [2, 1, 2, 4]
    assert len(find_stretches(rows[:0], rows[:0], 3)[0]) == 0
