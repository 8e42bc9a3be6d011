"""The base of log1p values: read from the file, compared with the values, and reported."""

from __future__ import annotations

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import vcelltools as vc
from vcelltools.differential.expression import find_scale
from vcelltools.io import open_dataset
from vcelltools.io.counts import find_log_base

N_CELLS, N_GENES = 120, 30
LAYOUTS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def make_counts(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 3.0, N_GENES), (N_CELLS, N_GENES)).astype(float)
    counts[N_CELLS // 2 :, :3] *= 4
    counts[:, -1] += 1  # no empty cell
    return counts


def make_log(base: float | None, *, stated: float | None = None, target: float = 1e4, seed: int = 0, layout="csr"):
    counts = make_counts(seed)
    x = np.log1p(counts / counts.sum(axis=1, keepdims=True) * target) / math.log(base or math.e)
    obs = pd.DataFrame(
        {"target_gene": ["non-targeting", "A", "B"] * (N_CELLS // 3)}, index=[f"c{i}" for i in range(N_CELLS)]
    )
    data = ad.AnnData(
        LAYOUTS[layout](x.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)])
    )
    data.uns["log1p"] = {} if stated is None else {"base": stated}
    return data


def write(data: ad.AnnData, path, kind: str):
    if kind == "memory":
        return data
    (data.write_h5ad if kind == "h5ad" else data.write_zarr)(path)
    return path


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("kind", ["h5ad", "zarr", "memory"])
def test_the_stated_base_is_read_from_every_kind_of_file(tmp_path, kind):
    if kind == "zarr":
        pytest.importorskip("zarr")
    with open_dataset(write(make_log(2, stated=2.0), tmp_path / f"x.{kind}", kind)) as ds:
        assert ds.stated_base == 2.0
        base, target, notes = find_log_base(ds)
    assert base == 2.0
    assert target == pytest.approx(1e4, rel=1e-5)
    assert "base 2" in " ".join(notes)


@pytest.mark.parametrize(("base", "stated"), [(2, None), (10, 2.0), (None, 2.0)])
def test_the_values_decide_where_the_file_says_otherwise(base, stated):
    with open_dataset(make_log(base, stated=stated)) as ds:
        found, _, notes = find_log_base(ds)
    assert found == (base or math.e)
    assert "uns/log1p" in notes[0]


def test_natural_logarithms_need_no_words():
    with open_dataset(make_log(None)) as ds:
        assert find_log_base(ds)[0] == math.e
        assert find_log_base(ds)[2] == []


@pytest.mark.parametrize("stated", [math.nan, -2.0, 1.0, math.inf])
def test_a_base_that_is_none_is_ignored_and_said(stated):
    with open_dataset(make_log(None, stated=stated)) as ds:
        base, _, notes = find_log_base(ds)
    assert base == math.e
    assert "not a valid base" in notes[0]


def test_some_of_the_genes_leave_the_statement_to_be_believed():
    data = make_log(2, stated=2.0)[:, :12].copy()
    with open_dataset(data) as ds:
        assert find_log_base(ds)[:2] == (2.0, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base", [2, 10])
def test_de_does_not_depend_on_the_base(layout, base):
    want = vc.de(make_log(None, layout=layout))
    got = vc.de(make_log(base, stated=float(base), layout=layout))
    np.testing.assert_allclose(got.log2fc_pg, want.log2fc_pg, atol=1e-4)
    np.testing.assert_allclose(got.mean_pg, want.mean_pg, rtol=1e-4)
    np.testing.assert_allclose(got.p_pg, want.p_pg, rtol=1e-6)
    assert any("base" in n for n in got.notes)


def test_epsilon_and_means_are_per_ten_thousand_whatever_the_cells_were_scaled_to():
    want = vc.de(make_log(None), epsilon=1.0)
    got = vc.de(make_log(None, target=1e6), epsilon=1.0)
    np.testing.assert_allclose(got.log2fc_pg, want.log2fc_pg, atol=1e-4)
    np.testing.assert_allclose(got.mean_pg.sum(axis=1), 1e4, rtol=1e-4)
    assert any("1e+06" in n for n in got.notes)


def test_the_units_of_some_of_the_genes_are_the_files():
    data = make_log(None, target=1e6)[:, :12].copy()
    natural = np.expm1(data.X.toarray().astype(float))[1::3].mean(axis=0)
    got = vc.de(data)
    np.testing.assert_allclose(got.mean_pg[0], natural, rtol=1e-5)
    assert any("units of the file" in n for n in got.notes)


def test_score_reads_both_files_as_natural_logarithms():
    want = vc.score(make_log(None, seed=1), make_log(None))
    got = vc.score(make_log(2, stated=2.0, seed=1), make_log(10, stated=10.0))
    assert got.components["mae"].value == pytest.approx(want.components["mae"].value, rel=1e-4)
    assert sum("base" in w for w in got.warnings) == 2


def test_cell_evals_rules_read_the_values_as_they_are():
    plain = make_log(2)
    del plain.uns["log1p"]
    want = vc.score(plain, make_log(None), compat="cell-eval")
    got = vc.score(make_log(2, stated=2.0), make_log(None), compat="cell-eval")
    assert got.components["mae"].value == want.components["mae"].value
    assert any("natural logarithms" in w for w in got.warnings)


def test_to_cp10k_undoes_the_logarithm_of_its_base():
    want = vc.score(make_log(None, seed=1), make_log(None), to_cp10k=True)
    got = vc.score(make_log(2, stated=2.0, seed=1, target=1e6), make_log(None), to_cp10k=True)
    assert got.components["mae"].value == pytest.approx(want.components["mae"].value, rel=1e-4)


def test_two_targets_are_said():
    result = vc.score(make_log(None, target=1e6), make_log(None))
    assert any("1e+06" in w and "10,000" in w for w in result.warnings)


def test_library_sizes_are_of_the_base():
    with open_dataset(make_log(2, stated=2.0)) as ds:
        scale = find_scale(ds, with_library=True)
    np.testing.assert_allclose(scale.library_n, 1e4, rtol=1e-5)
