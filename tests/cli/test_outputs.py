"""No output of any command is, holds or lies inside what the command reads, or replaces what is not of its kind."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tests.conftest import run_cli
from vcelltools.cli.main import COMMANDS

BUILD = ("--pert-col", "target_gene", "--control", "non-targeting")
MINE = "years of work\n"

# The options and arguments of every command that are paths: what it reads, and what it writes.
READS = {
    "demo": set(),
    "doctor": set(),
    "init": {"folder"},
    "inspect": {"file"},
    "hvg": {"files"},
    "normalize": {"file"},
    "convert": {"file"},
    "sample": {"file", "matching"},
    "simulate": set(),
    "basis": {"files", "gene_table"},
    "build-store": {"file", "basis", "stats", "gene_table"},
    "verify": {"stores"},
    "features": {"sources", "perturbations", "stores", "gene_table"},
    "train": {"stores", "split", "features", "network", "from_run", "extend"},
    "predict": {"run", "perturbations", "genes", "source"},
    "de": {"file"},
    "pseudobulk": {"file"},
    "baseline": {"truth", "stores", "split", "features"},
    "score": {"pred", "truth", "truth_pack", "baseline", "target_gene_map"},
    "prep": {"pred", "genes", "perturbations"},
    "lint": {"path", "genes", "perturbations"},
    "qc": {"files"},
    "guides": {"file", "targets"},
    "responders": {"file"},
    "evaluate": {"stores", "features", "network", "compare"},
}
WRITES = {
    "demo": {"dir"},
    "init": {"out"},
    "hvg": {"out", "stats", "plot", "hvg_info"},
    "qc": {"out", "write"},
    "guides": {"out", "write", "page"},
    "responders": {"out", "write"},
    "normalize": {"out"},
    "convert": {"out"},
    "sample": {"out"},
    "simulate": {"out"},
    "basis": {"out"},
    "build-store": {"out"},
    "features": {"out"},
    "train": {"out"},
    "evaluate": {"out"},
    "predict": {"out"},
    "de": {"out"},
    "pseudobulk": {"out"},
    "baseline": {"out"},
    "score": {"out", "report", "truth_pack"},
    "prep": {"out"},
}

HVG = ("hvg", "x.h5ad", "--top", 5)
BASIS = ("basis", "x.h5ad", "--top", 5)
STORE = ("build-store", "x.h5ad", "--basis", "b.txt", *BUILD, "--cell-line-col", "cell_line")
TRAIN = ("train", "--model", "perturbation-mean", "--store", "stores/x", "--split", "split.toml")
FEATURES = ("features", "aliases.tsv", "--store", "stores/x")
EVALUATE = ("evaluate", "--store", "stores/x")
PREDICT = ("predict", "--run", "r", "--perturbations", "perts.csv", "--genes", "genes.csv", "--source", "x.h5ad")
DE = ("de", "x.h5ad", *BUILD)
SCORE = ("score", "pred.h5ad", "--truth", "n.h5ad")
SCORE26 = (*SCORE, "--compat", "vcc2026", "--target-gene-map", "map.csv")
PREP = ("prep", "pred.h5ad", "--genes", "genes.csv", "--perturbations", "perts.csv", "--rules", 2026)
SAMPLE = ("sample", "x.h5ad", "--by", "target_gene", "--matching", "n.h5ad")
LEARNED = ("baseline", "--store", "stores/x", "--split", "split.toml")

# (command, the output's option, its path): the path is an input, holds one or lies inside one
CASES = [
    (HVG, "--out", "x.h5ad"),
    (HVG, "--out", "./sub/../x.h5ad"),
    (HVG, "--out", "symlink.txt"),
    (HVG, "--out", "hardlink.txt"),
    (HVG, "--plot", "x.h5ad"),
    (HVG, "--plot", "symlink.txt"),
    (HVG, "--stats", "x.h5ad"),
    (("hvg", "z.zarr", "--top", 5), "--out", "z.zarr/genes.txt"),
    (("hvg", "z.zarr", "--top", 5), "--plot", "z.zarr/p.png"),
    (("hvg", "z.zarr", "--top", 5), "--stats", "z.zarr"),
    (("hvg", "z.zarr", "--top", 5), "--stats", "z.zarr/stats"),
    (("hvg", "z.zarr", "--top", 5), "--stats", "linked.zarr"),
    (("hvg", "S", "--top", 5), "--out", "S/genes.txt"),
    (("hvg", "x.h5ad", "--top", 5, "--stats", "new"), "--out", "new/h.txt"),
    (("hvg", "x.h5ad", "--top", 5, "--out", "new.png"), "--plot", "new.png"),
    ((*HVG, "--pooled", "--values", "counts"), "--hvg-info", "x.h5ad"),
    (("qc", "x.h5ad"), "--out", "x.h5ad"),
    (("qc", "x.h5ad"), "--write", "x.h5ad"),
    (("guides", "x.h5ad"), "--out", "x.h5ad"),
    (("guides", "x.h5ad"), "--write", "x.h5ad"),
    (("guides", "x.h5ad"), "--page", "x.h5ad"),
    (("guides", "x.h5ad", "--targets", "aliases.tsv"), "--out", "aliases.tsv"),
    (("responders", "x.h5ad"), "--out", "x.h5ad"),
    (("responders", "x.h5ad"), "--write", "x.h5ad"),
    (("normalize", "x.h5ad"), "--out", "x.h5ad"),
    (("normalize", "x.h5ad"), "--out", "symlink.h5ad"),
    (("convert", "x.h5ad"), "--out", "hardlink.h5ad"),
    (("convert", "z.zarr"), "--out", "z.zarr/x.h5ad"),
    (("pseudobulk", "x.h5ad"), "--out", "x.h5ad"),
    (SAMPLE, "--out", "x.h5ad"),
    (SAMPLE, "--out", "n.h5ad"),
    (BASIS, "--out", "x.h5ad"),
    ((*BASIS, "--aliases", "aliases.tsv"), "--out", "aliases.tsv"),
    ((*BASIS, "--gene-table", "aliases.tsv"), "--out", "aliases.tsv"),
    (("basis", "S", "--top", 5), "--out", "S/basis.txt"),
    ((*STORE, "--name", "z.zarr"), "--out", "."),
    (("build-store", "z.zarr", "--basis", "b.txt", *BUILD, "--name", "z.zarr"), "--out", "."),
    (("build-store", "z.zarr", "--basis", "b.txt", *BUILD, "--name", "s"), "--out", "z.zarr"),
    (("build-store", "lab/z.zarr", "--basis", "b.txt", *BUILD, "--name", "lab"), "--out", "."),
    ((*STORE, "--name", "thesis"), "--out", "."),
    (TRAIN, "--out", "stores/x"),
    (TRAIN, "--out", "stores/x/run"),
    (TRAIN, "--out", "stores"),
    (TRAIN, "--out", "thesis"),
    (FEATURES, "--out", "aliases.tsv"),
    (FEATURES, "--out", "stores/x/features.parquet"),
    (EVALUATE, "--out", "stores/x"),
    (EVALUATE, "--out", "stores/x/table"),
    (EVALUATE, "--out", "thesis"),
    (PREDICT, "--out", "x.h5ad"),
    (PREDICT, "--out", "r/pred.h5ad"),
    (PREDICT, "--out", "perts.csv"),
    (PREDICT, "--out", "genes.csv"),
    (LEARNED, "--out", "stores/x/pred.h5ad"),
    (LEARNED, "--out", "split.toml"),
    (("baseline", "--truth", "n.h5ad"), "--out", "n.h5ad"),
    (DE, "--out", "x.h5ad"),
    (SCORE, "--report", "n.h5ad"),
    (SCORE, "--report", "pred.h5ad"),
    ((*SCORE, "--out", "sc"), "--report", "sc/score.json"),
    ((*SCORE, "--out", "sc"), "--truth-pack", "sc/results.csv"),
    ((*SCORE, "--baseline", "base/agg_results.csv"), "--out", "base"),
    (SCORE26, "--report", "map.csv"),
    (PREP, "--out", "pred.h5ad"),
    (PREP, "--out", "genes.csv"),
    (PREP, "--out", "perts.csv"),
    (("init", "."), "--out", "x.h5ad"),
    (("init", "."), "--out", "z.zarr/vcelltools.toml"),
    # of another kind than the output, though the command does not read it
    (HVG, "--out", "n.h5ad"),
    (HVG, "--out", "mine.toml"),
    (HVG, "--out", "mine.html"),
    (HVG, "--plot", "mine.png"),
    (HVG, "--stats", "thesis"),
    (BASIS, "--out", "n.h5ad"),
    (("simulate", "--cells", 50, "--genes", 100), "--out", "mine.h5ad"),
    (("normalize", "x.h5ad"), "--out", "mine.h5ad"),
    (("convert", "x.h5ad"), "--out", "mine.h5ad"),
    (DE, "--out", "mine.parquet"),
    (SCORE, "--report", "mine.html"),
    (SCORE, "--report", "notes.txt"),
    (PREP, "--out", "notes.txt"),
    (("init", "."), "--out", "mine.toml"),
    (("demo", "--quick"), "--dir", "."),
    (("demo", "--quick"), "--dir", "thesis"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small file of every kind that the commands read."""
    d = tmp_path_factory.mktemp("outputs")

    def run(*args):
        done = run_cli(*args, "-q", cwd=d)
        assert done.code == 0, f"{args}\n{done.stderr}"

    run("simulate", "--out", "x.h5ad", "--cells", 200, "--genes", 100, "--perturbations", 4, "--cell-lines", 2)
    run("normalize", "x.h5ad", "--out", "n.h5ad")
    run("baseline", "--truth", "n.h5ad", "--out", "pred.h5ad")
    run("hvg", "x.h5ad", "--top", 30, "--out", "b.txt", "--stats", "S")
    run(*STORE, "--name", "x")
    code = "import anndata as ad; ad.read_h5ad('x.h5ad').write_zarr('z.zarr')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=d, check=True)
    shutil.copytree(d / "z.zarr", d / "lab" / "z.zarr")
    names = (d / "b.txt").read_text().split()
    (d / "split.toml").write_text('[training]\nx = "train"\n[zeroshot]\n"x.line2" = "test"\n')
    (d / "aliases.tsv").write_text(f"OLD\t{names[0]}\n")
    (d / "genes.csv").write_text("gene\n" + "\n".join(names) + "\n")
    (d / "perts.csv").write_text("target_gene,n_cells,context\nA,5,c\n")
    (d / "map.csv").write_text("perturbation,gene\n*,\n")
    run(*TRAIN, "--out", "r")
    (d / "base").mkdir()
    (d / "base" / "agg_results.csv").write_text(MINE)
    (d / "thesis").mkdir()
    (d / "sub").mkdir()
    for name in ("thesis/chapter1.txt", "notes.txt", "mine.toml", "mine.png", "mine.h5ad", "mine.parquet"):
        (d / name).write_text(MINE)
    (d / "mine.html").write_text("<!doctype html>\n<title>mine</title>\n")
    for name in ("symlink.txt", "symlink.h5ad"):
        (d / name).symlink_to("x.h5ad")
    for name in ("hardlink.txt", "hardlink.h5ad"):
        os.link(d / "x.h5ad", d / name)
    (d / "linked.zarr").symlink_to("z.zarr")
    return d


def look(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("command", "option", "path"), CASES, ids=lambda v: v if isinstance(v, str) else v[0])
def test_an_output_never_touches_what_is_not_its_own(made, command, option, path):
    before = look(made)
    done = run_cli(*command, option, path, *([] if command[0] == "demo" else ["--json"]), "--force", cwd=made)
    assert done.code == 2, (done.code, done.stderr)
    assert "Traceback" not in done.stderr
    if command[0] != "demo":
        assert json.loads(done.stdout)["error"]["exit_code"] == 2
    assert look(made) == before


def find_path_options(command: str) -> set[str]:
    module, function, _ = COMMANDS[command]
    found = getattr(importlib.import_module(f"vcelltools.cli.{module}"), function)
    hints = typing.get_type_hints(found)
    return {name for name in inspect.signature(found).parameters if "Path" in str(hints[name])}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_of_every_command_is_in_the_table(command):
    assert find_path_options(command) == READS[command] | WRITES.get(command, set())
    tried = {option.removeprefix("--").replace("-", "_") for c, option, _ in CASES if c[0] == command}
    assert tried == WRITES.get(command, set()), "an output that no case tries"


def test_an_output_of_its_kind_is_replaced(made):
    """With --force what the program writes again and again is replaced, a store and a run too."""
    again = [
        (*HVG, "--out", "again.txt"),
        ("normalize", "x.h5ad", "--out", "again.h5ad"),
        (*STORE, "--name", "again"),
        ("init", ".", "--out", "again.toml"),
        (*TRAIN, "--out", "again.run"),
    ]
    for command in again:
        for force in ((), ("--force",)):
            done = run_cli(*command, *force, "-q", cwd=made)
            assert done.code == 0, f"{command}\n{done.stderr}"


def test_a_store_with_a_file_of_the_user_in_it_stays(made):
    shutil.copytree(made / "stores" / "x", made / "stores" / "noted")
    (made / "stores" / "noted" / "notes.txt").write_text(MINE)
    done = run_cli(*STORE, "--name", "noted", "--force", cwd=made)
    assert done.code == 2 and "contains other files" in done.stderr
    assert (made / "stores" / "noted" / "notes.txt").read_text() == MINE


def test_scores_of_three_lists_of_one_stem_are_kept(made, tmp_path):
    for out in ("g.txt", "g.csv", "g.lst"):
        assert run_cli("hvg", made / "x.h5ad", "--top", 5, "--out", out, cwd=tmp_path).code == 0
    lists = {json.loads(p.read_text())["list"] for p in tmp_path.glob("hvg_scores*.json")}
    assert lists == {"g.txt", "g.csv", "g.lst"}


def test_lists_are_written_side_by_side(made, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        names = ["a.txt", "b.txt", "c.txt"]
        done = list(
            pool.map(lambda out: run_cli("hvg", made / "x.h5ad", "--top", 5, "--out", out, cwd=tmp_path), names)
        )
    assert [d.code for d in done] == [0, 0, 0], [d.stderr for d in done]
    assert {json.loads(p.read_text())["list"] for p in tmp_path.glob("hvg_scores*.json")} == set(names)


def test_a_list_that_another_process_writes_is_refused_before_the_pass(made, tmp_path):
    from vcelltools.io.write.atomic import locked

    with locked(tmp_path / "h.txt"):
        done = run_cli("hvg", made / "x.h5ad", "--top", 5, "--out", "h.txt", cwd=tmp_path)
    assert done.code == 4 and "is being written by another process" in done.stderr
    assert not (tmp_path / "h.txt").exists()


def test_the_demo_does_not_overwrite_a_file_that_the_user_changed(tmp_path):
    from vcelltools.errors import UsageError
    from vcelltools.project.demo import run_demo

    (tmp_path / "demo.json").write_text('{"version": "", "files": {}, "steps": {}}')
    (tmp_path / "split.toml").write_text(MINE)
    for force in (False, True):
        with pytest.raises(UsageError, match=r"split\.toml was changed since the demo wrote it"):
            run_demo(tmp_path, quick=True, force=force)
    assert (tmp_path / "split.toml").read_text() == MINE
