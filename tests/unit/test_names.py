"""Odd characters in names: what people see, what a list holds, and that it comes back."""

from __future__ import annotations

import csv
import hashlib
import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vcelltools.genes.identity import make_basis, read_basis
from vcelltools.genes.table import read_aliases
from vcelltools.io.textfile import read_rows
from vcelltools.io.write.atomic import dump_json
from vcelltools.names import quote_cell, read_lines, show, show_lines, split_lines, write_lines

ANY = st.text(st.characters(exclude_categories=()), min_size=1)  # lone surrogates too
ODD = [
    "a\nb",
    "a\rb",
    "a\x85b",
    "a\u2028b",
    "\x1b[31mred",
    "tab\t",
    " lead",
    "#note",
    '"quoted"',
    "\\n",
    "\x7f",
    "\udcff",
]


def test_what_does_not_print_is_shown_as_its_escape():
    assert show("TP53 – ok × 2 …") == "TP53 – ok × 2 …"
    assert show("\x1b[2J\n\r\t\x9b1m\x7f\x85") == r"\x1b[2J\n\r\t\x9b1m\x7f\x85"
    assert show("a\u2028b\u202ec\u200b\udcff\xa0") == r"a\u2028b\u202ec\u200b\udcff\xa0"
    assert show_lines("one\x1b\ntwo") == "one\\x1b\ntwo"


@given(ANY)
def test_whatever_is_shown_prints(text):
    assert show(text).isprintable()


@given(st.lists(ANY))
@example(ODD)
def test_a_list_gives_back_every_name_also_to_those_who_split_lines(names):
    text = write_lines(names)
    assert read_lines(text) == names
    assert len(text.splitlines()) == len(names)
    text.encode("utf-8")


def test_ordinary_names_stand_in_a_list_as_they_are():
    names = ["TP53", "HLA-A", "ENSG00000141510.18", "a b", "5'-x", "β2m"]
    assert write_lines(names) == "".join(f"{n}\n" for n in names)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lists_of_others(ends):
    assert read_lines(ends.join(["# comment", "A", "", '"B"', ' "C', "D "])) == ["A", "B", '"C', "D"]
    assert split_lines(ends.join(["a", "b", ""])) == ["a", "b"]


@given(ANY.filter(lambda t: "\0" not in t))
@example("a\rb")
def test_a_cell_of_a_csv_comes_back(text):
    assert next(csv.reader(io.StringIO(f"x,{quote_cell(text)}\n", newline=""))) == ["x", text]


@given(ANY)
def test_json_comes_back_and_prints(text):
    body = dump_json({"name": text})
    assert body.isprintable() and json.loads(body) == {"name": text}


def test_a_basis_keeps_odd_names_and_tells_lists_apart_by_hash(tmp_path):
    (tmp_path / "basis.txt").write_text(write_lines(ODD))
    basis = read_basis(tmp_path / "basis.txt")
    assert list(basis.labels) == ODD
    assert make_basis(["a\nb"]).sha256 != make_basis(["a", "b"]).sha256
    assert make_basis(["A", "B"]).sha256 == hashlib.sha256(b"A\nB").hexdigest()


def test_a_line_separator_ends_no_line_of_a_table(tmp_path):
    (tmp_path / "aliases.tsv").write_text("old\x85name\tTP53\nother\u2028\tMYC\n")
    assert read_aliases(tmp_path / "aliases.tsv") == {"old\x85name": "TP53", "other": "MYC"}
    (tmp_path / "t.csv").write_bytes('"a\rb",1\nc\u2028d,2\n'.encode())
    assert read_rows(tmp_path / "t.csv", what="a table") == [["a\rb", "1"], ["c\u2028d", "2"]]
