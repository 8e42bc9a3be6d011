"""``train --model diffusion``: it beats the marginals, holds out cells, and resumes bitwise."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import jax
import numpy as np
import pytest

import vcelltools as vc
from tests.atlases import make_ids
from tests.make import make_adata
from vcelltools.errors import DataError, InterruptedRun, UsageError
from vcelltools.prediction.predict import predict
from vcelltools.training.cell_inputs import make_cell_setup
from vcelltools.training.diffusion import DiffusionTrainer
from vcelltools.training.inherit import _open_run
from vcelltools.training.run_folder import RunFolder
from vcelltools.training.sanity import check_sanity
from vcelltools.training.settings import make_settings
from vcelltools.training.train import train

G = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return 1,200 cells of two programmes: a gene predicts the others, but not the kind of its cell."""
    d = tmp_path_factory.mktemp("diffusion")
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 1200)
    rate = np.where((np.arange(G) % 2)[None, :] == kind[:, None], 20.0, 0.5)
    adata = make_adata(rng.poisson(rate).astype("float32"), names=make_ids(G))
    adata.write_h5ad(d / "x.h5ad")
    vc.build_store(d / "x.h5ad", basis=make_ids(G), out=d / "stores", name="x", unperturbed=True)
    return d / "stores" / "x"


def settings(store, out, **options):
    given = {"model": "diffusion", "size": "tiny", "steps": 40, "sets": 32, "warmup": 10, "learning_rate": 3e-3,
             "eval_every": 20, "log_every": 10, "stores": [str(store)], "out": str(out)}  # fmt: skip
    return make_settings({}, given | options)


def test_it_beats_the_marginal_entropy_on_held_out_cells(store, tmp_path):
    final = train(settings(store, tmp_path / "run", steps=400, eval_every=200, learning_rate=5e-3)).summary
    assert final["beats_baselines"] and final["final"]["gain_ci95"][0] > 0, final["final"]
    drawn = ad.read_h5ad(predict(tmp_path / "run", tmp_path / "p.h5ad", cells=150).out)
    X = drawn.X.toarray()
    assert X.shape == (150, G) and (X >= 0).all() and (np.rint(X) == X).all()
    assert abs(X.mean() / vc.open_store(store).counts().mean() - 1) < 0.3, "as deep as the cells it learned from"
    with pytest.raises(UsageError, match="genes"):
        predict(tmp_path / "run", tmp_path / "q.h5ad", genes="x.csv")
    assert final["final"]["part"] == "test" and final["final"]["n"] == 120
    assert final["baselines"]["marginal-entropy"]["loss"] > final["final"]["loss"]


def test_parts_share_no_cell_and_every_cell_is_trained_on_once_an_epoch(store, tmp_path):
    setup = make_cell_setup(settings(store, tmp_path / "run", sets=48))
    parts = [set(v.tolist()) for v in setup.parts.values()]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert len(set.union(*parts)) == 1200 == sum(map(len, parts))
    batch = setup.make_batch(7)
    again = setup.make_batch(7)
    assert all(np.array_equal(batch[k], again[k]) for k in batch) and batch["tokens"].shape == (48, G)
    counts = vc.open_store(store).counts().toarray()
    rows = setup.parts["train"][:5]
    read = setup.read(rows)
    assert np.array_equal(read["tokens"], vc.Tokenizer("loglinear").encode(counts[rows]))
    np.testing.assert_allclose(np.expm1(read["log_library"]), counts[rows].sum(1), rtol=1e-5)


def test_a_run_that_was_stopped_continues_to_the_same_bits(store, tmp_path, monkeypatch):
    whole = train(settings(store, tmp_path / "whole")).summary
    from vcelltools.training import diffusion

    stops = iter([None] * 25 + ["SIGTERM"] + [None] * 999)
    monkeypatch.setattr(diffusion.Stop, "due", lambda self: next(stops))
    with pytest.raises(InterruptedRun):
        train(settings(store, tmp_path / "run"))
    again = train(settings(store, tmp_path / "run")).summary
    assert again["params_sha256"] == whole["params_sha256"] and again["final"] == whole["final"]


def test_an_extended_run_ends_as_a_longer_one(store, tmp_path):
    fields = {"schedule": "constant", "warmup": 5, "eval_every": 5}
    whole = train(settings(store, tmp_path / "whole", steps=20, **fields)).summary
    train(settings(store, tmp_path / "run", steps=10, **fields))
    done = vc.train(extend=tmp_path / "run", steps=20).summary
    assert done["params_sha256"] == whole["params_sha256"] and done["final"] == whole["final"]
    assert done["steps"] == done["config"]["steps"] == 20


def test_one_device_and_eight_learn_the_same(store, tmp_path):
    import jax

    from vcelltools.training.diffusion import DiffusionTrainer

    assert len(jax.devices()) == 8
    setup = make_cell_setup(settings(store, tmp_path / "r", sets=32))
    found = []
    for n in (1, 8):
        trainer = DiffusionTrainer(setup, None, devices=jax.devices()[:n])
        assert trainer.mesh.size == n
        state, losses = trainer.place(trainer.init_state()), []
        for number in range(5):
            state, metrics = trainer.step(state, trainer.put(setup.make_batch(number)))
            losses.append(float(metrics["loss"]))
        found.append((losses, jax.device_get(state.params)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=4e-5), found[0][1], found[1][1])


def test_settings_that_do_not_go_with_it_are_refused(store, tmp_path):
    with pytest.raises(UsageError, match="split"):
        make_cell_setup(settings(store, tmp_path, split="x.toml"))
    with pytest.raises(UsageError, match="not a size of diffusion"):
        settings(store, tmp_path, size="rn")
    with pytest.raises(UsageError, match="only be planned"):
        train(settings(store, tmp_path / "r", size="moe-17b"))
    with pytest.raises(UsageError, match="sets of cells"):
        check_sanity("controls-same", settings(store, tmp_path / "r"))
    with pytest.raises(UsageError, match="needs stores with perturbations"):
        check_sanity("random-perturbations", settings(store, tmp_path / "r"))
    plain = make_settings({}, {"model": "diffusion"})
    assert (plain.size, plain.sets, plain.warmup, plain.weight_decay) == ("tiny", 64, 1000, 0.01)


def test_stores_of_different_genes_are_refused(store, tmp_path):
    other = vc.build_store(
        make_adata(np.ones((30, 5), "float32") * 2, names=make_ids(5)), basis=make_ids(5), out=tmp_path, name="y",
        unperturbed=True,
    )  # fmt: skip
    with pytest.raises(DataError, match="different genes"):
        make_cell_setup(settings(store, tmp_path / "r", stores=[str(store), str(other.path)]))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Return 600 cells of a control and two perturbations, each of which raises half of the genes."""
    d = tmp_path_factory.mktemp("screen")
    rng = np.random.default_rng(1)
    label = np.repeat(["control", "A", "B"], 200)
    rate = np.full((600, G), 4.0)
    rate[label == "A", : G // 2] = 12.0
    rate[label == "B", G // 2 :] = 12.0
    adata = make_adata(rng.poisson(rate).astype("float32"), names=make_ids(G))
    adata.obs["gene"] = label
    adata.write_h5ad(d / "x.h5ad")
    vc.build_store(d / "x.h5ad", basis=make_ids(G), out=d / "stores", name="x", pert_col="gene", control=["control"])
    return d / "stores" / "x"


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("overfit-batch", {"sets": 8, "steps": 250, "learning_rate": 1e-2}),
        ("random-perturbations", {"steps": 60}),
        ("permutation", {"steps": 5}),
    ],
)
def test_sanity_modes_hold(screen, tmp_path, mode, fields):
    found = check_sanity(mode, settings(screen, tmp_path / "r", **fields))
    assert found.holds, found


def test_sanity_modes_can_fail(store, tmp_path):
    found = check_sanity("overfit-batch", settings(store, tmp_path / "r", sets=8, steps=25, learning_rate=0.0))
    assert not found.holds, "a network that learns nothing"


def test_a_training_starts_from_a_run_on_stores_whose_genes_are_in_another_order(store, tmp_path):
    source = train(settings(store, tmp_path / "source"))
    still = train(settings(store, tmp_path / "still", from_run=str(source.out), learning_rate=0.0, weight_decay=0.0))
    start = still.summary["start"]
    assert start["run"] == str(source.out) and start["step"] == source.summary["final"]["best_step"]
    assert start["params_sha256"] == still.summary["params_sha256"], "nothing is learned"
    assert still.summary["config"]["from_run"] == str(source.out)
    assert still.summary["final"]["loss"] == pytest.approx(source.summary["final"]["loss"], rel=1e-5)

    genes = list(vc.open_store(store).genes)[::-1]
    adata = make_adata(vc.open_store(store).counts().toarray()[:, ::-1].astype("float32"), names=genes)
    adata.write_h5ad(tmp_path / "y.h5ad")
    vc.build_store(tmp_path / "y.h5ad", basis=genes, out=tmp_path / "stores", name="y", unperturbed=True)
    other = settings(tmp_path / "stores" / "y", tmp_path / "other", from_run=str(source.out))
    params = DiffusionTrainer(make_cell_setup(other), None).begin().params
    old = DiffusionTrainer(make_cell_setup(settings(store, tmp_path / "source")), None)
    known = RunFolder(source.out).best().load(jax.eval_shape(old.init_state)).state.ema
    np.testing.assert_array_equal(params["gene"], known["gene"][::-1])
    np.testing.assert_array_equal(params["head"]["w"], known["head"]["w"])


def test_a_training_does_not_start_from_another_model_or_size(store, tmp_path):
    source = train(settings(store, tmp_path / "source", steps=2, warmup=0, eval_every=2))
    with pytest.raises(UsageError, match="has the size tiny, but here it is mini"):
        train(settings(store, tmp_path / "mini", size="mini", from_run=str(source.out)))
    with pytest.raises(UsageError, match="is a run of diffusion, but from_run needs one of a transformer"):
        _open_run(source.out, make_settings({}, {"model": "transformer"}))


def test_known_perturbations_keep_their_embeddings(screen, tmp_path):
    source = train(settings(screen, tmp_path / "source", steps=4, warmup=0, eval_every=2))
    target = settings(screen, tmp_path / "target", from_run=str(source.out), seed=1)
    notes = []
    trainer = DiffusionTrainer(make_cell_setup(target), None, SimpleNamespace(note=notes.append))
    params, fresh = trainer.begin().params, trainer.init_state().params
    assert "with 2 of 2 perturbations" in notes[0] and "has seen cells that are held out here" in notes[1]
    assert not np.any(np.all(params["perturbation"] == fresh["perturbation"], axis=1))
