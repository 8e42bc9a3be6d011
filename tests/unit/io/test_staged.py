"""Files that belong together appear together or not at all, and with them the folders that they needed."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager

import pytest
import scipy.sparse as sp

import vcelltools as vc
from tests.files import write_h5ad
from tests.oracle.pairs import make_adata, make_pair
from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.io.write.atomic import atomic_file, check_output, staged, write_text
from vcelltools.selection.hvg import compute_hvg


@contextmanager
def file_size_limit(n: int):
    """No file may grow beyond ``n`` bytes: to a writer, a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_all(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_all_move_in_or_none(tmp_path):
    a, b = tmp_path / "new" / "a", tmp_path / "new" / "b"
    with pytest.raises(ZeroDivisionError), staged([a, b]) as there:
        write_text(there / "a", "1")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == [], "neither a file nor the folder made for it"
    with staged([a, b]) as there:
        write_text(there / "a", "1")
        write_text(there / "b", "2")
    assert read_all(a.parent) == {"a": b"1", "b": b"2"}
    with pytest.raises(UsageError, match="b exists"), staged([a.with_name("c"), b]):
        pass
    with staged([a.with_name("c"), b], over=[b]) as there:
        write_text(there / "c", "3")
        write_text(there / "b", "4")
    assert read_all(a.parent) == {"a": b"1", "b": b"4", "c": b"3"}
    with pytest.raises(UsageError, match="two outputs have the name"), staged([a, a], force=True):
        pass


def test_one_that_appears_meanwhile_is_not_overwritten(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(UsageError, match="b exists"), staged([a, b]) as there:
        write_text(there / "a", "1")
        write_text(there / "b", "2")
        b.write_text("another's")
    assert read_all(tmp_path) == {"b": b"another's"}


def test_the_rest_of_a_killed_writer_goes(tmp_path):
    rest = tmp_path / ".a.123.0123abcd.tmp"
    rest.mkdir()
    (rest / "a").write_text("half")
    with staged([tmp_path / "a"]) as there:
        write_text(there / "a", "1")
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    message = rf"^{tmp_path}/b: the disk is full"
    with file_size_limit(1000), pytest.raises(EnvironmentFault, match=message), staged([tmp_path / "a"]) as there:
        write_text(there / "b", "x" * 2000)
    assert os.listdir(tmp_path) == []


def test_folders_are_made_by_who_writes(tmp_path):
    out = tmp_path / "x" / "y" / "z"
    check_output(out, force=False)
    assert os.listdir(tmp_path) == [], "a look makes nothing"
    with pytest.raises(ZeroDivisionError), atomic_file(out):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []
    write_text(out, "1")
    assert out.read_text() == "1"
    with pytest.raises(EnvironmentFault, match=r"file: the folder .*z cannot be made, because a file has that name"):
        check_output(out / "below" / "file", force=False)


def test_a_gene_list_and_its_scores_come_together(tmp_path):
    result = compute_hvg(write_h5ad(tmp_path / "x.h5ad"), top=5)
    d = tmp_path / "out"
    with file_size_limit(500), pytest.raises(EnvironmentFault, match=r"out/hvg_scores\.json: the disk is full"):
        result.write(d / "h.txt")  # the list fits, the scores do not
    assert not d.exists()
    result.write(d / "h.txt")
    before = read_all(d)
    with file_size_limit(500), pytest.raises(EnvironmentFault):
        result.write(d / "h.txt", force=True)
    assert read_all(d) == before and sorted(before) == ["h.txt", "hvg_scores.json"]


def test_statistics_are_whole_or_not_there(tmp_path):
    path, d = write_h5ad(tmp_path / "x.h5ad"), tmp_path / "stats"
    with file_size_limit(600), pytest.raises(EnvironmentFault, match=r"stats/\w+\.(npy|json): the disk is full"):
        compute_hvg(path, top=5, stats_dpath=d)
    assert not d.exists()
    first = compute_hvg(path, top=5, stats_dpath=d)
    again = compute_hvg(path, top=5, stats_dpath=d)
    assert again.selected == first.selected and "saved statistics were used" in " ".join(again.notes)


def test_a_score_is_whole_or_not_there(tmp_path):
    pred, real, labels, genes, _ = make_pair(40)
    result = vc.score(*(make_adata(sp.csr_matrix(x), labels, genes) for x in (pred, real)))
    d = tmp_path / "scored"
    with file_size_limit(500), pytest.raises(EnvironmentFault, match=r"scored/\w+\.(csv|json): the disk is full"):
        result.write(d)
    assert not d.exists()
    result.write(d)
    before = read_all(d)
    with file_size_limit(500), pytest.raises(EnvironmentFault):
        result.write(d, force=True)
    assert read_all(d) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_device_or_pipe_is_never_replaced(tmp_path, force):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, os.devnull):
        with pytest.raises(UsageError, match="is a device or a pipe"):
            check_output(path, force=force)
        with pytest.raises(UsageError), atomic_file(path, force=force):
            pass
    assert pipe.is_fifo()


def test_a_working_directory_that_is_gone_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(EnvironmentFault, match=r"x\.txt: its folder was removed|no such file"):
        write_text("x.txt", "1")
