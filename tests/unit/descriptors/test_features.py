"""Features of perturbations from each kind of file."""

from __future__ import annotations

import gzip
import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.smallstore import build_small_store
from vcelltools.descriptors import read_edges, read_networks
from vcelltools.descriptors.sources import read_source
from vcelltools.errors import DataError, UsageError

GENES = [f"G{i}" for i in range(12)]


def write_edges(path, header="a,b\n"):
    """Return two cliques of six genes."""
    pairs = [(GENES[i + k], GENES[j + k]) for k in (0, 6) for i in range(6) for j in range(i)]
    path.write_text(header + "".join(f"{a},{b}\n" for a, b in pairs))
    return path


def test_edges_become_features_in_which_neighbours_are_alike(tmp_path):
    edges = write_edges(tmp_path / "net.csv")
    (tmp_path / "wanted.txt").write_text("\n".join([*GENES, "NOWHERE"]) + "\n")
    r = vc.features([edges], tmp_path / "f.parquet", perturbations=tmp_path / "wanted.txt", dims=4)
    f = pd.read_parquet(tmp_path / "f.parquet")
    assert r.missing == ("NOWHERE",) and f.index.tolist() == GENES and f.shape == (12, 4)
    cosine = np.corrcoef(f.to_numpy())
    assert cosine[0, 5] > 0.99 and cosine[0, 6] < 0
    assert np.mean((f**2).sum(axis=1)) == pytest.approx(1.0, rel=1e-5)
    assert r.coverage["net"] == {"kind": "edges", "columns": 4, "known": 12}


def test_networks_are_symmetric_weighted_and_matched_by_identity(tmp_path):
    (tmp_path / "w.tsv").write_text(
        "x\ty\tscore\nG1\tG2\t0.5\nG2\tG1\t0.9\nG1\tG1\t5\nENSG00000141510.18\tG3\t2\nG9\tZZ\t1\n"
    )
    got = read_networks([tmp_path / "w.tsv"], ["control", "G1", "G2", "G3", "ENSG00000141510"])
    want = np.zeros((5, 5))
    want[1, 2] = want[2, 1] = 0.9
    want[3, 4] = want[4, 3] = 2.0
    np.testing.assert_array_equal(got, want)
    assert read_networks([tmp_path / "w.tsv"] * 2, ["control", "G1", "G2"])[1, 2] == pytest.approx(1.8)
    with pytest.raises(DataError, match="no edge connects two"):
        read_networks([tmp_path / "w.tsv"], ["control", "G1", "G8"])


def test_gene_sets_and_annotations(tmp_path):
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("S1\tabout\tG0\tG1\tG2\nS2\tabout\tG3\tG4\nS3\tabout\tG0\n")
    source = read_source(gmt)
    assert source.labels == GENES[:5] and source.values.shape == (5, 2)  # sets of one gene are dropped
    np.testing.assert_allclose(source.values.toarray()[:, 0], [1 / np.sqrt(3)] * 3 + [0, 0])
    row = ["UniProt", "P1", "G0", "involved_in", "GO:1", "r", "IEA", "", "P", "", "", "gene", "t", "d", "by"]
    lines = [row, [*row[:2], "G1", *row[3:]], [*row[:2], "G2", "NOT|involved_in", *row[4:]]]
    with gzip.open(tmp_path / "go.gaf.gz", "wt") as f:
        f.write("!gaf-version: 2.2\n" + "".join("\t".join(x) + "\n" for x in lines))
    assert read_source(tmp_path / "go.gaf.gz").labels == ["G0", "G1"]


def test_tables_of_each_kind_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 3))
    pd.DataFrame(values, index=GENES, columns=list("abc")).to_csv(tmp_path / "t.csv")
    pd.DataFrame(values, index=pd.Index(GENES, name="gene"), columns=list("abc")).to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", names=np.array(GENES), values=values)
    np.save(tmp_path / "t.npy", values)
    (tmp_path / "t.txt").write_text("\n".join(GENES))
    a = ad.AnnData(np.ones((2, 12), np.float32), var=pd.DataFrame(index=GENES))
    a.varm["emb"], a.varm["other"] = values, values[:, :1]
    a.write_h5ad(tmp_path / "t.h5ad")
    want = read_source(tmp_path / "t.csv")
    for name in ("t.parquet", "t.npz", "t.npy"):
        np.testing.assert_allclose(read_source(tmp_path / name).values, want.values)
    np.testing.assert_allclose(read_source(tmp_path / "t.h5ad", varm="emb").values, want.values)
    with pytest.raises(DataError, match="varm has 2 arrays"):
        read_source(tmp_path / "t.h5ad")
    vc.features([tmp_path / "t.csv", tmp_path / "t.npz"], tmp_path / "o.parquet", weights=[1.0, 2.0])
    f = pd.read_parquet(tmp_path / "o.parquet").to_numpy()
    np.testing.assert_allclose(f[:, 3:], 2 * f[:, :3], rtol=1e-5)


def test_co_expression_is_that_of_the_controls_within_lines(tmp_path):
    path = build_small_store(tmp_path)
    source = read_source(path, dims=8)
    store = vc.open_store(path)
    runs, parts = store.runs[store.runs["is_control"]], []
    for _, members in runs.groupby("cell_line"):
        x = np.concatenate([store.X[r.start : r.start + r.length] for r in members.itertuples()]).astype(float)
        parts.append((x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1))
    pooled = np.concatenate(parts)
    values, vectors = np.linalg.eigh(pooled.T @ pooled / len(pooled))
    best = (vectors[:, -8:] * values[-8:]) @ vectors[:, -8:].T
    rows = [store.gene_table["symbol"].tolist().index(g) for g in source.labels]
    np.testing.assert_allclose(source.values @ source.values.T, best[np.ix_(rows, rows)], atol=1e-8)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("e.csv", "", "is empty"),
        ("e.csv", "G1,G2,0.5\nG1,G3,x\n", "line 2: the weight 'x'"),
        ("e.csv", "G1,G2\nG1\n", "line 2 has 1 columns"),
        ("e.csv", "G1,G2\nG1,\n", "line 2 has 1 genes"),
        ("e.csv", "g,a\nG1,1\nG2,nan\n", "finite"),
        ("s.gmt", "S1\tG1\n", "line 1 does not have a name"),
        ("s.gaf", "a\tb\n", "has 2 columns"),
    ],
)
def test_bad_sources_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        read_source(tmp_path / name) if "weight" not in says else read_edges(tmp_path / name)


def test_weights_and_sources_must_fit(tmp_path):
    edges = write_edges(tmp_path / "net.csv")
    with pytest.raises(UsageError, match="2 weights for 1 source"):
        vc.features([edges], tmp_path / "f.parquet", weights=[1.0, 2.0])
    (tmp_path / "wanted.txt").write_text("ABC\n")
    with pytest.raises(DataError, match="no source has any"):
        vc.features([edges], tmp_path / "f.parquet", perturbations=tmp_path / "wanted.txt")


def test_the_command_feeds_train(tmp_path):
    path = build_small_store(tmp_path)
    names = sorted(set(vc.open_store(path).runs["perturbation"].dropna()) - {"non-targeting"})
    (tmp_path / "net.csv").write_text("".join(f"{a},{b}\n" for a, b in itertools.pairwise(names)))
    made = run_cli("features", "net.csv", path, "--store", path, "--dims", 5, "--json", cwd=tmp_path)
    assert made.code == 0 and made.json["n_covered"] == len(names), made.stderr
    for model in ("neighbours", "kernel-ridge"):
        words = ("--features", "features.parquet", "--network", "net.csv", "--model", model, "--out", f"runs/{model}")
        done = run_cli("train", "--store", path, *words, "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert set(done.json["objectives"]) == {"discrimination", "error", "balanced"}
        assert next(iter(done.json["choices"].values()))["n"] >= 3
