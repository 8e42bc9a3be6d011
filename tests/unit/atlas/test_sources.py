"""Sources and their tables: presets, layouts, and ids and paths that a table must not contain."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.atlases import OLD_RELEASE, RELEASE, STANDIN, TAHOE, make_atlas, needs_standin
from vcelltools.atlas import PRESETS, Access, open_source
from vcelltools.atlas._remote import check_segments, get_place, get_scheme, join_url, show_url
from vcelltools.atlas._sources import map_path
from vcelltools.errors import DataError, EnvironmentFault, UsageError, VcellError

BASE = "gs://bucket/atlas/2026"


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("h5ad/a.h5ad", f"{BASE}/h5ad/a.h5ad"),
        (f"{BASE}/h5ad/F/O/a.h5ad", f"{BASE}/h5ad/F/O/a.h5ad"),
        ("gs://bucket/elsewhere/a.h5ad", "gs://bucket/elsewhere/a.h5ad"),
        ("gs://other/x/h5ad/F/O/a.h5ad", f"{BASE}/h5ad/F/O/a.h5ad"),
        ("/local/h5ad/F/a.h5ad", f"{BASE}/h5ad/F/a.h5ad"),
    ],
)
def test_paths_are_mapped_onto_the_base(path, url):
    assert map_path(path, BASE, where="table") == url


@pytest.mark.parametrize(
    "path",
    [
        "../secret.h5ad",
        "gs://bucket/a/../../other/x.h5ad",
        "gs://other/h5ad/../../../x.h5ad",
        "h5ad/%2e%2e/%2E%2E/x.h5ad",
        "h5ad/%252e%252e/x.h5ad",
        "h5ad\\..\\x.h5ad",
        "..\\x.h5ad",
        "/etc/passwd",
        "file:///etc/passwd",
        "gs://other/x.h5ad",
        "http://169.254.169.254/latest/meta-data",
        "ftp://bucket/h5ad/x.h5ad",
        "data:text/plain,x",
        "javascript:alert(1)",
        "gs://bucket/a\nb.h5ad",
        "gs://bucket/a\x00b.h5ad",
        "",
        "   ",
        None,
        3.0,
    ],
)
def test_paths_that_lead_elsewhere_are_refused(path):
    with pytest.raises(DataError):
        map_path(path, BASE, where="table")


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "/data/atlas-other/x.h5ad", "memory://x.h5ad"])
def test_a_local_table_stays_in_its_folder(path):
    with pytest.raises(DataError):
        map_path(path, "/data/atlas", where="table")
    assert map_path("/data/atlas/x.h5ad", "/data/atlas", where="table") == "/data/atlas/x.h5ad"


def test_a_host_is_the_sources_own_with_its_port():
    base = "http://host:8000/atlas?sig=1"
    assert map_path("http://host:8000/other/x.h5ad", base, where="t") == "http://host:8000/other/x.h5ad"
    for path in ("http://host:9000/x.h5ad", "http://host.evil.org:8000/x.h5ad", "http://host:8000@evil.org/x.h5ad"):
        with pytest.raises(DataError):
            map_path(path, base, where="t")
    assert map_path("x/y.h5ad", base, where="t") == "http://host:8000/atlas/x/y.h5ad?sig=1"


ODD = st.text(alphabet="a./\\%2eE:@?#h5ad \n\x00~-_é", max_size=24)


@settings(max_examples=400, deadline=None)
@given(scheme=st.sampled_from(["", "gs://bucket/", "gs://other/", "file://", "/", "http://bucket/"]), tail=ODD)
def test_whatever_a_table_says_the_file_read_lies_in_the_source(scheme, tail):
    try:
        url = map_path(scheme + tail, BASE, where="t")
    except DataError:
        return
    assert get_place(url) == ("gs", "bucket") and get_scheme(url) == "gs"
    check_segments(show_url(url), "t")


@settings(max_examples=300, deadline=None)
@given(tail=ODD, scheme=st.sampled_from(["", "/", "file://", "/data/atlas/", "gs://b/"]))
def test_a_local_source_reads_below_its_folder(tail, scheme):
    import posixpath

    try:
        url = map_path(scheme + tail, "/data/atlas", where="t")
    except DataError:
        return
    assert posixpath.normpath(show_url(url)).startswith("/data/atlas"), url


def write_table(d, **columns):
    folder = d / "metadata" / "GeneFull_Ex50pAS" / "Homo_sapiens"
    folder.mkdir(parents=True)
    rows = {"srx_accession": ["SRX1"], "file_path": ["gs://b/h5ad/SRX1.h5ad"], "obs_count": [3], **columns}
    pd.DataFrame(rows).to_parquet(folder / "sample_metadata.parquet")
    return d


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "..", ".hidden", "", "a\\b", "a\x00", "-rf", "a b", "x" * 300, None, "é"]
)
def test_ids_that_are_no_plain_names_are_refused(tmp_path, name):
    write_table(tmp_path, srx_accession=[name])
    with pytest.raises(DataError, match="id"):
        open_source(str(tmp_path))


def test_ids_twice_and_numbers_of_cells_that_are_none_are_refused(tmp_path):
    two = {"srx_accession": ["S1", "S1"], "file_path": ["h5ad/a.h5ad"] * 2}
    write_table(tmp_path / "a", **two, obs_count=[1, 2])
    with pytest.raises(DataError, match="twice"):
        open_source(str(tmp_path / "a"))
    write_table(tmp_path / "b", obs_count=[-5])
    with pytest.raises(DataError, match="not a number of cells"):
        open_source(str(tmp_path / "b"))


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=300), cut=st.integers(0, 4000), ending=st.sampled_from(["parquet", "csv", "tsv", "json"]))
def test_damaged_tables_are_data_errors(tmp_path_factory, raw, cut, ending):
    d = tmp_path_factory.mktemp("t")
    path = d / f"index.{ending}"
    if ending == "parquet" and cut % 2:
        pd.DataFrame({"id": ["a"], "path": ["x.h5ad"]}).to_parquet(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: cut % len(whole)] + raw)
    else:
        path.write_bytes(raw)
    try:
        open_source(str(path))
    except VcellError as e:
        assert e.exit_code in (2, 3)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "json"])
def test_an_index_of_any_kind(tmp_path, ending):
    frame = pd.DataFrame({"name": ["a", "b"], "where": ["x/a.h5ad", "x/b.h5ad"], "n": [5, 7]})
    path = tmp_path / f"i.{ending}"
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending == "json":
        path.write_text(frame.to_json(orient="records"))
    else:
        frame.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    source = open_source(str(path), id_col="name", path_col="where", count_col="n")
    assert source.ids == ["a", "b"] and source.cells.tolist() == [5, 7]
    assert source.urls[0] == f"{tmp_path}/x/a.h5ad"
    with pytest.raises(DataError, match="ids"):
        open_source(str(path))
    with pytest.raises(DataError, match="did you mean 'name'"):
        open_source(str(path), id_col="nam")


def test_a_folder_of_files_and_files_in_memory(tmp_path):
    import fsspec

    make_atlas(tmp_path / "s", 3)
    folder = tmp_path / "s" / "h5ad" / "GeneFull_Ex50pAS" / "Homo_sapiens"
    source = open_source(str(folder))
    assert source.ids == ["SRX0000", "SRX0001", "SRX0002"] and np.isnan(source.cells).all()
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "s").rglob("*"):
        if path.is_file():
            memory.pipe(f"/atlas/{path.relative_to(tmp_path / 's')}", path.read_bytes())
    try:
        assert open_source("memory://atlas").ids == source.ids
    finally:
        memory.rm("/atlas", recursive=True)


@needs_standin
def test_every_layout_of_the_stand_ins():
    new, old, tahoe = (open_source(str(p)) for p in (RELEASE, OLD_RELEASE, TAHOE))
    assert [x[:3] for x in new.ids] == ["SRX", "SRX", "ERX", "NRX", "SRX", "SRX"] and new.cells.sum() == 332
    assert old.cells.sum() == 892 and len(tahoe) == 2 and np.isnan(tahoe.cells).all()
    cellxgene = open_source(str(STANDIN / "cellxgene"))
    assert cellxgene.cells.tolist() == [50, 50] and cellxgene.table["tissue"][0] == ["blood"]
    with pytest.raises(DataError, match="Homo_sapiens"):
        open_source(str(RELEASE), organism="Homo sapien")


def test_presets_name_the_buckets_that_are_open():
    assert PRESETS["scbasecount"].base.format(release="R") == "gs://arc-institute-virtual-cell-atlas/scbasecount/R"
    with pytest.raises(DataError, match="closed") as e:
        open_source("gs://arc-scbasecount/2025-02-25")
    assert "arc-institute-virtual-cell-atlas" in e.value.hint
    with pytest.raises(UsageError, match="scbasecount"):
        open_source("scbasecount2")
    with pytest.raises(UsageError, match="releases"):
        open_source("cellxgene", release="x")


def test_a_library_that_is_missing_is_named_with_its_pip_line(monkeypatch):
    import importlib

    real = importlib.import_module

    def hide(name, *args):
        if name in ("gcsfs", "s3fs", "aiohttp"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", hide)
    for url, extra in (("gs://b/x", "gcs"), ("s3://b/x", "s3"), ("https://h/x", "http")):
        with pytest.raises(EnvironmentFault) as e:
            open_source(url, access=Access())
        assert f'pip install "vcelltools[{extra}]"' in e.value.hint


def test_urls_are_shown_without_secrets():
    assert show_url("https://u:p@h/x/y?token=1#z") == "https://h/x/y"
    assert show_url("gs://b/x") == "gs://b/x" and show_url("file:///a/b") == "/a/b" and show_url("/a b") == "/a b"
    assert join_url("https://u:p@h/x?t=1", "y", "z.h5ad") == "https://u:p@h/x/y/z.h5ad?t=1"


def test_cellxgene_properties_are_lists_of_labels(tmp_path):
    rows = [
        {"dataset_id": "d1", "cell_count": 5, "tissue": [{"label": "lung"}, {"label": "blood"}],
         "is_primary_data": [True], "assets": [{"filetype": "RDS"}, {"filetype": "H5AD", "url": "files/d1.h5ad"}]},
        {"dataset_id": "d2", "cell_count": 5, "tissue": "odd", "assets": "odd"},
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(rows))
    source = open_source(str(tmp_path / "x.json"))
    assert source.ids == ["d1"] and source.table["tissue"][0] == ["lung", "blood"]
