"""What lies, is cut, or hides in a container: lint names it, and never takes it for good."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zstandard
from scipy import sparse

from tests.unit.challenge.test_vcc_container import GENES, build, get_body, make, make_box
from vcelltools.challenge.checks import get_fingerprint
from vcelltools.challenge.vcc import lint, prep
from vcelltools.errors import DataError

NO_OBJECTS = (b"null", b"[]", b"", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 60_000, b"{" * 9, b"1" * 5000)


@pytest.fixture
def box(tmp_path):
    return make_box(tmp_path)


def get_meta(vcc) -> dict:
    with tarfile.open(vcc) as tar:
        return json.load(tar.extractfile("meta.json"))


def pack_zip(raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("pred.h5ad.zst", raw)
    return out.getvalue()


def test_a_packed_tar_is_named(box):
    raw = (box / "p26.vcc").read_bytes()
    packers = {
        "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zip": pack_zip,
        "zstd": zstandard.ZstdCompressor().compress, "HDF5": lambda _: (box / "p26.h5ad").read_bytes(),
    }  # fmt: skip
    for name, packer in packers.items():
        (box / "x.vcc").write_bytes(packer(raw))
        result = lint(box / "x.vcc")
        assert not result.ok
        assert name in result.problems[0], result.problems


@pytest.mark.parametrize("cut", [1, 2, 4, 7])
def test_a_frame_without_its_end_is_refused(box, cut):
    """The tar is whole, and what the frame unpacks to as well; the end of its checksum is missing."""
    raw = zstandard.ZstdCompressor(write_checksum=True).compress((box / "p25.h5ad").read_bytes())
    for body in (raw[:-cut], raw + raw[:-cut]):
        with tarfile.open(box / "x.vcc", "w", format=tarfile.GNU_FORMAT) as tar:
            for name, part in (("pred.h5ad.zst", body), ("watermark.txt", b"vcc-prep")):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
        result = lint(box / "x.vcc")
        assert not result.ok
        assert any("truncated" in p or "unpacks to more than" in p for p in result.problems), result.problems


def test_a_tar_that_is_cut_anywhere_is_refused(box):
    raw = (box / "p25.vcc").read_bytes()
    end = len(raw.rstrip(b"\0")) // 512 * 512 + 512  # the first empty block of the end
    for cut in (len(raw) - 1, len(raw) - 511, end, end + 511, end + 512, end + 1023):
        (box / "x.vcc").write_bytes(raw[:cut])
        result = lint(box / "x.vcc")
        assert not result.ok, cut
        assert "truncated" in result.problems[0]
    (box / "x.vcc").write_bytes(raw[: end + 1024])
    assert lint(box / "x.vcc").ok


def test_padding_is_fine_and_data_behind_the_end_is_not(box):
    raw = (box / "p25.vcc").read_bytes()
    (box / "x.vcc").write_bytes(raw + bytes(3 << 20))
    assert lint(box / "x.vcc").ok
    for tail in (bytes(2 << 20) + b"x" * 512, raw):
        (box / "x.vcc").write_bytes(raw + tail)
        assert lint(box / "x.vcc").problems == ("there is data after the archive's end (copy or upload it again)",)
    with open(box / "x.vcc", "r+b") as f:
        f.truncate(80 << 20)
    assert "bytes that do not belong to the archive follow its last member" in lint(box / "x.vcc").problems[0]


def test_an_extended_header_cannot_rename_a_member(box):
    body = get_body(box / "p25.vcc")
    info = tarfile.TarInfo("pred.h5ad.zst")
    info.size = len(body)
    info.pax_headers = {"path": "../../pred.h5ad.zst"}
    with tarfile.open(box / "x.vcc", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(body))
    assert "changes the path of a member" in lint(box / "x.vcc").problems[0]


def test_a_name_that_is_not_text_is_refused(box):
    raw = bytearray((box / "p25.vcc").read_bytes())
    raw[0:4] = b"\xff\xfe\xfd\xfc"
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    (box / "x.vcc").write_bytes(bytes(raw))
    assert not lint(box / "x.vcc").ok


LIES = [
    ({"nnz": 1}, "nnz = 1, but the prediction has"),
    ({"nnz": 1.5}, "nnz is 1.5, not a whole number"),
    ({"nnz": "many"}, "nnz is 'many', not a whole number"),
    ({"nnz": True}, "nnz is True, not a whole number"),
    ({"nnz": float("nan")}, "nnz is nan, not a whole number"),
    ({"n_obs": -12}, "n_obs = -12, but the prediction has 12"),
    ({"n_obs": [12]}, "n_obs is [12], not a whole number"),
    ({"n_vars": 10**60}, "n_vars = 1000000"),
    ({"contexts": "ABC"}, "contexts is 'ABC', not a list of names"),
    ({"contexts": ["A", 2]}, "contexts is ['A', 2], not a list of names"),
    ({"contexts": ["A", "B"]}, "unexpected contexts: C"),
    ({"contexts": ["D", "E", "F"]}, "contexts are missing: D, E, F"),
    ({"perts_fingerprint": "sha256:0"}, "made for other perturbations than those of the prediction"),
    ({"perts_fingerprint": ["x"]}, "perts_fingerprint is ['x'], not text"),
    ({"perts_fingerprint": {"x": 1}}, "perts_fingerprint is {'x': 1}, not text"),
    ({"panel_id": ["x" * 3000]}, "…, not text"),
]


@pytest.mark.parametrize(("lie", "says"), LIES)
def test_meta_that_lies_is_a_problem(box, lie, says):
    meta = get_meta(box / "p26.vcc") | lie
    body = ("pred.h5ad.zst", get_body(box / "p26.vcc"))
    result = lint(build(box / "m.vcc", ("meta.json", json.dumps(meta).encode()), body))
    assert not result.ok
    assert any(says in p for p in result.problems), result.problems
    assert max(map(len, result.problems)) < 400


@pytest.mark.parametrize(
    "text", [b"null", b"[]", b"", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 60_000, b"{" * 9, b"1" * 5000]
)
def test_meta_that_is_no_object_is_a_problem(box, text):
    result = lint(build(box / "m.vcc", ("meta.json", text), ("pred.h5ad.zst", get_body(box / "p26.vcc"))))
    assert not result.ok
    assert "meta.json is not" in result.problems[0]


def test_the_list_given_to_lint_must_be_the_one_it_was_packed_with(box):
    (box / "more.csv").write_text("target_gene\nG1\nG2\nG3\n")
    result = lint(box / "p26.vcc", perturbations=box / "more.csv", cells_per_perturbation=2)
    assert any("1 perturbations are missing (G3)" in p for p in result.problems)
    assert any("made for other perturbations than those in" in p for p in result.problems)


def pack_inner(box, path, adata, *, meta=None):
    """Wrap any AnnData as a 2026 container."""
    adata.write_h5ad(box / "inner.h5ad")
    body = zstandard.ZstdCompressor().compress((box / "inner.h5ad").read_bytes())
    members = [("meta.json", json.dumps(meta).encode())] if meta else []
    return build(path, *members, ("pred.h5ad.zst", body))


def test_a_context_may_not_be_missing_where_no_meta_names_them(box):
    whole = ad.read_h5ad(box / "p26.h5ad")
    part = whole[(whole.obs["context"] != "C").to_numpy()].copy()
    result = lint(pack_inner(box, box / "x.vcc", part))
    assert "contexts are missing: C" in result.problems
    whole.obs["context"] = [{"A": "D", "B": "E", "C": "F"}[c] for c in whole.obs["context"]]
    assert lint(pack_inner(box, box / "x.vcc", whole)).ok
    whole.obs["context"] = [f"new{c}" for c in whole.obs["context"]]
    meta = {"schema": 1, "contexts": ["newD", "newE", "newF"]}
    result = lint(pack_inner(box, box / "x.vcc", whole, meta=meta))
    assert result.ok, result.problems
    assert any("do not belong to either phase" in w for w in result.warnings)


def test_stored_zeros_may_be_counted_or_not(box):
    """The challenge's own tool counts what is stored."""
    whole = ad.read_h5ad(box / "p26.h5ad")
    whole.X.data[:3] = 0
    for nnz, good in ((whole.X.nnz, True), (whole.X.nnz - 3, True), (whole.X.nnz - 1, False)):
        result = lint(pack_inner(box, box / "x.vcc", whole, meta={"schema": 1, "nnz": nnz, "contexts": list("ABC")}))
        assert result.ok is good, result.problems


def test_what_nobody_reads_is_said(box):
    whole = ad.read_h5ad(box / "p26.h5ad")
    whole.layers["counts"] = whole.X.copy()
    whole.obs["batch"], whole.var["chromosome"] = "x", "1"
    whole.X = whole.X.toarray().astype(np.int64)
    result = lint(pack_inner(box, box / "x.vcc", whole))
    assert result.ok, result.problems
    text = "; ".join(result.warnings)
    for says in ("X is dense", "X is int64", "obs has columns that are not used: batch", "chromosome", "counts"):
        assert says in text, text


# ---- prep: what the message must say ----


def refuse(box, a, *, year=2026, **more) -> str:
    a.write_h5ad(box / "bad.h5ad")
    lists = {"perturbations": box / "perts.csv", "cells_per_perturbation": 2} if year == 2026 else {}
    with pytest.raises(DataError) as e:
        prep(box / "bad.h5ad", box / "bad.vcc", genes=box / "genes.csv", year=year, **lists | more)
    assert not (box / "bad.vcc").exists()
    return str(e.value)


def test_names_that_are_nearly_right_are_told_how(box):
    def change(f, *, genes=False):
        a = ad.read_h5ad(box / "p26.h5ad")
        if genes:
            a.var_names = [f(g) for g in a.var_names]
        else:
            a.obs["target_gene"] = [f(t) for t in a.obs["target_gene"]]
        return refuse(box, a)

    assert "(G1-1, G2-2); they match the missing ones without the guide number" in change(lambda t: f"{t}-{t[1:]}")
    assert "('G1 ', 'G2 '); they match the missing ones without surrounding spaces" in change(lambda t: t + " ")
    assert "(g1, g2); they match the missing ones in upper case" in change(str.lower)
    assert "without the part after the last dot" in change(lambda g: g + ".3", genes=True)
    assert "('', G2)" not in change(lambda t: "" if t == "G1" else t)
    assert "not on the list ('')" in change(lambda t: "" if t == "G1" else t)
    long = change(lambda t: t + "x" * 5000)
    assert len(long) < 2000
    assert "they match" not in change(lambda t: "G7" if t == "G1" else t)


def test_a_missing_context_is_said_once(box):
    a = ad.read_h5ad(box / "p26.h5ad")
    assert refuse(box, a[(a.obs["context"] != "C").to_numpy()].copy()).endswith("2026 rules: contexts are missing: C")


def test_refusals_of_counts_carry_the_remedy(box):
    a = ad.read_h5ad(box / "p26.h5ad")
    a.X.data[3] = 0.5
    assert "round the predicted counts" in refuse(box, a)
    a.X.data[3] = 3e6
    assert "scale the cells down" in refuse(box, a)


def test_an_empty_group_in_one_context_and_uneven_sets_are_warned_of(box):
    a = ad.read_h5ad(box / "p26.h5ad")
    here = ((a.obs["context"] == "A") & (a.obs["target_gene"] == "G2")).to_numpy()
    a.X = sparse.csr_matrix(a.X.multiply(~here[:, None]))
    a.obs["target_gene"] = ["G9" if i == 2 else t for i, t in enumerate(a.obs["target_gene"])]
    a.write_h5ad(box / "odd.h5ad")
    result = prep(box / "odd.h5ad", box / "odd.vcc", genes=box / "genes.csv", cells_per_perturbation=2)
    text = "; ".join(result.warnings)
    for says in ("perturbations were not checked", "context A: 1 perturbations are all zero in every cell (G2)",
                 "2 perturbations do not have 2 cells (B G1: 1, B G9: 1)",
                 "1 perturbations are not in every context (G9)"):  # fmt: skip
        assert says in text, text


def test_2025_values_beyond_float32_and_an_index_out_of_range(box):
    X = np.full((8, 20), 3.0)
    X[2, 3] = 1e300
    a = ad.read_h5ad(make(box / "x.h5ad", X=X))
    assert "not finite at cell c2 (row 2), gene G3 (1 such values in total" in refuse(box, a, year=2025)
    a.X.data[:] = -2.0
    assert "160 negative values" in refuse(box, a, year=2025)
    import h5py

    a.X.data[:] = 2.0
    a.write_h5ad(box / "i.h5ad")
    for bad in (-1, 20):
        with h5py.File(box / "i.h5ad", "r+") as f:
            f["X/indices"][3] = bad
        with pytest.raises(DataError, match=f"gene index {bad}, but there are only 20"):
            prep(box / "i.h5ad", box / "i.vcc", genes=box / "genes.csv", year=2025)


def test_columns_become_rows_in_bounded_memory(tmp_path, monkeypatch):
    """Small spill buckets: the rows come in several blocks, and are those of the CSR file."""
    from vcelltools.io.write import transpose

    monkeypatch.setattr(transpose, "_BUCKET_VALUES", 40)
    (tmp_path / "genes.csv").write_text("\n".join(GENES))
    X = np.random.default_rng(0).poisson(0.7, (50, 20)).astype(np.float32)
    labels = ["non-targeting"] * 20 + ["G1"] * 30
    back = np.arange(20)[::-1]
    inner = []
    for name, fmt in (("r", sparse.csr_matrix), ("c", sparse.csc_matrix)):
        make(tmp_path / f"{name}.h5ad", X=X[:, back], labels=labels, fmt=fmt, genes=[GENES[i] for i in back])
        prep(tmp_path / f"{name}.h5ad", tmp_path / f"{name}.vcc", genes=tmp_path / "genes.csv")
        inner.append(zstandard.ZstdDecompressor().stream_reader(io.BytesIO(get_body(tmp_path / f"{name}.vcc"))).read())
    (tmp_path / "i.h5ad").write_bytes(inner[1])
    got = ad.read_h5ad(tmp_path / "i.h5ad")
    assert pd.Index(got.var_names).tolist() == GENES
    (tmp_path / "i.h5ad").write_bytes(inner[0])
    want = ad.read_h5ad(tmp_path / "i.h5ad")
    assert (got.X != want.X).nnz == 0
    assert (got.X.indices == want.X.indices).all()


def test_the_fingerprint_is_of_sorted_unique_names():
    import hashlib

    want = "sha256:" + hashlib.sha256(b"A\nB").hexdigest()
    assert get_fingerprint(["B", "A", "B", ""]) == want
