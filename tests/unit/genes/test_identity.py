"""Gene identity and the basis."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from tests.make import make_counts
from vcelltools.config import DatasetConfig
from vcelltools.errors import DataError, UsageError
from vcelltools.files.inspect import inspect
from vcelltools.genes.identity import (
    Genes,
    make_basis,
    match_genes,
    read_basis,
    read_genes,
    strip_version,
)
from vcelltools.genes.table import read_aliases
from vcelltools.io.table import MemoryTable
from vcelltools.selection.hvg import compute_hvg
from vcelltools.stores.basis import Ranking, basis, choose_basis


def genes(names, ids=None) -> Genes:
    ids = [None] * len(names) if ids is None else ids
    return Genes(ids=np.array(ids, object), names=np.array(names, object), id_source=None, name_source="index")


E = [f"ENSG{i:011d}" for i in range(10)]


def test_versions_are_stripped_and_symbols_are_not():
    assert strip_version("ENSG00000141510.18") == "ENSG00000141510"
    assert strip_version("ENSMUSG00000059552.1") == "ENSMUSG00000059552"
    assert strip_version("ENSG00000182378.15_PAR_Y") == "ENSG00000182378_PAR_Y"
    assert strip_version("AC012345.2") == "AC012345.2"


def test_columns_are_found():
    var = pd.DataFrame({"gene_ids": [E[0] + ".3", E[1]], "n": [1, 2]}, index=["A", "B"])
    g = read_genes(MemoryTable(var, where="var"))
    assert (g.id_source, g.name_source) == ("gene_ids", "index") and g.keys == [E[0], E[1]]
    g = read_genes(MemoryTable(pd.DataFrame({"gene_name": ["A", "B"]}, index=E[:2]), where="var"))
    assert (g.id_source, g.name_source) == ("index", "gene_name") and list(g.names) == ["A", "B"]
    g = read_genes(MemoryTable(pd.DataFrame(index=["A", "B"]), where="var"))
    assert g.id_source is None and g.keys == ["A", "B"]
    with pytest.raises(DataError, match="no column 'ids'"):
        read_genes(MemoryTable(var, where="var"), id_col="ids")


def test_matching_by_id_symbol_and_alias():
    file = genes(["A", "B", "C", "D"], [E[0], E[1], E[2], E[3]])
    b = make_basis([E[1] + ".7", "C", "OLD", "NOWHERE"])
    m = match_genes(b, file, aliases={"OLD": "D"})
    assert m.gene_of.tolist() == [1, 2, 3, -1] and m.how == ("id", "symbol", "alias", "missing")
    assert m.present.tolist() == [True, True, True, False] and m.summary()["coverage"] == 0.75
    assert "1 by id, 1 by symbol, 1 by alias; 0 ambiguous, 1 missing" in m.describe()


def test_an_ambiguous_symbol_is_never_guessed():
    m = match_genes(make_basis(["A"]), genes(["A", "A"], [E[0], E[1]]))
    assert m.how == ("ambiguous",) and m.gene_of.tolist() == [-1] and m.ambiguous == {"A": (E[0], E[1])}
    # one id settles it
    m = match_genes(make_basis(["A"], known={"A": (E[1], "A")}), genes(["A", "A"], [E[0], E[1]]))
    assert m.how == ("id",) and m.gene_of.tolist() == [1]


def test_a_column_claimed_twice_goes_to_the_better_evidence():
    m = match_genes(make_basis([E[0], "A"]), genes(["A"], [E[0]]))
    assert m.how == ("id", "ambiguous") and m.gene_of.tolist() == [0, -1]
    m = match_genes(make_basis(["X", "Y"]), genes(["A"]), aliases={"X": "A", "Y": "A"})
    assert m.how == ("ambiguous", "ambiguous")


def test_duplicates():
    g = genes(["A", "B", "A"], [E[0], E[1], E[0]])
    assert g.merge("sum").of_column.tolist() == [0, 1, 0]
    assert g.merge("first").of_column.tolist() == [0, 1, 2]
    assert g.merge().duplicates == {E[0]: 2}
    assert match_genes(make_basis([E[0]]), g, policy="first").gene_of.tolist() == [0]


def test_basis_files(tmp_path):
    f = tmp_path / "b.txt"
    f.write_text("# a comment\nA\n\n B \n")
    assert read_basis(f).labels == ("A", "B") and read_basis(f).symbols == ("A", "B")
    (tmp_path / "b.json").write_text(json.dumps({"genes": [{"label": "A", "id": E[0] + ".2", "symbol": "A"}]}))
    assert read_basis(f).ids == (E[0], None)
    f.write_text("A\nA\n")
    with pytest.raises(DataError, match="'A' twice"):
        read_basis(f)
    f.write_text("\n")
    with pytest.raises(DataError, match="no gene"):
        read_basis(f)
    with pytest.raises(DataError, match="the basis file does not exist"):
        read_basis(tmp_path / "none.txt")


def test_alias_tables(tmp_path):
    f = tmp_path / "a.tsv"
    f.write_text(f"OLD\tNEW\nX\t{E[0]}.1\nTWO\tA\nTWO\tB\n")
    assert read_aliases(f) == {"OLD": "NEW", "X": E[0]}
    f.write_text("OLD NEW\n")
    with pytest.raises(DataError, match="line 1"):
        read_aliases(f)


def ranking(name, names, ids=None, **kw) -> Ranking:
    return Ranking(name=name, genes=genes(names, ids), rank=np.arange(len(names)), **kw)


def test_mean_rank_and_absent_genes():
    a = ranking("a", ["G1", "G2", "G3", "G4"])
    b = ranking("b", ["G3", "G2", "G5"])
    r = choose_basis([a, b], top=3)
    ranks = {g.label: g.mean_rank for g in (*r.genes, *r.next)}
    # 1-based ranks; absent: the last of that data set, plus one more where it ranks from 1
    assert ranks == {"G2": 2.0, "G3": 2.0, "G1": 2.5, "G4": 4.0, "G5": 4.0}
    assert r.labels == ["G2", "G3", "G1"]
    assert r.genes[2].ranks == {"a": 1, "b": None} and "b absent" in r.genes[2].why
    heavy = ranking("b", ["G3", "G2", "G5"], weight=9.0)
    assert choose_basis([a, heavy], top=1).labels == ["G3"]


def test_intersection_first_then_most():
    a = ranking("a", ["S", "A1", "M", "A3"])
    b = ranking("b", ["B1", "S", "B3", "M"])
    c = ranking("c", ["S", "C1", "M", "C2"])
    r = choose_basis([a, b, c], top=3, rule="intersection")
    assert r.labels[0] == "S" and r.genes[0].n_hvg == 3
    assert r.labels[1] == "M" and r.genes[1].n_hvg == 2  # outranked by none, though others lead one data set


def test_identities_are_united_across_files():
    a = ranking("a", ["TP53", "MYC"], [E[0], E[1]])
    b = ranking("b", ["TP53", "MYC"])  # symbols alone
    c = ranking("c", ["p53", "cMyc"], [E[0], E[1]])
    r = choose_basis([a, b, c], top=2)
    assert r.labels == ["TP53", "MYC"] and [g.id for g in r.genes] == E[:2]
    assert all(v is not None for g in r.genes for v in g.ranks.values())
    # a symbol of two ids stays apart from both
    d = ranking("d", ["DUP", "DUP"], [E[2], E[3]])
    e = ranking("e", ["DUP"])
    r = choose_basis([d, e], top=10)
    assert sorted(r.labels) == sorted([E[2], E[3], "DUP"])
    assert any("1 ambiguous" in line for line in r.report)


def test_forced_and_excluded_genes():
    a = ranking("a", ["MT-ND1", "RPL3", "G1", "G2", "G3"], targets=("G3", "nobody"))
    r = choose_basis([a], top=2, exclude=["^MT-", "^RP[SL]"])
    assert r.labels == ["G1", "G2"] and r.excluded == ("MT-ND1", "RPL3")
    r = choose_basis([a], top=2, exclude=["^MT-", "^RP[SL]"], force_targets=True)
    assert r.labels == ["G1", "G3"] and r.genes[1].why.startswith("forced") and "1 perturbation labels" in r.warnings[0]
    r = choose_basis([a], top=2, exclude=["^MT-"], force=["MT-ND1"])
    assert "MT-ND1" in r.labels and "forced although" in r.warnings[0]
    with pytest.raises(DataError, match="in no data set"):
        choose_basis([a], top=2, force=["NOPE"])
    with pytest.raises(UsageError, match="forced into a basis of 1"):
        choose_basis([a], top=1, force=["G1", "G2"])
    with pytest.raises(UsageError, match="regular expression"):
        choose_basis([a], exclude=["("])
    with pytest.raises(UsageError, match="rule"):
        choose_basis([a], rule="best")


def test_basis_of_files(tmp_path):
    from tests.screens import BUILD, make_screen, write

    write(make_screen(seed=1), tmp_path / "a.h5ad")
    write(make_screen(seed=2, g=50), tmp_path / "b.h5ad", "csc")
    specs = [DatasetConfig(name=n, path=f"{n}.h5ad", **BUILD) for n in "ab"]
    r = basis(specs, base=tmp_path, top=12)
    import vcelltools as vc

    frames = [vc.hvg(tmp_path / f"{n}.h5ad", top=60) for n in "ab"]
    rank = [{g: i + 1 for i, g in enumerate(f.attrs["genes"])} for f in frames]
    mean = {g: (rank[0][g] + rank[1].get(g, 51)) / 2 for g in rank[0]}
    assert set(r.labels) == set(sorted(mean, key=lambda g: (mean[g], g))[:12])
    out, beside = r.write(tmp_path / "basis.txt")
    assert out.read_text().split() == r.labels
    assert read_basis(out).ids == tuple(g.id for g in r.genes)
    assert json.loads(beside.read_text())["genes"][0]["why"] == r.genes[0].why
    with pytest.raises(UsageError, match="exists"):
        r.write(tmp_path / "basis.txt")


def test_doubtful_genes_are_told(tmp_path):
    counts = make_counts(40, 30, seed=1)
    barcodes = [f"AAAC{'ACGT'[i % 4] * 8}{'ACGT'[i // 4 % 4] * 4}-{i}" for i in range(40)]
    genes = [f"ENSG{i:011d}" for i in range(30)]
    symbols = [f"GENE{i}" for i in range(30)]
    half = [g if i % 2 else s for i, (g, s) in enumerate(zip(genes, symbols, strict=True))]
    for obs, var, said in (
        (barcodes, genes, None),
        (barcodes, symbols, None),
        (genes[:20], barcodes, "transposed"),
        (symbols[:20], barcodes, "transposed"),
        (barcodes, half, "named in two ways: 50%"),
    ):
        X = counts[: len(obs), :20].repeat(2, axis=1)[:, : len(var)]
        adata = AnnData(X.astype("float32"), pd.DataFrame(index=obs), pd.DataFrame(index=var))
        adata.write_h5ad(tmp_path / "x.h5ad")
        found = [*inspect(tmp_path / "x.h5ad").problems, *compute_hvg(tmp_path / "x.h5ad", top=5).warnings]
        assert sum(said in f for f in found) == 2 if said else not found, (found, said)
