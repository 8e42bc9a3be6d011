"""Effects and splits from stores."""

from __future__ import annotations

import numpy as np
import pytest

from vcelltools.errors import DataError
from vcelltools.sampling.effects import add_validation, choose_split, make_screen, read_features
from vcelltools.sampling.sampler import Sampler
from vcelltools.sampling.splits import Split


@pytest.fixture
def screen(store):
    sampler = Sampler([store], set_size=8, sets_per_batch=4, level="cell_line", short="replace")
    split = Split(training=frozenset(["sim"]))
    return make_screen([store], split, sampler.perturbations, sampler.contexts)


def test_effects_are_batch_matched_differences_of_means(store, screen):
    runs = store.runs
    group = screen.groups.iloc[7]
    line = group["line"].split(".")[1]
    mine = runs[(runs["cell_line"] == line) & (runs["perturbation"] == group["perturbation"])]
    control = runs[(runs["cell_line"] == line) & runs["is_control"]].set_index("context")
    X = store.X.astype(np.float64)
    parts, weights = [], []
    for r in mine.itertuples():
        zero = X[control.loc[r.context, "start"] :][: control.loc[r.context, "length"]].mean(axis=0)
        parts.append(X[r.start : r.start + r.length].mean(axis=0) - zero)
        weights.append(r.length)
    np.testing.assert_allclose(screen.effect_kg[7], np.average(parts, axis=0, weights=weights), atol=1e-5)
    assert group["cells"] == sum(weights)


def test_every_perturbation_in_every_line(screen):
    assert len(screen.groups) == 12 * 3
    names = [p for p, t in zip(screen.perturbations, screen.target_p, strict=True) if t >= 0]
    assert all(str(screen.stores[0].genes[screen.target_p[screen.perturbations.index(p)]]) == p for p in names)


def test_default_split_holds_out_pairs_that_train_elsewhere(store):
    split = choose_split([store], seed=0, unseen=False)
    parts = {}
    for line in store.runs["cell_line"].unique():
        for p in store.runs.loc[~store.runs["is_control"], "perturbation"].unique():
            parts.setdefault(p, []).append(split.get_part("sim", line, p))
    flat = [x for row in parts.values() for x in row]
    assert flat.count("test") == round(0.15 * 36)
    assert flat.count("val") == 3
    assert all("train" in row for row in parts.values())
    assert choose_split([store], seed=0, unseen=False) == split


def test_with_features_perturbations_are_held_out_everywhere(store):
    split = choose_split([store], seed=1, unseen=True)
    assert split.heldout
    assert not split.fewshot


def test_validation_is_taken_from_training_alone(store):
    held = {"sim": None}
    lines = sorted(store.runs["cell_line"].unique())
    perts = sorted(store.runs.loc[~store.runs["is_control"], "perturbation"].unique())
    split = Split(training=frozenset(held), fewshot={("sim", lines[0]): dict.fromkeys(perts[:6], "test")})
    more = add_validation(split, [store], seed=0)
    for line in lines:
        for p in perts:
            before, after = split.get_part("sim", line, p), more.get_part("sim", line, p)
            assert after == before or (before, after) == ("train", "val")
    assert sum(x == "val" for s in [more.get_run_parts(store)] for x in s) >= 3
    assert add_validation(more, [store], seed=0) is more


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".npz"])
def test_feature_files(tmp_path, suffix):
    import pandas as pd

    fpath = tmp_path / f"f{suffix}"
    values = np.arange(6.0).reshape(3, 2)
    table = pd.DataFrame(values, index=["A", "B", "C"], columns=["x", "y"])
    if suffix == ".npz":
        np.savez(fpath, names=np.array(["A", "B", "C"]), values=values)
    elif suffix == ".parquet":
        table.to_parquet(fpath)
    else:
        table.to_csv(fpath, sep="\t" if suffix == ".tsv" else ",")
    got = read_features(fpath, ["control", "C", "Z", "A"])
    np.testing.assert_array_equal(got, [[np.nan] * 2, [4, 5], [np.nan] * 2, [0, 1]])


def test_half_missing_features_are_counted_and_named(tmp_path):
    from vcelltools.runtime.progress import Silent

    heard = []

    class Listener(Silent):
        def note(self, text):
            heard.append(text)

    fpath = tmp_path / "f.csv"
    fpath.write_text("gene,x\nA,1\nb,2\nC ,3\n")
    got = read_features(fpath, ["control", "A", "B", "C", "D"], Listener())
    np.testing.assert_array_equal(got[:, 0], [np.nan, 1, np.nan, 3, np.nan])
    (said,) = heard
    assert "2 of the 4 perturbations have no features" in said and "(B, D)" in said
    assert "its name 'b' may be 'B' in the stores" in said
    read_features(fpath, ["control", "A", "C"], Listener())
    assert len(heard) == 1


def test_bad_feature_files(tmp_path):
    fpath = tmp_path / "f.csv"
    with pytest.raises(DataError, match="no such file"):
        read_features(fpath, ["control", "A"])
    fpath.write_text("gene,x\nA,word\n")
    with pytest.raises(DataError, match="not a table of numbers"):
        read_features(fpath, ["control", "A"])
    fpath.write_text("gene,x\nB,1\n")
    with pytest.raises(DataError, match="none of the 1 perturbations"):
        read_features(fpath, ["control", "A"])
    fpath.write_text("gene,x\nA,1\nB,1\nA,2\n")
    with pytest.raises(DataError, match="contains 'A' 2 times"):
        read_features(fpath, ["control", "A"])
    fpath.write_text("gene,x\nA,inf\n")
    with pytest.raises(DataError, match="finite"):
        read_features(fpath, ["control", "A"])
