"""Fetching with s3fs from moto on loopback: anonymous reading, ranges, changed versions and missing keys."""

from __future__ import annotations

import hashlib

import pytest

from tests.atlases import make_atlas
from vcelltools.atlas import Access, Choice, Transfer, fetch, open_source
from vcelltools.atlas._remote import Changed, open_remote
from vcelltools.errors import EnvironmentFault

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
CHUNK = 16384
URL = "s3://a-bucket/atlas"


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    d = tmp_path_factory.mktemp("s3")
    make_atlas(d / "atlas", 3, cells=40, genes=60)
    return d


def put(client, key, raw, acl="public-read"):
    client.put_object(Bucket="a-bucket", Key=key, Body=raw, ACL=acl)


@pytest.fixture
def bucket(origin, monkeypatch, tmp_path):
    """Return a bucket with the atlas; no login of this machine is used."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        client = boto3.client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id="x",
            aws_secret_access_key="x",
        )  # fmt: skip
        client.create_bucket(Bucket="a-bucket", ACL="public-read")
        for path in origin.rglob("*"):
            if path.is_file():
                put(client, str(path.relative_to(origin)), path.read_bytes())
        yield client, f"http://{host}:{port}"
        client.close()
    finally:
        running.stop()


def access(url):
    return Access(endpoint_url=url, first_wait=0.01, retries=3)


def test_an_atlas_comes_whole_and_is_not_fetched_twice(bucket, origin, tmp_path):
    client, url = bucket
    out = tmp_path / "a"

    def run():
        return fetch(
            open_source(URL, access=access(url)), Choice(all=True), out, transfer=Transfer(chunk=CHUNK, jobs=2)
        )

    done = run()
    assert done.experiments == 3 and not done.failed and done.bytes_fetched > 0
    for path in (out / "raw").iterdir():
        assert path.read_bytes() == next(origin.rglob(path.name)).read_bytes()
    again = run()
    assert again.bytes_fetched == 0 and again.bytes_reused == done.bytes_fetched
    broken = out / "raw" / "SRX0001.h5ad"
    key = str(next(origin.rglob(broken.name)).relative_to(origin))
    broken.unlink()
    client.delete_object(Bucket="a-bucket", Key=key)
    lacking = run()
    assert [f["id"] for f in lacking.to_json()["failed"]] == ["SRX0001"]


def test_ranges_belong_to_one_version(bucket, origin):
    client, url = bucket
    path = next(origin.rglob("SRX0001.h5ad"))
    key = str(path.relative_to(origin))
    raw = path.read_bytes()
    remote = open_remote(f"s3://a-bucket/{key}", access(url))
    facts = remote.stat(f"s3://a-bucket/{key}")
    assert facts.size == len(raw) and facts.md5 == hashlib.md5(raw).hexdigest()
    got: list[bytes] = []
    remote.read(f"s3://a-bucket/{key}", 100, 300, facts, got.append)
    assert b"".join(got) == raw[100:300]
    put(client, key, raw[::-1])
    with pytest.raises(Changed):
        remote.read(f"s3://a-bucket/{key}", 300, 400, facts, got.append)


def test_what_is_not_public_is_refused_at_once(bucket, origin, tmp_path):
    client, url = bucket
    path = next(origin.rglob("SRX0001.h5ad"))
    put(client, str(path.relative_to(origin)), path.read_bytes(), acl="private")
    with pytest.raises(EnvironmentFault, match="access is denied") as e:
        fetch(open_source(URL, access=access(url)), Choice(all=True), tmp_path / "a")
    assert e.value.exit_code == 4
