"""Targets of guides: names, columns, tables, and invalid input."""

from __future__ import annotations

import doctest

import pandas as pd
import pytest

from vcelltools.errors import DataError
from vcelltools.io.table import MemoryTable
from vcelltools.screens import targets
from vcelltools.screens.targets import NON_TARGETING, is_non_targeting, parse_names, read_targets

NT = ["NTg3", "NTC", "NTC_5", "non-targeting_00012", "non_targeting", "NonTargeting12", "NegCtrl0", "neg_control-3",
      "NO-TARGET", "scramble_1", "Scrambled", "safe-targeting_4", "control_2", "CTRL0001", "NO_TARGET_7"]  # fmt: skip
GENES = ["NTRK1", "NT5E", "STAT1", "SCRIB", "CTRL", "NTN1", "SAFB", "NEGR1", "CONTROL1A"]


def make_var(names, **columns):
    return MemoryTable(pd.DataFrame(columns, index=names), where="x: var")


def test_the_examples_run():
    assert doctest.testmod(targets).failed == 0


@pytest.mark.parametrize("name", NT)
def test_what_targets_nothing_is_recognised(name):
    assert is_non_targeting(name)


@pytest.mark.parametrize("name", [g for g in GENES if g != "CTRL"])
def test_genes_are_no_controls(name):
    assert not is_non_targeting(name) and not is_non_targeting(f"{name}g2") and not is_non_targeting(f"{name}_1")


@pytest.mark.parametrize(
    ("guide", "target"),
    [("IFNGR2g1", "IFNGR2"), ("AAVS1_1", "AAVS1"), ("TP53_sg2", "TP53"), ("sgTP53_2", "TP53"), ("TP53-gRNA-11", "TP53"),
     ("HLA-DRB1_3", "HLA-DRB1"), ("MYC.2", "MYC"), ("PDCD1LG2g4", "PDCD1LG2"), ("NKX2-1_1", "NKX2-1"),
     ("TP53_-_7687529.23-P1P2", "TP53")],
)  # fmt: skip
def test_names_say_their_target(guide, target):
    assert parse_names([guide]) == ([target], [])


def test_what_is_ambiguous_is_not_guessed():
    assert parse_names(["NKX2-1"]) == (["NKX2-1"], ["NKX2-1"]), "a gene, or the first guide of NKX2"
    assert parse_names(["NKX2-1"], ["NKX2-1"]) == (["NKX2-1"], [])
    assert parse_names(["TP53-1", "TP53-2"]) == (["TP53", "TP53"], []), "two guides of one target"
    assert parse_names(["TP53-1"], ["TP53"]) == (["TP53"], [])
    assert parse_names(["STAT1"]) == (["STAT1"], ["STAT1"])


def test_a_column_comes_before_the_names_and_a_table_before_both(tmp_path):
    var = make_var(["PDL1g1", "NTg1"], intended_target_name=["CD274", "non-targeting"])
    assert read_targets(var).labels.tolist() == ["CD274", NON_TARGETING]
    assert read_targets(make_var(["PDL1g1", "NTg1"])).labels.tolist() == ["PDL1", NON_TARGETING]
    (tmp_path / "map.csv").write_text("sgRNA,target_gene,other\nNTg1,neg_ctrl,\nPDL1g1,PDL1,\n")
    found = read_targets(var, table=tmp_path / "map.csv")
    assert found.labels.tolist() == ["PDL1", NON_TARGETING]
    (tmp_path / "plain.tsv").write_text("NTg1\tNT\nPDL1g1\tX\n")
    assert read_targets(var, table=tmp_path / "plain.tsv").labels.tolist() == ["X", NON_TARGETING]


@pytest.mark.parametrize(
    ("text", "says"),
    [("guide,target\nNTg1,NT\n", "has no target for 1 of 2 guides .*'PDL1g1'"),
     ("guide,target\nNTg1,NT\nPDL1g1,A\nPDL1g1,B\n", "'PDL1g1' has two targets"),
     ("NTg1\n", "row 1 does not have a guide and a target")],
)  # fmt: skip
def test_a_table_that_does_not_say_every_target_is_refused(tmp_path, text, says):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_targets(make_var(["PDL1g1", "NTg1"]), table=tmp_path / "map.csv")


def test_a_column_with_gaps_is_an_error_where_it_was_asked_for():
    var = make_var(["PDL1g1", "NTg1"], target=["CD274", None])
    assert read_targets(var).labels.tolist() == ["PDL1", NON_TARGETING], "not asked for: the names are read"
    with pytest.raises(DataError, match="has no target for 'NTg1'"):
        read_targets(var, column="target")
