"""Differential expression on a Dask cluster: the bytes of one machine, whatever becomes of the workers."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vcelltools as vc
from tests.clusters import Killer, run_cluster
from tests.make import get_mudata
from tests.screens import CONTROL, make_screen, write
from vcelltools.errors import DataError, EnvironmentFault, UsageError
from vcelltools.io import remote

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")  # dask's own, of sockets that close with lost workers

COLUMNS = {"pert_col": "target", "control": CONTROL}
TESTS = {
    "wilcoxon": {"min_cpm": 1.0},
    "exact": {"exact": True, "continuity": False},
    "rest": {"reference": "rest"},
    "strata": {"stratify": "batch"},
    "contexts": {"context_col": "line", "keep": "ok"},
    "nb": {"test": "nb"},
    "replicates": {"test": "nb", "replicate_col": "batch", "reference": "rest"},
    "welch": {"test": "welch", "covariates": ["batch"]},
    "library": {"library_size": "total"},
}


@pytest.fixture(scope="module")
def client():
    with run_cluster() as c:
        yield c


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(remote, "PART_VALUES", 1 << 12)


@pytest.fixture(scope="module")
def screen():
    adata = make_screen(n=500)
    adata.var_names = [f"GENE{i % 58}" for i in range(60)]  # two names are used twice
    adata.obs["total"] = np.asarray(adata.X.sum(axis=1)).ravel() * np.linspace(1.2, 2.0, adata.n_obs).round(1)
    return adata


def check_same(path, tmp_path, client, suffix=".parquet", **options):
    one, many = (vc.de(path, dask=dask, **COLUMNS, **options) for dask in (None, client))
    tables = [r.write(tmp_path / f"{i}{suffix}", force=True).read_bytes() for i, r in enumerate((one, many))]
    assert tables[0] == tables[1]
    assert json.dumps(one.to_json()) == json.dumps(many.to_json())


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((layout, name) for layout in ("csr", "csc") for name in TESTS),
        *((layout, name) for layout in ("dense", "dense-columns") for name in ("wilcoxon", "nb", "welch")),
    ],
)
def test_every_test_on_every_layout_has_the_same_bytes(tmp_path, client, screen, layout, name):
    path = write(screen, tmp_path / "s.h5ad", layout, dtype="int32", compression="gzip")
    check_same(path, tmp_path, client, ".csv" if name == "welch" else ".parquet", **TESTS[name])


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_log1p_values_and_duplicate_entries(tmp_path, client, screen, layout):
    adata = screen.copy()
    X = adata.X.astype(np.float32)
    X.data = np.log1p(X.data * np.float32(0.7))
    if layout == "csc":
        X = X.tocsc()
    X.indices[X.indptr[5] + 1] = X.indices[X.indptr[5]]
    adata.X = X
    adata.write_h5ad(tmp_path / "s.h5ad")
    check_same(tmp_path / "s.h5ad", tmp_path, client)
    assert any("duplicate entries were summed" in n for n in vc.de(tmp_path / "s.h5ad", dask=client, **COLUMNS).notes)


def test_zarr_and_a_modality(tmp_path, client, screen):
    pytest.importorskip("zarr")
    screen.write_zarr(tmp_path / "s.zarr")
    check_same(tmp_path / "s.zarr", tmp_path, client)
    get_mudata().MuData({"rna": screen}).write(tmp_path / "s.h5mu")
    check_same(tmp_path / "s.h5mu", tmp_path, client, modality="rna", reference="rest")


def test_pseudobulks_are_the_same(tmp_path, client, screen):
    path = write(screen, tmp_path / "s.h5ad")
    for name, dask in (("one", None), ("many", client)):
        vc.pseudobulk(path, tmp_path / f"{name}.h5ad", by=["target", "batch"], dask=dask)
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "many.h5ad").read_bytes()
    screen = screen.copy()
    screen.X = screen.X.astype(np.float32)
    screen.X.data[7] = 0.5
    with pytest.raises(DataError, match=r"GENE.*0\.5"):
        vc.pseudobulk(write(screen, tmp_path / "f.h5ad"), tmp_path / "no.h5ad", by=["target"], dask=client)


@pytest.mark.parametrize("phase", ["reading", "ranking"])
def test_a_worker_is_lost_in_the_middle(tmp_path, client, screen, phase):
    path = write(screen, tmp_path / "s.h5ad")
    one = vc.de(path, **COLUMNS).write(tmp_path / "one.parquet").read_bytes()
    killer = Killer(client, 1, phase)
    many = vc.de(path, dask=client, progress=killer, **COLUMNS).write(tmp_path / "many.parquet").read_bytes()
    assert killer.killed and one == many


def test_a_bad_value_is_named(tmp_path, client, screen):
    adata = screen.copy()
    adata.X = adata.X.astype(np.float32)
    adata.X.data[100] = -1
    path = write(adata, tmp_path / "s.h5ad")
    said = []
    for dask in (None, client):
        with pytest.raises(DataError, match="negative") as e:
            vc.de(path, dask=dask, **COLUMNS)
        said.append(str(e.value))
    assert said[0] == said[1]


def test_what_a_cluster_cannot_do_is_said(tmp_path, client, screen, monkeypatch):
    with pytest.raises(UsageError, match="cannot read an AnnData in memory"):
        vc.de(screen, dask=client, **COLUMNS)
    path = write(screen, tmp_path / "s.h5ad")
    with pytest.raises(EnvironmentFault, match="no Dask scheduler"):
        vc.de(path, dask="bad://x", **COLUMNS)
    monkeypatch.setattr(remote, "__version__", "0.0.0")
    with pytest.raises(UsageError, match="different data or software than the driver"):
        vc.de(path, dask=client, **COLUMNS)
    monkeypatch.undo()
    monkeypatch.setattr(remote, "get_fingerprint", lambda *a, **k: "xxh3-128:of another file")
    with pytest.raises(UsageError, match="different data or software than the driver"):
        vc.de(path, dask=client, **COLUMNS)
    monkeypatch.undo()

    class Mover(Killer):
        def start(self, phase, total, unit):
            path.rename(tmp_path / "elsewhere.h5ad")

    with pytest.raises(DataError, match=r"s\.h5ad"):
        vc.de(path, dask=client, progress=Mover(client, np.inf), **COLUMNS)


def test_from_the_command_line(tmp_path, cli, screen):
    path = write(screen, tmp_path / "s.h5ad")
    args = ("--pert-col", "target", "--control", CONTROL)
    assert cli("de", path, *args, "--out", "one.parquet", cwd=tmp_path).code == 0
    ran = cli("de", path, *args, "--out", "many.parquet", "--dask", "local", "-q", cwd=tmp_path)
    assert ran.code == 0 and ran.stderr == ""
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "many.parquet").read_bytes()
    ran = cli("pseudobulk", path, "--by", "target", "--out", "b.h5ad", "--dask", "local", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    ran = cli("de", path, *args, "--test", "energy", "--dask", "local", cwd=tmp_path)
    assert ran.code == 2 and "--dask" in ran.stderr
