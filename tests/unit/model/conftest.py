"""Eight CPU devices and no search for others, quick compilation, and strict promotion for the tests of the model."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

# the models are tiny: compiling them is what takes time
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
jax.config.update("jax_num_cpu_devices", 8)
# a TPU plug-in would look for chips and a metadata server, behind a lock file that processes side by side dispute,
# and after a minute (of a paused process, too) its timer's warning would be an error
jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def strict():
    """No silent promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
