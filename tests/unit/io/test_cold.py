"""Files that are not in the page cache: the same values, read past it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.make import as_layout, make_adata
from vcelltools import convert, hvg
from vcelltools.errors import DataError
from vcelltools.io import open_dataset
from vcelltools.io.hdf5 import direct
from vcelltools.io.hdf5.direct import FileBytes, drop_pages

N, G = 900, 400


@pytest.fixture
def large(monkeypatch):
    """Every file of a megabyte counts as large."""
    monkeypatch.setattr(direct, "get_free_memory", lambda: 0)


def need_cold(path) -> None:
    drop_pages(path)
    source = FileBytes(path)
    cold = source.cold
    source.close()
    if not cold:
        pytest.skip("this file system has no direct reads, or does not drop pages")


@pytest.fixture
def noise(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, 9_000_001).astype(np.uint8)
    path = tmp_path / "noise.bin"
    path.write_bytes(values.tobytes())
    return path, values


def test_every_range_is_the_files(noise, large):
    path, values = noise
    need_cold(path)
    source = FileBytes(path)
    rng = np.random.default_rng(1)
    ranges = [(0, len(values)), (len(values) - 70_000, len(values)), (1, 4_000_000), (4096, 4096 + (1 << 22))]
    ranges += [(int(a), int(a) + int(n)) for a, n in rng.integers(1, 4_000_000, (20, 2))]
    for a, b in ranges:
        drop_pages(path)
        np.testing.assert_array_equal(source.read(a, b - a), values[a:b])
    assert direct.get_resident_share(np.memmap(path, np.uint8, "r")) < 0.5  # reads have left the cache alone
    with pytest.raises(DataError, match="truncated"):
        source.read(len(values) - 100_000, 100_001)
    source.close()


def test_what_the_cache_holds_is_read_from_it(noise, large):
    path, values = noise
    need_cold(path)
    source = FileBytes(path)
    path.read_bytes()  # into the cache, after the file was found cold
    assert source._is_cached(0, len(values))
    np.testing.assert_array_equal(source.read(5, 8_000_000), values[5:8_000_005])
    source.close()
    assert not FileBytes(path).cold


def test_a_file_that_is_read_again_and_again_fills_the_cache(tmp_path, large):
    path = tmp_path / "x.h5ad"
    make_adata(as_layout(np.random.default_rng(2).poisson(5.0, (N, G)), "csr")).write_h5ad(path)
    need_cold(path)
    with open_dataset(path) as ds:
        ds.keep_cached()
        for span in ds.matrix.plan():
            ds.matrix.read(span)
    assert direct.get_resident_share(np.memmap(path, np.uint8, "r")) > 0.9


def test_a_small_file_is_left_in_the_cache(noise):
    path, _ = noise
    drop_pages(path)
    source = FileBytes(path)
    assert not source.cold and source._mapped is None
    source.close()


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("compression", ["none", "gzip", "lzf"])
def test_a_cold_file_gives_the_same_result(tmp_path, large, layout, compression):
    X = np.random.default_rng(2).poisson(5.0, (N, G)).astype(np.float32)
    make_adata(as_layout(X, layout), batches=2).write_h5ad(tmp_path / "x.h5ad")
    path = tmp_path / "y.h5ad"
    convert(tmp_path / "x.h5ad", path, layout=layout, compression=compression, chunk_len=50_000)
    path.read_bytes()
    warm = hvg(path, top=50, batch_key="batch", threads=2)
    if path.stat().st_size > 1 << 20:
        need_cold(path)
    for threads in (1, 3):
        drop_pages(path)
        cold = hvg(path, top=50, batch_key="batch", threads=threads)
        pd.testing.assert_frame_equal(cold, warm, check_exact=True)
