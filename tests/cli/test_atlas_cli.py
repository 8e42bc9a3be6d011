"""``vcelltools atlas`` end to end, in a subprocess: from a bucket to a store."""

from __future__ import annotations

import json
import re

import anndata as ad
import pytest

from tests.atlases import RELEASE, make_atlas, needs_standin
from tests.conftest import run_cli
from vcelltools.cli.main import GROUPS

COMMANDS = ("list", "fetch", "merge")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_everything(command):
    done = run_cli("atlas", command, "--help")
    assert done.code == 0 and done.stderr == "" and f"vcelltools atlas {command}" in done.stdout
    for option in re.findall(r"^  (-\S+.*)$", done.stdout, re.M):
        assert len(option.split("  ")) > 1 or option.startswith("--"), option


def test_the_group_lists_its_commands():
    assert set(GROUPS) >= {"atlas"}
    done = run_cli("atlas", "--help")
    assert done.code == 0 and all(c in done.stdout for c in COMMANDS)


@needs_standin
def test_from_a_bucket_to_a_store(tmp_path):
    def run(*args):
        done = run_cli(*args, "--json", "-q", cwd=tmp_path)
        assert done.code == 0, f"{args}\n{done.stderr}"
        return json.loads(done.stdout)

    url = f"file://{RELEASE}"
    assert run("atlas", "list", url, "--where", "tissue=blood")["cells"] == 170
    plan = run("atlas", "fetch", url, "--out", "a", "--cells", 200, "--plan")
    assert plan["overshoot"] == 20 and not (tmp_path / "a").exists()
    fetched = run("atlas", "fetch", url, "--out", "a", "--cells", 200)
    assert fetched["cells"] == plan["cells"] == 220 and fetched["bytes_fetched"] == plan["bytes"]
    assert run("atlas", "fetch", url, "--out", "a", "--cells", 200)["bytes_fetched"] == 0
    merged = run("atlas", "merge", "a")
    assert (merged["cells"], merged["dtype"]) == (220, "uint16")
    run("hvg", "a/merged.h5ad", "--top", 100, "--out", "h.txt")
    built = run("build-store", "a/merged.h5ad", "--basis", "h.txt", "--unperturbed", "--group-by", "experiment")
    assert built["stores"][0]["n_cells"] == 220
    assert run("verify", "a")["ok"] is True
    assert ad.read_h5ad(tmp_path / "a" / "merged.h5ad").obs["experiment"].nunique() == 4


def test_exit_codes_and_json_errors(tmp_path):
    make_atlas(tmp_path / "src", 3)
    for args, code, word in (
        (("fetch", "src", "--out", "a"), 2, "no target is given"),
        (("fetch", "src", "--out", "a", "--cells", 5, "--all"), 2, "several targets"),
        (("fetch", "src", "--out", "a", "--all", "--where", "tisue=lung"), 3, "tissue"),
        (("fetch", "src", "--out", "a", "--all", "--max-bytes", "10"), 2, "max-bytes"),
        (("list", "scbasecout"), 2, "scbasecount"),
        (("list", "ftp://host/x"), 2, "scheme"),
        (("merge", "nowhere"), 3, "fetched atlas"),
    ):
        done = run_cli("atlas", *args, "--json", cwd=tmp_path)
        assert done.code == code, (args, done.stderr)
        error = json.loads(done.stdout)["error"]
        assert error["exit_code"] == code and word in error["message"] + str(error["hint"]), error
    assert not (tmp_path / "a").exists()


def test_a_damaged_fetch_is_found_by_verify(tmp_path):
    make_atlas(tmp_path / "src", 3)
    assert run_cli("atlas", "fetch", "src", "--out", "a", "--all", cwd=tmp_path).code == 0
    path = tmp_path / "a" / "raw" / "SRX0001.h5ad"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    done = run_cli("verify", "a", "--json", cwd=tmp_path)
    assert done.code == 3 and json.loads(done.stdout)["bad"][0]["id"] == "SRX0001"
