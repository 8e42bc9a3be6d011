"""Counts are told from what is not counts, and the refusal names what to pass instead."""

from __future__ import annotations

import subprocess
import sys

import h5py
import numpy as np
import pytest

from tests.files import make_counts, write_h5ad, write_h5mu, write_matrix
from vcelltools.errors import DataError, NotCountsError
from vcelltools.io import get_count_evidence, open_dataset, require_counts, survey_counts

COUNTS = make_counts(60, 50)


def normalise(x: np.ndarray, target: float = 1e4) -> np.ndarray:
    return x / np.maximum(x.sum(axis=1, keepdims=True), 1) * target


CASES = {
    "counts": (COUNTS, True),
    "CP10K": (normalise(COUNTS), False),
    "log1p CP10K": (np.log1p(normalise(COUNTS)), False),
    "log1p": (np.log1p(COUNTS), False),
    "scaled": ((COUNTS - COUNTS.mean()) / COUNTS.std(), False),
    "fractions": (COUNTS * 7.7, False),
    "huge": (np.where(COUNTS > 0, 3e30, 0), False),
    "empty": (np.zeros((5, 4)), True),
}


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_the_evidence_names_what_the_values_are(tmp_path, name, layout):
    values, is_counts = CASES[name]
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", values, layout=layout)) as ds:
        evidence = get_count_evidence(ds.matrix)
    assert evidence.is_counts == is_counts
    if layout == "csc" and name in ("CP10K", "log1p CP10K"):  # columns do not show what cells sum to
        assert evidence.looks_like in ("log1p", "fractions")
    else:
        assert evidence.looks_like == name
    if name == "CP10K" and layout != "csc":
        assert evidence.target_sum == pytest.approx(1e4, rel=1e-3)


def test_a_rare_negative_is_left_to_the_kernel_which_knows_its_place(tmp_path):
    x = make_counts(80, 60)
    x[3, 4] = -1
    with open_dataset(write_h5ad(tmp_path / "f.h5ad", x)) as ds:
        evidence = require_counts(ds)
    assert evidence.negative_share > 0
    assert "negative" in evidence.describe()


def test_the_refusal_names_the_layer_that_holds_counts(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", np.log1p(COUNTS))
    with h5py.File(path, "a") as f:
        write_matrix(f, "layers/counts", COUNTS)
        write_matrix(f, "layers/scaled", COUNTS - 1.5)
    with open_dataset(path) as ds, pytest.raises(NotCountsError, match="layer='counts'") as e:
        require_counts(ds)
    assert "f.h5ad: X holds log1p values" in str(e.value)
    assert "not whole numbers" in str(e.value)
    assert "scaled" not in str(e.value)
    assert e.value.exit_code == 3
    with open_dataset(path, layer="counts") as ds:
        assert require_counts(ds).looks_like == "counts"


def test_without_any_counts_the_refusal_says_so(tmp_path):
    with (
        open_dataset(write_h5ad(tmp_path / "f.h5ad", np.log1p(COUNTS))) as ds,
        pytest.raises(NotCountsError, match="no other layer"),
    ):
        require_counts(ds)


def test_bool_is_refused_as_counts(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS, dtype="bool")
    with pytest.raises(NotCountsError, match="boolean"):
        open_dataset(path)
    assert survey_counts(path) == [(None, "X", None)]


def test_the_modality_with_counts_is_chosen_and_said(tmp_path):
    path = write_h5mu(tmp_path / "f.h5mu", {"a": np.log1p(COUNTS), "b": COUNTS})
    with open_dataset(path) as ds:
        assert ds.modality == "b"
        assert "counts" in ds.notes[0]
    with open_dataset(path, modality="a") as ds, pytest.raises(NotCountsError, match="modality='b'"):
        require_counts(ds)


def test_the_transcriptome_is_chosen_by_name_among_counts(tmp_path):
    path = write_h5mu(tmp_path / "f.h5mu", {"guide": COUNTS, "rna": COUNTS})
    with open_dataset(path) as ds:
        assert ds.modality == "rna"


def test_two_candidates_ask_for_a_choice(tmp_path):
    path = write_h5mu(tmp_path / "f.h5mu", {"a": COUNTS, "b": COUNTS})
    with pytest.raises(DataError, match="a, b all hold counts") as e:
        open_dataset(path)
    assert "modality, one of: a, b" in str(e.value)


def test_memory_is_judged_and_its_layers_named():
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(np.log1p(COUNTS), layers={"counts": COUNTS})
    with open_dataset(adata) as ds, pytest.raises(NotCountsError, match="layer='counts'"):
        require_counts(ds)


def test_real_files_hold_counts(thp1, papalexi, pbmc):
    for path in (thp1, papalexi, pbmc):
        with open_dataset(path) as ds:
            assert require_counts(ds).looks_like == "counts"


def test_opening_and_judging_loads_nothing_heavy(tmp_path):
    path = write_h5ad(tmp_path / "f.h5ad", COUNTS)
    code = (
        "import sys; from vcelltools.io import open_dataset, require_counts\n"
        f"require_counts(open_dataset({str(path)!r}))\n"
        "heavy = {'pandas', 'anndata', 'numba', 'scipy', 'jax', 'zarr', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
