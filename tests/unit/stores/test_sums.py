"""Sums on disk, by way of spilled counts, are those in memory."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from vcelltools.kernels import store as kernels
from vcelltools.stores.building import sums as module
from vcelltools.stores.building.sums import Sums

GENES = 50


def make_blocks(rng, n_blocks: int, n_groups: int, top: int):
    """Blocks of CSR cells with scales, groups (-1: none) and measured genes (-1: none)."""
    measured = np.where(rng.random(GENES + 7) < 0.8, rng.permutation(GENES + 7) % GENES, -1).astype(np.int32)
    for _ in range(n_blocks):
        n = int(rng.integers(1, 40))
        X = sparse.random(n, GENES + 7, 0.3, "csr", random_state=rng, data_rvs=lambda k: rng.integers(1, top + 1, k))
        X.sort_indices()
        groups = rng.integers(-1, n_groups, n)
        yield X.indptr.astype(np.int64), X.indices, X.data.astype(np.float32), rng.uniform(0.5, 20, n), groups, measured


def add(sums: Sums, block) -> bool:
    indptr, indices, data, scale, groups, measured = block
    if sums.spill(*block):
        return True
    fixed = np.empty(len(data), np.int32)
    kernels.csr_fixed_logs(indptr, data, scale, fixed)
    sums.add_cells(indptr, indices, fixed, groups, measured)
    return False


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_groups=st.integers(1, 60),
    n_blocks=st.integers(0, 6),
    threads=st.integers(1, 3),
    rows=st.integers(1, 70),
    top=st.sampled_from([3, 400, 100_000]),
    settled=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_on_disk_are_those_in_memory(tmp_path, monkeypatch, n_groups, n_blocks, threads, rows, top, settled, seed):
    monkeypatch.setattr(module, "MAPPED_SUMS", 4 * 8 * GENES * rows)
    here = Sums((n_groups, GENES), None, threads)
    there = Sums((n_groups, GENES), tmp_path / "sums.work", threads)
    spilled = []
    for k, block in enumerate(make_blocks(np.random.default_rng(seed), n_blocks, n_groups, top)):
        assert not add(here, block)
        spilled.append(add(there, block))
        if k in settled:
            there.settle()
    assert all(spilled) or top > 0xFFFF
    here.save(tmp_path / "a.npy")
    there.save(tmp_path / "b.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    np.testing.assert_array_equal(here.table, there.table)
    there.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_a_large_spill_is_settled_and_a_saved_state_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAPPED_SUMS", 4 * 8 * GENES * 3)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    here, there, again = (Sums((9, GENES), p, 2) for p in (None, tmp_path / "1.work", tmp_path / "2.work"))
    most = 0
    for block in make_blocks(np.random.default_rng(1), 60, 9, 50):
        add(here, block)
        add(there, block)
        most = max(most, there._spill.n_bytes)
        there.tidy()
        assert there._spill.n_bytes <= module.SPILL_SHARE * there.table.nbytes
    assert most > module.SPILL_SHARE * there.table.nbytes  # so that it has been settled on the way
    with open(tmp_path / "state", "w+b") as f:
        there.write(f)
        f.seek(0)
        again.add_file(f)
    np.testing.assert_array_equal(again.table, here.table)
    for s in (here, there, again):
        s.close()
        s.close()
    del here, there, again, s  # the maps of the tables
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_genes_beyond_a_word_are_added_at_once(tmp_path):
    sums = Sums((2, (1 << 16) + 1), tmp_path / "sums.work", 1)
    one = np.array([0, 1]), np.array([1 << 16]), np.array([1.0], np.float32), np.ones(1), np.zeros(1, np.int64)
    measured = np.arange((1 << 16) + 1, dtype=np.int32)
    assert not add(sums, (*one, measured))
    assert sums.table[0, -1] == pytest.approx(np.log1p(1) * kernels.FIXED_ONE, abs=1)
    sums.close()
