"""basis, build-store and verify from the command line, on the real screens."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import scanpy as sc

import vcelltools as vc
from tests.conftest import run_cli, start_cli
from tests.make import get_mudata


@pytest.fixture(scope="module")
def built(thp1, tmp_path_factory):
    d = tmp_path_factory.mktemp("cli")
    assert run_cli("hvg", thp1, "--top", 100, "--out", "h.txt", cwd=d).code == 0
    args = ("--pert-col", "perturbation", "--control", "non-targeting", "--group-by", "bio_rep")
    ran = run_cli("build-store", thp1, "--basis", "h.txt", "--out", "s", "--name", "thp1", *args, "--json", cwd=d)
    assert ran.code == 0, ran.stderr
    return d, ran.json


def test_build_says_what_it_wrote(built):
    (said,) = built[1]["stores"]
    assert (said["n_cells"], said["n_genes"], said["n_runs"], said["n_perturbations"]) == (20729, 100, 78, 25)


def test_values_are_scanpys_rounded_to_float16(built, thp1):
    d, _ = built
    store = vc.open_store(d / "s/thp1")
    adata = sc.read_h5ad(thp1)[store.obs.index]
    counts = adata[:, list(store.genes)].X.toarray()
    assert np.array_equal(store.counts().toarray(), counts)
    adata = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    assert np.array_equal(store.X, adata[:, list(store.genes)].X.toarray().astype(np.float16))
    runs = store.runs.groupby("perturbation")["length"].sum()
    assert runs.to_dict() == adata.obs["perturbation"].value_counts().to_dict()


def test_verify(built, cli, tmp_path):
    d, _ = built
    ran = cli("verify", "s/thp1", "--json", cwd=d)
    assert ran.code == 0 and ran.json["ok"] and ran.json["stores"][0]["problems"] == []
    import shutil

    shutil.copytree(d / "s/thp1", tmp_path / "bad")
    (tmp_path / "bad/runs.parquet").unlink()
    ran = cli("verify", d / "s/thp1", tmp_path / "bad", "--json")
    assert ran.code == 3 and not ran.json["ok"] and [s["ok"] for s in ran.json["stores"]] == [True, False]
    assert "runs.parquet" in ran.json["stores"][1]["problems"][0]


def test_a_label_that_matches_no_cell(built, cli, thp1):
    d, _ = built
    args = ("--basis", "h.txt", "--out", "x", "--pert-col", "perturbation", "--control")
    ran = cli("build-store", thp1, *args, "NT", cwd=d)
    assert ran.code == 3 and "non-targeting 2,386" in ran.stderr
    assert not (d / "x").exists() or not list((d / "x").iterdir())
    ran = cli("build-store", thp1, *args[:4], "--pert-col", "nonsense", "--control", "x", cwd=d)
    assert ran.code == 3 and "perturbation" in ran.stderr
    assert cli("build-store", thp1, "--basis", "h.txt", "--out", "x", cwd=d).code == 2
    assert cli("build-store", cwd=d).code == 2
    again = ("build-store", thp1, "--basis", "h.txt", "--out", "s", "--name", "thp1", *args[4:], "non-targeting")
    assert cli(*again, cwd=d).code == 2
    plan = cli(*again[:6], "--name", "p", *again[8:], "--plan", "--json", cwd=d)
    assert plan.code == 0 and plan.json["plans"][0]["cells"] == 20729 and not (d / "s/p").exists()


def test_a_project_folder_needs_no_options(tmp_path, cli, thp1, papalexi):
    (tmp_path / "vcelltools.toml").write_text(
        f"""
[basis]
top = 60
exclude = ["^MT-"]
[[datasets]]
name = "thp1"
path = "{thp1}"
pert_col = "perturbation"
control = "non-targeting"
group_by = ["bio_rep"]
cell_line = "THP-1"
keep = ["confident_guide"]
"""
    )
    assert cli("basis", cwd=tmp_path).code == 0
    ran = cli("build-store", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    assert ran.json["stores"][0]["dropped"] == {"not confident_guide": 20729 - ran.json["stores"][0]["n_cells"]}
    store = vc.open_store(tmp_path / "stores/thp1")
    assert store.n_genes == 60 and set(store.runs["cell_line"]) == {"THP-1"}
    controls = store.runs[store.runs["is_control"]]["length"].sum()
    assert controls == 1923  # known of this screen
    assert cli("verify", cwd=tmp_path).code == 0
    (tmp_path / "vcelltools.toml").write_text("[basis]\ntopp = 5\n")
    ran = cli("basis", cwd=tmp_path)
    assert ran.code == 3 and "did you mean 'top'" in ran.stderr


@pytest.fixture
def project(tmp_path):
    """A folder with three data sets, the second of which has no such control."""
    from tests.screens import CONTROL, make_screen, write

    text = '[basis]\npath = "b.txt"\n'
    for i, control in enumerate((CONTROL, "nonsense", CONTROL)):
        write(make_screen(n=200, seed=i), tmp_path / f"d{i}.h5ad", "csc" if i == 2 else "csr")
        text += f'[[datasets]]\nname = "d{i}"\npath = "d{i}.h5ad"\npert_col = "target"\ncontrol = "{control}"\n'
    (tmp_path / "vcelltools.toml").write_text(text)
    (tmp_path / "b.txt").write_text("".join(f"GENE{i}\n" for i in range(20)))
    return tmp_path


def test_data_sets_side_by_side_have_the_bytes_of_a_serial_run(project, cli):
    from tests.unit.stores.test_store import hashes

    ran = cli("build-store", "--jobs", 2, "--json", cwd=project)
    assert ran.code == 3, ran.stderr
    assert [Path(s["path"]).name for s in ran.json["stores"]] == ["d0", "d2"]
    (failed,) = ran.json["failed"]
    assert failed["name"] == "d1" and failed["exit_code"] == 3 and "nonsense" in failed["message"]
    assert "error: d1: " in ran.stderr and "d0: built, 200 cells" in ran.stderr
    toml = project / "vcelltools.toml"
    toml.write_text(toml.read_text().replace("nonsense", "P1"))
    ran = cli("build-store", "--jobs", 2, "--json", cwd=project)  # what is whole is kept
    assert ran.code == 0 and ran.json["failed"] == [], ran.stderr
    assert [s["kept"] for s in ran.json["stores"]] == [True, False, True] and "kept" in ran.stderr
    ran = cli("build-store", "--jobs", 1, "--out", "serial", "--json", cwd=project)
    assert ran.code == 0, ran.stderr
    for name in ("d0", "d1", "d2"):
        assert hashes(project / "stores" / name) == hashes(project / "serial" / name)
    (project / "b.txt").write_text("GENE1\nGENE2\n")  # of another plan: refused, not replaced
    ran = cli("build-store", "--jobs", 1, "--json", cwd=project)
    assert ran.code == 2 and len(ran.json["failed"]) == 3 and "--force" in ran.json["failed"][0]["hint"]
    assert cli("build-store", "--jobs", 2, "--dask", "local", cwd=project).code == 2


def _find_children(pid: int) -> set[int]:
    """Return the processes below one, but for those that are dead and not yet buried."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, above = rest.split()[:2]
        if state != "Z":
            parent[int(name.split()[0])] = int(above)
    found, level = set(), {pid}
    while level:
        level = {p for p, above in parent.items() if above in level} - found
        found |= level
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_asked_to_stop_leaves_no_process_behind(project, cli, number, jobs):
    from tests.screens import make_screen, write
    from tests.unit.stores.test_store import hashes

    toml = project / "vcelltools.toml"
    toml.write_text(toml.read_text().replace("nonsense", "P1"))
    write(make_screen(n=60_000, seed=1), project / "d1.h5ad")
    run = start_cli("build-store", "--jobs", jobs, "--json", cwd=project)
    deadline = time.monotonic() + 120
    while not (project / "stores/.d1.building/journal").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    children = _find_children(run.pid)
    assert len(children) >= jobs - 1
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 5, err
    assert "interrupted" in err and "Traceback" not in err
    deadline = time.monotonic() + 30
    while (left := [p for p in children if Path(f"/proc/{p}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert not (project / "stores/d1").exists()
    ran = cli("build-store", "--jobs", jobs, "--json", cwd=project)
    assert ran.code == 0, ran.stderr
    assert cli("build-store", "--name", "d1", "--out", "clean", cwd=project).code == 0
    assert hashes(project / "stores/d1") == hashes(project / "clean/d1")


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_killed_run_over_several_data_sets_continues(project, cli, victim):
    from tests.screens import make_screen, write
    from tests.unit.stores.test_store import hashes

    toml = project / "vcelltools.toml"
    toml.write_text(toml.read_text().replace("nonsense", "P1"))
    write(make_screen(n=60_000, seed=1), project / "d1.h5ad")
    run = start_cli("build-store", "--jobs", 2, "--json", cwd=project)
    deadline = time.monotonic() + 60
    work = project / "stores/.d1.building/journal"
    while not work.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    if victim == "parent":
        run.send_signal(signal.SIGKILL)
    else:
        lock = os.stat(project / "stores/.d1.lock").st_ino
        holders = [p.parent.parent for p in Path("/proc").glob("[0-9]*/fd/*") if _inode(p) == lock]
        os.kill(int(holders[0].name), signal.SIGKILL)
    out, err = run.communicate(timeout=60)
    if victim == "child":
        assert run.returncode == 5, err
        assert "killed by signal 9" in err and len(json.loads(out)["stores"]) == 2
    assert not (project / "stores/d1").exists()
    ran = cli("build-store", "--jobs", 2, "--json", cwd=project)
    assert ran.code == 0, ran.stderr
    assert [s["kept"] for s in ran.json["stores"]][1] is False
    assert cli("build-store", "--jobs", 1, "--out", "clean", cwd=project).code == 0
    for name in ("d0", "d1", "d2"):
        assert hashes(project / "stores" / name) == hashes(project / "clean" / name)


def _inode(path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1


def test_sums_of_all_genes_of_a_file_stored_gene_by_gene(project, cli):
    args = ("build-store", "d2.h5ad", "--out", "s")
    plan = cli(*args, "--plan", "--json", cwd=project).json["plans"][0]
    assert "--sums all" in plan["sums_over"] and "20 basis genes" in plan["passes"]
    full = cli(*args, "--sums", "all", "--plan", "--json", cwd=project).json["plans"][0]
    assert full["sums_over"] == "all genes" and full["bytes_to_read"] > plan["bytes_to_read"]
    assert cli(*args, "--sums", "all", cwd=project).code == 0
    store = vc.open_store(project / "s/d2")
    assert len(store.measured) == 60 and store.sums.shape[1] == 60
    assert cli(*args, "--sums", "some", cwd=project).code == 2


def test_a_modality_of_an_h5mu(tmp_path, cli, papalexi):
    import h5py

    with h5py.File(papalexi) as f:
        columns = sorted(f["obs"])
    assert "replicate" in columns
    assert cli("hvg", papalexi, "--modality", "gene", "--top", 50, "--out", "h.txt", cwd=tmp_path).code == 0
    ran = cli(
        "build-store", papalexi, "--modality", "gene", "--basis", "h.txt", "--out", "s", "--name", "m",
        "--pert-col", "replicate", "--control", "rep_1", "--json", cwd=tmp_path,
    )  # fmt: skip
    if ran.code:  # the replicate's labels are the file's
        assert ran.code == 3 and "labels found" in ran.stderr
        label = ran.stderr.split("labels found: ")[1].split(" ")[0]
        ran = cli(
            "build-store", papalexi, "--modality", "gene", "--basis", "h.txt", "--out", "s", "--name", "m",
            "--pert-col", "replicate", "--control", label, "--json", cwd=tmp_path,
        )  # fmt: skip
    assert ran.code == 0, ran.stderr
    store = vc.open_store(tmp_path / "s/m")
    import anndata as ad

    gene = get_mudata().read_h5mu(papalexi).mod["gene"]
    adata = ad.AnnData(X=gene.X.copy(), obs=gene.obs, var=gene.var)[store.obs.index].copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    X = adata[:, list(store.genes)].X
    X = X.toarray() if hasattr(X, "toarray") else X
    assert np.array_equal(store.X, X.astype(np.float16))


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_an_atlas_like_kolf_by_its_preset(tmp_path, cli, layout):
    import anndata as ad

    from vcelltools.sampling.sampler import Sampler

    options = ("--cells", 3000, "--genes", 800, "--perturbations", 12, "--batches", 3, "--like", "kolf")
    ran = cli("simulate", "--out", "k.h5mu", *options, "--layout", layout, "-q", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    assert cli("hvg", "k.h5mu", "--top", 100, "--out", "h.txt", "--stats", "st", cwd=tmp_path).code == 0
    build = ("build-store", "k.h5mu", "--basis", "h.txt", "--out", "s", "--preset", "kolf", "--stats", "st")
    ran = cli(*build, "--name", "k", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    store = vc.open_store(tmp_path / "s/k")
    rna = get_mudata().read_h5mu(tmp_path / "k.h5mu").mod["rna"]
    obs = rna.obs
    single = (obs["num_features"] == 1) & ~obs["feature_call"].astype(str).str.contains("|", regex=False)
    kept = obs[single & obs["feature_call"].notna()]
    assert set(store.obs.index) == set(kept.index)
    sizes = kept.groupby(["feature_call", "batch"], observed=True).size()
    runs = store.runs.set_index(["perturbation", "context"])["length"]
    assert sorted(runs.items()) == sorted(sizes.items())
    adata = ad.AnnData(X=rna.X.copy(), obs=obs, var=rna.var)[store.obs.index].copy()
    assert np.array_equal(store.counts().toarray(), adata[:, list(store.genes)].X.toarray())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    assert np.array_equal(store.X, adata[:, list(store.genes)].X.toarray().astype(np.float16))
    assert store.manifest["library_size"]["from"] == {"csr": "the matrix", "csc": "saved statistics"}[layout]
    assert set(store.runs["cell_line"]) == {"KOLF2.1J"}
    Sampler(store, set_size=16, sets_per_batch=4, level="cell_line").batch(0).load()
    assert cli("verify", "s/k", cwd=tmp_path).code == 0
