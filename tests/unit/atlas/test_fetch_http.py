"""Fetching over HTTP from a faulty server: no file is wrong, and no complete file is downloaded again."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from tests.atlases import make_atlas
from tests.faulty_server import Plan, serve
from vcelltools.atlas import Access, Choice, Transfer, fetch, open_folder, open_source, verify_folder
from vcelltools.errors import DataError, EnvironmentFault

pytest.importorskip("aiohttp", reason="the extra http is not installed")
CHUNK = 8192
FAST = Transfer(chunk=CHUNK, jobs=3)
HASTY = Access(timeout=0.7, retries=4, first_wait=0.01)
FILE = "SRX0001.h5ad"
PORTS: dict = {}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return make_atlas(tmp_path_factory.mktemp("origin"), 4, cells=60, genes=80)


def get(origin, tmp_path, plan=None, *, transfer=FAST, choice=None, access=None, **options):
    with serve(origin, plan, port=PORTS.get(tmp_path, 0)) as (url, log):
        PORTS[tmp_path] = int(url.rpartition(":")[2])
        source = open_source(url, access=access or HASTY)
        done = fetch(source, choice or Choice(all=True), tmp_path / "a", transfer=transfer, **options)
    return done, log


def check(origin, tmp_path, done, n=4):
    assert done.experiments == n
    for path in (tmp_path / "a" / "raw").iterdir():
        if path.suffix == ".h5ad":
            assert path.read_bytes() == next(origin.rglob(path.name)).read_bytes(), path
    assert not list((tmp_path / "a" / "raw").glob("*.part*")), "nothing half is left"
    folder = open_folder(tmp_path / "a")
    for name, facts in folder.files.items():
        assert facts["sha256"] == hashlib.sha256(folder.get_raw(name).read_bytes()).hexdigest()


def size(origin, name=FILE):
    return next(origin.rglob(name)).stat().st_size


def test_ranges_are_asked_for_one_after_the_other(origin, tmp_path):
    done, plan = get(origin, tmp_path)
    check(origin, tmp_path, done)
    assert plan.starts(FILE) == list(range(0, size(origin), CHUNK))
    assert done.bytes_fetched == sum(p.stat().st_size for p in origin.rglob("*.h5ad"))
    assert all(e["headers"].get("Accept-Encoding") == "identity" for e in plan.log if e["path"].endswith(".h5ad"))


@pytest.mark.parametrize(
    "faults",
    [
        ["503", "503", "503"],
        ["429:0", "ok", "500", "502"],
        ["short:100", "ok", "short:1", "short:4097"],
        ["honest:100", "honest:1"],
        ["reset:0", "ok", "reset:3000"],
        ["stall"],
        ["slow", "ok", "slow"],
    ],
    ids="+".join,
)
def test_a_passing_fault_costs_no_byte_that_arrived(origin, tmp_path, faults):
    plan = Plan(faults={FILE: list(faults)})
    done, plan = get(origin, tmp_path, plan)
    check(origin, tmp_path, done)
    assert not done.failed and not plan.faults[FILE]
    assert done.bytes_fetched == sum(p.stat().st_size for p in origin.rglob("*.h5ad")), "no byte arrived twice"


def test_retry_after_is_waited_for(origin, tmp_path):
    import time

    began = time.monotonic()
    done, _ = get(origin, tmp_path, Plan(faults={FILE: ["503:1"]}))
    assert time.monotonic() - began >= 1.0 and done.experiments == 4


def test_a_flipped_bit_under_the_right_hash_is_fetched_again(origin, tmp_path):
    done, plan = get(origin, tmp_path, Plan(faults={FILE: ["ok", "flip"]}))
    check(origin, tmp_path, done)
    assert any("a different hash" in w for w in done.warnings) and plan.starts(FILE).count(0) == 2


def test_a_file_that_is_always_damaged_is_listed_and_the_others_go_on(origin, tmp_path):
    done, _ = get(origin, tmp_path, Plan(faults={FILE: ["flip"] * 1000}))
    assert done.experiments == 3 and [f[0] for f in done.failed] == ["SRX0001"]
    assert isinstance(done.error, DataError) and not (tmp_path / "a" / "raw" / FILE).exists()


def test_without_ranges_the_file_comes_whole_and_is_never_appended(origin, tmp_path):
    done, plan = get(origin, tmp_path, Plan(no_ranges=True, faults={FILE: ["short:9000", "short:20000"]}))
    check(origin, tmp_path, done)
    assert set(plan.starts(FILE)) == {0}


def test_a_file_replaced_midway_starts_again(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "o")
    other = next((tmp_path / "o").rglob("SRX0002.h5ad")).relative_to(tmp_path / "o")
    plan = Plan(faults={FILE: ["ok", "ok", f"replace:{other}"]})
    done, plan = get(tmp_path / "o", tmp_path, plan)
    assert done.experiments == 4 and plan.starts(FILE).count(0) == 2
    assert (tmp_path / "a" / "raw" / FILE).read_bytes() == (tmp_path / "o" / other).read_bytes()


def test_a_server_without_hashes_or_with_a_wrong_size_is_told_by_its_structure(origin, tmp_path):
    done, _ = get(origin, tmp_path, Plan(hashes=False))
    check(origin, tmp_path, done)


def test_a_refusal_ends_the_run_at_once_with_exit_code_4(origin, tmp_path):
    with serve(origin, Plan(forbidden=(FILE,))) as (url, plan), pytest.raises(EnvironmentFault, match="denied") as e:
        fetch(open_source(url, access=HASTY), Choice(all=True), tmp_path / "a", transfer=FAST)
    assert e.value.exit_code == 4 and e.value.hint
    assert sum(x["status"] == 403 for x in plan.log) <= 2, "no second try"


def test_a_missing_file_is_listed_with_exit_code_3_and_topped_up(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "o")
    with serve(tmp_path / "o") as (url, _):
        from vcelltools.atlas._choose import choose

        source = open_source(url, access=HASTY)
        source_order = [source.ids[i] for i in choose(source, Choice(experiments=2))]
        next((tmp_path / "o").rglob(f"{source_order[0]}.h5ad")).unlink()
        done = fetch(source, Choice(experiments=2), tmp_path / "a", transfer=FAST)
        assert done.experiments == 1 and done.failed[0][0] == source_order[0] and done.error.exit_code == 3
        done = fetch(source, Choice(experiments=2), tmp_path / "b", transfer=FAST, top_up=True)
        assert done.experiments == 2 and len(done.failed) == 1


def test_an_unreachable_server_is_given_up_with_exit_code_4(origin, tmp_path):
    done, _ = get(origin, tmp_path, Plan(faults={FILE: ["503"] * 100}))
    assert done.experiments == 3 and done.error.exit_code == 4 and "given up" in done.failed[0][1]
    done, _ = get(origin, tmp_path)
    check(origin, tmp_path, done)


def test_what_is_whole_is_not_fetched_again_and_a_part_goes_on(origin, tmp_path):
    done, plan = get(origin, tmp_path, Plan(faults={FILE: ["ok", "ok", *["503"] * 100]}))
    assert done.experiments == 3
    done, plan = get(origin, tmp_path)
    check(origin, tmp_path, done)
    assert plan.starts(FILE)[0] == 2 * CHUNK, "the journal vouches for two chunks"
    assert plan.sent(".h5ad") == size(origin) - 2 * CHUNK == done.bytes_fetched


def test_a_part_of_another_version_is_dropped(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "o")
    get(tmp_path / "o", tmp_path, Plan(faults={FILE: ["ok", *["503"] * 100]}))
    path = next((tmp_path / "o").rglob(FILE))
    shutil.copy(next((tmp_path / "o").rglob("SRX0003.h5ad")), path)
    done, plan = get(tmp_path / "o", tmp_path)
    assert done.experiments == 4 and plan.starts(FILE)[0] == 0
    assert (tmp_path / "a" / "raw" / FILE).read_bytes() == path.read_bytes()


def test_a_raw_folder_of_a_public_script_is_adopted_where_it_agrees(origin, tmp_path):
    raw = tmp_path / "a" / "raw"
    raw.mkdir(parents=True)
    for path in origin.rglob("*.h5ad"):
        shutil.copy(path, raw)
    (raw / "SRX0002.h5ad").write_bytes(b"another file")
    done, plan = get(origin, tmp_path)
    check(origin, tmp_path, done)
    assert plan.sent(".h5ad") == size(origin, "SRX0002.h5ad")
    assert any("SRX0002" in w and "replaced" in w for w in done.warnings)


def test_a_file_that_is_no_h5ad_or_has_other_cells_is_said(origin, tmp_path):
    shutil.copytree(origin, tmp_path / "o")
    next((tmp_path / "o").rglob("SRX0000.h5ad")).write_bytes(b"<html>not found</html>" * 20)
    shutil.copy(next(origin.rglob("SRX0003.h5ad")), next((tmp_path / "o").rglob("SRX0002.h5ad")))
    done, _ = get(tmp_path / "o", tmp_path)
    assert [f[0] for f in done.failed] == ["SRX0000"] and done.error.exit_code == 3
    assert any("SRX0002" in w and "the table lists" in w for w in done.warnings)


def test_tokens_in_a_url_are_shown_and_stored_nowhere(origin, tmp_path):
    with serve(origin) as (url, plan):
        secret = url.replace("http://", "http://user:hunter2@") + "?sig=topsecret"
        done = fetch(open_source(secret, access=HASTY), Choice(all=True), tmp_path / "a", transfer=FAST)
        assert done.experiments == 4 and all(e["query"] == "sig=topsecret" for e in plan.log)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes() and b"topsecret" not in path.read_bytes(), path
    with (
        serve(origin, Plan(faults={".parquet": ["404"] * 9})) as (url, _),
        pytest.raises((DataError, EnvironmentFault)) as e,
    ):
        open_source(url.replace("http://", "http://user:hunter2@") + "/x.parquet?sig=topsecret", access=HASTY)
    assert "hunter2" not in str(e.value) and "topsecret" not in str(e.value)


def test_a_second_writer_is_refused(origin, tmp_path):
    from vcelltools.io.write.atomic import locked

    with locked(tmp_path / "a" / "atlas"), pytest.raises(EnvironmentFault, match="another process"):
        get(origin, tmp_path)


def test_the_rate_is_kept(origin, tmp_path):
    import time

    total = sum(p.stat().st_size for p in origin.rglob("*.h5ad"))
    began = time.monotonic()
    get(origin, tmp_path, transfer=Transfer(chunk=CHUNK, max_rate=total / 1.5))
    assert time.monotonic() - began >= 1.2


def test_verify_hashes_again(origin, tmp_path):
    get(origin, tmp_path)
    assert verify_folder(tmp_path / "a").ok
    (tmp_path / "a" / "raw" / "SRX0000.h5ad").unlink()
    found = verify_folder(tmp_path / "a")
    assert not found.ok and found.bad[0][0] == "SRX0000"
