"""inspect of large files: the same report in bounded memory, and very many columns."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from vcelltools.files import inspect as module
from vcelltools.files.inspect import inspect
from vcelltools.io import open_dataset
from vcelltools.io.hdf5 import probe

pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique")


@pytest.fixture
def path(tmp_path):
    n = 900
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "guide": pd.Categorical(np.where(rng.random(n) < 0.3, "non-targeting", "G1"), ["G1", "non-targeting", "x"]),
            "text": np.where(rng.random(n) < 0.1, None, "label"),
            "number": rng.integers(0, 4, n),
            "fraction": np.where(rng.random(n) < 0.2, np.nan, 0.5),
            "flag": rng.random(n) < 0.5,
            "name": [f"n{i}" for i in range(n)],
            "nullable": pd.array([None, *range(n - 1)], "Int64"),
        },
        index=[f"c{i % 890}" for i in range(n)],
    )
    X = sparse.csr_matrix(rng.poisson(1.0, (n, 5)).astype("float32"))
    ad.AnnData(X, obs, pd.DataFrame(index=[f"G{i}" for i in range(5)])).write_h5ad(tmp_path / "x.h5ad")
    return tmp_path / "x.h5ad"


def test_the_report_does_not_depend_on_what_is_held_at_once(path, monkeypatch):
    whole = inspect(path)
    assert "10 of 900 names of cells are duplicates" in whole.problems[0] and "2 times" in whole.problems[0]
    monkeypatch.setattr(module, "_STEP", 64)
    parts = inspect(path)
    assert replace(parts, problems=()) == replace(whole, problems=())
    by_name = {c.name: c for c in parts.obs}
    frame = ad.read_h5ad(path).obs
    for name, c in by_name.items():
        assert c.n_missing == frame[name].isna().sum(), name
    assert by_name["number"].examples == tuple((str(k), v) for k, v in frame["number"].value_counts().items())
    assert by_name["name"].n_labels == 900 and by_name["fraction"].n_labels is None
    monkeypatch.setattr(module, "_MAX_LABELS", 100)
    assert {c.name: c for c in inspect(path).obs}["name"].n_labels == 900


def test_odd_names_are_told(path):
    with h5py.File(path, "a") as f:
        names = f["var/_index"]  # a group in anndata 0.13
        (names["values"] if isinstance(names, h5py.Group) else names)[1] = "G1 "
    assert any("surrounding spaces" in p and "'G1 '" in p for p in inspect(path).problems)


def test_many_columns_are_no_damage(path, monkeypatch):
    with h5py.File(path, "a") as f:
        for i in range(3000):
            f["obs"].create_dataset(f"col{i}", data=np.zeros(900, "i1"))
    monkeypatch.setattr(module, "_MAX_COLUMNS", 50)
    report = inspect(path)
    assert len(report.obs) == 50 and any("3,007 columns; only the first 50 are described" in n for n in report.notes)
    with open_dataset(path) as ds:
        assert ds.obs.columns[-1].startswith("col") and len(ds.obs.columns) == 3007


def test_the_look_at_the_metadata_ends_however_much_there_is(path, monkeypatch):
    with h5py.File(path, "a") as f:
        for i in range(400):
            f["uns"].create_dataset(f"k{i}", data=np.zeros(3))
    code = (
        "import sys, time; from vcelltools.io.hdf5 import probe; import h5py; from pathlib import Path\n"
        "probe.CPU_SECONDS = 1\n"
        "look = probe._look\n"
        "def slow(*a, **k):\n    end = time.process_time() + 0.02\n    while time.process_time() < end: pass\n"
        "probe._look = slow\n"
        "probe.probe_h5(Path(sys.argv[1])); print('looked')"
    )  # 400 objects, 8 s of the processor in all, 0.02 s each
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "looked", done.stderr
    assert probe._WALK_SECONDS < 8
