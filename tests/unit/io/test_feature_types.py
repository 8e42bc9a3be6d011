"""Antibodies, guides and species are told from genes in the same way in every container."""

from __future__ import annotations

import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import io, sparse

import vcelltools as vc
from tests.conftest import DATA, run_cli
from tests.make import get_mudata, make_counts
from vcelltools.errors import DataError, UsageError
from vcelltools.io import open_dataset

GENES, TAGS, GUIDES = "Gene Expression", "Antibody Capture", "CRISPR Guide Capture"
X = make_counts(60, 40, seed=5).astype(np.int32)
TYPES = [GENES] * 30 + [TAGS] * 6 + [GUIDES] * 4
GENOMES = ["GRCh38"] * 18 + ["mm10"] * 12 + ["GRCh38"] * 3 + [""] * 7
KINDS = ("h5", "csr", "csc", "zarr", "memory", "h5mu")
PARTS = {
    (None, None): (0, 30), (TAGS, None): (30, 36), (GUIDES, None): (36, 40), ("all", None): (0, 40),
    (None, "mm10"): (18, 30), (GENES, "GRCh38"): (0, 18), (TAGS, "GRCh38"): (30, 33), (None, "all"): (0, 30),
}  # fmt: skip


def write_tenx(path, x=X, types=TYPES, genomes=GENOMES):
    csr = sparse.csr_matrix(x)
    with h5py.File(path, "w") as f:
        g = f.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            g[key] = getattr(csr, key)
        g["shape"] = np.array(csr.shape[::-1], np.int32)
        g["barcodes"] = np.array([f"AAAC{i}-1" for i in range(len(x))], "S")
        features = g.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(types))], "S")
        features["name"] = np.array([f"S{i}" for i in range(len(types))], "S")
        features["feature_type"], features["genome"] = np.array(types, "S"), np.array(genomes, "S")
        features["_all_tag_keys"] = np.array([b"genome"])
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same counts as a 10x file, and as scanpy and mudata write what scanpy reads of it."""
    folder = tmp_path_factory.mktemp("containers")
    adata = sc.read_10x_h5(write_tenx(folder / "x.h5"), gex_only=False)
    adata.write_h5ad(folder / "csr.h5ad")
    adata.write_zarr(folder / "x.zarr")
    whole = get_mudata().MuData({"rna": adata, "hto": adata[:, :2].copy()})
    del whole["hto"].var["feature_types"]
    whole.write_h5mu(folder / "x.h5mu")
    columns = adata.copy()
    columns.X = columns.X.tocsc()
    columns.write_h5ad(folder / "csc.h5ad")
    named = {"h5": "x.h5", "csr": "csr.h5ad", "csc": "csc.h5ad", "zarr": "x.zarr", "h5mu": "x.h5mu"}
    return {k: folder / v for k, v in named.items()} | {"memory": adata}


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_container_gives_the_same_features(sources, tmp_path, kind, part):
    feature_type, genome = part
    first, last = PARTS[part]
    chosen = {"feature_type": feature_type, "genome": genome, "modality": "rna" if kind == "h5mu" else None}
    vc.convert(sources[kind], tmp_path / "o.h5ad", layout="dense", **chosen)
    back = ad.read_h5ad(tmp_path / "o.h5ad")
    np.testing.assert_array_equal(back.X, X[:, first:last])
    assert back.var_names.tolist() == [f"S{i}" for i in range(first, last)]
    with open_dataset(sources[kind], **chosen) as ds, open_dataset(sources["h5"], **chosen | {"modality": None}) as h5:
        notes = [n for n in ds.notes if not n.startswith("modality")]
        assert notes == h5.notes
        assert any("6 Antibody Capture, 4 CRISPR Guide Capture" in n for n in notes) == (feature_type is None)
        assert any("are of several genomes (18 of GRCh38, 12 of mm10)" in n for n in notes) == (part == (None, None))
        with open_dataset(ds.source, **ds.part) as again:  # as a layer is copied, and a store reads its source again
            np.testing.assert_array_equal(again.var.index, ds.var.index)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_an_error_that_lists_what_is(sources, kind):
    modality = "rna" if kind == "h5mu" else None
    for wrong, message, hint in (
        ({"feature_type": "Antibody"}, "no feature type 'Antibody'", "Antibody Capture, CRISPR Guide Capture, Gene"),
        ({"genome": "hg19"}, "no genome 'hg19'", "GRCh38, mm10, all"),
        ({"feature_type": GUIDES, "genome": "mm10"}, "no features of genome 'mm10' among those of type", "all"),
    ):
        with pytest.raises(DataError, match=message) as e:
            open_dataset(sources[kind], modality=modality, **wrong)
        assert hint in e.value.hint


def test_a_type_chooses_the_modality_that_holds_it(tmp_path):
    rna, tags = (
        ad.AnnData(x.astype("float32"), var=pd.DataFrame({"feature_types": t}, [f"{t[0]}{i}" for i in range(n)]))
        for x, t, n in ((X[:, :30], GENES, 30), (X[:, 30:], TAGS, 10))
    )
    get_mudata().MuData({"rna": rna, "prot": tags}).write_h5mu(tmp_path / "x.h5mu")
    with open_dataset(tmp_path / "x.h5mu", feature_type=TAGS) as ds:
        assert (ds.modality, ds.n_genes) == ("prot", 10)
    with open_dataset(tmp_path / "x.h5mu") as ds:
        assert (ds.modality, ds.n_genes) == ("rna", 30)
    with pytest.raises(DataError, match="no modality holds features of type 'Peaks'") as e:
        open_dataset(tmp_path / "x.h5mu", feature_type="Peaks")
    assert f"{TAGS}, {GENES}" in e.value.hint
    with pytest.raises(DataError, match="no feature type 'Antibody Capture'"):
        open_dataset(tmp_path / "x.h5mu", modality="rna", feature_type=TAGS)


@pytest.mark.parametrize("kind", ["h5ad", "h5"])
def test_types_without_genes_need_a_choice(tmp_path, kind):
    path = write_tenx(tmp_path / "x.h5", X[:, 30:], TYPES[30:], GENOMES[30:])
    if kind == "h5ad":
        sc.read_10x_h5(path, gex_only=False).write_h5ad(path := tmp_path / "x.h5ad")
    with pytest.raises(DataError, match="6 Antibody Capture, 4 CRISPR Guide Capture and no Gene Expression"):
        open_dataset(path)
    with open_dataset(path, feature_type="all") as ds:
        assert ds.n_genes == 10
    assert vc.guides(path, method="threshold", threshold=5).guides.tolist() == ["S6", "S7", "S8", "S9"]


def test_biotypes_are_no_feature_types(tmp_path):
    biotypes = np.array(["protein_coding", "lncRNA", "IG_V_gene", "guide_RNA"])[np.arange(40) % 4]
    adata = ad.AnnData(X.astype("float32"), var=pd.DataFrame({"feature_type": biotypes}, [f"g{i}" for i in range(40)]))
    with open_dataset(adata) as ds:
        assert ds.n_genes == 40 and "all of them are used as genes" in ds.notes[0]
    with open_dataset(adata, feature_type="lncRNA") as ds:
        assert ds.n_genes == 10
    adata.var["feature_types"] = adata.var["feature_type"]
    adata.var["feature_type"] = TYPES
    with open_dataset(adata) as ds:  # the column that holds types of Cell Ranger counts
        assert ds.n_genes == 30


def test_multiome_files_name_gene_expression_gex(tmp_path):
    names = [f"g{i}" for i in range(40)]
    adata = ad.AnnData(X.astype("float32"), var=pd.DataFrame({"feature_types": ["GEX"] * 25 + ["ADT"] * 15}, names))
    with open_dataset(adata) as ds:
        assert ds.n_genes == 25 and "25 features of type GEX out of 15 ADT, 25 GEX" in ds.notes[0]


def test_an_mtx_folder_has_its_types(tmp_path):
    io.mmwrite(tmp_path / "matrix.mtx", sparse.coo_matrix(X.T))
    (tmp_path / "barcodes.tsv").write_text("".join(f"A{i}\n" for i in range(60)))
    (tmp_path / "features.tsv").write_text("".join(f"ENSG{i:011d}\tS{i}\t{t}\n" for i, t in enumerate(TYPES)))
    for feature_type, n in ((None, 30), (TAGS, 6), ("all", 40)):
        with open_dataset(tmp_path, feature_type=feature_type) as ds:
            assert ds.n_genes == n
    with pytest.raises(DataError, match="states no genome of its features"):
        open_dataset(tmp_path, genome="GRCh38")


def test_a_genome_of_the_second_version_is_chosen_by_either_name(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as f:
        for genome, x in (("hg19", X[:, :20]), ("mm10", X[:, 20:])):
            csr, g = sparse.csr_matrix(x), f.create_group(genome)
            for key in ("data", "indices", "indptr"):
                g[key] = getattr(csr, key)
            g["shape"], g["barcodes"] = np.array([20, 60]), np.array([f"A{i}-1" for i in range(60)], "S")
            g["genes"] = g["gene_names"] = np.array([f"{genome}{i}" for i in range(20)], "S")
    with pytest.raises(DataError, match="holds 2 genomes") as e:
        open_dataset(tmp_path / "x.h5")
    assert e.value.hint == "genome, one of: hg19, mm10"
    for chosen in ({"genome": "mm10"}, {"modality": "mm10"}, {"modality": "mm10", "genome": "mm10"}):
        with open_dataset(tmp_path / "x.h5", **chosen) as ds:
            assert ds.var.index[0] == "mm100" and ds.part["genome"] == "mm10"
    with pytest.raises(UsageError, match="modality='hg19' and genome='mm10' differ"):
        open_dataset(tmp_path / "x.h5", modality="hg19", genome="mm10")


def test_a_modality_that_contradicts_is_refused(sources):
    with pytest.raises(UsageError, match="modality='all' and feature_type='Antibody Capture' differ"):
        open_dataset(sources["csr"], modality="all", feature_type=TAGS)
    with open_dataset(sources["csr"], modality="mm10", feature_type="all") as ds:
        assert ds.n_genes == 12


@pytest.mark.parametrize("command", ["normalize", "hvg", "qc"])
def test_commands_agree_on_a_10x_file_and_its_h5ad(sources, tmp_path, command):
    options = {
        "normalize": ("--feature-type", TAGS, "--out", "n.h5ad"),
        "hvg": ("--genome", "mm10", "--top", 5, "--out", "h.txt", "--flavor", "dispersion"),
        "qc": ("--feature-type", "all", "--genome", "GRCh38", "--out", "q"),
    }[command]
    said = []
    for kind in ("h5", "csr"):
        done = run_cli(command, sources[kind], *options, "--json", "--force", cwd=tmp_path)
        assert done.code == 0, done.stderr
        if command == "normalize":
            assert ad.read_h5ad(tmp_path / "n.h5ad").shape == (60, 6)
            said.append(ad.read_h5ad(tmp_path / "n.h5ad").to_df().to_json())
        elif command == "hvg":
            said.append((tmp_path / "h.txt").read_text())
            assert len(said[-1].split()) == 5 and "30 features of type Gene Expression out of" in done.stderr
        else:
            said.append(json.dumps(done.json["batches"]).replace(str(sources[kind].name), ""))
    assert said[0] == said[1]


@pytest.mark.skipif(not (DATA / "pbmc1k_citeseq_10x").exists(), reason="the real data are not here (../shared/data)")
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_the_real_cells_give_the_same_results(tmp_path):
    path = DATA / "pbmc1k_citeseq_10x/pbmc_1k_citeseq_filtered_feature_bc_matrix.h5"
    sc.read_10x_h5(path, gex_only=False).write_h5ad(tmp_path / "x.h5ad")
    for options in ({}, {"feature_type": TAGS, "flavor": "dispersion"}):
        a, b = (vc.hvg(source, top=12, **options) for source in (path, tmp_path / "x.h5ad"))
        pd.testing.assert_frame_equal(a, b)
        assert a.attrs["genes"] == b.attrs["genes"] and len(a) == (36601 if not options else 10)
