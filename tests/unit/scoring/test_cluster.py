"""Scores from a Dask cluster: the bytes of one machine, whatever becomes of the workers."""

from __future__ import annotations

import pytest
from scipy import sparse

import vcelltools as vc
from tests.clusters import Killer, run_cluster
from tests.oracle.pairs import PAIRS, make_adata, make_pair
from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.io import remote

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")  # dask's own, of sockets that close with lost workers


@pytest.fixture(scope="module")
def client():
    with run_cluster() as c:
        yield c


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(remote, "PART_VALUES", 1 << 11)


def write_pair(tmp_path, pair):
    paths = []
    for name, adata in zip(("pred", "real"), pair, strict=True):
        paths.append(tmp_path / f"{name}.h5ad")
        adata.write_h5ad(paths[-1])
    return paths


def check_same(tmp_path, client, paths, **options):
    for name, dask in (("one", None), ("many", client)):
        vc.score(*paths, out=tmp_path / name, dask=dask, force=True, **options)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("csr", {"profile": "full"}),
        ("csc", {"ceiling": True}),
        ("dense", {"compat": "vcc2025"}),
        ("csc", {"compat": "cell-eval", "epsilon": 0.1, "cpm_filter": 1.0}),
        ("counts_csr", {"to_cp10k": True}),
        ("counts_csc", {"allow_discrete": True}),
        ("different_cells", {}),
        ("empty_prediction", {"profile": "minimal"}),
        ("csc", {"profile": "calibrated"}),
    ],
)
def test_tables_have_the_same_bytes(tmp_path, client, name, options):
    check_same(tmp_path, client, write_pair(tmp_path, PAIRS[name]()), **options)


def test_genes_in_another_order_and_contexts(tmp_path, client):
    pred, real, labels, genes, rng = make_pair(7)
    order = rng.permutation(len(genes))
    a = make_adata(sparse.csc_matrix(pred[:, order]), labels, [genes[i] for i in order])
    b = make_adata(sparse.csr_matrix(real), labels, genes)
    for adata in (a, b):
        adata.obs["line"] = [f"L{i % 2}" for i in range(adata.n_obs)]
    check_same(tmp_path, client, write_pair(tmp_path, (a, b)), context_col="line")


def test_a_truth_pack_is_the_same(tmp_path, client):
    pred, real = write_pair(tmp_path, PAIRS["csr"]())
    for name, dask in (("one", None), ("many", client)):
        vc.score(pred, real, truth_pack=tmp_path / f"{name}.pack", compat="cell-eval", dask=dask)
    assert (tmp_path / "one.pack").read_bytes() == (tmp_path / "many.pack").read_bytes()
    check_same(tmp_path, client, (pred,), truth_pack=tmp_path / "one.pack", compat="cell-eval")


def test_a_worker_is_lost_in_the_middle(tmp_path, client):
    paths = write_pair(tmp_path, PAIRS["csr"]())
    killer = Killer(client, 1, "prediction")
    vc.score(*paths, out=tmp_path / "one")
    vc.score(*paths, out=tmp_path / "many", dask=client, progress=killer)
    assert killer.killed
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name


def test_what_a_cluster_cannot_do_is_said(tmp_path, client):
    pair = PAIRS["csr"]()
    with pytest.raises(UsageError, match="cannot read an AnnData in memory"):
        vc.score(*pair, dask=client)
    paths = write_pair(tmp_path, pair)
    with pytest.raises(UsageError, match="dask cannot be used with compat='vcc2026'"):
        vc.score(*paths, compat="vcc2026", dask="local")
    with pytest.raises(EnvironmentFault, match="no Dask scheduler"):
        vc.score(*paths, dask="bad://x")


def test_from_the_command_line(tmp_path, cli):
    write_pair(tmp_path, PAIRS["csr"]())
    for name, more in (("one", ()), ("many", ("--dask", "local"))):
        ran = cli("score", "pred.h5ad", "--truth", "real.h5ad", "--out", name, *more, cwd=tmp_path)
        assert ran.code == 0, ran.stderr
    assert (tmp_path / "one/score.json").read_bytes() == (tmp_path / "many/score.json").read_bytes()
