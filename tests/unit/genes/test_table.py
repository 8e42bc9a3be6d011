"""Tables of genes of every kind that is read, what is ambiguous, and both directions of a match."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from tests.conftest import DATA, run_cli
from tests.make import make_adata, make_counts
from vcelltools.errors import DataError
from vcelltools.genes.identity import Genes, make_basis, match_genes
from vcelltools.genes.table import read_aliases, read_gene_table

A, B, C = "ENSG00000000001", "ENSG00000000002", "ENSG00000000003"
GTF = f"""#!genome-build GRCh38
1\thavana\tgene\t11\t99\t.\t+\t.\tgene_id "{A}.5"; gene_name "AAA"; gene_biotype "protein_coding";
1\thavana\ttranscript\t11\t99\t.\t+\t.\tgene_id "{A}.5"; transcript_id "ENST1"; gene_name "AAA";
1\thavana\tgene\t11\t99\t.\t-\t.\tgene_id "{B}"; gene_biotype "lncRNA";
"""
GFF = f"""##gff-version 3
1\thavana\tgene\t1\t9\t.\t+\t.\tID=gene:{A};Name=AAA;gene_id={A};version=5
1\tBestRefSeq\tgene\t1\t9\t.\t+\t.\tID=gene-BBB;Dbxref=GeneID:7,Ensembl:{B};Name=BBB;gene_synonym=OLDB,B2
1\thavana\tmRNA\t1\t9\t.\t+\t.\tID=transcript:ENST1;Parent=gene:{A}
"""
HGNC = (
    "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\n"
    f'HGNC:1\tAAA\tan a\tApproved\t"A1|SHARED"\t"OLDA|BBB"\t{A}\n'
    f"HGNC:2\tBBB\ta b\tApproved\tSHARED\t\t{B}\n"
    "HGNC:3\tCCC\ta c\tApproved\tOLDA\t\t\n"
    f"HGNC:4\tDDD~withdrawn\tgone\tEntry Withdrawn\t\t\t{C}\n"
)
GENE_INFO = (
    "#tax_id\tGeneID\tSymbol\tLocusTag\tSynonyms\tdbXrefs\tchromosome\tSymbol_from_nomenclature_authority\n"
    f"9606\t1\tAAA\t-\tA1|A2\tMIM:1|HGNC:HGNC:5|Ensembl:{A}\t19\tAAA\n"
    f"9606\t2\tBBB\t-\t-\tMIM:2|Ensembl:{B}|Ensembl:{C}\t1\tBBB\n"
)
GENE2ENSEMBL = (
    f"#tax_id\tGeneID\tEnsembl_gene_identifier\tRNA\n9606\t1\t{A}\tNM_1\n9606\t1\t{A}\tNM_2\n9606\t2\t{B}\tNM_3\n"
)
BIOMART = f"Gene stable ID,Gene name,Gene Synonym\n{A},AAA,A1\n{A},AAA,A2\n{B},,\n"
FEATURES = f"{A}\tAAA\tGene Expression\n{B}\tBBB\tGene Expression\nCD3\tCD3\tAntibody Capture\n"
PAIRS = f"OLDA\t{A}\nTWO\tAAA\nTWO\tBBB\n"

KINDS = {
    "a GTF": (GTF, {"AAA": A}),
    "a GFF3": (GFF, {"AAA": A, "BBB": B, "OLDB": B, "B2": B}),
    "HGNC's complete set": (HGNC, {"AAA": A, "A1": A, "OLDA": A, "BBB": B}),
    "NCBI's gene_info": (GENE_INFO, {"AAA": A, "A1": A, "A2": A}),
    "NCBI's gene2ensembl": (GENE2ENSEMBL, {"1": A, "2": B}),
    "a BioMart export": (BIOMART, {"AAA": A, "A1": A, "A2": A}),
    "features.tsv of Cell Ranger": (FEATURES, {"AAA": A, "BBB": B}),
    "a table of aliases": (PAIRS, {"OLDA": A}),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_table_is_known_by_its_content(tmp_path, kind, zipped):
    text, names = KINDS[kind]
    path = tmp_path / "table"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    table = read_gene_table(path)
    assert (table.kind, table.gene_of) == (kind, names)
    assert read_aliases(path) == names


def test_what_is_ambiguous_is_not_guessed(tmp_path):
    (tmp_path / "hgnc.txt").write_text(HGNC)
    table = read_gene_table(tmp_path / "hgnc.txt")
    assert table.ambiguous == {"SHARED"} and "1 names of several genes are not used" in table.describe()
    assert table.gene_of["BBB"] == B, "an approved symbol comes before a retired one"
    assert table.gene_of["OLDA"] == A, "a retired symbol comes before an alias"
    assert "DDD~withdrawn" not in table.gene_of
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    assert read_gene_table(tmp_path / "pairs.tsv").ambiguous == {"TWO"}


def make_genes(ids, names):
    return Genes(ids=np.array(ids, object), names=np.array(names, object), id_source=None, name_source=None)


@pytest.mark.parametrize(
    ("label", "ids", "names", "at"),
    [("AAA", [B, A], ["BBB", None], 1), (A, [None, None], ["BBB", "AAA"], 1), ("OLDA", [None, None], ["BBB", "AAA"], 1),
     (A, [None, None], ["BBB", "OLDA"], 1), ("A1", [A, B], ["x", "y"], 0), ("SHARED", [A, B], ["AAA", "BBB"], -1)],
)  # fmt: skip
def test_symbols_and_ids_find_each_other_through_a_table(tmp_path, label, ids, names, at):
    (tmp_path / "hgnc.txt").write_text(HGNC)
    names = [n or f"none{i}" for i, n in enumerate(names)]
    match = match_genes(make_basis([label]), make_genes(ids, names), aliases=read_aliases(tmp_path / "hgnc.txt"))
    assert match.gene_of.tolist() == [at]


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is empty"), ("\n\n", "is empty"), ("A B\n", "line 1 is not two columns"),
     ("# nothing\n", "line 1|names no gene"), ("hgnc_id\tsymbol\n", "names no gene")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, says):
    (tmp_path / "t").write_text(text)
    with pytest.raises(DataError, match=says):
        read_gene_table(tmp_path / "t")


def test_damaged_and_missing_files_are_refused(tmp_path):
    (tmp_path / "t.gz").write_bytes(gzip.compress(GTF.encode() * 50)[:-40])
    for path, says in (
        (tmp_path / "t.gz", "cannot be read"),
        (tmp_path / "none", "no such file"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(DataError, match=says):
            read_gene_table(path)
    (tmp_path / "b").write_bytes(b"a\tb\0\n")
    with pytest.raises(DataError, match="is not a text file"):
        read_gene_table(tmp_path / "b")


def test_a_store_is_built_from_symbols_over_a_basis_of_ids(tmp_path):
    adata = make_adata(make_counts(40, 3).astype(np.float32), names=["AAA", "BBB", "CCC"])
    adata.obs["p"] = ["c", "t"] * 20
    adata.write_h5ad(tmp_path / "x.h5ad")
    (tmp_path / "basis.txt").write_text(f"{B}\n{A}\n")
    (tmp_path / "hgnc.txt").write_text(HGNC)
    words = ("build-store", "x.h5ad", "--basis", "basis.txt", "--pert-col", "p", "--control", "c", "--plan", "--json")
    without = run_cli(*words, cwd=tmp_path)
    done = run_cli(*words, "--gene-table", "hgnc.txt", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "2 by alias" not in without.stdout
    assert "2 by alias" in done.stdout


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
def test_a_real_features_file_is_read():
    folder = DATA / "reader_fixtures" / "scanpy" / "10x_data" / "3.0.0" / "filtered_feature_bc_matrix"
    table = read_gene_table(folder / "features.tsv.gz")
    assert table.kind == "features.tsv of Cell Ranger" and len(table.symbol_of) > 100
