"""Set up eight CPU devices, quick compilation and strict promotion for the tests of the model."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

# the models are tiny, so compilation dominates
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
jax.config.update("jax_num_cpu_devices", 8)
# a TPU plug-in would look for chips and a metadata server, behind a lock file that concurrent processes share; after a
# minute (also of a paused process) a warning of its timer would be an error
jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def strict():
    """Make silent promotion of dtypes or ranks an error."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
