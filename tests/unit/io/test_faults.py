"""Every damaged input that we know of: the error says what is wrong and where, and nothing is ever silently off.

Each case runs the whole command in this process; ``test_fuzz`` runs mutants in children, where a crash is seen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.files import TEXT, make_counts, write_frame_tables, write_h5ad, write_h5mu, write_matrix, write_sparse
from vcelltools.cli.main import main

COUNTS = make_counts(80, 60, density=0.4)
TOP = 10


@dataclass
class Outcome:
    code: int
    body: dict
    stderr: str

    @property
    def error(self) -> str:
        e = self.body["error"]
        return f"{e['message']} | {e['hint']}"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., Outcome]:
    """``run(path, *options)``: ``vcelltools hvg`` in this process, with ``--json``."""

    def call(path: Path, *options: str) -> Outcome:
        out = tmp_path / "genes.txt"
        out.unlink(missing_ok=True)
        argv = ["vcelltools", "hvg", str(path), "--top", str(TOP), "--out", str(out), "--json", "--force", *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        code = stop.value.code or 0
        body = json.loads(said.out)
        assert ("error" in body) == (code != 0)
        assert out.exists() == (code == 0)
        if code == 0:
            body["genes"] = out.read_text().split()
        return Outcome(int(code), body, said.err)

    return call


@pytest.fixture
def good(tmp_path) -> Path:
    return write_h5ad(tmp_path / "f.h5ad", COUNTS)


@pytest.fixture
def genes(good, run) -> list[str]:
    """What the undamaged file gives."""
    return run(good).body["genes"]


def edit(path: Path, change: Callable[[h5py.File], object]) -> Path:
    with h5py.File(path, "a") as f:
        change(f)
    return path


def put(key: str, at: int, value: object) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        f[key][at] = value

    return change


def resize(key: str, n: int) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        values = f[key][()]
        del f[key]
        f[key] = np.resize(values, n)

    return change


def drop(key: str) -> Callable[[h5py.File], None]:
    def change(f: h5py.File) -> None:
        del f[key]

    return change


# ------------------------------------------------------------------ truncation, missing parts


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"layout": "dense"}], ids=["csr", "gzip", "dense"])
@pytest.mark.parametrize("cut", ["empty", "header", "half", "one byte"])
def test_a_truncated_file_is_called_truncated(tmp_path, run, options, cut):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, **options)
    size = path.stat().st_size
    os.truncate(path, {"empty": 0, "header": 20, "half": size // 2, "one byte": size - 1}[cut])
    r = run(path)
    assert r.code == 3
    assert "f.h5ad" in r.error
    assert ("empty" if cut == "empty" else "truncated") in r.error


def test_what_is_not_a_file_of_cells_is_said_plainly(tmp_path, run):
    (tmp_path / "a.h5ad").write_bytes(b"\x1f\x8b" + bytes(100))
    assert "gunzip a.h5ad" in run(tmp_path / "a.h5ad").error
    assert "no such file" in run(tmp_path / "nope.h5ad").error
    with h5py.File(tmp_path / "b.h5ad", "w") as f:
        f["x"] = 1
    r = run(tmp_path / "b.h5ad")
    assert r.code == 3
    assert "X is missing" in r.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_is_an_environment_fault(good, run):
    good.chmod(0)
    assert run(good).code == 4


@pytest.mark.parametrize("key", ["X/indptr", "X/indices", "X/data", "obs", "var", "obs/_index", "var/_index"])
def test_a_missing_part_is_named(good, run, key):
    r = run(edit(good, drop(key)))
    assert r.code == 3
    assert f"{key} is missing" in r.error


def test_a_part_of_the_wrong_kind_is_named(good, run):
    edit(good, drop("X/indptr"))
    r = run(edit(good, lambda f: f.create_group("X/indptr")))
    assert r.code == 3
    assert "X/indptr is a group" in r.error


# ------------------------------------------------------------------ indptr, indices, data, shape

STRUCTURE = {
    "column = n_genes": (put("X/indices", 5, 60), "60"),
    "column 2e9": (put("X/indices", 5, 2_000_000_000), "2,000,000,000"),
    "column -5": (put("X/indices", 5, -5), "-5"),
    "indptr decreases": (put("X/indptr", 3, 0), "indptr decreases"),
    "indptr past the end": (put("X/indptr", 80, 10**6), "indptr ends at 1,000,000"),
    "indptr huge in the middle": (put("X/indptr", 40, 2**31 - 1), "indptr decreases"),
    "indptr negative": (put("X/indptr", 1, -7), "indptr decreases"),
    "indptr does not start at 0": (put("X/indptr", 0, 1), "indptr starts at 1"),
    "indptr too short": (resize("X/indptr", 70), "indptr has 70"),
    "data shorter than indices": (resize("X/data", 100), "data holds 100 values but indices"),
    "indices shorter than data": (resize("X/indices", 100), "but indices holds 100"),
    "shape says more cells": (lambda f: f["X"].attrs.__setitem__("shape", (90, 60)), "indptr has 81"),
    "shape says more genes": (lambda f: f["X"].attrs.__setitem__("shape", (80, 2**40)), "60 names"),
    "shape is negative": (lambda f: f["X"].attrs.__setitem__("shape", (-80, 60)), "shape attribute"),
    "no shape": (lambda f: f["X"].attrs.__delitem__("shape"), "shape attribute"),
    "shape is text": (lambda f: f["X"].attrs.__setitem__("shape", "80, 60"), "X"),
    "unknown encoding": (lambda f: f["X"].attrs.__setitem__("encoding-type", "coo_matrix"), "coo_matrix"),
    "float indices": (lambda f: (drop("X/indices")(f), f.create_dataset("X/indices", data=np.ones(9)))[1], "indices"),
    "obs too short": (resize("obs/_index", 70), "70"),
    "var too short": (resize("var/_index", 50), "50"),
    "NaN": (put("X/data", 7, np.nan), "nan"),
    "inf": (put("X/data", 7, np.inf), "inf"),
    "negative": (put("X/data", 7, -3), "-3"),
    "huge": (put("X/data", 7, 3e30), "3e+30"),
    "one fraction": (put("X/data", 7, 1.5), "not whole numbers|not a whole number"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_damaged_structure_is_refused_with_its_place(good, run, name):
    change, match = STRUCTURE[name]
    r = run(edit(good, change))
    assert r.code == 3
    assert any(m in r.error for m in match.split("|")), r.error
    assert "f.h5ad" in r.error


@pytest.mark.parametrize("name", ["NaN", "inf", "negative", "huge"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_bad_value_is_named_by_cell_and_gene(tmp_path, run, layout, name):
    x = COUNTS.astype(float)
    x[33, 44] = {"NaN": np.nan, "inf": np.inf, "negative": -1, "huge": 3e30}[name]
    r = run(write_h5ad(tmp_path / "f.h5ad", x, layout=layout, dtype="float64"))
    assert r.code == 3
    assert "cell33" in r.error
    assert "gene44" in r.error


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("indices", "has the gene index 18,446,744,073,709,551,615, but there are only 60 genes"),
        ("indptr", "indptr holds 9,223,372,036,854,775,812 at position 3, but"),
        ("data", "holds 9,223,372,036,854,775,812: values above the largest count"),
    ],
)
def test_unsigned_numbers_above_int64_are_refused_and_shown_as_they_are(good, run, part, said):
    with h5py.File(good, "r+") as f:
        values = f[f"X/{part}"][()].astype(np.uint64)
        values[3] = 2**64 - 1 if part == "indices" else 2**63 + 4
        attrs = dict(f[f"X/{part}"].attrs)
        del f[f"X/{part}"]
        f.create_dataset(f"X/{part}", data=values).attrs.update(attrs)
    got = run(good)
    assert got.code == 3 and said in got.error, got.error


@pytest.mark.parametrize("index", [80, 2**31 - 1, -5])
def test_bad_rows_of_csc_are_refused(tmp_path, run, index):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout="csc")
    r = run(edit(path, put("X/indices", 11, index)))
    assert r.code == 3
    assert f"{index:,}" in r.error


def test_duplicates_are_summed_and_unsorted_indices_are_fine(tmp_path, run, genes):
    rng = np.random.default_rng(1)
    indptr, indices, data = [0], [], []
    n_split = 0
    for row in COUNTS:
        cols, vals = np.flatnonzero(row), row[row > 0]
        split = vals > 4  # as 2 and the rest
        cols = np.concatenate([cols, cols[split]])
        vals = np.concatenate([np.where(split, 2, vals), vals[split] - 2])
        order = rng.permutation(len(cols))
        indices += cols[order].tolist()
        data += vals[order].tolist()
        indptr.append(len(indices))
        n_split += int(split.sum())
    path = tmp_path / "g.h5ad"
    with h5py.File(path, "w") as f:
        write_sparse(
            f,
            "X",
            indptr=np.array(indptr),
            indices=np.array(indices),
            data=np.array(data, np.int32),
            shape=COUNTS.shape,
        )
        write_frame_tables(f, *COUNTS.shape)
    r = run(path)
    assert r.body["genes"] == genes
    assert any(f"{n_split:,}" in w for w in r.body["warnings"]), r.body["warnings"]


def test_zero_rows_and_columns_are_fine(run, good, genes):
    assert (COUNTS.sum(axis=1) == 0).any()
    assert (COUNTS.sum(axis=0) == 0).any()
    assert len(genes) == TOP


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_cells_or_no_genes_is_an_error(tmp_path, run, layout, shape):
    r = run(write_h5ad(tmp_path / "f.h5ad", np.zeros(shape), layout=layout))
    assert r.code == 3
    assert ("no cells" if shape[0] == 0 else "no genes") in r.error


def test_duplicate_gene_names_give_exactly_as_many_genes(good, run):
    def change(f: h5py.File) -> None:
        del f["var/_index"]
        f["var"].create_dataset("_index", data=np.array(["same"] * 60, object), dtype=TEXT)

    r = run(edit(good, change))
    assert r.code == 0
    assert len(set(r.body["genes"])) == TOP and all(g.startswith("ENSG") for g in r.body["genes"])  # told apart by id
    assert any("59 gene names" in w for w in r.body["warnings"]), r.body["warnings"]


# ------------------------------------------------------------------ not counts, dtypes


def test_values_that_are_not_counts_are_refused_with_the_remedy(tmp_path, run):
    path = write_h5ad(tmp_path / "f.h5ad", np.log1p(COUNTS))
    edit(path, lambda f: write_matrix(f, "layers/counts", COUNTS))
    r = run(path)
    assert r.code == 3
    assert r.body["error"]["kind"] == "not-counts"
    for part in ("not whole numbers", "min", "max", "--layer counts"):
        assert part in r.error
    assert run(path, "--layer", "counts").code == 0


def test_bool_is_refused(tmp_path, run):
    assert "boolean" in run(write_h5ad(tmp_path / "f.h5ad", COUNTS, dtype="bool")).error


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int64", "uint64", "float32", "float64", ">f4", ">i8"]
)
def test_every_dtype_gives_the_same_genes(tmp_path, run, genes, layout, dtype):
    path = write_h5ad(tmp_path / "d.h5ad", COUNTS, layout=layout, dtype=dtype)
    assert run(path).body["genes"] == genes


# ------------------------------------------------------------------ obs


@pytest.mark.parametrize("code", [3, 100, -2])
def test_a_category_code_out_of_range_is_refused(good, run, code):
    edit(good, put("obs/batch/codes", 9, code))
    r = run(good, "--batch-key", "batch")
    assert r.code == 3
    assert f"code {code} at row 9" in r.error
    assert run(good).code == 0  # the column is not needed here


def test_bytes_categories_are_read(good, run):
    before = run(good, "--batch-key", "batch").body

    def change(f: h5py.File) -> None:
        del f["obs/batch/categories"]
        f["obs/batch/categories"] = np.array([b"b0", b"b1", b"b2"])

    assert run(edit(good, change), "--batch-key", "batch").body["genes"] == before["genes"]


def test_a_missing_label_in_the_batch_column_is_refused(good, run):
    r = run(edit(good, put("obs/batch/codes", 9, -1)), "--batch-key", "batch")
    assert r.code == 3
    assert "cell 9" in r.error


def test_an_unknown_column_layer_and_modality_are_refused(good, run):
    assert "columns: batch, depth" in run(good, "--batch-key", "nope").error
    assert "matrices: X" in run(good, "--layer", "nope").error
    assert "no modalities" in run(good, "--modality", "rna").error


# ------------------------------------------------------------------ other files, links


@pytest.fixture
def secret(tmp_path) -> Path:
    return write_h5ad(tmp_path / "secret.h5ad", COUNTS)


def link_external(key: str, to: str) -> Callable[[Path], Callable[[h5py.File], None]]:
    def make(secret: Path) -> Callable[[h5py.File], None]:
        def change(f: h5py.File) -> None:
            if key in f:
                del f[key]
            f[key] = h5py.ExternalLink(str(secret), to)

        return change

    return make


@pytest.mark.parametrize(
    "key", ["X", "X/data", "X/indptr", "obs", "var", "var/_index", "layers", "mod", "matrix", "raw"]
)
def test_an_external_link_is_not_followed(good, secret, run, key):
    edit(good, link_external(key, "/X/data" if key == "X/data" else f"/{key}")(secret))
    r = run(good)
    if key in ("layers", "raw"):  # not needed, so not touched
        assert r.code == 0
        return
    assert r.code == 3
    assert "external link" in r.error


@pytest.mark.parametrize("key", ["obs/batch", "obs/batch/codes", "obs/batch/categories"])
def test_an_external_link_inside_obs_is_not_followed(good, secret, run, key):
    edit(good, link_external(key, f"/{key}")(secret))
    r = run(good, "--batch-key", "batch")
    assert r.code == 3
    assert "external link" in r.error
    assert run(good).code == 0


def test_external_raw_storage_is_refused(good, run, tmp_path):
    (tmp_path / "passwd").write_bytes(b"root" * 10_000)

    def change(f: h5py.File) -> None:
        shape, dtype = f["X/data"].shape, f["X/data"].dtype
        del f["X/data"]
        f.create_dataset("X/data", shape, dtype, external=[(str(tmp_path / "passwd"), 0, h5py.h5f.UNLIMITED)])

    r = run(edit(good, change))
    assert r.code == 3
    assert "another file" in r.error


def test_a_virtual_dataset_is_refused(good, secret, run):
    def change(f: h5py.File) -> None:
        shape, dtype = f["X/data"].shape, f["X/data"].dtype
        del f["X/data"]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(str(secret), "X/data", shape)
        f.create_virtual_dataset("X/data", layout)

    r = run(edit(good, change))
    assert r.code == 3
    assert "virtual" in r.error


def test_soft_links_are_followed_and_loops_are_not(good, run, genes):
    def relink(f: h5py.File) -> None:
        f.move("X", "layers/x")
        f["X"] = h5py.SoftLink("/layers/x")

    assert run(edit(good, relink)).body["genes"] == genes

    def loop(f: h5py.File) -> None:
        del f["X"]
        f["a"], f["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")
        f["X"] = h5py.SoftLink("/a")

    r = run(edit(good, loop))
    assert r.code == 3
    assert "form a cycle" in r.error


def test_a_soft_link_to_an_external_link_is_not_followed(good, secret, run):
    def change(f: h5py.File) -> None:
        del f["X"]
        f["far"] = h5py.ExternalLink(str(secret), "/")
        f["X"] = h5py.SoftLink("/far/X")

    r = run(edit(good, change))
    assert r.code == 3
    assert "external link" in r.error


# ------------------------------------------------------------------ filters, chunks


def test_a_missing_filter_is_named(good, run):
    def change(f: h5py.File) -> None:
        n = len(f["X/data"])
        del f["X/data"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((n,))
        plist.set_filter(32_099, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((n,))
        h5py.h5d.create(f["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, plist)
        f["X/data"][...] = 1

    r = run(edit(good, change))
    assert r.code == 4
    assert "32099" in r.error
    assert "pip install hdf5plugin" in r.error


@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_data_that_was_never_written_is_refused_not_read_as_zeros(tmp_path, run, layout):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout=layout)
    key = "X" if layout == "dense" else "X/data"

    def replace(**options: object) -> Callable[[h5py.File], None]:
        def change(f: h5py.File) -> None:
            shape, attrs = f[key].shape, dict(f[key].attrs)
            del f[key]
            d = f.create_dataset(key, shape, "f4", **options)
            d.attrs.update(attrs)
            if options:
                d[:10] = 1

        return change

    r = run(edit(path, replace()))
    assert r.code == 3
    assert "never written" in r.error
    chunks = (10, 60) if layout == "dense" else (100,)
    for compression in (None, "gzip", "lzf"):
        r = run(edit(path, replace(chunks=chunks, compression=compression)))
        assert r.code == 3
        assert "are missing" in r.error


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": True}, {"fletcher32": True}], ids=["gzip", "shuffle", "fletcher32"]
)
def test_a_damaged_chunk_is_named(tmp_path, run, options):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, chunks=(100,), compression="gzip", **options)
    with h5py.File(path) as f:
        info = f["X/data"].id.get_chunk_info(2)
    with path.open("r+b") as raw:
        raw.seek(info.byte_offset)
        raw.write(b"\xff" * (info.size // 2))
    r = run(path)
    assert r.code == 3
    assert "X/data" in r.error


# ------------------------------------------------------------------ bombs: bounded memory

CHILD = """
import sys
from vcelltools.cli.main import main
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    with open(sys.argv[-1] + ".peak", "w") as f:
        f.write(peak.split()[1])
"""


def run_and_weigh(path: Path, *options: str) -> tuple[int, str, float]:
    """Run hvg in a child; return its exit code, what it said, and its peak memory in MB."""
    if sys.platform != "linux":
        pytest.skip("reads the peak memory from /proc")
    out = path.with_suffix(".txt")
    command = [sys.executable, "-c", CHILD, "hvg", str(path), "--top", "5", "--force", *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr, float(Path(f"{out}.peak").read_text()) / 1e3


def zeros(f: h5py.File, key: str, n: int, dtype: str = "f8", chunk: int = 1 << 22) -> None:
    """A gzipped data set of ``n`` zeros that takes a thousandth of its size."""
    d = f.create_dataset(key, (n,), dtype, chunks=(min(chunk, n),), compression="gzip")
    packed = zlib.compress(bytes(d.chunks[0] * d.dtype.itemsize), 9)
    for a in range(0, n, d.chunks[0]):
        d.id.write_direct_chunk((a,), packed)


@pytest.fixture(scope="module")
def base_mb(tmp_path_factory) -> float:
    path = write_h5ad(tmp_path_factory.mktemp("base") / "f.h5ad", COUNTS)
    code, said, peak = run_and_weigh(path)
    assert code == 0, said
    return peak


def bomb_elsewhere(f: h5py.File) -> None:
    zeros(f, "uns/bomb", 1 << 28)
    zeros(f, "obsm/bomb", 1 << 27)


def bomb_data(f: h5py.File) -> None:
    n = 1 << 28
    for key in ("X/data", "X/indices", "X/indptr"):
        del f[key]
    zeros(f, "X/data", n)
    zeros(f, "X/indices", n, "i4")
    f["X/indptr"] = np.linspace(0, n, 81).astype(np.int64)


def bomb_indptr(f: h5py.File) -> None:
    del f["X/indptr"]
    f["X"].attrs["shape"] = ((1 << 28) - 1, 60)
    zeros(f, "X/indptr", 1 << 28, "i8")


def bomb_categories(f: h5py.File) -> None:
    del f["obs/batch/categories"]
    zeros(f, "obs/batch/categories", 1 << 28)


def bomb_codes(f: h5py.File) -> None:
    del f["obs/batch/codes"]
    zeros(f, "obs/batch/codes", 1 << 28, "i8")


def bomb_chunk(f: h5py.File) -> None:
    n = 1 << 26
    for key in ("X/data", "X/indices", "X/indptr"):
        del f[key]
    zeros(f, "X/data", n, "f8", n)
    zeros(f, "X/indices", n, "i4", n)
    f["X/indptr"] = np.linspace(0, n, 81).astype(np.int64)


def bomb_text(f: h5py.File) -> None:
    """Sixty genes' names, and a category list that points half a million times at one text of a megabyte."""
    del f["obs/batch/categories"]
    n = 1 << 19
    d = f.create_dataset("obs/batch/categories", (n,), TEXT, chunks=(n,), compression="gzip")
    d[0] = "x" * (1 << 20)
    mask, raw = d.id.read_direct_chunk((0,))
    references = np.frombuffer(zlib.decompress(raw), "V16").copy()
    references[:] = references[0]
    d.id.write_direct_chunk((0,), zlib.compress(references.tobytes(), 9), mask)


BOMBS = {
    "elsewhere": (bomb_elsewhere, None),
    "data": (bomb_data, "not plausible"),
    "indptr": (bomb_indptr, "not plausible"),
    "categories": (bomb_categories, "not plausible"),
    "codes": (bomb_codes, "instead of 80"),
    "chunk": (bomb_chunk, "not plausible"),
    "text": (bomb_text, "not plausible"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_does_not_fill_the_memory(tmp_path, base_mb, name):
    change, match = BOMBS[name]
    path = edit(write_h5ad(tmp_path / "f.h5ad", COUNTS), change)
    assert path.stat().st_size < 8 << 20
    code, said, peak = run_and_weigh(path, "--batch-key", "batch")
    assert peak < base_mb + 200
    if match is None:
        assert code == 0
    else:
        assert code == 3
        assert match in said


def test_a_damaged_modality_does_not_matter_unless_it_is_asked_for(tmp_path, run):
    path = write_h5mu(tmp_path / "f.h5mu", {"rna": COUNTS, "prot": COUNTS})
    edit(path, put("mod/prot/X/indptr", 3, -1))
    assert run(path).code == 0
    r = run(path, "--modality", "prot")
    assert r.code == 3
    assert "mod/prot/X/indptr" in r.error


def test_the_source_is_never_written(good, run):
    before = (good.read_bytes(), good.stat().st_mtime_ns)
    run(good)
    copy = shutil.copy(good, good.with_name("copy.h5ad"))
    edit(Path(copy), put("X/indices", 5, 99))
    run(Path(copy))
    assert (good.read_bytes(), good.stat().st_mtime_ns) == before


# ------------------------------------------------------------------ damage on which HDF5 itself fails


def overwrite(path: Path, at: int, values: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(values)] = values
    path.write_bytes(bytes(raw))
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the look ahead needs fork")
def test_a_heap_that_hdf5_walks_for_ever_is_refused(good, run, monkeypatch):
    monkeypatch.setattr("vcelltools.io.hdf5.probe.CPU_SECONDS", 1)
    r = run(overwrite(good, good.read_bytes().index(b"GCOL") + 48, bytes(512)))
    assert r.code == 3
    assert "does not finish" in r.error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the look ahead needs a limit of the processor's time")
def test_beside_other_threads_a_new_interpreter_looks(good, run, monkeypatch):
    monkeypatch.setattr("vcelltools.io.hdf5.probe.CPU_SECONDS", 1)
    path = shutil.copy(good, good.with_name("other.h5ad"))
    overwrite(Path(path), good.read_bytes().index(b"GCOL") + 48, bytes(512))
    over = threading.Event()
    thread = threading.Thread(target=over.wait)  # as a notebook has some: forking would be unsafe
    thread.start()
    try:
        assert run(good).code == 0
        r = run(Path(path))
    finally:
        over.set()
        thread.join()
    assert r.code == 3
    assert "does not finish" in r.error


def test_modalities_that_are_an_array_are_refused(tmp_path, run):
    path = write_h5mu(tmp_path / "f.h5mu", {"rna": COUNTS})
    with h5py.File(path, "a") as f:
        del f["mod"]
        f["mod"] = np.arange(3)
    assert "mod, which should be the group of modalities, is an array" in run(path).error


@pytest.mark.parametrize("option", ["fletcher32", "scaleoffset", "gzip"])
def test_a_damaged_index_of_chunks_is_refused(tmp_path, run, option):
    options = {"fletcher32": True} if option == "fletcher32" else {"scaleoffset": 0}
    options = {"compression": "gzip"} if option == "gzip" else options
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout="dense", dtype="uint32", chunks=(10, 10), **options)
    raw = path.read_bytes()
    nodes = [i for i in range(0, len(raw) - 24, 8) if raw[i : i + 5] == b"TREE\x01"]  # node type 1: chunks
    assert nodes
    r = run(overwrite(path, nodes[-1] + 120, bytes(512)))
    assert r.code == 3
    assert "f.h5ad" in r.error


def test_lzf_data_that_unpacks_short_is_refused(tmp_path, run):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, layout="dense", dtype="int16", chunks=(20, 20), compression="lzf")
    with h5py.File(path) as f:
        info = f["X"].id.get_chunk_info(1)
    r = run(overwrite(path, info.byte_offset + 20, bytes(info.size - 20)))
    assert r.code == 3
    assert "lzf" in r.error
