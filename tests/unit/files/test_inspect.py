"""``inspect`` finds matrices, counts, columns with a role, and all problems at once."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest

from tests.conftest import need_data
from tests.files import TEXT, make_counts, write_h5ad, write_h5mu, write_matrix, write_table
from vcelltools.errors import DataError
from vcelltools.files.inspect import inspect

COUNTS = make_counts(60, 30)


def test_the_screen_is_recognised(thp1):
    r = inspect(thp1)
    assert r.ok
    assert r.get_column("perturbation").name == "perturbation"
    assert r.control == ["non-targeting"]
    assert r.get_column("batch").name == "bio_rep"
    assert (r.n_cells, r.n_genes, r.index_kind) == (20_729, 299, "symbols")
    assert r.matrices[0].nnz == 1_390_126
    assert r.matrices[0].compression == ("gzip",)


def test_every_modality_is_described(papalexi):
    r = inspect(papalexi)
    assert {(m.modality, m.layer) for m in r.matrices} == {("gene", "X"), ("guide", "X"), ("guide", "guide_assignment")}
    assert r.opened == ("gene", "X")
    assert {c.name for c in r.get_columns("batch")} == {"lane", "replicate"}
    assert any("guide" in n and "perturbation" in n for n in r.notes)


def test_tenx_parts_and_gene_ids():
    r = inspect(need_data("pbmc1k_citeseq_10x/pbmc_1k_citeseq_filtered_feature_bc_matrix.h5"))
    assert [m.modality for m in r.matrices] == ["Gene Expression", "Antibody Capture"]
    assert r.get_column("gene_id").name == "gene_ids"
    assert r.matrices[1].options == "--modality 'Antibody Capture'"
    assert "duplicates" in r.problems[0]


def write_screen(path):
    """An h5ad with KOLF's column names."""
    n = 60
    genes = [f"GENE{j}" for j in range(30)]
    targets = ["Non-Targeting", "GENE1", "GENE2", "GENE1|GENE2"]
    with h5py.File(path, "w") as f:
        write_matrix(f, "X", np.log1p(COUNTS))
        write_matrix(f, "layers/counts", COUNTS)
        write_table(
            f,
            "obs",
            [f"c{i}" for i in range(n)],
            feature_call=([i % 4 if i else -1 for i in range(n)], targets),
            num_features=np.array([1, 1, 1, 2] * 15),
            gem_group=([i % 2 for i in range(n)], ["1", "2"]),
            cell_line=([0] * n, ["KOLF2.1J"]),
            pct_mito=np.linspace(0, 1, n),
        )
        write_table(f, "var", genes, gene_ids=[f"ENSG{j:011d}.{j}" for j in range(30)])
    return path


def test_columns_get_their_roles(tmp_path):
    r = inspect(write_screen(tmp_path / "f.h5ad"))
    pert = r.get_column("perturbation")
    assert (pert.name, pert.n_labels, pert.n_missing) == ("feature_call", 4, 1)
    assert pert.controls == (("Non-Targeting", 14),)
    assert r.get_column("n_guides").name == "num_features"
    assert r.get_column("batch").name == "gem_group"
    assert r.get_column("cell_line").name == "cell_line"
    assert r.get_column("gene_id").name == "gene_ids"


def test_the_counts_layer_is_the_one_described(tmp_path):
    r = inspect(write_screen(tmp_path / "f.h5ad"))
    assert r.opened == (None, "counts")
    assert {m.layer: m.is_counts for m in r.matrices} == {"X": False, "counts": True}
    assert r.matrices[1].options == "--layer counts"
    assert r.to_json()["perturbation"] == ["feature_call"]


def test_all_problems_are_told_at_once(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    with h5py.File(path, "a") as f:
        write_matrix(f, "layers/broken", COUNTS)
        f["layers/broken/indptr"][3] = 10_000
        write_matrix(f, "layers/flags", COUNTS, dtype="bool")
        f["obs/batch/codes"][4] = 77
        del f["var/_index"]
        f["var"].create_dataset("_index", data=np.array(["a"] * 30, object), dtype=TEXT)
    r = inspect(path)
    text = "\n".join(r.problems)
    assert not r.ok
    assert len(r.problems) == 4
    assert r.notes == ("1 cells have no counts at all",)
    for part in (
        "indptr decreases",
        "boolean",
        "code 77 at row 4",
        "29 of 30 names of genes are duplicates",
    ):
        assert part in text
    assert r.matrices[0].is_counts


def test_a_file_without_var_or_matrix_is_described_as_such(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    with h5py.File(path, "a") as f:
        del f["var"]
    r = inspect(path)
    assert any("var is missing" in p for p in r.problems)
    with h5py.File(path, "a") as f:
        del f["X"]
    assert any("no matrix" in p for p in inspect(path).problems)


def test_an_unknown_layer_is_refused(tmp_path):
    with pytest.raises(DataError, match="layers/nope is missing"):
        inspect(write_h5ad(tmp_path / "f.h5ad", COUNTS), layer="nope")


def test_memory_is_described():
    anndata = pytest.importorskip("anndata")
    import pandas as pd

    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(["control", "G1", "G2"] * 20)}, index=[f"c{i}" for i in range(60)]
    )
    r = inspect(anndata.AnnData(COUNTS, obs=obs))
    assert r.control == ["control"]
    assert r.path == "AnnData"


def test_the_command_prints_a_table_and_json(cli, tmp_path):
    path = write_screen(tmp_path / "f.h5ad")
    ran = cli("inspect", path)
    assert ran.code == 0
    for part in ("feature_call", "Non-Targeting (14)", "log1p", "counts (", "KOLF2.1J"):
        assert part in ran.stdout
    assert f"next: vcelltools hvg {path} --layer counts" in ran.stderr
    body = cli("inspect", path, "--json").json
    assert body["opened"] == {"modality": None, "layer": "counts"}
    assert body["control"] == ["Non-Targeting"]
    assert body["matrices"][1]["is_counts"] is True
    assert "pct_mito" in cli("inspect", path, "-v").stdout


def test_the_command_refuses_what_is_not_a_file_of_cells(cli, tmp_path):
    (tmp_path / "x.h5ad").write_text("hello")
    ran = cli("inspect", tmp_path / "x.h5ad", "--json")
    assert ran.code == 3
    assert "not an HDF5 file" in ran.json["error"]["message"]


def test_inspect_loads_nothing_heavy(tmp_path):
    path = write_h5mu(tmp_path / "f.h5mu", {"rna": COUNTS})
    code = (
        "import sys; import vcelltools as vc\n"
        f"assert vc.inspect({str(path)!r}).ok\n"
        "heavy = {'pandas', 'anndata', 'numba', 'scipy', 'jax', 'scanpy', 'zarr', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_piped_table_keeps_its_columns(capsys):
    """A head that begins with a line break stands on one line, below an empty one."""
    from vcelltools.cli.output import Output

    Output().table(["\nrole", "\nn"], [["batch", 3], ["perturbation", 26]])
    assert capsys.readouterr().out == "\nrole           n\nbatch          3\nperturbation  26\n"
