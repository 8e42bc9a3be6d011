"""The modulators of a target, by hand on small networks."""

from __future__ import annotations

import pytest

from tests.tissues import make_tissue_adata, write_network
from vcelltools.errors import DataError, UsageError
from vcelltools.spatial.modulators import Choice, Finder, read_names
from vcelltools.spatial.regulatory_network import find_network, guess_species, read_network
from vcelltools.spatial.tissue import open_tissue

ROWS = [
    ("Tf1", "Gene0", "grn", 1.0, None),
    ("Tf0", "Gene0", "grn", 1.0, None),
    ("Tf1", "Gene0", "grn", 1.0, None),
    ("Gene0", "Gene0", "grn", 1.0, None),
    ("Absent", "Gene0", "grn", 1.0, None),
    ("Lig0", "Rec0_Rec1", "lr", 1.0, "ECM-Receptor"),
    ("Lig0", "Rec1", "lr", 1.0, "Secreted Signaling"),
    ("Lig1_Lig2", "Rec3", "lr", 1.0, None),
    ("Gene0", "Rec3", "lr", 1.0, None),
    ("Lig0", "Tf0", "nichenet", 0.9, None),
    ("Lig0", "Tf0", "nichenet", 0.1, None),
    ("Lig1", "Tf1", "nichenet", 0.1, None),
    ("Lig1", "Tf1", "nichenet", 0.9, None),
    ("Lig2", "Tf1", "nichenet", 0.2, None),
    ("Lig3", "Tf1", "nichenet", 0.9, None),
    ("Lig2", "Tf2", "nichenet", 0.9, None),
]


@pytest.fixture
def find(tmp_path):
    tissue, path = open_tissue(make_tissue_adata()), write_network(tmp_path, ROWS)

    def run(target="Gene0", **choice):
        return Finder(tissue, read_network(path), Choice(**choice)).find(target)

    return run


def test_order_is_the_files_and_the_first_of_duplicates_counts(find):
    m = find()
    assert m.tf == ("Tf1", "Tf0")
    assert m.lr == (("Lig0", "Rec0"), ("Lig0", "Rec1"), ("Lig1", "Rec3"), ("Lig2", "Rec3"))
    assert m.tfl == (("Lig0", "Tf0"), ("Lig2", "Tf1"))  # Lig1#Tf1 is first at 0.1, Lig3 has no pair, Tf2 no target
    assert m.names[:3] == ["Tf1", "Tf0", "Lig0$Rec0"] and m.names[-1] == "Lig2#Tf1"
    assert find("Gene1").lr[-1] == ("Gene0", "Rec3") and find("Gene1").tf == ()


def test_extras_and_masks(find):
    m = find(extra_modulators=("Gene3", "Tf1", "Gene0", "Rec0"), extra_lr=("Lig3$Rec2", "Gene0$Rec1"))
    assert m.extra == ("Gene3",) and m.lr[-1] == ("Lig3", "Rec2")
    assert all(a != "Lig3" for a, _ in m.tfl), "an extra pair brings no ligand-TF pair"
    masked = find(use_lr=False, extra_lr=("Lig3$Rec2",))
    assert masked.lr == () and masked.tfl == m.tfl
    assert find(use_tf=False).tf == () and find(use_tf=False).tfl == m.tfl
    with pytest.raises(UsageError, match=r"LIGAND\$RECEPTOR"):
        find(extra_lr=("Lig3",))
    with pytest.raises(DataError, match="Gene33"):
        find(extra_modulators=("Gene33",))


def test_only_the_most_expressed_ligands(tmp_path):
    adata = make_tissue_adata()
    adata.layers["imputed_count"][:, [adata.var_names.get_loc(g) for g in ("Lig0", "Lig1")]] = 1.0
    adata.layers["imputed_count"][:, adata.var_names.get_loc("Lig2")] = 0.5
    finder = Finder(open_tissue(adata), read_network(write_network(tmp_path, ROWS[5:9])), Choice(max_ligands=2))
    assert {a for a, _ in finder.find("Rec2").lr} == {"Gene0", "Lig0"}, (
        "Gene0 is the highest, Lig0 wins the tie by name"
    )


def test_a_tf_keeps_its_five_heaviest_ligands(tmp_path):
    genes = [f"Lig{i}" for i in range(8)] + ["Tf0", "Gene0", "Rec0"]
    weights = [0.2, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.16]
    rows = [("Tf0", "Gene0", "grn", 1.0, None)]
    rows += [(f"Lig{i}", "Rec0", "lr", 1.0, None) for i in range(8)]
    rows += [(f"Lig{i}", "Tf0", "nichenet", w, None) for i, w in enumerate(weights)]
    finder = Finder(open_tissue(make_tissue_adata(genes=genes)), read_network(write_network(tmp_path, rows)), Choice())
    assert [a for a, _ in finder.find("Gene0").tfl] == ["Lig1", "Lig2", "Lig3", "Lig4", "Lig5"]


def test_names_from_files(tmp_path):
    (tmp_path / "names").write_text("# all\nA, B\nC # last\n\nA\n")
    assert read_names("X,A", tmp_path / "names") == ("X", "A", "B", "C")


def test_the_network_is_found_by_species(tmp_path, monkeypatch):
    assert guess_species(["Foxp3", "Cd4", "Actb"]) == "mouse" and guess_species(["FOXP3", "CD4", "ACTB"]) == "human"
    (tmp_path / "data").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = write_network(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.delenv("SPACETRAVLR_DATA_DIR", raising=False)
    assert find_network(network=None, folder=None, species=None, genes=["Foxp3"]) == path
    with pytest.raises(DataError, match=r"human_network\.parquet"):
        find_network(network=None, folder=None, species="human", genes=[])
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("SPACETRAVLR_DATA_DIR", str(other))
    named = write_network(other)
    assert find_network(network=None, folder=None, species=None, genes=["Foxp3"]) == named
    with pytest.raises(UsageError, match="rat"):
        find_network(network=None, folder=None, species="rat", genes=[])


def test_a_network_of_another_species_matches_nothing(tmp_path):
    rows = [("FOXP3", "CD4", "grn", 1.0, None)]
    with pytest.raises(DataError, match=r"no edge matches.*Tf0.*FOXP3"):
        Finder(open_tissue(make_tissue_adata()), read_network(write_network(tmp_path, rows)), Choice())
