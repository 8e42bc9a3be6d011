"""``vcelltools hvg`` as a user runs it."""

from __future__ import annotations

import json

import numpy as np

from tests.files import write_h5ad
from tests.make import as_layout, make_adata, make_counts


def write(tmp_path, name="x.h5ad", **options):
    adata = make_adata(as_layout(make_counts(150, 90, seed=1), "csr"), batches=3)
    adata.write_h5ad(tmp_path / name, **options)
    return tmp_path / name


def test_writes_list_and_scores_and_says_so(cli, tmp_path):
    path = write(tmp_path)
    done = cli("hvg", path, "--top", 12, "--out", "h.txt", "--plot", "p.png", cwd=tmp_path)
    assert done.code == 0 and done.stdout == ""
    assert "h.txt" in done.stderr and "next:" in done.stderr
    genes = (tmp_path / "h.txt").read_text().split()
    scores = json.loads((tmp_path / "hvg_scores.json").read_text())
    assert len(genes) == 12
    table = scores["genes"]
    rank = dict(zip(table["gene"], table["highly_variable_rank"], strict=True))
    assert [rank[g] for g in genes] == list(range(12))
    assert {len(v) for v in table.values()} == {90}
    assert scores["settings"]["flavor"] == "seurat_v3"
    assert scores["source"][0]["n_cells"] == 150
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_json_is_one_object_and_quiet_is_quiet(cli, tmp_path):
    path = write(tmp_path)
    done = cli("hvg", path, "--top", 5, "--out", "h.txt", "--json", "-q", "--batch-key", "batch", cwd=tmp_path)
    assert done.code == 0 and done.stderr == ""
    body = done.json
    assert body["n_cells"] == 150 and body["n_genes"] == 90 and body["n_selected"] == 5
    assert body["batches"] == ["b0", "b1", "b2"]
    assert body["bytes_read"] > 0 and body["peak_memory_bytes"] > 0


def test_an_existing_list_is_refused_and_kept(cli, tmp_path):
    path = write(tmp_path)
    (tmp_path / "h.txt").write_text("mine\n")
    done = cli("hvg", path, "--top", 5, "--out", "h.txt", "--json", cwd=tmp_path)
    assert done.code == 2 and done.json["error"]["kind"] == "usage"
    assert (tmp_path / "h.txt").read_text() == "mine\n"
    assert cli("hvg", path, "--top", 5, "--out", "h.txt", "--force", cwd=tmp_path).code == 0


def test_scores_of_another_list_are_kept(cli, tmp_path):
    path = write(tmp_path)
    cli("hvg", path, "--top", 5, "--out", "a.txt", cwd=tmp_path)
    first = (tmp_path / "hvg_scores.json").read_text()
    assert cli("hvg", path, "--top", 7, "--out", "b.txt", cwd=tmp_path).code == 0
    assert (tmp_path / "hvg_scores.a.json").read_text() == first
    assert json.loads((tmp_path / "hvg_scores.json").read_text())["list"] == "b.txt"


def test_errors_have_codes_and_name_the_remedy(cli, tmp_path, papalexi):
    path = write(tmp_path)
    for args, code, words in [
        ((path, "--flavor", "nonsense"), 2, "seurat_v3"),
        ((path, "--top", 0), 2, "--top"),
        ((path, "--layer", "counts"), 3, "matrices: X"),
        ((path, "--modality", "rna"), 3, "modalities"),
        ((path, "--batch-key", "lot"), 3, "columns: batch"),
        ((tmp_path / "none.h5ad",), 3, "no such file"),
        ((papalexi, "--modality", "nonsense"), 3, "gene, guide"),
    ]:
        done = cli("hvg", *args, "--out", "z.txt", cwd=tmp_path)
        assert done.code == code, (args, done.stderr)
        assert words in done.stderr, (args, done.stderr)
    assert not (tmp_path / "z.txt").exists()


def test_log_values_are_refused_with_the_evidence(cli, tmp_path):
    adata = make_adata(as_layout(make_counts(100, 50), "csr"))
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    adata.write_h5ad(tmp_path / "log.h5ad")
    done = cli("hvg", tmp_path / "log.h5ad", "--top", 5, "--out", "h.txt", cwd=tmp_path)
    assert done.code == 3 and "--layer counts" in done.stderr
    assert cli("hvg", tmp_path / "log.h5ad", "--layer", "counts", "--out", "h.txt", cwd=tmp_path).code == 0


def test_statistics_are_kept_reused_and_guarded(cli, tmp_path):
    path = write(tmp_path)
    args = ("hvg", path, "--top", 9, "--stats", "st", "-q")
    assert cli(*args, "--out", "a.txt", cwd=tmp_path).code == 0
    assert np.load(tmp_path / "st" / "library_size.npy").shape == (150,)
    again = cli("hvg", path, "--top", 9, "--stats", "st", "--out", "b.txt", cwd=tmp_path)
    assert "saved statistics were used" in again.stderr
    assert cli("hvg", "st", "--top", 9, "--out", "c.txt", cwd=tmp_path).code == 0
    texts = {(tmp_path / f"{x}.txt").read_text() for x in "abc"}
    assert len(texts) == 1
    other = cli("hvg", path, "--batch-key", "batch", "--stats", "st", "--out", "d.txt", cwd=tmp_path)
    assert other.code == 2 and "batch_key" in other.stderr
    counts = tmp_path / "st" / "counts.npy"
    damaged = bytearray(counts.read_bytes())
    damaged[-3] ^= 4
    counts.write_bytes(damaged)
    hurt = cli("hvg", "st", "--top", 9, "--out", "e.txt", cwd=tmp_path)
    assert hurt.code == 3 and "damaged" in hurt.stderr


def test_plan_reads_little_and_writes_nothing(cli, tmp_path):
    path = write(tmp_path)
    done = cli("hvg", path, "--plan", "--json", "--batch-key", "batch", "--out", "h.txt", cwd=tmp_path)
    assert done.code == 0 and not (tmp_path / "h.txt").exists()
    plan = done.json
    assert plan["files"][0]["n_cells"] == 150 and sum(plan["files"][0]["batches"].values()) == 150
    assert plan["peak_memory_bytes"] > 0 and plan["seconds"] >= 0


def test_dispersion_takes_widely_expressed_genes_alone(cli, tmp_path):
    path = write(tmp_path)
    args = ("hvg", path, "--flavor", "dispersion", "--min-share", "0.9", "--top", 50, "--out", "h.txt", "--json")
    done = cli(*args, cwd=tmp_path)
    X = make_counts(150, 90, seed=1)
    share = (X > 0).mean(axis=0)
    score = X.var(axis=0, ddof=1) / np.maximum(X.mean(axis=0), 1e-9)
    wide = np.flatnonzero(share >= 0.9)
    expected = [f"g{j}" for j in wide[np.argsort(-score[wide])]][:50]
    assert (tmp_path / "h.txt").read_text().split() == expected
    assert done.json["n_selected"] == len(expected)


def test_of_several_files_each_is_named(cli, tmp_path):
    for name in ("a", "b"):
        counts = np.random.default_rng(0).poisson(1.0, (60, 30))
        counts[:, 7:9] = 0
        write_h5ad(tmp_path / f"{name}.h5ad", counts)
    done = cli("hvg", "a.h5ad", "b.h5ad", "--top", 5, "--out", "h.txt", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "a.h5ad: 2 genes have no counts" in done.stderr and "b.h5ad: 2 genes have no counts" in done.stderr
