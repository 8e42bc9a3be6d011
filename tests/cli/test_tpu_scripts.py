"""The launch scripts against a fake gcloud that writes down what it is asked."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "tpu"

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE_LOG"
case "$*" in
  *describe*) cat "$FAKE_STATE" ;;
  *"tpu-vm create"*) echo READY >"$FAKE_STATE" ;;
  *"tpu-vm delete"*) echo MISSING >"$FAKE_STATE" ;;
  *worker_run.sh\\ gs:*)
    n=$(cat "$FAKE_RUNS"); echo $((n + 1)) >"$FAKE_RUNS"
    if [ "$n" = 0 ]; then echo PREEMPTED >"$FAKE_STATE"; exit 255; fi ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    bin_dpath = tmp_path / "bin"
    bin_dpath.mkdir()
    (bin_dpath / "gcloud").write_text(FAKE)
    # the wheel is not built: python3 -m build would reach for the network
    (bin_dpath / "python3").write_text(
        '#!/bin/sh\nfor a; do [ "$last" = --outdir ] && touch "$a/vcelltools-9-py3.whl"; last=$a; done; exit 0\n'
    )
    for f in bin_dpath.iterdir():
        f.chmod(0o755)
    (tmp_path / "state").write_text("MISSING\n")
    (tmp_path / "runs").write_text("0\n")
    return {
        **os.environ,
        "PATH": f"{bin_dpath}:{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_STATE": str(tmp_path / "state"),
        "FAKE_RUNS": str(tmp_path / "runs"),
        "TMPDIR": "/tmp",
        "BUCKET": "gs://b/p",
        "PAUSE": "0",
        "API_TOKEN": "hush-hush",
    }


def call(name: str, env: dict, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPTS / name, *args], env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_preempted_run_is_created_again_and_finished(cloud):
    done = call("keep_running.sh", cloud)
    assert done.returncode == 0, done.stderr
    log = Path(cloud["FAKE_LOG"]).read_text().splitlines()
    order = [w for line in log for w in ("create", "delete", "worker_run.sh gs:") if f" {w}" in f" {line}"]
    assert order == ["create", "worker_run.sh gs:", "delete", "create", "worker_run.sh gs:"]
    creation = next(line for line in log if " create " in line)
    assert "--spot" in creation
    assert "--accelerator-type v5litepod-16" in creation
    assert "metadata" not in creation
    assert "hush-hush" not in "\n".join(log)


@pytest.mark.parametrize(
    "name", sorted(p.name for p in SCRIPTS.glob("*.sh") if p.name not in ("common.sh", "worker_run.sh"))
)
def test_a_dry_run_prints_commands_and_calls_nothing(cloud, name):
    done = call(name, cloud, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "+ gcloud" in done.stderr
    assert not Path(cloud["FAKE_LOG"]).exists()
    for line in done.stderr.splitlines():
        if line.startswith("+ "):
            assert shlex.split(line[2:])


def test_names_that_would_become_commands_are_refused(cloud):
    done = call("run.sh", {**cloud, "RUN": "x; rm -rf ."})
    assert done.returncode == 2
    assert "RUN=" in done.stderr
    assert call("run.sh", {**cloud, "BUCKET": ""}).returncode == 2
    assert call("run.sh", cloud, "--nonsense").returncode == 2


def test_failed_training_on_a_healthy_machine_is_not_repeated(cloud):
    Path(cloud["FAKE_STATE"]).write_text("READY\n")
    fake = Path(cloud["PATH"].split(":")[0]) / "gcloud"
    fake.write_text(FAKE.replace('echo PREEMPTED >"$FAKE_STATE"; exit 255', "exit 3"))
    done = call("keep_running.sh", cloud)
    assert done.returncode == 1
    assert Path(cloud["FAKE_RUNS"]).read_text().strip() == "1"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "-x", *sorted(map(str, SCRIPTS.glob("*.sh")))], check=True, cwd=SCRIPTS)
