"""The sampler: its draws, their reproducibility, no leakage between parts; and splits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import vcelltools as vc
from tests.screens import BUILD, CONTROL, make_screen, write
from vcelltools.errors import DataError, UsageError
from vcelltools.sampling.sampler import Sampler
from vcelltools.sampling.splits import Split, hold_out, parse_split, read_split

BASIS = [f"GENE{i}" for i in range(20)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    d = tmp_path_factory.mktemp("stores")
    for name, kw in (("a", {"n": 900, "perts": 5}), ("b", {"n": 600, "perts": 7, "seed": 3, "lines": 1})):
        vc.build_store(write(make_screen(**kw), d / f"{name}.h5ad"), basis=BASIS, out=d, name=name, **BUILD)
    return [vc.open_store(d / "a"), vc.open_store(d / "b")]


def facts(sampler, batch):
    """Yield (store obs of the perturbed cells, of the controls, labels) of every set."""
    for i in range(len(batch.store_id)):
        store = sampler.stores[batch.store_id[i]]
        yield (
            store,
            store.obs.iloc[batch.perturbed_rows[i]],
            store.obs.iloc[batch.control_rows[i]],
            sampler.perturbations[batch.perturbation_id[i]],
            sampler.contexts[batch.context_id[i]],
        )


@pytest.mark.parametrize("draw", ["scatter", "blocks"])
@pytest.mark.parametrize("level", ["context", "cell_line"])
@pytest.mark.parametrize(
    ("set_size", "read"), [(3, "memory"), (20, "memory"), (20, "disk"), (20, "auto"), (33, "memory")]
)
def test_sets_are_what_they_say(stores, draw, level, set_size, read):
    options = {"level": level, "draw": draw, "short": "replace", "read": read}
    s = Sampler(stores, set_size=set_size, sets_per_batch=16, seed=5, **options)
    for step in range(4):
        batch = s.batch(step)
        loaded = batch.load()
        assert loaded.perturbed.shape == (16, set_size, 20) and loaded.perturbed.dtype == np.float16
        for i, (store, perturbed, control, pert, context) in enumerate(facts(s, batch)):
            assert np.array_equal(loaded.perturbed[i], store.X[batch.perturbed_rows[i]])
            assert np.array_equal(loaded.control[i], store.X[batch.control_rows[i]])
            assert set(perturbed["target"]) == {pert} and set(control["target"]) == {CONTROL}
            assert context.startswith(f"{store.name}.") and perturbed["line"].iloc[0] in context
            assert np.array_equal(perturbed["line"], control["line"])
            if level == "context":
                assert len({*perturbed["batch"], *control["batch"]}) == 1 and perturbed["batch"].iloc[0] in context
            else:
                assert np.array_equal(perturbed["batch"], control["batch"])
            group = s.groups.iloc[batch.group_id[i]]
            if group["length"] >= set_size:
                assert len(set(batch.perturbed_rows[i])) == set_size


def test_a_pure_function_of_seed_and_step(stores):
    def rows(**kw):
        s = Sampler(stores, set_size=8, sets_per_batch=12, **{"seed": 1, **kw})
        return [s.batch(t).perturbed_rows for t in (0, 7)], s

    (first, later), s = rows()
    assert np.array_equal(s.batch(7).perturbed_rows, later)  # independent of earlier draws
    again, _ = rows()
    assert np.array_equal(again[0], first) and np.array_equal(again[1], later)
    assert not np.array_equal(first, later)
    assert not np.array_equal(rows(seed=2)[0][0], first)
    parts = [rows(process_index=h, process_count=5)[0][1] for h in range(5)]
    for h, part in enumerate(parts):
        assert np.array_equal(part, later[h::5])


def test_the_iterator_is_the_same_batches_read_ahead(stores):
    s = Sampler(stores, set_size=8, sets_per_batch=4)
    got = list(s.iterate(3, 9, prefetch=3))
    assert [b.step for b, _ in got] == list(range(3, 9))
    for b, values in got:
        assert np.array_equal(b.perturbed_rows, s.batch(b.step).perturbed_rows)
        assert np.array_equal(values.control, s.batch(b.step).load().control)
    endless = iter(s)
    assert next(endless)[0].step == 0
    endless.close()  # its thread ends too


def test_an_error_in_the_reading_thread_reaches_the_caller(stores, monkeypatch):
    s = Sampler(stores, set_size=8, sets_per_batch=4)
    monkeypatch.setattr(s, "begin", lambda batch, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(s.iterate())


def test_short_groups_are_listed_never_silently_dropped(stores):
    skip = Sampler(stores, set_size=25, sets_per_batch=4, short="skip")
    keep = Sampler(stores, set_size=25, sets_per_batch=4, short="replace")
    assert len(skip.groups) + len(skip.skipped) == len(keep.groups) and len(skip.skipped) > 0
    assert set(skip.skipped["why"]) <= {"few cells", "few controls"}
    assert (skip.groups[["length", "control_length"]] >= 25).all(axis=None)
    with pytest.raises(DataError, match="too small"):
        Sampler(stores, set_size=5000, sets_per_batch=4)


@pytest.mark.parametrize(("weights", "power"), [("uniform", 0), ("cells", 1), (0.5, 0.5)])
def test_weights(stores, weights, power):
    s = Sampler(stores, set_size=2, sets_per_batch=20_000, weights=weights, store_weights={"b": 3.0})
    factor = np.where(s.groups["store"] == "b", 3.0, 1.0)
    p = s.groups["length"].to_numpy() ** float(power) * factor
    found = np.bincount(s.batch(0).group_id, minlength=len(p))
    assert stats.chisquare(found, p / p.sum() * found.sum()).pvalue > 1e-4


@pytest.mark.parametrize("draw", ["scatter", "blocks"])
def test_every_cell_is_drawn_and_evenly(stores, draw):
    s = Sampler(stores[0], set_size=4, sets_per_batch=4000, level="cell_line", draw=draw, short="replace")
    batch = s.batch(0)
    found = np.bincount(batch.perturbed_rows.reshape(-1), minlength=s.stores[0].n_cells)
    group = s.groups.iloc[0]
    mine = found[group["start"] : group["start"] + group["length"]]
    assert (mine > 0).all()
    if draw == "scatter":
        assert stats.chisquare(mine).pvalue > 1e-4


def test_any_two_cells_of_a_group_meet(stores):
    s = Sampler(stores[0], set_size=16, sets_per_batch=3000, level="cell_line", draw="scatter")
    batch = s.batch(0)
    g = int(s.groups["length"].argmin())
    start, n = int(s.groups["start"][g]), int(s.groups["length"][g])
    met = np.zeros((n, n), bool)
    for rows in batch.perturbed_rows[batch.group_id == g] - start:
        met[np.ix_(rows, rows)] = True
    assert met.all()


def test_sanity_targets(stores):
    same = Sampler(stores, set_size=8, sets_per_batch=8, target="control-same").batch(0)
    other = Sampler(stores, set_size=8, sets_per_batch=8, target="control").batch(0)
    assert np.array_equal(same.perturbed_rows, same.control_rows) and not same.perturbation_id.any()
    assert not np.array_equal(other.perturbed_rows, other.control_rows) and not other.perturbation_id.any()
    for store, a, b, *_ in facts(Sampler(stores, set_size=8, sets_per_batch=8, target="control"), other):
        assert set(a["target"]) == set(b["target"]) == {CONTROL} and set(a["batch"]) == set(b["batch"]), store


def test_groups_for_evaluation(stores):
    s = Sampler(stores, set_size=8, sets_per_batch=2, short="replace")
    batch = s.draw_groups(np.arange(len(s.groups)))
    assert np.array_equal(batch.group_id, np.arange(len(s.groups)))
    assert [s.perturbations[i] for i in batch.perturbation_id] == list(s.groups["perturbation"])


def test_vocabularies_do_not_depend_on_the_split(stores):
    split = hold_out(stores, test=0.4, seed=3)
    a, b = Sampler(stores, set_size=4, sets_per_batch=2), Sampler(stores, set_size=4, sets_per_batch=2, split=split)
    assert a.perturbations == b.perturbations == [CONTROL, *[f"P{i}" for i in range(7)]]
    assert a.contexts == b.contexts and len(b.groups) < len(a.groups)


def test_stores_of_other_bases_are_refused(stores, tmp_path):
    vc.build_store(write(make_screen(), tmp_path / "c.h5ad"), basis=BASIS[::-1], out=tmp_path, name="c", **BUILD)
    with pytest.raises(DataError, match="gene 0 is GENE0 in a and GENE19 in c"):
        Sampler([stores[0], vc.open_store(tmp_path / "c")], set_size=4, sets_per_batch=2)
    with pytest.raises(DataError, match="named 'a'"):
        Sampler([stores[0], stores[0]], set_size=4, sets_per_batch=2)


@pytest.mark.parametrize(
    "bad",
    [
        {"level": "line"},
        {"short": "pad"},
        {"draw": "x"},
        {"weights": "n"},
        {"set_size": 0},
        {"process_index": 3},
        {"part": "dev"},
    ],
)
def test_wrong_options(stores, bad):
    with pytest.raises(UsageError):
        Sampler(stores, **{"set_size": 4, "sets_per_batch": 2, **bad})


SPLIT = """
[datasets]
a = "stores/a"
b = "stores/b"
[training]
a = "train"
b = "train"
[zeroshot]
"a.L1" = "test"
[fewshot."b.L0"]
val = ["P1", "P2"]
test = ["P3"]
"""


def test_the_dialect(stores, tmp_path):
    (tmp_path / "s.toml").write_text(SPLIT)
    split = read_split(tmp_path / "s.toml")
    split.check(stores)
    assert split.get_part("a", "L0", "P3") == "train" and split.get_part("a", "L1", "P3") == "test"
    assert [split.get_part("b", "L0", f"P{i}") for i in range(5)] == ["train", "val", "val", "test", "train"]
    assert split.get_part("c", "L0", "P0") is None
    unquoted = SPLIT.replace('"a.L1"', "a.L1").replace('"b.L0"', "b.L0")
    (tmp_path / "u.toml").write_text(unquoted)
    again = read_split(tmp_path / "u.toml")
    assert again.zeroshot == split.zeroshot and again.fewshot == split.fewshot
    dotted = parse_split({"zeroshot": {"x.y.L.1": "val"}}, where="t", names=["x.y"])
    assert dotted.zeroshot == {("x.y", "L.1"): "val"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zeroshots": {}}, r"unknown section \[zeroshots\] \(did you mean \[zeroshot\]"),
        ({"zeroshot": {"a.L1": "holdout"}}, "'holdout'"),
        ({"zeroshot": {"L1": "test"}}, "does not have the form"),
        ({"training": {"a": "test"}}, "only 'train'"),
        ({"fewshot": {"a.L1": {"dev": ["P1"]}}}, "'dev'"),
        ({"fewshot": {"a.L1": {"test": "P1"}}}, "list of perturbations"),
        ({"fewshot": {"a.L1": {"test": ["P1"], "val": ["P1"]}}}, "in both"),
        ({"zeroshot": {"a.L1": "test"}, "fewshot": {"a.L1": {"test": ["P1"]}}}, "both zeroshot and fewshot"),
    ],
)
def test_mistakes_in_splits(raw, message):
    with pytest.raises(DataError, match=message):
        parse_split(raw, where="t", names=["a"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zeroshot": {"a.l1": "test"}}, "no cell line of a is named 'l1'"),
        ({"zeroshot": {"aa.L1": "test"}}, "no data set is named 'aa'"),
        ({"fewshot": {"a.L1": {"test": ["P11"]}}}, "no perturbation of a.L1 is named 'P11'"),
        ({"heldout": {"test": ["Q"]}}, "no perturbation is named 'Q'"),
        ({"heldout": {"test": ["non-targeting"]}}, "'non-targeting' is a control, which cannot be held out"),
        ({"fewshot": {"a.L1": {"val": ["non-targeting"]}}}, "'non-targeting' is a control, which cannot be held out"),
    ],
)
def test_a_split_that_names_nothing_is_an_error(stores, raw, message):
    with pytest.raises(DataError, match=message):
        Sampler(stores, set_size=4, sets_per_batch=2, split=parse_split(raw, where="t"))


def splits(stores):
    yield parse_split(
        {
            "training": {"a": "train", "b": "train"},
            "zeroshot": {"a.L1": "test"},
            "fewshot": {"b.L0": {"test": ["P3"], "val": ["P2"]}},
        },
        where="t",
    )
    yield hold_out(stores, test=0.3, val=0.2, seed=4)
    yield Split(heldout={"P1": "test"}, zeroshot={("a", "L1"): "val"})


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("level", ["context", "cell_line"])
def test_nothing_leaks(stores, which, level):
    """No perturbed cell is in two parts, by the labels of the cells, or in the sums for training."""
    split = list(splits(stores))[which]
    seen: dict[str, dict[str, set]] = {}
    for part in ("train", "val", "test"):
        s = Sampler(stores, set_size=4, sets_per_batch=600, split=split, part=part, level=level, short="replace")
        cells: dict[str, set] = {"a": set(), "b": set()}
        for step in range(3):
            batch = s.batch(step)
            for store, perturbed, control, *_ in facts(s, batch):
                cells[store.name] |= set(perturbed.index)
                assert set(control["target"]) == {CONTROL}
                for line, pert in set(zip(perturbed["line"], perturbed["target"], strict=True)):
                    assert split.get_part(store.name, line, pert) == part
        seen[part] = cells
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        for store in ("a", "b"):
            assert not seen[a][store] & seen[b][store]
    for store in stores:
        allowed = split.get_train_groups(store)
        group = np.repeat(store.runs["sums_row"], store.runs["length"]).to_numpy()
        held = np.isin(store.obs.index, list(seen["val"][store.name] | seen["test"][store.name]))
        assert not allowed[group[held]].any()
        trained = np.isin(store.obs.index, list(seen["train"][store.name]))
        assert allowed[group[trained]].all()
        assert allowed[group[(store.obs["target"] == CONTROL).to_numpy()]].all()


def test_the_parts_are_the_whole(stores):
    split = hold_out(stores, test=0.3, val=0.2, seed=4)
    whole = Sampler(stores, set_size=4, sets_per_batch=2, short="replace").groups
    parts = [
        Sampler(stores, set_size=4, sets_per_batch=2, short="replace", split=split, part=p).groups
        for p in ("train", "val", "test")
    ]
    key = ["store", "context", "perturbation"]
    both = pd.concat(parts)[key].sort_values(key).to_numpy()
    assert np.array_equal(both, whole[key].sort_values(key).to_numpy())


def test_a_store_of_controls_alone_says_that_it_trains_nothing(tmp_path):
    whole = make_screen(n=200)
    path = write(whole[whole.obs["target"] == CONTROL].copy(), tmp_path / "c.h5ad")
    vc.build_store(path, basis=BASIS, out=tmp_path, name="c", **BUILD)
    store = vc.open_store(tmp_path / "c")
    with pytest.raises(DataError, match="every cell of c is a control"):
        Sampler([store], set_size=3, sets_per_batch=2, split=hold_out([store], test=0.15))


def test_a_split_that_leaves_nothing_says_so(stores):
    with pytest.raises(DataError, match=r"there are no training groups.*\[training\]"):
        Sampler(stores, set_size=3, sets_per_batch=2, split=parse_split({"datasets": {"a": "x"}}, where="split.toml"))
    split = parse_split({"training": {"a": "train", "b": "train"}}, where="split.toml")
    with pytest.raises(DataError, match="list held-out groups in"):
        Sampler(stores, set_size=3, sets_per_batch=2, split=split, part="test")
