"""A panel of genes is normalised by the library of the whole transcriptome if obs has it and the user asks for it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import vcelltools as vc
from tests.conftest import run_cli
from tests.make import make_counts
from vcelltools.errors import DataError, UsageError

PANEL = slice(20, 60)
LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.ascontiguousarray}


def make_whole(seed=0):
    """Counts of 240 cells of four labels, two of which express some genes more."""
    X = make_counts(240, 300, seed=seed)
    label = np.array(["non-targeting", "A", "B", "C"])[np.arange(240) % 4]
    X[np.ix_(label == "A", np.arange(25, 40))] *= 3
    X[np.ix_(label == "B", np.arange(50, 200))] *= 2  # shifts the library, and with it what a panel's sum is worth
    obs = pd.DataFrame({"target_gene": label, "n_counts": X.sum(axis=1)}, [f"c{i}" for i in range(240)])
    return ad.AnnData(X.astype("float32"), obs, pd.DataFrame(index=[f"g{i}" for i in range(300)]))


def make_panel(layout="csr", seed=0):
    part = make_whole(seed)[:, PANEL].copy()
    part.X = LAYOUTS[layout](part.X)
    return part


def make_log(adata):
    """Log1p CP10K of the whole, of which the panel is taken afterwards."""
    out = adata.copy()
    sc.pp.normalize_total(out, target_sum=1e4)
    sc.pp.log1p(out)
    return out[:, PANEL].copy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"test": "nb"}, {"test": "welch"}, {"reference": "rest"}], ids=str)
def test_de_of_a_panel_equals_that_of_the_whole(layout, options):
    whole = vc.de(make_whole(), **options)
    panel = vc.de(make_panel(layout), library_size="n_counts", **options)
    np.testing.assert_allclose(panel.p_pg, whole.p_pg[:, PANEL], rtol=1e-9)
    np.testing.assert_allclose(panel.log2fc_pg, whole.log2fc_pg[:, PANEL], rtol=1e-9)
    assert panel.settings["library_size"] == "n_counts" and not any("n_counts" in n for n in panel.notes)
    alone = vc.de(make_panel(layout), **options)
    assert np.abs(alone.log2fc_pg - panel.log2fc_pg).max() > 0.3  # the sum of the panel gives another answer
    assert any("obs/n_counts is larger than the sums of the counts" in n for n in alone.notes)


def test_energy_and_responders_see_the_values_of_the_whole():
    few = {"max_genes": 40, "permutations": 99}
    a, b = vc.energy(make_panel(), library_size="n_counts", **few), vc.energy(make_log(make_whole()), **few)
    np.testing.assert_allclose(a.distance_p, b.distance_p, rtol=1e-4)
    found = [vc.responders(make_panel(), library_size="n_counts", **few), vc.responders(make_log(make_whole()), **few)]
    np.testing.assert_allclose(*([p.e_distance for p in r.perturbations] for r in found), rtol=1e-4)
    np.testing.assert_array_equal(found[0].response_n, found[1].response_n)
    assert not any("n_counts" in n for r in found for n in r.notes)
    assert any("library_size='n_counts' divides" in n for n in vc.responders(make_panel(), **few).notes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
def test_hvg_of_a_panel_equals_scanpys_on_values_of_the_whole(layout, flavor):
    want = sc.pp.highly_variable_genes(make_log(make_whole()), flavor=flavor, n_top_genes=10, inplace=False)
    got = vc.hvg(make_panel(layout), flavor=flavor, top=10, library_size="n_counts")
    np.testing.assert_allclose(got["dispersions_norm"], want["dispersions_norm"], rtol=2e-3, atol=1e-3)
    if flavor == "seurat":  # the others share ranks in bins of a few genes
        assert set(got.index[got["highly_variable"]]) == set(want.index[want["highly_variable"]])
    alone = vc.hvg(make_panel(layout), flavor=flavor, top=10)
    assert any("n_counts" in w for w in alone.attrs["warnings"]) and not got.attrs["warnings"]
    assert not np.allclose(alone["dispersions_norm"], got["dispersions_norm"], rtol=2e-3, atol=1e-3)


def test_pearson_residuals_expect_the_share_of_the_library():
    panel = make_panel()
    X, size = panel.X.toarray().astype(float), panel.obs["n_counts"].to_numpy()
    mu = size[:, None] * (X.sum(axis=0) / X.sum())
    residual = np.clip((X - mu) / np.sqrt(mu + mu**2 / 100), -np.sqrt(240), np.sqrt(240))
    got = vc.hvg(panel, flavor="pearson_residuals", top=10, library_size="n_counts")
    np.testing.assert_allclose(got["residual_variances"], residual.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stores_divide_by_the_library_of_the_whole(tmp_path, layout):
    panel = make_panel(layout)
    panel.write_h5ad(tmp_path / "x.h5ad")
    (tmp_path / "basis.txt").write_text("".join(f"{g}\n" for g in panel.var_names))
    how = {"basis": tmp_path / "basis.txt", "out": tmp_path, "pert_col": "target_gene", "control": "non-targeting",
           "cell_line": "a"}  # fmt: skip
    built = vc.build_store(tmp_path / "x.h5ad", name="whole", library_size="n_counts", **how)
    store = vc.open_store(built.path)
    want = np.asarray(make_log(make_whole()).X)[store.source_rows]
    np.testing.assert_allclose(np.asarray(store.X, np.float32), want, rtol=2e-3, atol=1e-3)
    assert not any("larger than the sums" in w for w in built.warnings)
    alone = vc.build_store(tmp_path / "x.h5ad", name="alone", **how)
    assert any("obs/n_counts is larger than the sums of the counts" in w for w in alone.warnings)


def test_scores_of_counts_equal_those_of_normalised_values(tmp_path):
    pred, truth = make_panel(seed=1), make_panel()
    by_library = vc.score(pred, truth, to_cp10k=True, library_size="n_counts", bootstrap=0)
    logs = vc.score(make_log(make_whole(1)), make_log(make_whole()), bootstrap=0)
    for name, component in logs.components.items():
        assert by_library.components[name].value == pytest.approx(component.value, rel=1e-4, abs=1e-6), name
    alone = vc.score(pred, truth, to_cp10k=True, bootstrap=0)
    assert alone.components["mae"].value != pytest.approx(by_library.components["mae"].value, rel=1e-3)
    assert any("n_counts" in w for w in alone.warnings)
    pack = tmp_path / "truth.pack"
    vc.score(pred, truth, truth_pack=pack, to_cp10k=True, library_size="n_counts", bootstrap=0)
    with pytest.raises(UsageError, match="library_size"):
        vc.score(pred, truth_pack=pack, to_cp10k=True, bootstrap=0)


@pytest.mark.parametrize("run", [vc.de, vc.energy, vc.responders, lambda a, **k: vc.score(a, a, **k)])
def test_what_cannot_be_a_library_is_refused(run):
    panel = make_panel()
    panel.obs["low"], panel.obs["text"], panel.obs["gap"] = 1.0, "many", np.nan
    with pytest.raises(DataError, match="obs/low is 1 for cell 0, whose counts sum to"):
        run(panel, library_size="low")
    with pytest.raises(DataError, match="obs/text does not hold numbers"):
        run(panel, library_size="text")
    with pytest.raises(DataError, match="obs/gap of cell 0 is nan"):
        run(panel, library_size="gap")
    with pytest.raises(DataError, match="no column 'none'"):
        run(panel, library_size="none")
    with pytest.raises(DataError, match="holds log1p values, which are normalised already"):
        run(make_log(make_whole()), library_size="n_counts")


def test_options_without_effect_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be used with flavor='seurat_v3', which ranks counts as they are"):
        vc.hvg(make_panel(), library_size="n_counts")
    with pytest.raises(UsageError, match="allow_discrete=True keeps counts"):
        vc.score(make_panel(), make_panel(), allow_discrete=True, library_size="n_counts")
    make_panel().write_h5ad(tmp_path / "x.h5ad")
    for command in (("hvg", "x.h5ad", "--pooled"), ("score", "x.h5ad", "--truth", "x.h5ad", "--compat", "vcc2026")):
        done = run_cli(*command, "--library-col", "n_counts", cwd=tmp_path)
        assert done.code == 2 and "--library-col cannot be used with" in done.stderr


def test_nothing_is_suggested_where_the_file_is_whole():
    whole = make_whole()
    whole.obs["n_counts"] = np.round(whole.obs["n_counts"] * 1.005)  # a few rare genes were filtered out
    assert not any("n_counts" in n for n in vc.de(whole).notes)
    whole.obs["n_counts"] -= 40  # of other cells or another step of a pipeline: not a total of these counts
    assert not any("n_counts" in n for n in vc.de(whole).notes)


def test_the_command_line_warns_and_takes_the_column(tmp_path):
    make_panel().write_h5ad(tmp_path / "x.h5ad")
    done = run_cli("normalize", "x.h5ad", "--out", "a.h5ad", cwd=tmp_path)
    assert done.code == 0 and "--library-col n_counts divides them by the whole library" in done.stderr
    done = run_cli("normalize", "x.h5ad", "--out", "b.h5ad", "--library-col", "n_counts", cwd=tmp_path)
    assert done.code == 0 and "library-col" not in done.stderr
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "b.h5ad").X.toarray(), make_log(make_whole()).X, rtol=1e-6)
