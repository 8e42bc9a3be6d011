"""Perturbations in no store, combinations, contexts with only controls, the emitter and the modes of emission."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import vcelltools as vc
from tests.conftest import run_cli
from tests.smallstore import build_small_store
from vcelltools.errors import UsageError
from vcelltools.prediction.emission import draw_counts, estimate_dispersion, get_factors
from vcelltools.prediction.emitter import Emitter, count_significant
from vcelltools.prediction.shifted_cells import make_stats
from vcelltools.training.inputs import make_setup
from vcelltools.training.settings import make_settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a store, features of all genes, and runs of kernel-ridge and perturbation-mean."""
    d = tmp_path_factory.mktemp("unseen")
    store = build_small_store(d)
    names = sorted(set(vc.open_store(store).runs["perturbation"]) - {"non-targeting"})
    (d / "split.toml").write_text(f'[training]\nsim = "train"\n[heldout]\ntest = {names[:2]}\n')
    for model in ("kernel-ridge", "perturbation-mean"):
        vc.train(
            d / model, stores=[store], split=d / "split.toml", features=d / "sim.features.parquet", model=model,
        )  # fmt: skip
    return d, store, names


def predict(d, run, rows, out, **options):
    pd.DataFrame(rows, columns=["target_gene", "n_cells"]).to_csv(d / "wanted.csv", index=False)
    line = sorted(vc.open_store(d / "stores/sim").runs["cell_line"].unique())[0]
    result = vc.predict(d / run, d / out, perturbations=d / "wanted.csv", lines=[line], force=True, **options)
    return result, ad.read_h5ad(d / out)


def get_effect(adata, name):
    label = adata.obs["target_gene"].astype(str).to_numpy()
    X = adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X
    return X[label == name].mean(axis=0) - X[label == "non-targeting"].mean(axis=0)


def test_an_unseen_name_is_predicted_from_its_features(trained):
    d, _, names = trained
    genes = pd.read_parquet(d / "sim.features.parquet").index
    other = [g for g in genes if g not in names][:2]
    rows = [(other[0], 60), (other[1], 60), ("NOBODY", 60)]
    result, adata = predict(d, "kernel-ridge", rows, "features.h5ad", basis_only=True)
    evidence = dict(zip(adata.obs["target_gene"].astype(str), adata.obs["evidence"].astype(str), strict=True))
    assert evidence == {
        "non-targeting": "controls", other[0]: "features", other[1]: "features", "NOBODY": "mean effect",
    }  # fmt: skip
    said = "1 perturbation is in no store (NOBODY) and predicted by the mean effect"
    assert any(said in w for w in result.warnings)
    assert any("2 perturbations are in no store" in w and "features" in w for w in result.warnings)
    a, b, c = (get_effect(adata, n) for n in (*other, "NOBODY"))
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize(("model", "evidence"), [("kernel-ridge", "features"), ("perturbation-mean", "held out")])
def test_a_perturbation_held_out_of_training_is_not_called_measured(trained, model, evidence):
    d, _, names = trained
    result, adata = predict(d, model, [(names[0], 40), (names[2], 40)], "held.h5ad", basis_only=True)
    found = dict(zip(adata.obs["target_gene"].astype(str), adata.obs["evidence"].astype(str), strict=True))
    assert found == {"non-targeting": "controls", names[0]: evidence, names[2]: "measured"}
    assert any(f"1 perturbation is held out of training ({names[0]}) and" in w for w in result.warnings)


@pytest.mark.parametrize("join", ["+", "|"])
def test_effects_of_a_combination_add(trained, join):
    d, _, _ = trained
    options = {"model": "perturbation-mean", "stores": [str(d / "stores/sim")], "split": str(d / "split.toml")}
    screen = make_setup(make_settings({}, options)).screen
    groups = screen.groups
    rows = np.flatnonzero((groups["line_id"] == 0) & (groups["part"] == "train"))[:2]
    one, two = groups["perturbation"].iloc[rows]
    pair, back = f"{one}{join}{two}", f"{two}{join}{one}"
    result, adata = predict(
        d, "perturbation-mean", [(pair, 80), (back, 80)], "sum.h5ad", basis_only=True, fit_emission=False
    )
    assert any("the sum of the effects of the parts" in w for w in result.warnings)
    assert set(adata.obs["evidence"]) == {"controls", "sum of its parts"}
    want = screen.effect_kg[rows].sum(axis=0)  # as measured in the line
    control = adata[adata.obs["target_gene"] == "non-targeting"].X.toarray().mean(axis=0)
    both = get_effect(adata, pair)
    free = control + want > 0  # a mean cannot fall below zero
    assert (np.abs(both - want)[free] < 0.05).mean() > 0.95  # a few cells cannot reach every mean
    assert np.corrcoef(both, want)[0, 1] > 0.98


def test_a_context_of_controls_alone_is_predicted_packed_and_linted(tmp_path):
    """Run the documented commands for 2026: measured screens, and one line with only controls."""
    shared = {"genes": 300, "perturbations": 8, "inert": 0.0, "effect_seed": 1, "depth": 4000}
    vc.simulate(tmp_path / "screen.h5ad", cells=1500, cell_lines=2, seed=1, **shared)
    vc.simulate(tmp_path / "new.h5ad", cells=2400, cell_lines=3, first_cell_line=3, seed=2, control_share=0.4, **shared)
    adata = ad.read_h5ad(tmp_path / "new.h5ad")
    letters = {"line3": "A", "line4": "B", "line5": "C"}
    adata.obs["cell_line"] = adata.obs["cell_line"].astype(str).map(letters)
    names = sorted(set(adata.obs["target_gene"]) - {"non-targeting"})
    adata[adata.obs["target_gene"] == "non-targeting"].copy().write_h5ad(tmp_path / "controls.h5ad")
    (tmp_path / "basis.txt").write_text("\n".join(adata.var_names[:150]) + "\n")
    (tmp_path / "genes.csv").write_text("gene_name\n" + "\n".join(adata.var_names) + "\n")
    (tmp_path / "split.toml").write_text('[training]\nscreen = "train"\n[zeroshot]\n"screen.line2" = "test"\n')
    table = pd.DataFrame([(n, 50, c) for c in "ABC" for n in [*names, "NOBODY"]])
    table.columns = ["target_gene", "n_cells", "context"]
    table.to_csv(tmp_path / "pert_counts.csv", index=False)
    columns = ("--pert-col", "target_gene", "--control", "non-targeting", "--cell-line-col", "cell_line")
    run = ("--run", "run", "--rules", 2026, "--genes", "genes.csv", "--perturbations", "pert_counts.csv")
    for words in (
        ("build-store", "screen.h5ad", "--basis", "basis.txt", *columns),
        ("build-store", "controls.h5ad", "--basis", "basis.txt", *columns),
        ("train", "--split", "split.toml", "--model", "transfer", "--out", "run"),
        ("predict", *run, "--out", "pred.h5ad"),
        ("prep", "pred.h5ad", "--rules", 2026, "--genes", "genes.csv", "--perturbations", "pert_counts.csv",
         "--out", "pred.vcc"),
        ("lint", "pred.vcc"),
    ):  # fmt: skip
        done = run_cli(*words, cwd=tmp_path)
        assert done.code == 0, f"{words}\n{done.stderr}"
    pred = ad.read_h5ad(tmp_path / "pred.h5ad")
    assert set(pred.obs["target_gene"]) == {*names, "NOBODY"} and set(pred.obs["context"]) == set("ABC")
    adata, pred = adata[adata.obs["cell_line"] == "A"], pred[pred.obs["context"] == "A"]
    made = _log(pred.X.toarray())
    zero = _log(adata[adata.obs["target_gene"] == "non-targeting"].X.toarray()).mean(axis=0)
    hits = 0
    for n in names:  # compares with the truth, so that the perturbation-specific part is tested
        truth = {m: _log(adata[adata.obs["target_gene"] == m].X.toarray()).mean(axis=0) - zero for m in names}
        mine = made[(pred.obs["target_gene"] == n).to_numpy()].mean(axis=0) - zero
        order = sorted(names, key=lambda m: np.abs(truth[m] - mine)[:150].sum())
        hits += order.index(n) < 2
    assert hits >= len(names) // 2


def count_all(adata):
    """Return the number of significant genes over all perturbations."""
    label, X = adata.obs["target_gene"].astype(str).to_numpy(), adata.X.toarray()
    X = _log(X) if X.max() > 10 else X
    control = X[label == "non-targeting"]
    return sum(count_significant(X[label == n], control) for n in set(label) - {"non-targeting"})


def _log(counts):
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def test_the_emitter_keeps_what_stands_out_and_nothing_of_nothing():
    effect, variance = np.array([0.0, 0.05, -0.05, 1.0, -2.0]), np.full(5, 0.5)
    error = np.sqrt(0.5 * (1 / 100 + 1 / 400))
    got = Emitter(threshold=3.0, kept=0.5).apply(effect, variance, 100, 400)
    np.testing.assert_allclose(got, [0, 0.5 * error, -0.5 * error, 1.0, -2.0])
    np.testing.assert_array_equal(Emitter().apply(effect, variance, 100, 400), effect)


def test_significant_genes_are_those_of_scipy():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    a, b = rng.poisson(1.0, (60, 30)).astype(float), rng.poisson(1.0, (80, 30)).astype(float)
    a[:, :4] += 2
    p = np.array([mannwhitneyu(a[:, j], b[:, j], method="asymptotic").pvalue for j in range(30)])
    order = np.sort(p) * 30 / np.arange(1, 31)
    assert count_significant(a, b) == int((np.minimum.accumulate(order[::-1])[::-1] < 0.05).sum()) >= 4
    assert count_significant(b[:40], b[40:]) == 0


def test_predicted_cells_have_as_many_significant_genes_as_true_ones(trained):
    d, path, names = trained
    line = sorted(vc.open_store(path).runs["cell_line"].unique())[0]
    truth = ad.read_h5ad(d / "sim.h5ad")
    truth = truth[(truth.obs["cell_line"] == line) & ~truth.obs["target_gene"].isin(names[:2])]
    sizes = truth.obs["target_gene"].astype(str).value_counts()
    _, adata = predict(d, "perturbation-mean", [(n, sizes[n]) for n in names[2:]], "emitted.h5ad")
    assert 0.5 <= count_all(adata) / count_all(truth) <= 2


def test_counts_have_the_dispersion_and_the_mean_asked_for():
    rng = np.random.default_rng(0)
    library = rng.integers(2000, 8000, 4000).astype(float)
    share, dispersion = np.array([1e-2, 1e-3, 1e-4, 0.0]), np.array([0.5, 0.2, 0.0, 0.0])
    counts = draw_counts(share, dispersion, library, rng)
    np.testing.assert_allclose(counts.mean(axis=0), library.mean() * share, rtol=0.1)
    got = estimate_dispersion(counts.sum(axis=0), (counts.astype(float) ** 2).sum(axis=0), library)
    np.testing.assert_allclose(got[:2], dispersion[:2], rtol=0.25)
    stats = make_stats(np.array([300.0, 90.0, 0.0]), np.array([200, 60, 0]), 200, 1.0)
    effect = np.array([-0.5, 0.2, 0.0])
    factor = get_factors(stats, effect)
    assert factor[0] < 1 < factor[1] and factor[2] == 1


@pytest.mark.parametrize("emission", ["counts", "pseudobulk"])
@pytest.mark.parametrize("rules", [None, 2026])
def test_every_emission_moves_the_means_by_the_effect(trained, emission, rules):
    d, _, names = trained
    rows = [(names[3], 400), (names[4], 400)]
    _, usual = predict(d, "perturbation-mean", rows, "usual.h5ad")
    options = {"rules": rules, "emission": emission}
    _, adata = predict(d, "perturbation-mean", rows, f"{emission}.h5ad", **options)
    assert adata.uns["vcelltools"]["emission"] == emission
    X = adata.X.toarray()
    if rules == 2026:
        assert (np.rint(X) == X).all()
        X = _log(X)
    zero = usual.X.toarray()[(usual.obs["target_gene"] == "non-targeting").to_numpy()].mean(axis=0)
    want = get_effect(usual, names[3])
    got = X[(adata.obs["target_gene"] == names[3]).to_numpy()].mean(axis=0) - zero
    big = np.argsort(-np.abs(want))[:15]
    assert np.corrcoef(got[big], want[big])[0, 1] > (0.9 if emission == "counts" else 0.6)


def test_an_unknown_emission_is_refused(trained):
    d, _, _ = trained
    with pytest.raises(UsageError, match="emission"):
        vc.predict(d / "kernel-ridge", d / "x.h5ad", emission="zz")


def test_an_unseen_line_has_as_many_significant_genes_as_the_truth_and_none_without_effects(trained):
    """All genes count, also those outside the basis, most of which few cells express."""
    d, path, _ = trained
    line = sorted(vc.open_store(path).runs["cell_line"].unique())[-1]
    (d / "line.toml").write_text(f'[training]\nsim = "train"\n[zeroshot]\n"sim.{line}" = "test"\n')
    truth = ad.read_h5ad(d / "sim.h5ad")
    true, made = count_all(truth[truth.obs["cell_line"] == line]), {}
    for model in ("perturbation-mean", "control-mean"):
        vc.train(d / f"{model}-line", stores=[path], split=d / "line.toml", model=model)
        vc.predict(d / f"{model}-line", d / "line.h5ad", basis_only=model == "control-mean", force=True)
        made[model] = count_all(ad.read_h5ad(d / "line.h5ad"))
    assert made["control-mean"] == 0
    assert 0.5 <= made["perturbation-mean"] / true <= 2


def test_a_saturating_screen_of_pairs_is_predicted_with_its_interaction(tmp_path):
    """From cells with two guides to predicted cells: the weaker part adds little, which the sum of the parts misses."""
    rng = np.random.default_rng(5)
    n_genes, names = 60, [f"G{i}" for i in range(1, 7)]
    change = {n: rng.normal(0, 0.5, n_genes) * size for n, size in zip(names, np.linspace(0.5, 1.5, 6), strict=True)}
    for a, b in itertools.combinations(names, 2):
        change[f"{a}|{b}"] = change[b] + 0.1 * change[a]  # b is the stronger part
    change["non-targeting"] = np.zeros(n_genes)
    label = np.repeat(list(change), [40] * (len(change) - 1) + [300])
    counts = rng.poisson(40 * np.exp(np.array([change[n] for n in label])))
    counts = np.c_[counts, rng.poisson(20000, len(label))]  # a gene that keeps the library constant
    obs = pd.DataFrame({"guide": label}, index=[f"c{i}" for i in range(len(label))])
    adata = ad.AnnData(counts.astype(np.float32), obs=obs)
    adata.var_names = [*names, *(f"H{i}" for i in range(n_genes - 6)), "REST"]
    adata.write_h5ad(tmp_path / "pairs.h5ad")
    store = vc.build_store(
        tmp_path / "pairs.h5ad", basis=list(adata.var_names), out=tmp_path, name="pairs", pert_col="guide",
        control="non-targeting", cell_line="x", gene_name_col="index", guides={"sep": "|", "policy": "combination"},
    ).path  # fmt: skip
    held = ["G1|G6", "G2|G6", "G3|G5"]
    (tmp_path / "split.toml").write_text(f'[training]\npairs = "train"\n[heldout]\ntest = {held}\n')
    vc.train(tmp_path / "run", stores=[store], split=tmp_path / "split.toml", model="ridge", objective="error")
    pd.DataFrame({"target_gene": ["G6+G1", "G2|G6", "G3|G5"], "n_cells": 100}).to_csv(tmp_path / "wanted.csv")
    result = vc.predict(tmp_path / "run", tmp_path / "pred.h5ad", perturbations=tmp_path / "wanted.csv")
    assert any("3 perturbations are" in w and "with a fitted interaction" in w for w in result.warnings)
    pred = ad.read_h5ad(tmp_path / "pred.h5ad")
    assert set(pred.obs["evidence"].astype(str)) == {"controls", "fitted combination"}
    X = _log(counts)
    zero = X[label == "non-targeting"].mean(axis=0)
    for asked, true in zip(["G6+G1", "G2|G6", "G3|G5"], held, strict=True):
        got, want = get_effect(pred, asked)[6:-1], (X[label == true].mean(axis=0) - zero)[6:-1]
        total = sum(X[label == n].mean(axis=0) - zero for n in true.split("|"))[6:-1]
        assert ((got - want) ** 2).sum() < 0.5 * ((total - want) ** 2).sum()
