"""Merging: one list of genes, cells in the order of the choice, and the same counts in every format."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import vcelltools as vc
from tests.atlases import OLD_RELEASE, RELEASE, STANDIN, TAHOE, make_experiment, make_ids, needs_standin, write_atlas
from vcelltools.atlas import Choice, fetch, merge, open_folder, open_source, plan_merge
from vcelltools.errors import DataError, NotCountsError, UsageError
from vcelltools.genes.identity import strip_version
from vcelltools.io import open_dataset


def fetch_all(source, out, **choice):
    done = fetch(open_source(str(source)), Choice(**(choice or {"all": True})), out)
    assert not done.failed, done.failed
    return out


def read_naive(folder, *, layer=None) -> tuple[pd.DataFrame, list[str]]:
    """Return the merge as computed by pandas: (cells × genes sorted by id, cell names)."""
    f = open_folder(folder)
    frames, names = [], []
    for name in f.ids:
        adata = ad.read_h5ad(f.get_raw(name))
        if f.files[name]["layer"] == "raw":
            adata = adata.raw.to_adata()
        X = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
        keys = [strip_version(str(v)) for v in adata.var.get("gene_ids", pd.Series(adata.var_names))]
        frames.append(pd.DataFrame(X, columns=keys).T.groupby(level=0).sum().T)
        names += [f"{name}:{b}" for b in adata.obs_names]
    return pd.concat(frames, ignore_index=True).fillna(0).sort_index(axis=1), names


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Write files with different genes, orders and layouts, versions in ids, and a gene in two columns."""
    d = tmp_path_factory.mktemp("mixed")
    ids = make_ids(60)
    experiments = {
        "SRX1": make_experiment(1, 13, ids),
        "SRX2": make_experiment(2, 9, ids[5:][::-1], layout="csc"),
        "ERX3": make_experiment(3, 7, [*ids[:20], *make_ids(5, 100)], layout="dense", top=40_000),
        "NRX4": make_experiment(4, 11, [f"{g}.{i % 9}" for i, g in enumerate(ids)], layout="csc", dtype="float64"),
        "SRX5": make_experiment(5, 6, [*ids[:10], f"{ids[3]}.1", f"{ids[3]}.2"], layout="csr", dtype="int32"),
    }
    return fetch_all(write_atlas(d / "src", experiments), d / "a")


def test_h5ad_is_the_naive_union(mixed):
    done = merge(mixed, force=True)
    adata = ad.read_h5ad(done.out)
    wanted, names = read_naive(mixed)
    assert adata.var_names.tolist() == wanted.columns.tolist() == sorted(wanted.columns)
    assert adata.obs_names.tolist() == names
    assert np.array_equal(adata.X.toarray(), wanted.to_numpy())
    assert adata.X.dtype == np.uint16 == np.dtype(done.dtype) and done.max == 40_000
    assert adata.X.has_sorted_indices and done.nnz == adata.X.nnz == np.count_nonzero(wanted)
    assert np.array_equal(adata.obs["umi_count"], wanted.sum(axis=1)) and done.sparsity == pytest.approx(
        1 - done.nnz / wanted.size
    )
    assert np.array_equal(adata.obs["gene_count"], (wanted > 0).sum(axis=1))
    assert adata.obs["experiment"].astype(str).tolist() == [n.split(":")[0] for n in names]
    table = pd.read_parquet(mixed / "genes.parquet").set_index("gene")
    assert any("several columns" in w for w in done.warnings)
    lacking = {g: [x for x in open_folder(mixed).ids if x in set(row)] for g, row in table["absent_from"].items()}
    assert lacking[make_ids(1, 100)[0]] == [x for x in open_folder(mixed).ids if x != "ERX3"]
    assert lacking[make_ids(1)[0]] == ["SRX2"] and table["n_experiments"].min() == 1


@pytest.mark.parametrize("format", ["zarr", "batches"])
def test_every_format_holds_the_same_counts(mixed, tmp_path, format):
    done = merge(mixed, format=format, out=tmp_path / "m", batch_size=2)
    wanted, names = read_naive(mixed)
    if format == "zarr":
        adata = ad.read_zarr(done.out)
        assert np.array_equal(adata.X.toarray(), wanted.to_numpy()) and adata.obs_names.tolist() == names
        return
    parts = sorted(done.out.iterdir())
    assert [p.name for p in parts] == ["batch_0000.h5", "batch_0001.h5", "batch_0002.h5"]
    X, cells, experiments = [], [], []
    for p in parts:
        with h5py.File(p) as f:
            assert f["X"].dtype == np.int32 and f["X"].compression == "gzip" and f["X"].compression_opts == 4
            assert f["X"].chunks[1] == f["X"].shape[1] and [g.decode() for g in f["genes"]] == list(wanted.columns)
            X.append(f["X"][:])
            cells += [c.decode() for c in f["cells"]]
            experiments += [c.decode() for c in f["obs/SRX_accession"]]
            assert f["cells"].dtype.kind == "S" and np.array_equal(f["obs/umi_count"], f["X"][:].sum(axis=1))
            assert np.array_equal(f["obs/gene_count"], (f["X"][:] > 0).sum(axis=1))
        with open_dataset(p) as ds:
            assert ds.kind == "batch" and ds.obs.columns == ["SRX_accession", "gene_count", "umi_count"]
    assert np.array_equal(np.vstack(X), wanted.to_numpy())
    assert [f"{e}:{c}" for e, c in zip(experiments, cells, strict=True)] == names


def test_a_store_without_a_file_between(mixed, tmp_path):
    wanted, names = read_naive(mixed)
    (tmp_path / "basis.txt").write_text("".join(f"{g}\n" for g in wanted.columns[10:2:-1]))
    done = merge(mixed, format="store", genes=tmp_path / "basis.txt", out=tmp_path / "stores" / "atlas")
    store = vc.open_store(done.out)
    rows = [names.index(n) for n in store.obs.index]
    assert np.array_equal(store.counts().toarray(), wanted.iloc[rows, 10:2:-1].to_numpy())
    assert np.array_equal(store.library_size, wanted.sum(axis=1).iloc[rows]) and vc.verify_store(done.out).ok
    with pytest.raises(UsageError, match="needs a gene list"):
        merge(mixed, format="store", out=tmp_path / "x")


def test_config_json_is_what_the_public_loader_takes(mixed):
    done = merge(mixed, force=True)
    body = json.loads((mixed / "config.json").read_text())
    assert list(body) == [
        "total_cells_requested", "total_cells_downloaded", "total_samples", "samples", "download_timestamp",
        "gene_list", "max_expression_value", "sparsity",
    ]  # fmt: skip
    keys = ["srx_accession", "file_path", "obs_count", "tissue", "tech_10x", "cell_prep", "disease", "perturbation"]
    assert all(list(s) == keys for s in body["samples"]) and len(body["samples"]) == body["total_samples"] == 5
    assert body["total_cells_downloaded"] == done.cells == 46 and body["max_expression_value"] == 40_000
    assert body["samples"][0]["file_path"].startswith("gs://a-bucket/atlas/h5ad/")
    assert body["gene_list"] == sorted(body["gene_list"]) and len(body["gene_list"]) == done.genes


def test_a_list_of_genes_keeps_its_order_and_says_what_is_lost(mixed, tmp_path):
    wanted, _ = read_naive(mixed)
    genes = [*wanted.columns[30:10:-3], "ENSG99999999999"]
    (tmp_path / "g.txt").write_text("".join(f"{g}\n" for g in genes))
    done = merge(mixed, genes=tmp_path / "g.txt", out=tmp_path / "m.h5ad")
    adata = ad.read_h5ad(done.out)
    expected = wanted.reindex(columns=genes, fill_value=0).to_numpy()
    assert adata.var_names.tolist() == genes and np.array_equal(adata.X.toarray(), expected)
    assert done.lost_counts == wanted.to_numpy().sum() - expected.sum()
    assert np.array_equal(adata.obs["umi_count"], wanted.sum(axis=1)), "library sizes are those of all genes"
    assert any("not in the list" in w for w in done.warnings) and any("not in any file" in w for w in done.warnings)
    (tmp_path / "s.txt").write_text("S003\nS007\n")  # symbols, which all files have
    by_symbol = ad.read_h5ad(merge(mixed, genes=tmp_path / "s.txt", out=tmp_path / "s.h5ad").out)
    assert by_symbol.var_names.tolist() == ["S003", "S007"]


def test_a_dtype_that_is_too_small_names_cell_and_gene_and_writes_nothing(mixed, tmp_path):
    with pytest.raises(DataError, match=r"ERX3: cell 'BC0000', gene 'ENSG00000000000' has 40,000") as e:
        merge(mixed, dtype="int16", format="batches", out=tmp_path / "b")
    assert e.value.exit_code == 3 and not (tmp_path / "b").exists()
    assert merge(mixed, dtype="uint32", out=tmp_path / "w.h5ad").dtype == "uint32"


def test_the_bytes_do_not_depend_on_threads(mixed, tmp_path):
    digests = set()
    for threads in (1, 2, 5):
        done = merge(mixed, out=tmp_path / f"{threads}.h5ad", threads=threads)
        digests.add(hashlib.sha256(done.out.read_bytes()).hexdigest())
    assert len(digests) == 1


def make_drafted(case: str) -> dict[str, ad.AnnData]:
    """Write three experiments, of which ``case`` says why pass 1 can or cannot write the result."""
    ids = make_ids(50)
    out = {f"SRX{k}": make_experiment(k, 30, ids if k else ids[::-1], top=700) for k in range(3)}
    if case == "zeros":
        X = out["SRX1"].X.copy()
        X.data[5] = 0
        out["SRX1"].X = X
    if case == "columns of one gene":
        both = make_experiment(2, 30, [*ids[:30], f"{ids[0]}.1"], top=700, layout="dense")
        both.X[0, 30] = 5
        out["SRX2"] = ad.AnnData(sparse.csr_matrix(both.X), both.obs, both.var)
    if case == "small counts":
        out = {f"SRX{k}": make_experiment(k, 30, ids) for k in range(3)}
    if case == "small counts at first":
        out["SRX0"] = make_experiment(0, 30, ids)
    if case == "large counts later":
        out["SRX2"] = make_experiment(2, 30, ids, top=70_000)
    return out


@pytest.mark.parametrize(
    ("case", "dtype", "drafted", "result"),
    [("usual", None, True, "uint16"), ("zeros", None, False, "uint16"), ("columns of one gene", None, False, "uint16"),
     ("small counts", None, False, "uint8"), ("small counts", "uint16", True, "uint16"),
     ("small counts at first", None, False, "uint16"), ("large counts later", None, False, "uint32"),
     ("large counts later", "int64", True, "int64"), ("usual", "float32", False, "float32")],
)  # fmt: skip
def test_writing_in_pass_1_gives_the_bytes_of_two_passes(tmp_path, monkeypatch, case, dtype, drafted, result):
    from vcelltools.atlas import _merge

    a = fetch_all(write_atlas(tmp_path / "src", make_drafted(case)), tmp_path / "a")
    passes = []
    second = _merge._write_h5ad
    monkeypatch.setattr(_merge, "_write_h5ad", lambda *args, **kw: passes.append(2) or second(*args, **kw))
    one = merge(a, out=tmp_path / "one.h5ad", dtype=dtype)
    assert (passes == []) == drafted and one.dtype == result
    monkeypatch.setattr(_merge._Draft, "is_worth", lambda self, largest: False)
    two = merge(a, out=tmp_path / "two.h5ad", dtype=dtype)
    assert passes and (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()
    assert {**one.to_json(), "out": ""} == {**two.to_json(), "out": ""}
    wanted, _ = read_naive(a)
    assert np.array_equal(ad.read_h5ad(tmp_path / "one.h5ad").X.toarray(), wanted.to_numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "one.h5ad", "src", "two.h5ad"]


def test_a_fault_after_the_first_rows_leaves_the_old_file(tmp_path):
    experiments = make_drafted("usual")
    X = experiments["SRX2"].X.copy()
    X.data[7] = -1
    experiments["SRX2"].X = X
    a = fetch_all(write_atlas(tmp_path / "src", experiments), tmp_path / "a")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "m.h5ad"
    ad.AnnData(np.ones((2, 2), np.float32)).write_h5ad(out)
    before = out.read_bytes()
    with pytest.raises(DataError, match="negative"):
        merge(a, out=out, force=True)
    assert out.read_bytes() == before and [p.name for p in out.parent.iterdir()] == ["m.h5ad"]


def test_missing_experiments_are_refused_or_skipped(mixed, tmp_path):
    import shutil

    shutil.copytree(mixed, tmp_path / "a")
    (tmp_path / "a" / "raw" / "SRX2.h5ad").unlink()
    with pytest.raises(DataError, match="SRX2"):
        merge(tmp_path / "a", force=True)
    assert plan_merge(tmp_path / "a", skip_failed=True).skipped == ["SRX2"]
    done = merge(tmp_path / "a", skip_failed=True, force=True, drop_raw=True)
    assert done.skipped == ["SRX2"] and done.cells == 37
    assert not list((tmp_path / "a" / "raw").iterdir()), "the files went once the merge was whole"


def test_a_file_without_counts_is_refused(tmp_path):
    adata = make_experiment(1, 8, make_ids(30))
    fractions = adata.copy()
    fractions.X = fractions.X * 0.37
    source = open_source(str(write_atlas(tmp_path / "src", {"S1": adata, "S2": fractions})))
    done = fetch(source, Choice(all=True), tmp_path / "a")
    assert done.failed[0][0] == "S2" and isinstance(done.error, DataError)
    late = make_experiment(1, 600, make_ids(300))
    late.X.data[late.X.nnz * 5 // 12] = 1.5  # between the positions at which values are sampled
    folder = fetch_all(write_atlas(tmp_path / "late", {"S1": late}), tmp_path / "b")
    with pytest.raises(NotCountsError, match=r"holds 1\.5, not a whole number"):
        merge(folder)
    assert not (folder / "merged.h5ad").exists()


def test_symbols_of_one_file_are_the_ids_of_the_others(tmp_path):
    ids = make_ids(20)
    by_symbol = make_experiment(2, 4, ids)
    by_symbol.var_names = by_symbol.var["gene_symbols"].tolist()
    by_symbol.var = by_symbol.var.drop(columns="gene_symbols")
    folder = fetch_all(write_atlas(tmp_path / "s", {"S1": make_experiment(1, 5, ids), "S2": by_symbol}), tmp_path / "a")
    adata = ad.read_h5ad(merge(folder).out)
    assert adata.var_names.tolist() == ids and adata.n_obs == 9


@needs_standin
@pytest.mark.parametrize("source", [RELEASE, OLD_RELEASE, TAHOE, STANDIN / "cellxgene"], ids=lambda p: p.name)
def test_the_stand_ins_merge_as_pandas_does(source, tmp_path):
    folder = fetch_all(source, tmp_path / "a")
    done = merge(folder)
    adata = ad.read_h5ad(done.out)
    wanted, names = read_naive(folder)
    assert np.array_equal(adata.X.toarray(), wanted[adata.var_names].to_numpy()) and adata.obs_names.tolist() == names
    if source == RELEASE:
        assert {"SRX_accession", "tissue", "cell_type", "gene_count_Unique"} <= set(adata.obs)
        assert np.array_equal(adata.obs["umi_count"], adata.obs["umi_count_Unique"]) and not done.warnings
        assert adata.var["gene_symbols"].notna().all()


MEASURE = """
import sys
from pathlib import Path
from vcelltools.atlas import merge
merge(sys.argv[1], out=sys.argv[2], threads=2)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent holds
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process its peak")
def test_four_times_the_cells_take_the_same_memory(tmp_path):
    """Memory must not grow with the values: 8 bytes per value would be 72 MB more than the smaller merge."""
    ids = make_ids(2000)
    rng = np.random.default_rng(0)
    peaks = []
    for n in (3000, 12_000):
        indices = 2 * np.arange(1000) + rng.integers(0, 2, (n, 1000))
        ends = np.arange(0, n * 1000 + 1, 1000)
        X = sparse.csr_matrix((np.ones(n * 1000, np.float32), indices.ravel(), ends), (n, 2000))
        names = [f"BC{i:05d}" for i in range(n // 2)]
        parts = {f"SRX{k}": ad.AnnData(X[k::2], pd.DataFrame(index=names), pd.DataFrame(index=ids)) for k in range(2)}
        folder = fetch_all(write_atlas(tmp_path / f"src{n}", parts, compression="lzf"), tmp_path / f"a{n}")
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / f"out{n}.h5ad")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks
