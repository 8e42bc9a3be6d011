"""Faults of data, options and runs are reported in one line, with the right exit code."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tissues import GENES, make_tissue_adata, write_network
from vcelltools import spatial
from vcelltools.errors import DataError, UsageError
from vcelltools.spatial.betadata import Betas, read_betas, write_betas
from vcelltools.spatial.settings import dump_toml, load_toml, make_settings
from vcelltools.spatial.tissue import open_tissue

FIT = {"radius": 100.0, "l1_reg": 0.05, "standardize": True}


@pytest.fixture
def network(tmp_path):
    return write_network(tmp_path)


def test_coordinates(tmp_path):
    adata = make_tissue_adata()
    xy = adata.obsm.pop("spatial")
    with pytest.raises(DataError, match="no coordinates"):
        open_tissue(adata)
    for bad in (np.nan, np.inf):
        adata.obsm["spatial"] = xy.copy()
        adata.obsm["spatial"][5, 1] = bad
        with pytest.raises(DataError, match="not finite in row 5"):
            open_tissue(adata)
    adata.obsm["spatial"] = np.ones_like(xy)
    with pytest.raises(DataError, match="same coordinates"):
        open_tissue(adata)
    adata.obsm["spatial"] = np.column_stack([xy, xy[:, 0]])
    with pytest.raises(DataError, match="three columns"):
        open_tissue(adata)
    assert open_tissue(adata, dims=3).xy.shape == (120, 3) and open_tissue(adata, dims=2).xy.shape == (120, 2)
    adata.obsm["X_spatial"] = adata.obsm.pop("spatial")[:, :2]
    adata.write_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(open_tissue(tmp_path / "x.h5ad").xy, adata.obsm["X_spatial"])
    with pytest.raises(DataError, match="has no 'places'"):
        open_tissue(tmp_path / "x.h5ad", coords="places")


def test_layer_and_values():
    adata = make_tissue_adata()
    with pytest.raises(DataError, match="no layer 'counts'"):
        open_tissue(adata, layer="counts")
    for bad, said in ((-1.0, "-1 for Tf0"), (np.nan, "nan for Tf0")):
        adata.layers["imputed_count"][7, 0] = bad
        with pytest.raises(DataError, match=f"{said} in cell cell7"):
            open_tissue(adata).expression(["Tf0"])


def test_clusters():
    adata = make_tissue_adata()
    with pytest.raises(DataError, match="no column 'kind'"):
        open_tissue(adata, cluster_annot="kind")
    adata.obs["holes"] = np.where(np.arange(120) < 3, np.nan, 1.0)
    with pytest.raises(DataError, match="no value for 3 cells"):
        open_tissue(adata, cluster_annot="holes")
    by_label = open_tissue(adata, cluster_annot="cell_type")
    assert by_label.labels == {0: "type a", 1: "type b", 2: "type c"}
    np.testing.assert_array_equal(by_label.clusters, adata.obs["cell_type_int"])
    adata.obs["from5"] = adata.obs["cell_type_int"] + 5
    assert open_tissue(adata, cluster_annot="from5").labels == {5: "5", 6: "6", 7: "7"}
    assert open_tissue(adata, cluster_annot="none").labels == {0: "all"}


def test_genes(network, tmp_path):
    adata = make_tissue_adata()
    with pytest.raises(DataError, match=r"Gene33.*did you mean Gene3"):
        spatial.fit(adata, tmp_path / "run", genes=["Gene33"], network=network, **FIT)
    adata.var_names = ["Tf0", "Tf0", *GENES[2:]]
    with pytest.raises(DataError, match="'Tf0' occurs more than once"):
        spatial.fit(adata, tmp_path / "run", genes=["Gene0"], network=network, **FIT)


def test_a_run_and_its_folder(network, tmp_path):
    adata = make_tissue_adata()
    first = spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0", "Gene1"], **FIT)
    assert first.n_fitted == 2
    again = spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0", "Gene1"], **FIT)
    assert (again.n_fitted, again.n_skipped) == (0, 2)
    with pytest.raises(UsageError, match="other settings"):
        spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], **FIT)
    forced = spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], force=True, **FIT)
    assert forced.n_fitted == 1 and not (tmp_path / "run" / "Gene1_betadata.feather").exists()
    other = make_tissue_adata(clusters=4)
    with pytest.raises(DataError, match="its content has changed"):
        spatial.open_run(tmp_path / "run", other)
    toml = tmp_path / "run" / "spacetravlr_run_repro.toml"  # that of another program has no fingerprint
    toml.write_text(
        "".join(x for x in toml.read_text().splitlines(True) if not x.startswith(("data =", 'network = "xxh')))
    )
    run = spatial.open_run(tmp_path / "run", other)
    with pytest.raises(DataError, match="other clusters"):
        run.betas("Gene0")
    fewer = make_tissue_adata()[:, [g for g in GENES if g != "Tf0"]].copy()
    with pytest.raises(DataError, match="Tf0"):
        spatial.open_run(tmp_path / "run", fewer).splash("Gene0")


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_run_and_its_data_are_one(network, tmp_path, kind):
    """If data or a network change between two steps, no result mixes both versions."""
    adata, path = make_tissue_adata(), tmp_path / "t.h5ad"

    def give():
        if kind == "file":
            adata.write_h5ad(path)
        return path if kind == "file" else adata

    fit = {"genes": ["Gene0"], "network": network, **FIT}
    spatial.fit(give(), tmp_path / "run", **fit)
    if kind == "memory":  # data that the fit does not use may change
        adata.obs["note"] = "x"
    spatial.fit(give() if kind == "memory" else path, tmp_path / "run", **fit)
    run = spatial.open_run(tmp_path / "run", adata if kind == "memory" else None)
    run.screen(["Tf0"], tmp_path / "screen", hops=1)
    write_network(tmp_path, [("Tf1", "Gene0", "grn", 1.0, None)])
    with pytest.raises(UsageError, match="other settings, data or genes"):
        spatial.fit(give(), tmp_path / "run", **fit)
    write_network(tmp_path)
    adata.layers["imputed_count"][3] *= 2
    with pytest.raises(DataError, match="its content has changed"):
        spatial.open_run(tmp_path / "run", give())
    with pytest.raises(UsageError, match="other settings, data or genes"):
        spatial.fit(give(), tmp_path / "run", **fit)
    spatial.fit(give(), tmp_path / "run", force=True, **fit)
    again = spatial.open_run(tmp_path / "run", adata if kind == "memory" else None)
    with pytest.raises(UsageError, match="holds another screen"):
        again.screen(["Tf0"], tmp_path / "screen", hops=1)


def test_a_folder_of_other_files_is_no_run(network, tmp_path):
    adata = make_tissue_adata()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "summary.parquet").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="contains other files and is not a run"):
            spatial.fit(adata, tmp_path / "thesis", network=network, force=force, **FIT)
    adata.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(UsageError, match="contains the input"):
        spatial.fit(tmp_path / "t.h5ad", tmp_path, network=network, force=True, **FIT)
    assert (tmp_path / "thesis" / "summary.parquet").read_text() == "mine"


def test_perturbations(network, tmp_path):
    adata = make_tissue_adata()
    spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0"], **FIT)
    run = spatial.open_run(tmp_path / "run", adata)
    with pytest.raises(DataError, match=r"'tf0'.*did you mean Tf0"):
        run.perturb({"tf0": 0})
    with pytest.raises(UsageError, match="-1"):
        run.perturb({"Tf0": -1.0})
    with pytest.raises(DataError, match="no cell 'cell999'"):
        run.perturb({"Tf0": 0}, cells=["cell1", "cell999"])
    with pytest.raises(DataError, match="no column 'x'"):
        (tmp_path / "cells.csv").write_text("CellID\ncell1\n")
        run.read_cells(tmp_path / "cells.csv", "x")
    with pytest.raises(DataError, match="label 'type z'"):
        run.where("cell_type=type z")
    with pytest.raises(DataError, match="no betadata of 'Gene1'"):
        run.splash("Gene1")
    assert "modulates no fitted gene" in run.perturb({"Gene5": 0}).warnings[0]
    assert run.where("cell_type=type a,type b").sum() == (adata.obs["cell_type_int"] < 2).sum()


def test_options():
    with pytest.raises(UsageError, match=r"'radus'.*'radius'"):
        make_settings({"radus": 3})
    for name, value in (("radius", 0.0), ("kernel", "slow"), ("scale_reg", "x"), ("min_cells", 0), ("dims", 4)):
        with pytest.raises(UsageError, match=name):
            make_settings({name: value})
    with pytest.raises(UsageError, match="null"):
        make_settings({"null": 9, "validate": False})


def test_betadata_of_every_layout(tmp_path):
    import pandas as pd

    frame = pd.DataFrame(
        {"Cluster": [1, 0], "beta0": [0.5, 0.25], "beta_Tf0": [1.0, 2.0], "beta_Lig0$Rec0": [3.0, 4.0]}
    )
    labels = {0: "a", 1: "b"}
    frame.to_feather(tmp_path / "G_betadata.feather")
    want = read_betas(tmp_path / "G_betadata.feather", "G", labels)
    assert want.names == ("Tf0", "Lig0$Rec0") and want.keys.tolist() == [1, 0]
    plain = frame.rename(columns=lambda c: c.removeprefix("beta_"))
    plain["Cluster"] = ["b", "a"]
    plain[["Lig0$Rec0", "Tf0", "Cluster", "beta0"]].to_csv(tmp_path / "G_betadata.csv", index=False)
    got = read_betas(tmp_path / "G_betadata.csv", "G", labels)
    assert got.keys.tolist() == [1, 0]
    np.testing.assert_array_equal(got.ordered, want.ordered)
    cells = frame.drop(columns="Cluster").assign(obs_names=["c1", "c0"])
    cells.to_parquet(tmp_path / "G_betadata.parquet")
    got = read_betas(tmp_path / "G_betadata.parquet", "G", labels)
    assert got.per_cell and got.keys.tolist() == ["c1", "c0"]
    cells.drop(columns="obs_names").set_index(pd.Index(["c1", "c0"])).to_parquet(tmp_path / "G_betadata.parquet")
    assert read_betas(tmp_path / "G_betadata.parquet", "G", labels).keys.tolist() == ["c1", "c0"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.assign(Cluster=[0, 0]), "twice"),
        (lambda f: f.drop(columns="Cluster"), "neither a column"),
        (lambda f: f.assign(beta_Tf0=["x", "y"]), "does not hold numbers"),
        (lambda f: f.assign(beta_Tf0=[np.nan, 1.0]), "not finite"),
        (lambda f: f.assign(Cluster=["a", "q"]), "have no cluster 'q'"),
    ],
)
def test_betadata_that_is_broken(tmp_path, change, said):
    import pandas as pd

    frame = pd.DataFrame({"Cluster": [0, 1], "beta0": [0.0, 0.0], "beta_Tf0": [1.0, 2.0]})
    change(frame).to_feather(tmp_path / "G_betadata.feather")
    with pytest.raises(DataError, match=said):
        read_betas(tmp_path / "G_betadata.feather", "G", {0: "a", 1: "b"})
    (tmp_path / "H_betadata.feather").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot be read"):
        read_betas(tmp_path / "H_betadata.feather", "H", {})


def test_a_cluster_or_cell_without_a_row(tmp_path):
    adata = make_tissue_adata()
    for keys, per_cell, said in ((np.array([0, 1]), False, "cluster 2"), (np.array(["cell0"], object), True, "cell1")):
        values = np.ones((len(keys), 1))
        write_betas(tmp_path, Betas("Gene0", ("Tf0",), keys, np.zeros(len(keys)), values, per_cell))
        with pytest.raises(DataError, match=said):
            spatial.open_run(tmp_path, adata).splash("Gene0")
    write_betas(tmp_path, Betas("Gene0", ("Nothing",), np.arange(3), np.zeros(3), np.ones((3, 1)), False))
    with pytest.raises(DataError, match="'Nothing', which is not a gene"):
        spatial.open_run(tmp_path, adata).splash("Gene0")


def test_cells_with_the_same_name_are_not_confused(tmp_path):
    adata = make_tissue_adata()
    names = adata.obs_names.to_list()
    adata.obs_names = ["cell5", *names[1:]]
    write_betas(tmp_path, Betas("Gene0", ("Tf0",), np.arange(3), np.zeros(3), np.ones((3, 1)), False))
    run = spatial.open_run(tmp_path, adata)
    assert run.perturb({"Tf0": 0}).delta.any(), "names are not used"
    with pytest.raises(DataError, match="same name, cell5"):
        run.perturb({"Tf0": 0}, cells=["cell5"])
    values = np.arange(120.0)[:, None]
    write_betas(tmp_path, Betas("Gene0", ("Tf0",), np.array(names, object), np.zeros(120), values, True))
    with pytest.raises(DataError, match="same name, cell5"):
        spatial.open_run(tmp_path, adata).splash("Gene0")


def test_factors_that_are_not_usable(tmp_path):
    write_betas(tmp_path, Betas("Gene0", ("Tf0",), np.arange(3), np.zeros(3), np.ones((3, 1)), False))
    run = spatial.open_run(tmp_path, make_tissue_adata())
    for options, said in (({"beta_scale_factor": np.nan}, "beta_scale_factor"), ({"beta_cap": -1.0}, "beta_cap")):
        for call in (lambda o=options: run.splash("Gene0", **o), lambda o=options: run.perturb({"Tf0": 0}, **o)):
            with pytest.raises(UsageError, match=said):
                call()


def test_columns_that_are_zero_are_left_out_and_orphans_are_empty(tmp_path):
    values = np.array([[1.0, 0.0], [2.0, 0.0]])
    written = write_betas(tmp_path, Betas("G", ("A", "B$C"), np.arange(2), np.zeros(2), values, False))
    assert read_betas(written, "G", {}).names == ("A",)
    orphan = write_betas(tmp_path, Betas("H", ("A",), np.arange(2), np.ones(2), np.zeros((2, 1)), False))
    assert orphan.name == "H.orphan" and orphan.read_bytes() == b""


def test_toml_of_the_peer(tmp_path):
    (tmp_path / "names.txt").write_text("Gene3\n")
    (tmp_path / "spaceship_config.toml").write_text(
        '[data]\nadata_path = "x.h5ad"\nlayer = "X"\n[spatial]\nradius = 150\n[grn]\nnetwork_data_dir = "nets"\n'
        'max_lr_pairs = 7\nextra_modulators_file = "names.txt"\n[lasso]\nl1_reg = 1e-9\nn_iter = 100\n[model]\nx = 1\n'
        "[perturbation]\nligand_grid_factor = 0.5\nn_propagation = 3\n"
    )
    loaded = load_toml(tmp_path / "spaceship_config.toml")
    assert loaded.unused == ("lasso.n_iter", "model.x")
    assert loaded.command["data.adata_path"] == str(tmp_path / "x.h5ad")
    s = make_settings({"radius": 99.0}, loaded)
    assert (s.radius, s.layer, s.max_ligands, s.l1_reg, s.kernel) == (99.0, "X", 7, 1e-9, "fast")
    assert s.network_dir == str(tmp_path / "nets") and s.extra_modulators == ("Gene3",)
    (tmp_path / "run.toml").write_text(dump_toml(s, command={"training.genes": ["A"]}, clusters={0: 'a "b"\n'}))
    back = load_toml(tmp_path / "run.toml")
    assert make_settings({}, back) == s and back.clusters == {0: 'a "b"\n'} and back.unused == ()
    for text, said in (("[lasso]\nl1_reg = 'x'\n", "a number is expected"), ("[data\n", "not valid TOML")):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(DataError, match=said):
            load_toml(tmp_path / "bad.toml")


def test_small_clusters_and_constant_columns_are_said(network, tmp_path):
    adata = make_tissue_adata()
    adata.obs["cell_type_int"] = np.where(np.arange(120) < 5, 9, 0)
    adata.layers["imputed_count"][:, adata.var_names.get_loc("Tf0")] = 1.0
    adata.layers["imputed_count"][:, adata.var_names.get_loc("Tf2")] = adata.layers["imputed_count"][
        :, adata.var_names.get_loc("Tf1")
    ]
    r = spatial.fit(adata, tmp_path / "run", network=network, genes=["Gene0", "Gene1"], validate=False, **FIT)
    assert "fewer than 20 cells get coefficients of 0: 9" in r.warnings[0]
    import pandas as pd

    rows = pd.read_parquet(tmp_path / "run" / "summary.parquet")
    assert "constant" in rows[(rows.gene == "Gene0") & (rows.cluster == 0)].note.item()
    assert (rows[rows.cluster == 9].kept == False).all()  # noqa: E712
    run = spatial.open_run(tmp_path / "run", adata)
    assert all(not run.betas(g).values[run.betas(g).keys.tolist().index(9)].any() for g in run.genes)


def test_least_squares_is_warned_of(network, tmp_path):
    r = spatial.fit(
        make_tissue_adata(), tmp_path / "r", network=network, genes=["Gene0"], radius=100.0, l1_reg=1e-9, group_reg=1e-9
    )
    assert "least squares" in r.warnings[0] and r.largest_kkt <= 1e-6


def test_check_tells_of_the_radius(network):
    adata = make_tissue_adata()
    wide = spatial.check(adata, network=network, radius=1e5, genes=["Gene0"])
    assert any("hardly vary" in p for p in wide.problems) and wide.modulators["Gene0"]["lr"][0] == "Lig0$Rec0"
    narrow = spatial.check(adata, network=network, radius=1.0)
    assert any("below the cell spacing" in p for p in narrow.problems)
    assert not any("radius" in p for p in spatial.check(adata, network=network, radius=60.0).problems)
