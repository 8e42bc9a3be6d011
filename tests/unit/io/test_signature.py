"""Hashes of tables as they are stored: equal only for equal values."""

from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.io import open_dataset


def write(path, names, symbols=None, *, n_cells=3, seed=0):
    rng = np.random.default_rng(seed)
    var = pd.DataFrame(index=list(names))
    if symbols is not None:
        var["gene_symbols"] = symbols
    obs = pd.DataFrame(
        {"note": ["x" * int(k) for k in rng.integers(1, 300, n_cells)]}, index=[f"{seed}c{i}" for i in range(n_cells)]
    )
    ad.AnnData(rng.poisson(1.0, (n_cells, len(var))).astype(np.float32), obs, var).write_h5ad(path)
    return path


def sign(path, columns=()):
    with open_dataset(path) as ds:
        return ds.var.hash_stored(columns)


NAMES = [f"ENSG{i:011d}" for i in range(700)]


def test_the_same_list_in_other_files_has_the_same_hash(tmp_path):
    """Other cells before it shift the heaps within the file."""
    symbols = pd.Categorical([f"S{i % 90}" for i in range(700)])
    found = {sign(write(tmp_path / f"{k}.h5ad", NAMES, symbols, n_cells=3 + 40 * k, seed=k), ["gene_symbols"])
             for k in range(4)}  # fmt: skip
    assert len(found) == 1 and None not in found


@pytest.mark.parametrize("at", [0, 350, 699])
def test_one_other_name_or_symbol_changes_the_hash(tmp_path, at):
    symbols = [f"S{i}" for i in range(700)]
    whole = sign(write(tmp_path / "a.h5ad", NAMES, symbols), ["gene_symbols"])
    names, others = NAMES.copy(), symbols.copy()
    names[at], others[at] = "ENSG99999999999", "T"
    assert whole != sign(write(tmp_path / "b.h5ad", names, symbols), ["gene_symbols"])
    assert whole != sign(write(tmp_path / "c.h5ad", NAMES, others), ["gene_symbols"])
    assert sign(tmp_path / "a.h5ad") == sign(tmp_path / "c.h5ad")  # without the symbols


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(
        st.lists(st.sampled_from(["a", "b", "ab", "é", "", "long" * 40, "x" * 5000]), min_size=1, max_size=6),
        min_size=2, max_size=4,
    ),
    form=st.sampled_from(["text", "categories", "fixed"]),
)  # fmt: skip
def test_equal_hashes_mean_equal_values(tmp_path_factory, lists, form):
    d = tmp_path_factory.mktemp("lists")
    found: dict[str, list[str]] = {}
    for k, values in enumerate(lists):
        column = pd.Categorical(values) if form == "categories" else values
        path = write(d / f"{k}.h5ad", [f"g{i}" for i in range(len(values))], column, seed=k)
        if form == "fixed":
            with h5py.File(path, "r+") as f:
                del f["var/gene_symbols"]
                f["var"].create_dataset("gene_symbols", data=np.array([v.encode() for v in values], "S5000"))
        key = sign(path, ["gene_symbols"])
        assert key is not None and found.setdefault(key, values) == values


def test_a_reference_outside_the_file_is_left_to_the_reader(tmp_path):
    path = write(tmp_path / "a.h5ad", NAMES)
    with h5py.File(path) as f:
        key = f["var"].attrs["_index"]
        offset = f["var"][key].id.get_offset()
        if offset is None:
            offset = f["var"][key].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[offset + 4 : offset + 12] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "b.h5ad").write_bytes(raw)
    with h5py.File(path) as good, h5py.File(tmp_path / "b.h5ad") as bad:
        from xxhash import xxh3_128

        from vcelltools.io.hdf5.signature import hash_stored

        assert hash_stored(good, good[f"var/{key}"], xxh3_128())
        assert not hash_stored(bad, bad[f"var/{key}"], xxh3_128())


def test_other_kinds_of_files_have_none(tmp_path):
    path = write(tmp_path / "a.h5ad", NAMES[:5])
    with open_dataset(ad.read_h5ad(path)) as ds:
        assert ds.var.hash_stored([]) is None
    block = tmp_path / "user.h5ad"
    with h5py.File(path) as f, h5py.File(block, "w", userblock_size=512) as g:
        for k in f:
            f.copy(k, g)
        g.attrs.update(f.attrs)
    assert sign(block) is None and sign(path) is not None
