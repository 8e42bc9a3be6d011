"""Layouts that people have: features of several types, samples with a prefix, other programs' files."""

from __future__ import annotations

import gzip
import lzma

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from tests.make import make_counts
from vcelltools.errors import DataError
from vcelltools.files.convert import convert
from vcelltools.files.inspect import inspect
from vcelltools.io import open_dataset
from vcelltools.project.init import init

RNA = make_counts(50, 20, seed=3)
TAGS = np.full((50, 4), 300.0)


def mixed(layout=sparse.csr_matrix):
    X = np.hstack([TAGS[:, :2], RNA, TAGS[:, 2:]])
    types = ["Antibody Capture"] * 2 + ["Gene Expression"] * 20 + ["CRISPR Guide Capture"] * 2
    var = pd.DataFrame({"feature_types": pd.Categorical(types)}, index=[f"f{i}" for i in range(24)])
    adata = ad.AnnData(layout(X.astype("float32")), var=var)
    adata.obs_names = [f"c{i}" for i in range(50)]
    adata.layers["twice"] = adata.X * 2
    adata.varm["loadings"] = np.arange(48.0).reshape(24, 2)
    adata.varp["pairs"] = np.arange(576.0).reshape(24, 24)
    return adata


@pytest.mark.parametrize("layout", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("kind", ["h5ad", "memory", "zarr"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_genes_alone_are_genes(tmp_path, layout, kind):
    source = adata = mixed(layout)
    if kind == "h5ad":
        adata.write_h5ad(source := tmp_path / "x.h5ad")
    if kind == "zarr":
        adata.write_zarr(source := tmp_path / "x.zarr")
    result = convert(source, tmp_path / "o.h5ad", layers=["all"], layout="dense")
    assert any("20 features of type Gene Expression out of" in n for n in result.notes)
    back = ad.read_h5ad(tmp_path / "o.h5ad")
    np.testing.assert_array_equal(back.X, RNA)
    np.testing.assert_array_equal(back.layers["twice"], 2 * RNA)
    assert back.var_names.tolist() == [f"f{i}" for i in range(2, 22)]
    np.testing.assert_array_equal(back.varm["loadings"], adata.varm["loadings"][2:22])
    np.testing.assert_array_equal(back.varp["pairs"], adata.varp["pairs"][2:22, 2:22])


def test_other_features_and_genomes_are_chosen_by_name(tmp_path):
    adata = mixed()
    adata.var["genome"] = ["", "", *["GRCh38"] * 12, *["mm10"] * 8, "", ""]
    adata.write_h5ad(path := tmp_path / "x.h5ad")
    for wanted, n in {"all": 24, "Antibody Capture": 2, "mm10": 8}.items():
        with open_dataset(path, modality=wanted) as ds:
            assert (ds.n_genes, ds.modality) == (n, wanted)
    with open_dataset(path) as ds:
        assert any("12 of GRCh38, 8 of mm10" in n for n in ds.notes)
    with pytest.raises(DataError, match="no feature type or genome 'rna'"):
        open_dataset(path, modality="rna")
    assert inspect(path).n_genes == 20


def test_types_without_gene_expression_choose_nothing(tmp_path):
    adata = ad.AnnData(
        RNA, var=pd.DataFrame({"feature_type": ["protein_coding", "lncRNA"] * 10}, [f"g{i}" for i in range(20)])
    )
    adata.write_h5ad(tmp_path / "x.h5ad")
    with open_dataset(tmp_path / "x.h5ad") as ds:
        assert ds.n_genes == 20 and any("all of them are used as genes" in n for n in ds.notes)


def write_mtx(folder, prefix="", *, turned=False, head=False, end=".mtx"):
    folder.mkdir(exist_ok=True)
    matrix = sparse.coo_matrix(RNA.astype("int32") if turned else RNA.T.astype("int32"))
    name = f"{prefix}matrix" if end == ".mtx" else prefix.rstrip("_")
    io.mmwrite(folder / f"{name}.mtx", matrix)
    genes = [("gene_id", "gene_name", "type")] * head + [
        (f"ENSG{i:011d}", f"S{i}", "Gene Expression") for i in range(20)
    ]
    cells = ["barcode"] * head + [f"AAAC{i}-1" for i in range(50)]
    (folder / f"{prefix}features.tsv").write_text("".join("\t".join(r) + "\n" for r in genes))
    with gzip.open(folder / f"{prefix}barcodes.tsv.gz", "wt") as f:
        f.write("".join(f"{c}\n" for c in cells))
    return folder / f"{name}.mtx"


@pytest.mark.parametrize(
    "options", [{}, {"prefix": "GSM1_S1_"}, {"turned": True}, {"head": True}, {"prefix": "GSM1_", "end": ""}]
)
def test_mtx_as_repositories_hold_it(tmp_path, options):
    path = write_mtx(tmp_path / "d", **options)
    for source in (path, path.parent) if "matrix" in path.name else (path,):
        with open_dataset(source) as ds:
            chunk = ds.matrix.read(ds.matrix.plan()[0])
            got = sparse.csr_matrix((chunk.data, chunk.indices, chunk.indptr), RNA.shape).toarray()
            np.testing.assert_array_equal(got, RNA)
            assert (ds.var.index[0], ds.obs.index[-1]) == ("S0", "AAAC49-1")


def test_several_samples_in_a_folder_are_listed(tmp_path):
    write_mtx(tmp_path / "d", "GSM1_")
    write_mtx(tmp_path / "d", "GSM2_")
    with pytest.raises(DataError, match="holds 2 10x matrices") as e:
        open_dataset(tmp_path / "d")
    assert "GSM1_matrix.mtx" in e.value.hint
    (tmp_path / "d/GSM1_features.tsv").unlink()
    with pytest.raises(DataError, match=r"GSM1_features\.tsv .*is missing"):
        open_dataset(tmp_path / "d/GSM1_matrix.mtx")


def test_a_file_of_the_second_10x_version_is_inspected_as_it_is_read(tmp_path):
    csr = sparse.csr_matrix(RNA.astype("int32"))
    with h5py.File(tmp_path / "x.h5", "w") as f:
        g = f.create_group("GRCh38")
        g["barcodes"] = np.array([f"A{i}-1" for i in range(50)], "S9")
        g["genes"] = np.array([f"ENSG{i:011d}" for i in range(20)], "S15")
        g["gene_names"] = np.array([f"S{i}" for i in range(20)], "S9")
        g["data"], g["indices"], g["indptr"], g["shape"] = csr.data, csr.indices, csr.indptr, np.array([20, 50])
    report = inspect(tmp_path / "x.h5")
    assert report.ok and report.opened == ("GRCh38", "X") and report.matrices[0].is_counts


def test_a_count_of_genes_is_not_that_of_a_sample(tmp_path):
    var = pd.DataFrame({"gene_name": [f"s{i}" for i in range(25_000)]}, index=[f"ENSG{i:011d}" for i in range(25_000)])
    ad.AnnData(sparse.csr_matrix(np.eye(3, 25_000, dtype="float32")), var=var).write_h5ad(tmp_path / "x.h5ad")
    assert inspect(tmp_path / "x.h5ad").get_column("gene_name").n_labels == 25_000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (gzip.compress(b"RDX3\nX\n" + bytes(90), mtime=0), "an R object"),
        (b"RDX3\nX\n" + bytes(90), "an R object"),
        (lzma.compress(b"X\n" + bytes(90)), "an R object"),
        (gzip.compress(b"\x89HDF\r\n\x1a\n", mtime=0), "a gzip-compressed file"),
        (b"PAR1" + bytes(90), "a Parquet table"),
        (b"gene,c1,c2,c3\nTP53,1,2,3\n", "a text table"),
        (b"\x00\x01\x02" * 40, "not an HDF5 file"),
    ],
)
def test_other_programs_files_are_named_by_their_content(tmp_path, body, said):
    (tmp_path / "x.h5ad").write_bytes(body)
    with pytest.raises(DataError, match=said) as e:
        open_dataset(tmp_path / "x.h5ad")
    assert e.value.hint


@pytest.mark.parametrize(("groups", "said"), [(("assays",), "h5Seurat")])
def test_other_programs_hdf5_is_named_by_its_content(tmp_path, groups, said):
    with h5py.File(tmp_path / "x.h5ad", "w") as f:
        f["matrix"], f["cell.names"] = RNA.T, np.array([b"c"])
        for g in groups:
            f.create_group(g)
    for run in (open_dataset, inspect):
        with pytest.raises(DataError, match=f"is an? {said} file"):
            run(tmp_path / "x.h5ad")


def test_init_takes_the_symbols_of_replogle_and_no_cell_type(tmp_path):
    targets = np.array([f"S{i % 20}" if i % 3 else "non-targeting" for i in range(50)])
    ids = {f"S{i}": f"ENSG{i:011d}" for i in range(20)}
    obs = pd.DataFrame(
        {
            "cell_type": np.array(["control", *(f"S{i}" for i in range(9))])[np.arange(50) % 10],
            "gene_id": [ids.get(t, t) for t in targets],
            "gene": targets,
            "gem_group": np.arange(50) % 4,
        },
        index=[f"c{i}" for i in range(50)],
    )
    var = pd.DataFrame({"gene_name": list(ids)}, index=list(ids.values()))
    ad.AnnData(sparse.csr_matrix(RNA.astype("float32")), obs, var).write_h5ad(tmp_path / "x.h5ad")
    assert inspect(tmp_path / "x.h5ad").get_column("perturbation").name == "gene"
    text = init(tmp_path).out.read_text()
    for line in ('pert_col = "gene"', 'control = ["non-targeting"]', 'group_by = ["gem_group"]'):
        assert line in text
    assert 'gene_id_col = "index"' in text and 'gene_name_col = "gene_name"' in text
