"""The documentation is true: every command in it runs, every link leads somewhere, the generated pages are current."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tests.atlases import RELEASE
from tests.conftest import ROOT, run_cli

README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
NOT_RUN = "<!-- not run by the tests -->\n"
BLOCK = re.compile(rf"^({NOT_RUN})?```(\w*)\n(.*?)^```", re.M | re.S)
SIZES = {"genes": 300, "perturbations": 6, "inert": 0.0, "effect_seed": 1}
TRAIN = '\n[train]\nsize = "tiny"\nsteps = 4\nsets = 4\nset_size = 8\neval_every = 4\n'


def get_commands(page: Path) -> list[str]:
    """Return the commands of a page's console blocks that are to be run."""
    out = []
    for not_run, language, body in BLOCK.findall(page.read_text()):
        if language == "console" and not not_run:
            out += [line[2:] for line in body.splitlines() if line.startswith("$ ")]
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Small files under the names that the pages use."""
    import anndata as ad

    from vcelltools.files.normalize import normalize
    from vcelltools.simulation.simulate import simulate

    d = tmp_path_factory.mktemp("docs")
    simulate(out=d / "kolf.h5mu", cells=500, seed=1, like="kolf", cell_lines=1, batches=2, **SIZES)
    simulate(out=d / "lab_b.h5ad", cells=700, seed=2, cell_lines=2, first_cell_line=2, genes_drop=0.1, **SIZES)
    for name, seed in (("lab_c", 3), ("other", 4)):
        simulate(out=d / f"{name}.h5ad", cells=500, seed=seed, first_cell_line=4, **SIZES)
    for name, seed in (("real_counts", 3), ("pred_counts", 5)):  # deep enough for the 2026 rules to see an effect
        simulate(out=d / f"{name}.h5ad", cells=900, seed=seed, first_cell_line=4, depth=4000, **SIZES)
    for name in ("real", "pred"):
        normalize(d / f"{name}_counts.h5ad", d / f"{name}.h5ad")
    adata = ad.read_h5ad(d / "pred_counts.h5ad")
    adata[adata.obs["target_gene"] != "non-targeting"].copy().write_h5ad(d / "pred_counts.h5ad")
    targets = sorted(set(adata.obs["target_gene"].astype(str)) - {"non-targeting"})
    (d / "network.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in itertools.pairwise(targets)))
    (d / "genes.csv").write_text("gene_name\n" + "".join(f"{g}\n" for g in adata.var_names))
    (d / "basis.txt").write_text("".join(f"{g}\n" for g in adata.var_names[:100]))
    simulate(out=d / "screen.h5mu", cells=500, seed=6, guides=True, **SIZES)
    (d / "split.toml").write_text('[training]\nkolf = "train"\nlab_b = "train"\n\n[zeroshot]\n"lab_c.line4" = "test"\n')
    for extra in d.glob("*.truth.h5ad"):
        extra.unlink()
    return d


def make_atlas_files(d: Path) -> None:
    """Write a small file with the columns of every preset, under the name that atlases.md uses."""
    import anndata as ad
    import pandas as pd

    from docs.make_api import get_file
    from tests.make import get_mudata
    from vcelltools.presets import PRESETS

    n, g = 40, 120
    X = np.random.default_rng(0).poisson(1.0, (n, g)).astype(np.float32)
    for name, preset in PRESETS.items():
        v = preset.values
        obs = {v["pert_col"]: ([v["control"][0]] * 20 + ["TP53"] * 20)}
        obs |= {c: ["a"] * n for c in [*v.get("group_by", []), v.get("cell_line_col")] if c}
        obs |= {c: [True] * n for c in v.get("keep", [])}
        if v.get("guides"):
            obs[v["guides"].n_col] = [1] * n
        ids, symbols = [f"ENSG{i:011d}" for i in range(g)], [f"GENE{i:05d}" for i in range(g)]
        var = {c: ids for c in [v.get("gene_id_col")] if c not in (None, "index")}
        var |= {c: symbols for c in [v.get("gene_name_col")] if c not in (None, "index")}
        index = ids if v.get("gene_id_col") == "index" else symbols
        cells = [f"c{i}" for i in range(n)]
        adata = ad.AnnData(X, obs=pd.DataFrame(obs, index=cells), var=pd.DataFrame(var, index=index))
        path = d / get_file(name, preset.source)
        if path.suffix == ".h5mu":
            get_mudata().MuData({v["modality"]: adata}).write(path)
        else:
            adata.write_h5ad(path)


def test_the_readme_shows_commands_of_the_guide():
    shown, run = get_commands(README), get_commands(ROOT / "docs" / "guide.md")
    assert shown and [c for c in run if c in shown] == shown, "what the README shows is run by the guide, in this order"


@pytest.mark.parametrize(
    "page",
    [p for p in DOCS if get_commands(p) and p.name != "challenges.md"],  # tests/workflow/test_challenges.py runs it
    ids=lambda p: p.name,
)
def test_every_command_runs(page, files, tmp_path, monkeypatch):
    commands = get_commands(page)
    monkeypatch.syspath_prepend(str(ROOT))
    d = tmp_path / "work"
    shutil.copytree(files, d)
    if page.name != "guides.md":
        (d / "screen.h5mu").unlink()  # without labels: init would ask for them
    if page.name == "atlas.md":
        if not RELEASE.is_dir():
            pytest.skip("the stand-in buckets are not here")
        shutil.copytree(RELEASE, d / "bucket" / "2026-01-12")
    if page.name == "atlases.md":
        make_atlas_files(d)
    if page.name == "guide.md":  # it begins with nothing but data files
        for name in ("basis.txt", "pred.h5ad"):
            (d / name).unlink()
        for name in ("real.h5ad", "other.h5ad", "real_counts.h5ad", "pred_counts.h5ad"):
            (d / name).rename(tmp_path / name)
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "vcelltools", f"{page.name}: {command}: only the public command is shown"
        if "other.h5ad" in words:
            shutil.copy(tmp_path / "other.h5ad", d)
        done = run_cli(*words[1:], cwd=d)
        assert done.code == 0, f"{page.name}: $ {command}\n{done.stderr}"
        if words[1] == "init":  # as it was written, but for a training of seconds
            config = d / "vcelltools.toml"
            config.write_text(re.sub(r"\n\[train\]\n.*?(?=\n\[)", TRAIN, config.read_text(), flags=re.S))
    run_python(page, d, monkeypatch)


def run_python(page: Path, d: Path, monkeypatch) -> None:
    """Run a page's Python, one block after the other, among the files that its commands left."""
    monkeypatch.chdir(d)
    names: dict[str, object] = {}
    for _, language, body in BLOCK.findall(page.read_text()):
        if language == "python" and page.name != "api.md":
            exec(compile(body, page.name, "exec"), names)


def test_the_python_of_the_readme_runs(files, tmp_path, monkeypatch):
    d = tmp_path / "work"
    shutil.copytree(files, d)
    run_python(README, d, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"https?://|mailto:", target):
            assert (page.parent / target).exists(), f"{page.name}: {target} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_toml_and_python_blocks_are_valid(page):
    from vcelltools.config import parse_config
    from vcelltools.sampling.splits import parse_split
    from vcelltools.training.settings import make_settings

    for _, language, body in BLOCK.findall(page.read_text()):
        if language == "python" and page.name != "api.md":
            compile(body, page.name, "exec")
        if language == "toml":
            if "[zeroshot]" in body:
                assert parse_split(tomllib.loads(body), where=page.name).zeroshot
            else:
                make_settings(parse_config(body, where=page.name).train, {})


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_api.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_is_documented():
    from vcelltools.cli.main import COMMANDS

    text = "".join(p.read_text() for p in PAGES)
    for command in COMMANDS:
        assert f"vcelltools {command}" in text, f"{command} is on no page"


def test_the_api_has_what_a_store_offers():
    page = (ROOT / "docs" / "api.md").read_text()
    section = page.split("## vcelltools.stores.store.Store")[1].split("\n## ")[0]
    for name in ("X", "genes", "obs", "runs", "library_size", "sums", "counts(", "to_anndata("):
        assert f"- `.{name}" in section, name
    assert 'flavor: str = "seurat_v3"' in page and "= seurat_v3" not in page
