"""Labels as people write them: blanks at their ends, the text nan, spellings that differ in case alone."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.make import as_layout, make_adata, make_counts
from vcelltools.differential.de import de
from vcelltools.differential.energy import energy
from vcelltools.files.convert import convert
from vcelltools.io import open_dataset

LABELS = np.array(["TP53", "TP53 ", "MYC", "nan", "ctrl", " ctrl", "", "Ctrl"], object)[np.arange(80) % 8]
WANT = [None if v.strip() in ("", "nan") else v.strip() for v in LABELS]


def write(path, values):
    adata = make_adata(as_layout(make_counts(80, 20, seed=1), "csr"))
    adata.obs["pert"] = values
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("kind", ["category", "text"])
@pytest.mark.parametrize("ranged", [True, False])
def test_labels_are_tidied_said_and_carried_exactly(tmp_path, kind, ranged):
    path = write(tmp_path / "x.h5ad", pd.Categorical(LABELS) if kind == "category" else LABELS)
    with open_dataset(path) as ds:
        codes, labels = ds.obs.factorize("pert") if ranged else ds.obs.column("pert").factorize()
        assert labels == ["Ctrl", "MYC", "TP53", "ctrl"]
        assert [None if c < 0 else labels[c] for c in codes] == WANT
        assert ds.obs.column("pert").labels().tolist() == WANT
        assert ds.obs.column("pert").labels(exact=True).tolist() == LABELS.tolist()
        said = "\n".join(ds.notes)
        assert "spaces around 2 labels were removed" in said
        assert "cells with the label" in said and "count as cells without a label" in said
        assert "differ only in case, separators or Unicode form and are kept separate: 'Ctrl' and 'ctrl'" in said
        n = len(ds.notes)
        ds.obs.factorize("pert")
        assert len(ds.notes) == n
    convert(path, tmp_path / "o.h5ad")
    assert ad.read_h5ad(tmp_path / "o.h5ad").obs["pert"].tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    "twins",
    [("TP53", "tp53"), ("TP-53", "TP_53"), ("\u00b5M", "\u03bcM"), ("ﬁ1", "fi1"), ("A\u200b", "A"), ("Ⅷ", "VIII")],
)
def test_labels_that_look_alike_are_named_together(tmp_path, twins):
    with open_dataset(write(tmp_path / "x.h5ad", [*twins, "MYC", "GATA1"] * 20)) as ds:
        assert len(ds.obs.factorize("pert")[1]) == 4
        said = "\n".join(ds.notes)
        assert all(repr(t) in said for t in twins)


def test_a_test_of_perturbations_counts_each_once(tmp_path):
    path = write(tmp_path / "x.h5ad", pd.Categorical(LABELS))
    result = de(path, pert_col="pert", control="ctrl")
    assert sorted(result.perturbations) == ["Ctrl", "MYC", "TP53"]
    assert any("spaces around" in n for n in result.notes)
    assert any("spaces around" in n for n in energy(path, pert_col="pert", control="ctrl", permutations=20).notes)


def test_ordinary_labels_and_numbers_stay_as_they_are(tmp_path):
    for values in (["b", "a", "B1", "a-1"] * 20, [10, 9, 1, 2] * 20, pd.Categorical([2.5, 1.0, 10.0, 2.0] * 20)):
        with open_dataset(write(tmp_path / "x.h5ad", values)) as ds:
            codes, labels = ds.obs.factorize("pert")
            assert labels == [f"{v:g}" if isinstance(v, float) else str(v) for v in sorted(set(values))]
            assert len(np.unique(codes)) == 4 and not ds.notes
