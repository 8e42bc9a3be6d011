"""init: what it writes loads, names what is there, and the pipeline runs with it."""

from __future__ import annotations

import shlex
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest

from tests.conftest import run_cli
from vcelltools.config import load_config
from vcelltools.errors import UsageError
from vcelltools.project.init import init
from vcelltools.simulation.simulate import simulate


@pytest.fixture
def project(tmp_path):
    small = {"cells": 400, "genes": 150, "perturbations": 6}
    simulate(tmp_path / "kolf.h5mu", **small, like="kolf", guides=True)
    simulate(tmp_path / "my lab (2).h5ad", **small, cell_lines=2)
    simulate(tmp_path / "adata_Validation.h5ad", **small, seed=3)
    (tmp_path / "broken.h5ad").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("not data")
    return tmp_path


def test_finds_what_is_there(project):
    r = init(project)
    config, base = load_config(project / "vcelltools.toml")
    assert base == project
    assert r.truth == config.score.truth == "adata_Validation.h5ad"
    assert (config.score.pert_col, config.score.control) == ("target_gene", "non-targeting")
    assert r.datasets == ("kolf", "my-lab-2")
    kolf, lab = config.datasets
    assert (kolf.path, kolf.modality, kolf.pert_col) == ("kolf.h5mu", "rna", "feature_call")
    assert kolf.controls == ("Non-Targeting",)
    assert (kolf.group_by, kolf.gene_id_col, kolf.gene_name_col) == (["batch"], "gene_ids", "index")
    assert (kolf.guides.sep, kolf.guides.n_col, kolf.guides.policy) == ("|", "num_features", "single")
    assert (lab.path, lab.modality, lab.pert_col, lab.guides) == ("my lab (2).h5ad", None, "target_gene", None)
    assert (lab.cell_line_col, lab.controls) == ("cell_line", ("non-targeting",))
    assert [name for name, _ in r.skipped] == ["broken.h5ad"]
    assert "broken.h5ad" in (project / "vcelltools.toml").read_text()


def test_what_is_left_out_is_named_once(tmp_path):
    (tmp_path / "empty.h5ad").touch()
    assert init(tmp_path).skipped == (("empty.h5ad", "the file is empty (0 bytes)"),)
    assert "#   empty.h5ad: the file is empty (0 bytes)\n" in (tmp_path / "vcelltools.toml").read_text()


def test_what_is_doubtful_about_a_file_is_said(tmp_path, cli):
    """Labels that look alike, genes named in two ways, a matrix on its side: init says it as inspect does."""
    adata = anndata.AnnData(
        np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32),
        obs=pd.DataFrame(
            {"target_gene": np.resize(["TP53", "tp53", "non-targeting"], 60)}, [f"c{i}" for i in range(60)]
        ),
        var=pd.DataFrame(index=[f"ENSG{i:011d}" if i % 2 else f"GENE{i}" for i in range(20)]),
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    said = "\n".join(init(tmp_path).warnings)
    assert "a.h5ad: genes are named in two ways: 50%" in said
    assert "differ only in case, separators or Unicode form and are kept separate: 'TP53' and 'tp53'" in said
    ran = cli("init", "--force", cwd=tmp_path)
    assert ran.code == 0 and "named in two ways" in ran.stderr and "kept separate: 'TP53' and 'tp53'" in ran.stderr
    turned = adata.T.copy()
    turned.obs["target_gene"] = np.resize(["A", "non-targeting"], 20)
    turned.obs_names = [f"ENSG{i:011d}" for i in range(20)]
    turned.var_names = [f"AAAC{'ACGT'[i % 4] * 8}{'ACGT'[i // 4 % 4] * 4}-{i}" for i in range(60)]
    turned.write_h5ad(tmp_path / "a.h5ad")
    assert any("transposed" in w for w in init(tmp_path, force=True).warnings)


def test_other_folder_and_nothing_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "conf").mkdir()
    simulate(tmp_path / "data" / "a.h5ad", cells=100, genes=60, perturbations=3)
    init(tmp_path / "data", out=tmp_path / "conf" / "c.toml")
    assert load_config(tmp_path / "conf" / "c.toml")[0].datasets[0].path == "../data/a.h5ad"
    r = init(tmp_path)
    assert r.datasets == ()
    assert load_config(tmp_path / "vcelltools.toml")[0].datasets == []
    with pytest.raises(UsageError, match="no such folder"):
        init(tmp_path / "nothing")


def test_labels_that_try_to_break_out(tmp_path):
    """Labels and file names reach the file quoted: none of them becomes a key."""
    evil = 'con"trol\n[store]\npath = "x"'
    rng = np.random.default_rng(0)
    n = 200
    labels = rng.choice([evil, "non-targeting", "G1", "G2"], n)
    a = anndata.AnnData(
        rng.poisson(1.0, (n, 20)).astype(np.float32),
        obs=pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"G{i}" for i in range(20)]),
    )
    a.write_h5ad(tmp_path / "a.h5ad")
    shutil.copy(tmp_path / "a.h5ad", tmp_path / 'q"uo\nte.h5ad')
    init(tmp_path)
    config, _ = load_config(tmp_path / "vcelltools.toml")
    assert {d.path for d in config.datasets} == {"a.h5ad", 'q"uo\nte.h5ad'}
    assert config.store.path == "stores"
    assert all(d.controls == ("non-targeting",) for d in config.datasets)


def test_without_controls_says_so(tmp_path):
    rng = np.random.default_rng(0)
    a = anndata.AnnData(
        rng.poisson(1.0, (90, 20)).astype(np.float32),
        obs=pd.DataFrame(
            {"perturbation": pd.Categorical(rng.choice(["G1", "G2"], 90))}, index=[f"c{i}" for i in range(90)]
        ),
        var=pd.DataFrame(index=[f"G{i}" for i in range(20)]),
    )
    a.write_h5ad(tmp_path / "a.h5ad")
    init(tmp_path)
    text = (tmp_path / "vcelltools.toml").read_text()
    assert "# control = " in text
    assert load_config(tmp_path / "vcelltools.toml")[0].datasets[0].controls == ()


def test_command_and_the_road_after_it(project, cli):
    (project / "broken.h5ad").unlink()
    (project / "my lab (2).h5ad").unlink()
    r = cli("init", "--json", cwd=project)
    assert r.code == 0, r.stderr
    assert r.json["datasets"] == ["kolf"]
    assert cli("init", cwd=project).code == 2
    assert cli("init", "--force", cwd=project).code == 0
    assert cli("hvg", "kolf.h5mu", "--top", 30, "--out", "basis.txt", cwd=project).code == 0
    built = cli("build-store", "--json", cwd=project)
    assert built.code == 0, built.stderr
    assert (project / "stores" / "kolf" / "manifest.json").exists()


def test_a_modality_of_guides_is_pointed_at(papalexi, tmp_path):
    shutil.copy(papalexi, tmp_path / "screen.h5mu")
    r = init(tmp_path)
    assert r.datasets == ()
    assert "modality 'guide' may hold the guides" in r.skipped[0][1] and "obs column" in r.skipped[0][1]
    program, _, command = r.skipped[0][1].rpartition(": ")[2].partition(" ")
    done = run_cli(*shlex.split(command), cwd=tmp_path)
    assert program == "vcelltools" and done.code == 0, done.stderr
    assert init(tmp_path, out=tmp_path / "new.toml").datasets == ("labelled",)


def test_a_filter_of_cells_is_pointed_at(thp1, tmp_path):
    (tmp_path / "screen.h5ad").symlink_to(thp1)
    init(tmp_path)
    config = tmp_path / "vcelltools.toml"
    text = config.read_text()
    line = next(x for x in text.splitlines() if "confident_guide" in x)
    assert line == '# keep = ["confident_guide"]  # only cells that are True: True (16,192), False (4,537)'
    config.write_text(text.replace("# keep", "keep"))
    assert load_config(config)[0].datasets[0].keep == ["confident_guide"]
