"""The remedy that an error names, tried in the state that the error leaves: the same command works with it."""

from __future__ import annotations

import re
import shlex
import shutil

import anndata as ad
import numpy as np
import pytest

from vcelltools.cli.main import main

SIM = ("--cells", 240, "--genes", 120, "--perturbations", 4, "--inert", 0)
LABELS = ("--pert-col", "target_gene", "--control", "non-targeting")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: ``run("hvg", "x.h5ad")`` returns the exit code and stderr."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["vcelltools", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main()
        return int(e.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import vcelltools as vc

    d = tmp_path_factory.mktemp("remedies")
    vc.simulate(d / "x.h5ad", cells=240, genes=120, perturbations=4, inert=0.0)
    vc.normalize(d / "x.h5ad", d / "n.h5ad")
    part = ad.read_h5ad(d / "x.h5ad")
    part.X = part.X.astype(np.float32)
    part.X.data += np.float32(0.25)
    part.write_h5ad(d / "soup.h5ad")
    (d / "b.txt").write_text("".join(f"{g}\n" for g in part.var_names[:20]))
    (d / "mine.h5ad").write_bytes((d / "n.h5ad").read_bytes())
    vc.build_store(d / "x.h5ad", basis=d / "b.txt", out=d / "stores", name="x", pert_col="target_gene",
                   control="non-targeting")  # fmt: skip
    vc.train(d / "r", stores=[d / "stores" / "x"], model="perturbation-mean")
    return d


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    shutil.copytree(files, tmp_path / "d")
    monkeypatch.chdir(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("words", "code", "named", "then"),
    [
        (("normalize", "x.h5ad", "--out", "mine.h5ad"), 2, "--force", ("--force",)),
        (("hvg", "soup.h5ad", "--top", 9, "--out", "h.txt"), 3, "--non-integer round", ("--non-integer", "round")),
        (("hvg", "soup.h5ad", "--top", 9, "--out", "h.txt"), 3, "keep", ("--non-integer", "keep")),
        (("build-store", "soup.h5ad", "--basis", "b.txt", *LABELS), 3, "--non-integer round",
         ("--non-integer", "round")),
        (("build-store", "soup.h5ad", "--basis", "b.txt", *LABELS, "--name", "x", "--non-integer", "round"), 2,
         "--force", ("--force",)),
        (("score", "n.h5ad", "--truth", "x.h5ad", "--profile", "minimal", "--out", "s"), 3, "--to-cp10k",
         ("--to-cp10k",)),
        (("train", "--store", "stores/x", "--model", "perturbation-mean", "--out", "r"), 2, "--force", ("--force",)),
        (("build-store", "x.h5ad", "--basis", "b.txt", "--pert-col", "target_gene", "--name", "y"), 2, "--control",
         ("--control", "non-targeting")),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else None,
)  # fmt: skip
def test_the_option_that_an_error_names_is_the_remedy(here, run, words, code, named, then):
    found, said = run(*words)
    assert found == code and named in said, said
    found, said = run(*words, *then)
    assert found == 0, said


def test_the_command_that_an_error_names_is_the_remedy(here, run):
    """Where there is nothing to choose a basis from; where a store is damaged; where a .vcc is none."""
    assert run("basis")[0] == 2
    for name in ("n.h5ad", "mine.h5ad", "soup.h5ad"):
        (here / name).unlink()
    shutil.rmtree(here / "stores")
    assert run("init")[0] == 0
    for command in ("basis", "build-store", "verify"):
        assert run(command, "-q")[0] == 0, command
    raw = bytearray((here / "stores/x/counts.u8z").read_bytes())
    raw[len(raw) // 2] ^= 1
    (here / "stores/x/counts.u8z").write_bytes(raw)
    code, said = run("verify", "stores/x")
    assert code == 3 and "the build-store command that made it, with --force, builds it again" in said
    assert run("build-store", "--force", "-q")[0] == 0 and run("verify", "stores/x")[0] == 0


def test_a_model_that_is_planned_for_alone_names_the_command_that_plans_it(here, run):
    code, said = run("train", "--store", "stores/x", "--model", "diffusion", "--size", "moe-17b", "--out", "moe")
    words = shlex.split(re.search(r"\(vcelltools (.*)\)", said)[1])
    assert code == 2 and words[:2] == ["train", "--model"] and {"--dry-run", "moe-17b"} <= set(words)
    assert words[3:5] == ["--size", "moe-17b"]  # to compile the plan takes minutes
