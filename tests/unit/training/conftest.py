"""A small store, and JAX set up as for the tests of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.unit.model.conftest  # noqa: F401  (devices and compiler flags, before any device is touched)
from tests.smallstore import build_small_store
from vcelltools.stores.store import open_store
from vcelltools.training.settings import make_settings

QUICK = {
    "size": "tiny", "sets": 8, "set_size": 16, "steps": 30, "eval_every": 10, "log_every": 5, "warmup": 5,
    "learning_rate": 1e-3, "patience": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def store_dpath(tmp_path_factory) -> Path:
    return build_small_store(tmp_path_factory.mktemp("train"))


@pytest.fixture
def store(store_dpath):
    return open_store(store_dpath)


@pytest.fixture
def settings(tmp_path, store_dpath):
    """``settings(steps=5)``: quick settings with changes."""

    def make(**changes):
        return make_settings({}, {"out": str(tmp_path / "run"), "stores": [str(store_dpath)], **QUICK, **changes})

    return make


@pytest.fixture
def one_device(monkeypatch):
    """The mesh of one device: batches of two sets do not divide over eight."""
    import jax

    from vcelltools.model import mesh

    make_mesh = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda devices=None: make_mesh(devices or jax.devices()[:1]))
