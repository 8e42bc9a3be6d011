"""Text that users name: read whole, or refused in plain words, whichever table it should be."""

from __future__ import annotations

import math

import pytest

from vcelltools.challenge.checks import read_genes, read_perturbations
from vcelltools.errors import DataError
from vcelltools.io.textfile import read_columns, read_rows, read_text, say_missing
from vcelltools.scoring.comparison import compare_scores
from vcelltools.scoring.tables import read_aggregate
from vcelltools.scoring.vcc2026.score import read_gene_map

TABLES = {
    "a list of genes": read_genes,
    "a table of perturbations": lambda p: read_perturbations(p, "non-targeting"),
    "a table of perturbations and their genes": read_gene_map,
    "a table of statistics": read_aggregate,
}


@pytest.mark.parametrize("what", TABLES)
@pytest.mark.parametrize("body", [b"\x89HDF\r\n\x1a\n\x00\xff", b"plain\x00zeros", b'a,"never closed\nb,c\n'])
def test_every_table_refuses_what_is_no_table(tmp_path, what, body):
    path = tmp_path / "t.csv"
    path.write_bytes(body)
    with pytest.raises(DataError, match=rf"t\.csv.*{what} is expected") as e:
        TABLES[what](path)
    assert "codec" not in str(e.value) and e.value.hint
    with pytest.raises(DataError, match="is a folder"):
        TABLES[what](tmp_path)
    with pytest.raises(DataError, match="no such file"):
        TABLES[what](tmp_path / "absent")


def test_rows_with_a_mark_quotes_and_empty_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefftarget_gene,n_cells\r\n"A,1",5\r\n\r\n ,\r\nB'.encode())
    assert read_rows(path, what="a table") == [["target_gene", "n_cells"], ["A,1", "5"], ["B"]]
    assert read_text(path, what="a table").startswith("target_gene")
    assert read_perturbations(path, "non-targeting") == {None: {"A,1": 5, "B": 0}}


def test_columns_of_numbers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("statistic,mae,note\nmean,0.5,\nmax,1,high\n")
    options = {"first": "statistic", "what": "a table of statistics"}
    names, columns = read_columns(path, **options, only="mean")
    assert names == ["mean"] and columns["mae"] == [0.5] and math.isnan(columns["note"][0])
    with pytest.raises(DataError, match="row 'max' does not consist of 2 numbers"):
        read_columns(path, **options)
    with pytest.raises(DataError, match="first column is not 'name'"):
        read_columns(path, first="name", what="a table")
    with pytest.raises(DataError, match="has no row 'min'"):
        read_aggregate(path, "min")


@pytest.mark.parametrize("text", ["[]", "{}", '{"components": 5}', '{"components": {"mae": 1}}', "not json"])
def test_a_score_that_score_did_not_write(tmp_path, text):
    (tmp_path / "results.csv").write_text("perturbation,mae\nA,1\nB,2\n")
    (tmp_path / "score.json").write_text(text)
    with pytest.raises(DataError, match=r"score\.json was not written by score"):
        compare_scores(tmp_path, tmp_path)


def test_what_is_missing_is_said_with_what_may_be_meant(tmp_path):
    (tmp_path / "screen.h5ad").touch()
    (tmp_path / "link.h5ad").symlink_to("gone.h5ad")
    said = {n: str(say_missing(tmp_path / n)) for n in ("scren.h5ad", "nope.h5ad", "no/zzz", "link.h5ad")}
    assert said["scren.h5ad"].endswith(f"no such file (did you mean {tmp_path}/screen.h5ad?)")
    assert said["nope.h5ad"].endswith("no such file (check the path)")
    assert said["no/zzz"].endswith(f"no such file (the folder {tmp_path}/no does not exist)")
    assert "link.h5ad is a link to gone.h5ad, which does not exist" in said["link.h5ad"]
