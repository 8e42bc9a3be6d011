"""Memory of building does not follow the number of cells, beyond some bytes of bookkeeping for each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.screens import BUILD, make_screen, write
from vcelltools.io import open_dataset
from vcelltools.stores.building import cells_table as store_cells

SMALL, LARGE = 120_000, 480_000  # both fill the buffers of fixed size
BYTES_A_CELL = 100  # obs alone is about 300 here

CHILD = """
import sys
import vcelltools as vc
vc.build_store(sys.argv[1], basis=["G0", "G3", "G5"], out=sys.argv[2], name="s", pert_col="guide", control="P0_guide",
               group_by=["batch"], threads=1)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def write_tall(path: Path, n: int, n_genes: int = 10) -> None:
    """Write a file of cells with one count each, and an obs whose strings are long."""
    with h5py.File(path, "w") as f:
        X = f.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n, n_genes]})
        X["indptr"] = np.arange(n + 1)
        X["indices"] = np.arange(n, dtype=np.int32) % n_genes
        X["data"] = np.ones(n, np.float32)
        text = {
            "_index": (f"ACGTACGTACGTACGT-{i}_of_some_library" for i in range(n)),
            "guide": (f"P{i % 40}_guide" for i in range(n)),
            "long": (f"some text of a cell, {i}, as long as a sentence of words may be" for i in range(n)),
            "batch": (f"b{i % 3}" for i in range(n)),
        }
        for key, rows in (("obs", n), ("var", n_genes)):
            t = f.create_group(key)
            t.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            columns = {"_index": (f"G{i}" for i in range(rows))} if key == "var" else text
            for name, values in columns.items():
                d = t.create_dataset(name, (rows,), h5py.string_dtype())
                d[:] = np.array(list(values), dtype=object)
            t.attrs["column-order"] = np.array([c for c in columns if c != "_index"], dtype=h5py.string_dtype())


VERIFY = """
import sys
import vcelltools as vc
assert vc.verify_store(sys.argv[2] + "/s").ok
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_the_peak_is_flat(tmp_path):
    peaks: dict[str, list[int]] = {CHILD: [], VERIFY: []}
    for n in (SMALL, LARGE):
        write_tall(tmp_path / f"{n}.h5ad", n)
        for child, found in peaks.items():
            command = [sys.executable, "-c", child, str(tmp_path / f"{n}.h5ad"), str(tmp_path / str(n))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            found.append(1024 * int(done.stdout))
        store = vc.open_store(tmp_path / str(n) / "s")
        assert store.n_cells == n and len(store.obs) == n
    for small, large in peaks.values():
        assert (large - small) / (LARGE - SMALL) < BYTES_A_CELL, peaks


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_obs_in_several_row_groups_round_trips(tmp_path, monkeypatch, layout):
    adata = make_screen(n=700)
    rng = np.random.default_rng(0)
    adata.obs["note"] = [None if i % 5 == 0 else f"n{i}" for i in range(700)]
    adata.obs["n"] = pd.array(np.where(np.arange(700) % 7, np.arange(700), 0), dtype="Int64")
    adata.obs.loc[adata.obs.index[::9], "n"] = pd.NA
    adata.obs["flag"] = pd.array([None, *(rng.random(699) < 0.5)], dtype="boolean")
    adata.obs["rare"] = pd.Categorical(
        np.where(np.arange(700) < 690, "z", "a"), categories=["unused", "z", "m", "a"], ordered=True
    )
    adata.obs["hole"] = pd.Categorical(np.where(np.arange(700) % 3, "x", None), categories=["y", "x"])
    adata.obs["small"] = np.arange(700).astype(np.int16)
    path = write(adata, tmp_path / "s.h5ad", layout)
    monkeypatch.setattr(store_cells, "get_group_rows", lambda n, n_columns: 64)
    vc.build_store(path, basis=["GENE1"], out=tmp_path, name="s", **BUILD)
    assert not list(tmp_path.glob("s/*.work"))
    obs = vc.open_store(tmp_path / "s").obs
    assert np.array_equal(adata.obs_names[obs["source_row"]], obs.index)
    with open_dataset(path) as ds:
        expected = ds.obs.to_frame()
    pd.testing.assert_frame_equal(obs.drop(columns="source_row").loc[adata.obs_names], expected)
    assert list(obs["rare"].cat.categories) == ["unused", "z", "m", "a"] and obs["rare"].cat.ordered
    assert vc.verify_store(tmp_path / "s").ok


def test_ranges_and_factorize_agree_with_whole_columns(tmp_path, monkeypatch):
    from vcelltools.io import table

    adata = make_screen(n=300)
    adata.obs["note"] = [None if i % 5 == 0 else f"n{i % 40}" for i in range(300)]
    adata.obs["n"] = pd.array(np.arange(300) % 12, dtype="Int64")
    adata.obs.loc[adata.obs.index[::9], "n"] = pd.NA
    path = write(adata, tmp_path / "s.h5ad")
    monkeypatch.setattr(table, "RANGE", 64)
    for source in (path, adata):
        with open_dataset(source) as ds:
            for name in ds.obs.columns:
                whole = ds.obs.column(name)
                codes, labels = ds.obs.factorize(name)
                expected = whole.factorize()
                assert np.array_equal(codes, expected[0]) and labels == expected[1], name
                parts = [c.labels() for _, c in ds.obs.ranges(name, 64)]
                assert np.array_equal(np.concatenate(parts), whole.labels()), name
            names = np.concatenate([ds.obs.names(a, min(a + 64, 300)) for a in range(0, 300, 64)])
            assert np.array_equal(names, ds.obs.index)
