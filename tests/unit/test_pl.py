"""Plots return axes, draw what the numbers say, and leave pyplot alone; results show themselves in notebooks."""

from __future__ import annotations

import doctest

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

import vcelltools as vc
from tests.make import make_adata, make_counts
from vcelltools import pl
from vcelltools.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("pl")
    vc.simulate(d / "atlas.h5ad", cells=200, genes=100, perturbations=4, seed=3)
    vc.normalize(d / "atlas.h5ad", d / "truth.h5ad")
    vc.baseline(d / "pred.h5ad", truth=d / "truth.h5ad")
    return d


@pytest.mark.parametrize("name", ["hvg", "volcano", "discrimination", "qc"])
def test_the_example_runs(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    found = doctest.DocTestFinder(recurse=False).find(getattr(pl, name), name)
    out: list[str] = []
    assert found[0].examples
    assert doctest.DocTestRunner().run(found[0], out=out.append).failed == 0, "".join(out)


def test_axes_of_the_caller_are_drawn_on(folder):
    from matplotlib.figure import Figure

    axes = Figure().subplots(2, 2).ravel()
    result = vc.de(folder / "atlas.h5ad")
    assert vc.pl.hvg(vc.hvg(folder / "atlas.h5ad", top=20), ax=axes[0]) is axes[0]
    assert vc.pl.volcano(result, result.perturbations[0], ax=axes[1]) is axes[1]
    assert vc.pl.qc(vc.qc(folder / "atlas.h5ad"), ax=axes[2]) is axes[2]
    score = vc.score(folder / "pred.h5ad", folder / "truth.h5ad")
    assert vc.pl.discrimination(score, ax=axes[3]) is axes[3]


def test_infinite_fold_changes_are_drawn_at_the_edge():
    x = make_counts(60, 20)
    adata = make_adata(x.astype(np.float32))
    adata.obs["target_gene"] = ["non-targeting"] * 30 + ["A"] * 30
    adata.X[:30, 4] = 0
    adata.X[30:, 4] = 5
    result = vc.de(adata)
    ax = vc.pl.volcano(result, "A")
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert any(n.startswith("beyond the axis (") for n in names)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    assert np.isfinite(drawn).all() and np.abs(drawn[:, 0]).max() < 25
    with pytest.raises(UsageError, match="no perturbation 'zz'"):
        vc.pl.volcano(result, "zz")


def test_names_do_not_lie_on_one_another(folder):
    ax = vc.pl.hvg(vc.hvg(folder / "atlas.h5ad", top=50))
    boxes = [Text.get_window_extent(t) for t in ax.texts]
    assert boxes
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[:i])


def test_results_show_themselves_as_tables(folder):
    de, qc = vc.de(folder / "atlas.h5ad"), vc.qc(folder / "atlas.h5ad")
    for result in (de, qc, vc.score(folder / "pred.h5ad", folder / "truth.h5ad")):
        html = result._repr_html_()
        assert html.count("<table") == 1 and type(result).__name__ in html
    shown = vc.convert(folder / "atlas.h5ad", folder / "again.h5ad")._repr_html_()
    assert "n_cells" in shown and "200" in shown


def test_a_name_of_the_file_is_no_markup(tmp_path):
    adata = ad.AnnData(np.ones((4, 2), np.float32), pd.DataFrame(index=list("abcd")), pd.DataFrame(index=["<b>", "y"]))
    adata.obs["target_gene"] = ["non-targeting", "non-targeting", "<script>", "<script>"]
    assert "<script>" not in vc.de(adata)._repr_html_()
