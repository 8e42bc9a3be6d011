"""Responders: known escapes, no response without an effect, layouts, and the biology of the THP-1 screen."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import DATA, run_cli
from tests.make import as_layout
from vcelltools.errors import DataError
from vcelltools.screens.response import find_genes, find_responding

THP1 = DATA / "papalexi_thp1_eccite" / "papalexi_thp1_20729x299.h5ad"


def draw(n=300, m=400, g=60, share=0.6, shift=1.5, seed=0):
    rng = np.random.default_rng(seed)
    responds = rng.random(n) < share
    a, c = rng.normal(0, 1, (n, g)), rng.normal(0, 1, (m, g))
    a[:, :12] += responds[:, None] * shift
    return a.astype(np.float32), c.astype(np.float32), responds


def test_responding_cells_are_told_from_those_that_escaped():
    a, c, responds = draw()
    found = find_responding(a, c)
    assert (found.responds_n == responds).mean() > 0.97
    assert found.n_genes >= 12 and abs(found.posterior_n.mean() - responds.mean()) < 0.03
    assert abs(found.score_n[responds].mean() - 1) < 0.1 and abs(found.score_n[~responds].mean()) < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_nobody_responds_where_there_is_no_effect(seed):
    a, c, _ = draw(share=0.0, seed=seed)
    assert not find_responding(a, c).responds_n.any()
    assert not find_responding(c[:200], c[200:]).responds_n.any()


def test_a_group_without_counts_by_chance_is_not_certain():
    rng = np.random.default_rng(0)
    rare = rng.poisson(0.03, (420, 200)).astype(np.float32)
    genes, _ = find_genes(rare[:20], rare[20:])
    assert genes.sum() == 0


def test_the_genes_are_those_of_scipys_test():
    from scipy import stats

    a, c, _ = draw(n=40, m=90)
    p = stats.ttest_ind(a.astype(float), c.astype(float)).pvalue
    np.testing.assert_array_equal(find_genes(a, c)[0], stats.false_discovery_control(p) < 0.05)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Return a screen of four targets with known escapes: G0 to G2 change 30 genes in responding cells, G3 none."""
    d = tmp_path_factory.mktemp("screen")
    rng = np.random.default_rng(0)
    n, g = 900, 200
    label = rng.choice([*(f"G{i}" for i in range(4)), "non-targeting"], n, p=[0.15] * 4 + [0.4])
    responds = (rng.random(n) < 0.6) & np.isin(label, ["G0", "G1", "G2"])
    rate = np.tile(rng.gamma(2, 2, g), (n, 1))
    for i in range(3):
        mine = (label == f"G{i}") & responds
        rate[np.ix_(mine, rng.choice(np.arange(4, g), 30, replace=False))] *= 2.5
        rate[mine, i] *= 0.1
    obs = pd.DataFrame({"target_gene": label, "truth": responds}, index=[f"c{i}" for i in range(n)])
    adata = ad.AnnData(as_layout(rng.poisson(rate), "csr"), obs, pd.DataFrame(index=[f"G{j}" for j in range(g)]))
    adata.write_h5ad(d / "s.h5ad")
    return d / "s.h5ad"


def test_known_escapes_are_found(screen):
    result = vc.responders(screen, permutations=99)
    truth = ad.read_h5ad(screen).obs["truth"].to_numpy()
    found = result.to_frame()
    for name in ("G0", "G1", "G2"):
        mine = result.codes == result.labels.index(name)
        assert ((result.response_n[mine] == 1) == truth[mine]).mean() > 0.95
        assert found.loc[name, "p_value"] == 0.01 and found.loc[name, "knockdown_log2fc"] < -0.7
    assert found.loc["G3", "responding_share"] == 0 and found.loc["G3", "p_value"] > 0.05
    assert np.isnan(result.posterior_n[result.response_n == 0]).all()


def test_layout_threads_and_order_change_nothing(screen, tmp_path):
    one = vc.responders(screen, permutations=19, threads=1)
    adata = ad.read_h5ad(screen)
    for layout in ("csc", "dense"):
        adata.X = as_layout(ad.read_h5ad(screen).X.toarray(), layout)
        other = vc.responders(adata, permutations=19, threads=3)
        pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), rtol=1e-6)
        np.testing.assert_array_equal(one.response_n, other.response_n)


def test_parts_of_the_perturbations_give_what_all_give(screen, monkeypatch):
    one = vc.responders(screen, permutations=19)
    monkeypatch.setattr("vcelltools.differential.screen.MAX_BYTES", 200 * 4 * 300)
    other = vc.responders(screen, permutations=19)
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame())
    np.testing.assert_array_equal(one.posterior_n, other.posterior_n)


def test_few_genes_are_the_most_variable_and_the_targets(screen):
    result = vc.responders(screen, permutations=0, max_genes=20)
    whole = vc.responders(screen, permutations=0)
    pairs = zip(result.perturbations, whole.perturbations, strict=True)
    for a, b in pairs:
        assert a.knockdown_log2fc == pytest.approx(b.knockdown_log2fc)
        assert np.isnan(a.p_value) and np.isnan(b.p_value)


def test_the_knock_down_is_that_of_de(screen):
    found = {r.perturbation: r.knockdown_log2fc for r in vc.responders(screen, permutations=0).perturbations}
    frame = vc.de(screen).to_frame()
    own = frame[frame["gene"].astype(str) == frame["perturbation"].astype(str)]
    assert len(own) == 4
    for p, value in zip(own["perturbation"], own["log2_fold_change"], strict=True):
        assert found[p] == pytest.approx(value, abs=1e-3)


def test_the_filter_is_taken_by_de_and_stores(screen, tmp_path):
    done = run_cli("responders", screen, "--write", "r.h5ad", "--permutations", 19, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    new = ad.read_h5ad(tmp_path / "r.h5ad")
    kept = new.obs["response"].isin(["control", "responding"])
    assert (new.obs["control_or_responding"] == kept).all() and 0 < kept.sum() < len(kept)
    assert (
        vc.de(tmp_path / "r.h5ad", keep="control_or_responding").n_controls
        == (kept & (new.obs["response"] == "control")).sum()
    )
    (tmp_path / "basis.txt").write_text("".join(f"{g}\n" for g in new.var_names[:20]))
    built = run_cli(
        "build-store", "r.h5ad", "--basis", "basis.txt", "--pert-col", "target_gene", "--control", "non-targeting",
        "--keep", "control_or_responding", "--name", "r", "-q", cwd=tmp_path,
    )  # fmt: skip
    assert built.code == 0, built.stderr
    assert vc.open_store(tmp_path / "stores" / "r").n_cells == kept.sum()
    table = pd.read_parquet(tmp_path / "responders.parquet")
    assert {"cell", "posterior", "knockdown_log2fc", "e_distance", "p_value", "responding_share"} <= set(table)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_an_index_outside_the_matrix_is_refused(screen, layout):
    adata = ad.read_h5ad(screen)
    adata.X = as_layout(adata.X.toarray(), layout)
    adata.X.indices[5] = -1
    with pytest.raises(DataError):
        vc.responders(adata, permutations=0)


def test_too_few_controls_are_refused(screen):
    adata = ad.read_h5ad(screen)
    few = adata[(adata.obs["target_gene"] != "non-targeting") | (np.arange(adata.n_obs) < 3)]
    with pytest.raises(DataError):
        vc.responders(few.copy())
    with pytest.raises(DataError, match="control"):
        vc.responders(screen, control="nobody")


@pytest.mark.skipif(not THP1.exists(), reason="the THP-1 screen is not here")
def test_the_thp1_screen_shows_its_biology():
    found = vc.responders(THP1, pert_col="perturbation", permutations=199).to_frame()
    for gene in ("IFNGR1", "IFNGR2", "JAK2", "STAT1"):
        assert 0.55 < found.loc[gene, "responding_share"] < 0.8 and found.loc[gene, "p_value"] == 1 / 200
    for gene in ("ATF2", "CAV1", "CD86", "ETV7", "IRF7", "STAT5A"):
        assert found.loc[gene, "responding_share"] == 0 and found.loc[gene, "p_value"] > 0.05
    assert found.loc["JAK2", "knockdown_log2fc"] < -1.8 and found.loc["STAT1", "knockdown_log2fc"] < -1.8
