"""Choosing experiments: conditions, caps, the seeded order and targets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcelltools.atlas import Choice, list_experiments, read_ids
from vcelltools.atlas._choose import choose, filter_rows
from vcelltools.atlas._sources import Source
from vcelltools.errors import DataError, UsageError


def make(n=12, seed=0) -> Source:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "tissue": [["lung", "blood", None, "unsure", "bone marrow, left", "Lung"][i % 6] for i in range(n)],
            "n": rng.integers(1, 100, n),
            "terms": [["a", "b"] if i % 2 else ["b"] for i in range(n)],
        }
    )
    return Source(
        name="s", settings={}, table=table, ids=[f"S{i}" for i in range(n)], urls=[""] * n, paths=[""] * n,
        cells=table["n"].to_numpy(float), remote=None,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["tissue=lung"], [0, 6]),
        (["tissue=lung|blood"], [0, 1, 6, 7]),
        (["tissue!=lung|blood"], [2, 3, 4, 5, 8, 9, 10, 11]),
        (["tissue="], [2, 3, 8, 9]),
        (["tissue=lung|"], [0, 2, 3, 6, 8, 9]),
        (["tissue!="], [0, 1, 4, 5, 6, 7, 10, 11]),
        (["tissue~^lung$"], [0, 5, 6, 11]),
        (["tissue = bone marrow, left"], [4, 10]),
        (["tissue~marrow", "terms=a"], None),
        (["terms=a"], [1, 3, 5, 7, 9, 11]),
        (["terms=b", "tissue=blood"], [1, 7]),
    ],
)
def test_conditions(where, rows):
    if rows is None:
        with pytest.raises(DataError, match="no experiment matches"):
            filter_rows(make(), where)
    else:
        assert filter_rows(make(), where).tolist() == rows


@settings(deadline=None)
@given(limit=st.integers(-5, 105), op=st.sampled_from([">", ">=", "<", "<="]), seed=st.integers(0, 5))
def test_numbers_compare_as_pandas_does(limit, op, seed):
    s = make(seed=seed)
    wanted = s.table.query(f"n {op} {limit}").index.tolist()
    if wanted:
        assert filter_rows(s, [f"n{op}{limit}"]).tolist() == wanted


def test_a_wrong_condition_names_what_is_near():
    for where, error, word in (
        ("tisue=lung", DataError, "did you mean 'tissue'"),
        ("tissue=lungs", DataError, "did you mean 'lung'"),
        ("tissue", UsageError, "not a valid condition"),
        ("n>many", UsageError, "not a number"),
        ("tissue~(", UsageError, "regular expression"),
    ):
        with pytest.raises(error) as e:
            filter_rows(make(), [where])
        assert word in str(e.value)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_the_order_is_pandas_sample(seed, n):
    s = make(n)
    rows = choose(s, Choice(all=True, seed=seed))
    assert rows.tolist() == s.table.sample(frac=1, random_state=seed).index.tolist()


@settings(deadline=None, max_examples=50)
@given(cells=st.integers(1, 900), seed=st.integers(0, 99))
def test_whole_experiments_until_the_target(cells, seed):
    s = make()
    rows = choose(s, Choice(cells=cells, seed=seed))
    total = s.cells[rows].sum()
    assert total >= min(cells, s.cells.sum()) and total - s.cells[rows[-1]] < cells
    assert rows.tolist() == choose(s, Choice(all=True, seed=seed)).tolist()[: len(rows)], "a prefix of one order"


def test_caps_hold_in_the_order():
    s = make(30)
    rows = choose(s, Choice(all=True, cap=("tissue=2",)))
    counts = s.table["tissue"].iloc[rows].value_counts(dropna=False)
    assert (counts == 2).all() and len(rows) == 12
    everything = choose(s, Choice(all=True)).tolist()
    assert [i for i in everything if i in set(rows.tolist())] == rows.tolist()
    with pytest.raises(UsageError, match="not a valid limit"):
        choose(s, Choice(all=True, cap=("tissue",)))


def test_ids_and_targets(tmp_path):
    s = make()
    assert choose(s, Choice(ids=("S3", "S1", "S3"))).tolist() == [3, 1]
    with pytest.raises(DataError, match="does not exist"):
        choose(s, Choice(ids=("S99",)))
    with pytest.raises(DataError, match="excluded by"):
        choose(s, Choice(ids=("S1",), where=("tissue=lung",)))
    assert len(choose(s, Choice(experiments=5))) == 5
    (tmp_path / "ids.txt").write_text("# mine\nS1\n\nS2\n")
    assert read_ids(str(tmp_path / "ids.txt")) == ("S1", "S2") and read_ids("S1,S2") == ("S1", "S2")
    s.cells[3] = np.nan
    with pytest.raises(UsageError, match="the number of cells"):
        choose(s, Choice(cells=10))


def test_listing_counts_columns_and_values():
    listing = list_experiments(make(), where=["tissue!="], values="terms").to_json()
    assert listing["experiments"] == 8 and listing["cells"] == int(make().cells[[0, 1, 4, 5, 6, 7, 10, 11]].sum())
    assert {c["name"]: (c["values"], c["unknown"]) for c in listing["columns"]}["tissue"] == (4, 0)
    assert [v["value"] for v in listing["values"]] == ["b", "a"] and listing["values"][1]["experiments"] == 4
