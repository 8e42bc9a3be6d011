"""Fetching with gcsfs from a fake server: billing is off by default, versions never mix, hashes are checked."""

from __future__ import annotations

import pytest

from tests.atlases import make_atlas
from tests.fake_gcs import Bucket, serve_bucket
from vcelltools.atlas import Access, Choice, Transfer, fetch, make_plan, open_source
from vcelltools.errors import EnvironmentFault

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
CHUNK = 16384
URL = "gs://a-bucket/atlas"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    d = tmp_path_factory.mktemp("gcs")
    make_atlas(d / "atlas", 3, cells=40, genes=60)
    return d


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    """Use no login of this machine and no metadata server."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)


def run(bucket, tmp_path, **access):
    with serve_bucket(bucket) as url:
        source = open_source(URL, access=Access(endpoint_url=url, first_wait=0.01, retries=3, **access))
        return fetch(source, Choice(all=True), tmp_path / "a", transfer=Transfer(chunk=CHUNK, jobs=2))


def test_anonymous_reading_names_no_project(origin, tmp_path):
    bucket = Bucket("a-bucket", origin)
    done = run(bucket, tmp_path)
    assert done.experiments == 3
    for path in (tmp_path / "a" / "raw").iterdir():
        assert path.read_bytes() == next(origin.rglob(path.name)).read_bytes()
    assert bucket.queries and all("userProject" not in q and "Authorization" not in h for _, q, h in bucket.queries)
    ranges = [h.get("Range") for p, _, h in bucket.queries if p.startswith("/download") and "SRX0001" in p]
    assert ranges[0] == f"bytes=0-{CHUNK - 1}" and ranges[1] == f"bytes={CHUNK}-{2 * CHUNK - 1}"


def test_a_requester_pays_bucket_says_what_to_do_and_bills_nobody(origin, tmp_path):
    bucket = Bucket("a-bucket", origin, pays=True)
    with pytest.raises(EnvironmentFault, match="denied") as e:
        run(bucket, tmp_path)
    assert "billing_project" in e.value.hint and e.value.exit_code == 4
    assert all("userProject" not in q for _, q, _ in bucket.queries)


def test_the_project_that_was_named_is_billed_in_every_request(origin, tmp_path):
    bucket = Bucket("a-bucket", origin, pays=True)
    done = run(bucket, tmp_path, billing_project="my-project")
    assert done.experiments == 3
    storage = [q for p, q, _ in bucket.queries if "/storage/v1/b/" in p]
    assert storage and all(q.get("userProject") == ["my-project"] for q in storage)


def test_the_plan_says_who_pays_and_at_most_what(origin, tmp_path):
    bucket = Bucket("a-bucket", origin, pays=True)
    with serve_bucket(bucket) as url:
        source = open_source(URL, access=Access(endpoint_url=url, billing_project="p1"))
        plan = make_plan(source, Choice(all=True), tmp_path / "a", Transfer(price_per_gib=1024.0))
    assert plan.billing_project == "p1" and plan.cost == pytest.approx(plan.bytes / 2**30 * 1024, abs=1e-3)
    assert "p1 pays" in plan.describe() and not (tmp_path / "a").exists()


def test_a_new_generation_midway_starts_again(origin, tmp_path):
    bucket = Bucket("a-bucket", origin)
    bucket.faults["SRX0001.h5ad"] = ["", "replace"]
    done = run(bucket, tmp_path)
    assert done.experiments == 3
    starts = [h["Range"] for p, _, h in bucket.queries if p.startswith("/download") and "SRX0001" in p]
    assert starts.count(f"bytes=0-{CHUNK - 1}") == 2


def test_without_an_md5_the_crc32c_is_checked(origin, tmp_path):
    bucket = Bucket("a-bucket", origin, md5=False)
    assert run(bucket, tmp_path).experiments == 3
    bucket = Bucket("a-bucket", origin, md5=False)
    key = next(k for k in bucket.objects if k.endswith("SRX0002.h5ad"))
    described = bucket.describe(key)
    bucket.describe = lambda k, real=bucket.describe: {**real(k), **({"crc32c": "AAAAAA=="} if k == key else {})}
    assert described["crc32c"] != "AAAAAA=="
    done = run(bucket, tmp_path / "b")
    assert done.experiments == 2 and done.failed[0][0] == "SRX0002"
