"""What every command says of wrong input: the exit code, one line that names the remedy, and one object with --json."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import run_cli


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("errors")

    def run(*args):
        done = run_cli(*args, "-q", cwd=d)
        assert done.code == 0, f"{args}\n{done.stderr}"

    sim = ("--cells", 300, "--genes", 120, "--perturbations", 5, "--inert", 0)
    run("simulate", "--out", "x.h5ad", *sim)
    run("simulate", "--out", "m.h5mu", *sim, "--like", "kolf", "--guides")
    run("normalize", "x.h5ad", "--out", "n.h5ad")
    run("basis", "x.h5ad", "--top", 40, "--out", "basis.txt")
    run("build-store", "x.h5ad", "--basis", "basis.txt", *STORE, "--name", "x")
    run("baseline", "--truth", "n.h5ad", "--out", "base.h5ad")
    (d / "text.h5ad").write_text("hello\n")
    (d / "binary.csv").write_bytes(b"\x89HDF\r\n\x1a\n\xff")
    (d / "empty.csv").touch()
    return d


STORE = ("--pert-col", "target_gene", "--control", "non-targeting")
BUILD = ("build-store", "x.h5ad", "--basis", "basis.txt", "--name", "q")
SCORE = ("score", "base.h5ad", "--truth", "n.h5ad", "--out", "sc")
TRAIN = ("train", "--store", "stores/x", "--out", "r")
SIM = ("simulate", "--out", "y.h5ad", "--cells", 10, "--genes", 50, "--perturbations", 3)

# (arguments, exit code, what the message holds)
CASES = [
    # files that are not there, or not what they seem
    (("inspect", "absent.h5ad"), 3, "no such file"),
    (("inspect", "text.h5ad"), 3, "not an HDF5 file"),
    (("hvg", "absent.h5ad", "--out", "h.txt"), 3, "no such file"),
    (("score", "absent.h5ad", "--truth", "n.h5ad"), 3, "no such file"),
    (("verify", "stores/absent"), 3, ""),
    (("lint", "absent.vcc"), 3, "no such file"),
    (("init", "absent"), 2, "no such folder"),
    (("verify", "text.h5ad"), 3, "a file, not a store"),
    (("hvg", "x.h5ad", "--stats", "text.h5ad", "--out", "h.txt"), 2, "is a file, but the output is a folder"),
    (("hvg", "x.h5ad", "--out", "hvg_scores.json"), 2, "two outputs have the name hvg_scores.json"),
    (("hvg", "x.h5ad", "--out", "p.png", "--plot", "p.png"), 2, "--out and --plot are both p.png"),
    (("hvg", "x.h5ad", "--out", "h.txt", "--plot", "p.xyz"), 2, "does not end in .png"),
    (("hvg", "x.h5ad", "./x.h5ad", "--out", "h.txt"), 2, "x.h5ad is given twice"),
    (("hvg", "x.h5ad", "--out", 300 * "a"), 2, "file name too long"),
    (("inspect", 300 * "a"), 2, "file name too long"),
    (("score", "base.h5ad", "--truth", "n.h5ad", "--out", "sc", "--report", "sc"), 2, "--out and --report are both sc"),
    (("basis", "x.h5ad", "--out", "b.json"), 2, "two outputs have the name b.json"),
    (("basis", "x.h5ad", "--aliases", "empty.csv", "--out", "b.txt"), 3, "is empty"),
    (("prep", "n.h5ad", "--genes", "binary.csv", "--out", "q.vcc"), 3, "is not a text file, but a list of genes"),
    ((*TRAIN, "--model", "ridge", "--features", "binary.csv"), 3, "is not a text file, but a table of numbers"),
    ((*TRAIN, "--model", "ridge", "--features", "empty.csv"), 3, "not a table of numbers"),
    (
        (*SCORE, "--compat", "vcc2026", "--target-gene-map", "binary.csv"),
        3,
        "is not a text file, but a table of perturbations",
    ),
    (("build-store", "x.h5ad", "--basis", "absent.txt", *STORE, "--name", "q"), 3, "absent.txt"),
    # the wrong part of a file
    (("hvg", "m.h5mu", "--modality", "zzz", "--out", "h.txt"), 3, "modalities: guide, rna"),
    (("hvg", "x.h5ad", "--modality", "rna", "--out", "h.txt"), 3, "leave --modality out"),
    (("hvg", "x.h5ad", "--layer", "zzz", "--out", "h.txt"), 3, "matrices: X"),
    (("hvg", "x.h5ad", "--batch-key", "zzz", "--out", "h.txt"), 3, "columns: target_gene"),
    (("hvg", "n.h5ad", "--out", "h.txt"), 3, "not counts"),
    (("normalize", "n.h5ad", "--out", "q.h5ad"), 3, "not counts"),
    (("normalize", "x.h5ad", "--out", "q.h5ad", "--library-size", "target_gene"), 3, "does not hold numbers"),
    (("de", "x.h5ad", "--pert-col", "zzz", "--out", "d.csv"), 3, "zzz"),
    (("de", "x.h5ad", "--control", "NT", "--out", "d.csv"), 3, "non-targeting"),
    ((*BUILD, "--pert-col", "zzz", "--control", "non-targeting"), 3, "zzz"),
    ((*BUILD, "--pert-col", "target_gene", "--control", "NT"), 3, "non-targeting"),
    ((*BUILD, *STORE, "--group-by", "zzz"), 3, "zzz"),
    ((*SCORE, "--pert-col", "zzz"), 3, "zzz"),
    ((*SCORE, "--control", "NT"), 3, "NT"),
    ((*SCORE, "--baseline", "absent.csv"), 3, "absent.csv: no such file"),
    ((*SCORE, "--baseline", "x.h5ad"), 3, "not a text file"),
    (("sample", "x.h5ad", "--where", "batch", "--out", "q.h5ad"), 2, "COLUMN=LABEL"),
    (("sample", "x.h5ad", "--where", "zzz=1", "--out", "q.h5ad"), 3, "zzz"),
    (("sample", "x.h5ad", "--where", "target_gene=zzz", "--out", "q.h5ad"), 3, "zzz"),
    (("sample", "x.h5ad", "--matching", "x.h5ad", "--out", "q.h5ad"), 2, "--by"),
    # outputs
    (("hvg", "x.h5ad", "--out", "basis.txt"), 2, "--force"),
    (("hvg", "x.h5ad", "--out", "x.h5ad", "--force"), 2, "the input itself"),
    (("normalize", "x.h5ad", "--out", "x.h5ad", "--force"), 2, "the input itself"),
    (("convert", "x.h5ad", "--out", "./x.h5ad", "--force"), 2, "the input itself"),
    (("sample", "x.h5ad", "-n", 5, "--out", "x.h5ad", "--force"), 2, "the input itself"),
    (("de", "x.h5ad", "--out", "x.h5ad", "--force"), 2, "the input itself"),
    (("baseline", "--truth", "n.h5ad", "--out", "n.h5ad", "--force"), 2, "the input itself"),
    (("basis", "x.h5ad", "--out", "x.h5ad", "--force"), 2, "the input itself"),
    (("normalize", "x.h5ad", "--out", "q.txt"), 2, ".h5ad"),
    (("simulate", "--out", "q.txt"), 2, ".h5ad"),
    # values and contradictions
    (("hvg", "x.h5ad", "--out", "h.txt", "--top", 0), 2, "not at least 1"),
    (("hvg", "x.h5ad", "--out", "h.txt", "--flavor", "zzz"), 2, "seurat_v3"),
    (("hvg", "x.h5ad", "--topp", 5), 2, "--top"),
    (("hvg", "x.h5ad", "n.h5ad", "--flavor", "seurat", "--out", "h.txt"), 2, "seurat_v3, seurat_v3_paper, dispersion"),
    (("hgv",), 2, "hvg"),
    (("sample", "x.h5ad", "--out", "q.h5ad"), 2, "exactly one"),
    (("sample", "x.h5ad", "-n", 5, "--frac", 0.1, "--out", "q.h5ad"), 2, "exactly one"),
    (("sample", "x.h5ad", "-n", -5, "--out", "q.h5ad"), 2, "cannot be sampled from"),
    (("convert", "x.h5ad", "--out", "q.h5ad", "--level", 3), 2, "no compression"),
    (("convert", "x.h5ad", "--out", "q.h5ad", "--contiguous", "--chunk-len", 9), 2, "no chunks"),
    (("convert", "x.h5ad", "--out", "q.h5ad", "--index-dtype", "int8"), 2, "int32"),
    ((*SIM, "--depth", 100, "--density", 0.1), 2, "one of the two"),
    ((*SIM, "--guides"), 2, ".h5mu"),
    (("simulate", "--out", "y.h5mu", *SIM[3:], "--guides", "--modality", "guide"), 2, "is used for the guides"),
    (("simulate", "--out", "y.h5mu", *SIM[3:], "--modality", "a/b"), 2, "a/b"),
    ((*SIM, "--perturbation-universe", 2), 2, "--perturbation-universe"),
    ((*SCORE, "--profile", "zzz"), 2, "vcc"),
    # options that would do nothing
    ((*SCORE, "--no-anchors"), 2, "--no-anchors cannot be used with --compat ours"),
    ((*SCORE, "--compat", "cell-eval", "--context-col", "c"), 3, "obs has no column 'c'"),
    ((*SCORE, "--compat", "vcc2026", "--ceiling", "--epsilon", 1), 2, "--epsilon cannot be used with --compat vcc20"),
    (
        ("hvg", "x.h5ad", "--flavor", "dispersion", "--span", 0.5, "--out", "h.txt"),
        2,
        "--span cannot be used with --flavor disp",
    ),
    (("normalize", "x.h5ad", "--no-log", "--base", 2, "--out", "q.h5ad"), 2, "remove one of the two"),
    (("convert", "n.h5ad", "--dtype", "int16", "--out", "q.h5ad"), 3, "float32 or float64 for fractions"),
    (("de", "x.h5ad", "--test", "nb", "--exact", "--out", "d.csv"), 2, "--exact cannot be used with --test nb"),
    (("de", "x.h5ad", "--out", "d.xlsx"), 2, "neither .parquet nor .csv"),
    (("baseline", "--truth", "n.h5ad", "--rules", 2025, "--out", "q.h5ad"), 2, "--rules cannot be used with --truth"),
    (
        ("baseline", "--store", "stores/x", "--pert-col", "p", "--out", "q.h5ad"),
        2,
        "--pert-col cannot be used with a baseline",
    ),
    (
        ("prep", "n.h5ad", "--genes", "basis.txt", "--contexts", "A", "--out", "q.vcc"),
        2,
        "--contexts belong to the 2026",
    ),
    (("prep", "n.h5ad", "--genes", "basis.txt", "--rules", 2026, "--allow-discrete", "--out", "q.vcc"), 2, "the 2025"),
    ((*SCORE, "--cpm-filter", -1), 2, "not at least 0"),
    (("de", "x.h5ad", "--min-cpm", -1, "--out", "d.csv"), 2, "not at least 0"),
    (("baseline", "--truth", "n.h5ad", "--kind", "zzz", "--out", "q.h5ad"), 2, "control-mean"),
    (("baseline", "--truth", "n.h5ad", "--store", "stores/x", "--out", "q.h5ad"), 2, "--store"),
    (("build-store", "x.h5ad", "--basis", "basis.txt", *STORE, "--name", "../q"), 2, "--name"),
    ((*BUILD, *STORE, "--stats", "absent"), 3, "holds no gene statistics"),
    (("basis", "x.h5ad", "--force-targets", "--out", "b.txt"), 2, "--force-gene"),
    (("basis", "x.h5ad", "--aliases", "absent.tsv", "--out", "b.txt"), 3, "no such file"),
    ((*TRAIN, "--size", "zzz"), 2, "tiny, rn"),
    ((*SCORE, "--compat", "zzz"), 2, "cell-eval"),
    ((*TRAIN, "--model", "zzz"), 2, "ridge"),
    ((*TRAIN, "--dry-run"), 2, "--topology"),
    (("train", "--store", "stores/absent", "--out", "r"), 3, "absent"),
    (("baseline", "--truth", "n.h5ad", "--kind", "ridge", "--out", "q.h5ad"), 2, "--store"),
    (("score", "base.h5ad"), 2, "--truth"),
    ((*TRAIN, "--tpu"), 4, "TPU"),
]


@pytest.mark.parametrize(
    ("args", "code", "said"), CASES, ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else ""
)
def test_the_error_is_one_line_and_one_object(files, args, code, said):
    done = run_cli(*args, "--json", cwd=files)
    assert done.code == code, done.stderr
    if args[0] in ("verify", "lint"):  # their results tell of the problems
        body = json.loads(done.stdout)
        assert body["ok"] is False and said in str(body)
        return
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code and error["kind"]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and error["message"] in line
    assert said in line, line
    assert not (files / "q.h5ad").exists() and not (files / "stores" / "q").exists()


def test_a_file_that_ends_too_early_is_no_interrupt():
    code = (
        "import sys; sys.argv = ['vcelltools', 'doctor', '--no-accelerators']\n"
        "import vcelltools.project.doctor as doctor\n"
        "def check_machine(*a, **k): raise EOFError\n"
        "doctor.check_machine = check_machine\n"
        "from vcelltools.cli.main import run\n"
        "run()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "ended too early" in ran.stderr and "interrupted" not in ran.stderr
