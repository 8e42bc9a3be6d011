"""The experiment card on designs that are known, and on the real screen."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.conftest import run_cli
from vcelltools.errors import DataError
from vcelltools.files.card import get_cramers_v, make_card


def make_data(labels, **columns) -> ad.AnnData:
    obs = pd.DataFrame({"target_gene": labels, **columns}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(sp.csr_matrix((len(labels), 4), dtype=np.int32), obs=obs)


def test_a_crossed_design():
    labels = np.tile(["A", "B", "non-targeting"], 120)
    card = make_card(make_data(labels, batch=np.repeat(["x", "y", "z"], 120), donor=np.repeat(["d", "d", "e"], 120)))
    assert (card.perturbation, card.control, card.batch) == ("target_gene", "non-targeting", "batch")
    assert card.cells_per_perturbation == (120, 120, 120)
    assert card.replicates_per_perturbation == (3, 3, 3)
    assert card.confounding == pytest.approx(0, abs=0.05)
    assert card.can_score
    assert card.findings == ()
    assert {(f.smallest, f.median, f.largest) for f in card.factors} == {(120, 120, 120), (120, 180, 240)}
    nested = {f.name: f.nested_in for f in card.factors}
    assert nested == {"target_gene": (), "batch": ("donor",), "donor": ()}


def test_a_confounded_design():
    labels = np.repeat(["A", "B", "non-targeting"], 100)
    card = make_card(make_data(labels, batch=np.repeat(["x", "y", "z"], 100)))
    assert card.confounding == pytest.approx(1, abs=0.02)
    text = " ".join(card.findings)
    assert "confounded" in text
    assert "2 of 2 perturbations occur in one batch of 3 alone" in text
    assert "2 perturbations share no batch with the controls (A, B)" in text
    assert "2 of 3 labels of batch hold no control cell" in text


def test_what_cannot_be_scored():
    card = make_card(make_data(np.repeat(["A", "non-targeting"], 50)))
    assert not card.can_score
    assert "1 perturbation beside the control" in card.findings[0]
    card = make_card(make_data(np.repeat(["A", "B"], 50)), pert_col="target_gene")
    assert not card.can_score
    assert "looks like a control" in card.findings[0]
    small = make_card(make_data(np.repeat(["A", "B", "non-targeting"], [50, 5, 12])))
    assert small.can_score
    assert any(f.startswith("12 control cells") for f in small.findings)
    assert any(f.startswith("1 of 2 perturbations have fewer than 30") for f in small.findings)


def test_cramers_v_is_one_or_none():
    a = np.repeat([0, 1, 2], 200)
    assert get_cramers_v(a, a) == pytest.approx(1)
    assert get_cramers_v(a, np.tile([0, 1], 300)) == pytest.approx(0, abs=0.05)
    assert np.isnan(get_cramers_v(a, np.zeros(600, int)))


def test_names_that_are_not_there():
    data = make_data(np.repeat(["A", "non-targeting"], 50))
    with pytest.raises(DataError, match="no column 'x'"):
        make_card(data, pert_col="x")
    with pytest.raises(DataError, match="is labelled 'NT'"):
        make_card(data, control="NT")


def test_the_screen_and_the_command(thp1):
    done = run_cli("inspect", thp1, "--card", "--pert-col", "perturbation", "--json")
    assert done.code == 0, done.stderr
    card = done.json
    assert card["control"] == "non-targeting"
    assert card["n_perturbations"] == 25
    assert card["can_score"]
    assert {f["name"] for f in card["factors"]} >= {"perturbation", "bio_rep"}
    assert run_cli("inspect", thp1, "--pert-col", "perturbation").code == 2
