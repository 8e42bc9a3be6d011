"""Containers: hostile tars are refused before a body is read; what prep writes, lint accepts."""

from __future__ import annotations

import io
import json
import tarfile
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zstandard
from scipy import sparse

from vcelltools.challenge.checks import get_fingerprint, read_contexts, read_genes, read_perturbations
from vcelltools.challenge.vcc import lint, parse_contexts, parse_day, prep
from vcelltools.errors import DataError, UsageError
from vcelltools.io.formats.vcc import read_members
from vcelltools.scoring.rules import RULES_2026, get_rules_2025

GENES = [f"G{i}" for i in range(20)]


def make(path, year=2025, *, X=None, labels=None, fmt=sparse.csr_matrix, genes=GENES):
    rng = np.random.default_rng(0)
    if labels is None:
        labels = ["non-targeting"] * 4 + ["G1"] * 4 if year == 2025 else [p for _ in "ABC" for p in ("G1", "G2")] * 2
    n = len(labels)
    if X is None:
        X = rng.poisson(2.0, (n, len(genes))).astype(np.float32)
        X = np.log1p(X) if year == 2025 else X
    obs = pd.DataFrame({"target_gene": labels}, index=[f"c{i}" for i in range(n)])
    if year == 2026:
        obs["context"] = [c for c in "ABC" for _ in range(2)] * 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        ad.AnnData(fmt(X), obs, pd.DataFrame(index=list(genes))).write_h5ad(path)
    return path


def make_box(tmp_path):
    """A folder with lists, a prediction of each year, and its container."""
    (tmp_path / "genes.csv").write_text("\n".join(GENES))
    (tmp_path / "perts.csv").write_text("target_gene\nG1\nG2\n")
    make(tmp_path / "p25.h5ad")
    make(tmp_path / "p26.h5ad", 2026)
    prep(tmp_path / "p25.h5ad", tmp_path / "p25.vcc", genes=tmp_path / "genes.csv")
    known = {"genes": tmp_path / "genes.csv", "perturbations": tmp_path / "perts.csv", "cells_per_perturbation": 2}
    prep(tmp_path / "p26.h5ad", tmp_path / "p26.vcc", **known)
    return tmp_path


@pytest.fixture
def box(tmp_path):
    return make_box(tmp_path)


def get_body(vcc) -> bytes:
    with tarfile.open(vcc) as tar:
        return tar.extractfile("pred.h5ad.zst").read()


def build(path, *members, fmt=tarfile.GNU_FORMAT):
    """Write a tar of (name, bytes) or of ready TarInfo objects."""
    with tarfile.open(path, "w", format=fmt) as tar:
        for m in members:
            if isinstance(m, tarfile.TarInfo):
                tar.addfile(m)
            else:
                info = tarfile.TarInfo(m[0])
                info.size = len(m[1])
                tar.addfile(info, io.BytesIO(m[1]))
    return path


def info(name, kind, target=""):
    out = tarfile.TarInfo(name)
    out.type, out.linkname = kind, target
    return out


def test_what_prep_writes_is_good(box):
    for name in ("p25.vcc", "p26.vcc"):
        result = lint(box / name, genes=box / "genes.csv")
        assert result.ok, result.problems
        assert result.facts["n_genes"] == 20
    assert [m.name for m in read_members(box / "p25.vcc")] == ["pred.h5ad.zst", "watermark.txt"]
    assert [m.name for m in read_members(box / "p26.vcc")] == ["meta.json", "pred.h5ad.zst"]


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (info("pred.h5ad.zst", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
        (info("pred.h5ad.zst", tarfile.LNKTYPE, "watermark.txt"), "a hard link"),
        (info("pred.h5ad.zst", tarfile.DIRTYPE), "a folder"),
        (info("pred.h5ad.zst", tarfile.CHRTYPE), "of type"),
        (info("pred.h5ad.zst", tarfile.FIFOTYPE), "of type"),
        (("../pred.h5ad.zst", b"x"), "not a plain file name"),
        (("/etc/cron.d/x", b"x"), "not a plain file name"),
        (("a/b", b"x"), "not a plain file name"),
        (("n" * 300, b"x"), "a long name"),
    ],
)
def test_hostile_members_are_refused(box, member, says):
    bad = build(box / "bad.vcc", member, ("watermark.txt", b"vcc-prep"))
    with pytest.raises(DataError, match=says):
        read_members(bad)
    result = lint(bad)
    assert not result.ok
    assert says in result.problems[0]


def test_members_twice_missing_extra_or_out_of_order(box):
    body, mark = ("pred.h5ad.zst", get_body(box / "p25.vcc")), ("watermark.txt", b"vcc-prep")
    cases = {
        (body, body, mark): "two members are named",
        (mark,): "pred.h5ad.zst is missing",
        (body, mark, ("evil.sh", b"rm")): "there are unexpected members: evil.sh",
        (mark, body): "instead of pred.h5ad.zst and watermark.txt, in this order",
        (body, ("watermark.txt", b"vcc-prep\n")): "does not hold the 8 bytes",
        (("pred.h5ad.zst", b""), mark): "is empty",
        (("pred.h5ad.zst", b"not zstd at all"), mark): "not complete zstd data",
        (("pred.h5ad.zst", body[1][: len(body[1]) // 2]), mark): "",
        (("pred.h5ad.zst", body[1] + b"junk"), mark): "",
    }
    for members, says in cases.items():
        result = lint(build(box / "x.vcc", *members))
        assert not result.ok, members
        assert any(says in p for p in result.problems), (says, result.problems)
    assert lint(build(box / "x.vcc", body, mark)).ok


def test_a_bomb_is_stopped(box):
    packer = zstandard.ZstdCompressor(level=19)
    inner = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(get_body(box / "p25.vcc"))).read()
    assert int.from_bytes(inner[40:48], "little") == len(inner)  # where the superblock says that the file ends
    endless = inner[:40] + (1 << 50).to_bytes(8, "little") + inner[48:]
    bomb = packer.compress(endless + bytes(40 << 20))
    small = lint(build(box / "b.vcc", ("pred.h5ad.zst", bomb), ("watermark.txt", b"vcc-prep")), max_bytes=1 << 20)
    assert any("unpacks to more than" in p for p in small.problems)
    bomb = packer.compress(endless + bytes(600 << 20))
    assert any(
        "like a decompression bomb" in p
        for p in lint(build(box / "b.vcc", ("pred.h5ad.zst", bomb), ("watermark.txt", b"vcc-prep"))).problems
    )
    for body, says in (
        (bytes(900 << 20), "does not hold an HDF5 file"),
        (inner + bytes(900 << 20), "unpacks to more than"),
    ):
        found = lint(build(box / "b.vcc", ("pred.h5ad.zst", packer.compress(body)), ("watermark.txt", b"vcc-prep")))
        assert says in found.problems[0]
        assert "unpacked_bytes" not in found.facts


def test_cut_files_and_no_tar(box):
    whole = (box / "p25.vcc").read_bytes()
    for n in (0, 100, 511, 700, len(get_body(box / "p25.vcc")) // 2):
        (box / "cut.vcc").write_bytes(whole[:n])
        assert not lint(box / "cut.vcc").ok, n
    (box / "text.vcc").write_text("hello\n" * 200)
    assert "not a tar" in lint(box / "text.vcc").problems[0]
    assert not lint(box / "absent.vcc").ok
    assert not lint(box).ok


def test_meta_is_checked_against_the_prediction(box):
    body = ("pred.h5ad.zst", get_body(box / "p26.vcc"))
    with tarfile.open(box / "p26.vcc") as tar:
        meta = json.load(tar.extractfile("meta.json"))
    assert meta["contexts"] == ["A", "B", "C"]
    assert meta["perts_fingerprint"] == get_fingerprint(["G2", "G1"])

    def problems(changed):
        return lint(build(box / "m.vcc", ("meta.json", json.dumps(changed).encode()), body)).problems

    assert problems(meta) == ()
    assert any("n_obs = 99" in p for p in problems(meta | {"n_obs": 99}))
    assert any("nnz = 1" in p for p in problems(meta | {"nnz": 1}))
    assert any("unexpected contexts: C" in p for p in problems(meta | {"contexts": ["A", "B"]}))
    assert lint(build(box / "m.vcc", ("meta.json", b"[" * 20000), body)).problems
    assert not lint(build(box / "m.vcc", ("meta.json", b"x" * 70_000), body)).ok
    without = lint(build(box / "m.vcc", body))
    assert without.ok, without.problems
    assert "no meta.json" in without.warnings[0]


def test_2025_refusals_name_the_culprit(box):
    rng = np.random.default_rng(0)
    genes = box / "genes.csv"
    bad = {
        "no control": (make(box / "a.h5ad", labels=["G1"] * 6), "no cell is the control 'non-targeting' (labels: G1"),
        "other genes": (make(box / "b.h5ad", genes=[*GENES[:-1], "Z"]), "1 genes of the list are missing (G19)"),
        "both scales": (make(box / "c.h5ad", X=rng.random((8, 20)) * 100), "neither counts nor log1p"),
        "negative": (make(box / "d.h5ad", X=rng.normal(0, 1, (8, 20))), "negative values"),
        "nan": (make(box / "e.h5ad", X=np.where(np.eye(8, 20) > 0, np.nan, 0.5)), "not finite at cell c0"),
        "twice": (make(box / "f.h5ad", genes=["G0", *GENES[:-1]]), "gene names are duplicates (G0"),
    }
    for what, (path, says) in bad.items():
        with pytest.raises(DataError) as e:
            prep(path, box / "out.vcc", genes=genes)
        assert says in str(e.value), (what, str(e.value))
        assert not (box / "out.vcc").exists()
    with pytest.raises(DataError, match="at most 5 are allowed"):
        prep(box / "p25.h5ad", box / "out.vcc", genes=genes, max_cells=5)
    leftovers = [p.name for p in box.iterdir() if "out" in p.name]
    assert leftovers == []


def test_layouts_and_orders_give_the_same_container(box):
    genes = box / "genes.csv"
    X = np.random.default_rng(3).poisson(1.0, (8, 20)).astype(np.float32)
    back = np.arange(20)[::-1]
    make(box / "csr.h5ad", X=X)
    make(box / "csc.h5ad", X=X, fmt=sparse.csc_matrix)
    make(box / "dense.h5ad", X=X, fmt=np.asarray)
    make(box / "back.h5ad", X=X[:, back], genes=[GENES[i] for i in back])
    bodies = set()
    for name in ("csr", "csc", "dense", "back"):
        result = prep(box / f"{name}.h5ad", box / f"{name}.vcc", genes=genes)
        assert result.normalized
        raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(get_body(box / f"{name}.vcc"))).read()
        (box / "inner.h5ad").write_bytes(raw)
        inner = ad.read_h5ad(box / "inner.h5ad")
        assert list(inner.var_names) == GENES
        bodies.add(inner.X.toarray().tobytes())
    assert len(bodies) == 1


def test_output_is_guarded(box):
    with pytest.raises(UsageError, match="exists"):
        prep(box / "p25.h5ad", box / "p25.vcc", genes=box / "genes.csv")
    before = (box / "p25.vcc").read_bytes()
    prep(box / "p25.h5ad", box / "p25.vcc", genes=box / "genes.csv", force=True)
    assert (box / "p25.vcc").read_bytes()[:512] == before[:512]
    with pytest.raises(UsageError, match="the input itself"):
        prep(box / "p25.h5ad", box / "p25.h5ad", genes=box / "genes.csv", force=True)


def test_rules_are_dated():
    from datetime import date

    assert get_rules_2025(date(2025, 10, 26)).max_cells == 100_000
    assert get_rules_2025(date(2025, 10, 27)).max_cells == 200_000
    assert get_rules_2025().max_cells == 200_000
    assert get_rules_2025(date(2024, 1, 1)).max_cells == 100_000
    assert RULES_2026.n_perturbations * RULES_2026.cells_per_perturbation * 3 <= RULES_2026.max_cells


def test_lists_are_read_as_the_challenge_writes_them(tmp_path):
    (tmp_path / "g.csv").write_text("gene_name\nA\nB\n")
    assert read_genes(tmp_path / "g.csv") == ["A", "B"]
    (tmp_path / "g.csv").write_text("A,1\nA,2\n")
    with pytest.raises(DataError, match="listed twice"):
        read_genes(tmp_path / "g.csv")
    (tmp_path / "p.csv").write_text("target_gene,context,n_cells\nA,X,5\nnon-targeting,X,9\nB,Y,\n")
    assert read_perturbations(tmp_path / "p.csv", "non-targeting") == {"X": {"A": 5}, "Y": {"B": 0}}
    (tmp_path / "p.csv").write_text("target_gene,n_cells\nA, \nnon-targeting,1\nD,7.0\nD,7\nE\n")
    assert read_perturbations(tmp_path / "p.csv", "NTC") == {None: {"A": 0, "D": 7, "E": 0}}
    for odd in ("²", "inf", "nan", "-3", "1.5", "1e30", "many"):
        (tmp_path / "p.csv").write_text(f"target_gene,n_cells\nA,{odd}\n")
        with pytest.raises(DataError, match=f"n_cells of 'A' is '{odd}', not a number of cells"):
            read_perturbations(tmp_path / "p.csv", "NTC")
    (tmp_path / "p.csv").write_text("target_gene,n_cells\nA,5\nA,6\n")
    with pytest.raises(DataError, match="'A' has both 5 and 6 cells"):
        read_perturbations(tmp_path / "p.csv", "NTC")
    (tmp_path / "p.csv").write_text("target_gene\nA\n")
    assert read_perturbations(tmp_path / "p.csv", "NTC") == {None: {"A": None}}
    (tmp_path / "manifest.json").write_text('{"contexts": ["D", "E"], "panel_id": "final"}')
    assert read_contexts(None, tmp_path / "p.csv") == (("D", "E"), "final")
    assert read_contexts(("A",), tmp_path / "p.csv") == (("A",), None)
    assert read_contexts(None) == (("A", "B", "C"), None)
    assert parse_contexts(" D, E ") == ("D", "E")
    with pytest.raises(UsageError):
        parse_contexts(" , ")
    with pytest.raises(UsageError):
        parse_day("yesterday")
