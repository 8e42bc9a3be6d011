"""The training step as the real TPU compiler makes it for v5e-16, without a TPU. Skips where libtpu is absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.peers import peer_python
from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.model.topology import count_collectives, get_devices, get_reduce_dtype, parse_topology

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from vcelltools.model.network import make_config
from vcelltools.model.step import StepConfig
from vcelltools.model.topology import plan_step
plan = plan_step(
    make_config("rn", genes=2000, perturbations=2000),
    StepConfig(bfloat16=True, scan=True, delta=0.3, pearson=2.0, rank=0.3), topology="v5litepod-16",
    n_sets=64, set_size=64, n_rows=200_000, columns=2048, n_runs=4000, feed=sys.argv[1],
)
print(json.dumps(plan.to_json()))
"""


def compile_plan(feed: str) -> dict:
    python = sys.executable if find_spec("libtpu") else peer_python("tpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [str(python), "-c", SCRIPT, feed]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_step_for_v5e_16():
    plan = compile_plan("replicated")
    assert (plan["topology"], plan["chips"], plan["processes"]) == ("v5e:4x4", 16, 4)
    assert plan["fits"]
    assert plan["hbm_bytes_per_chip"] < plan["hbm_limit_bytes"] == 16 << 30
    assert plan["store_bytes_per_chip"] == 200_000 * 2048 * 2 < plan["hbm_bytes_per_chip"]
    assert plan["gradient_reduce_dtype"] == "f32"
    assert plan["collectives"] == {"all-reduce": 1}
    assert plan["donated_bytes_per_chip"] >= plan["state_bytes_per_chip"]  # tiles are padded up, never down
    assert plan["temporary_bytes_per_chip"] < plan["store_bytes_per_chip"] / 10
    cells = 2 * 64 * 64 / 16
    assert plan["flops_per_chip"] > 6 * 1e6 * cells / 2  # about six operations a parameter and control cell
    assert 0 < plan["roofline_seconds"] < 1


@pytest.mark.parametrize("name", ["v5e-16", "v5litepod-16", "v5e:4x4", "V5E-16", "v5lite:4x4"])
def test_topologies_have_several_names(name):
    assert parse_topology(name) == ("v5e", "4x4")


@pytest.mark.parametrize("name", ["v5e", "v5e-17", "v9-8", "4x4", "v5e:5x5", ""])
def test_unknown_topologies(name):
    with pytest.raises(UsageError, match="one of v4-8"):
        parse_topology(name)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_the_remedy_is_named():
    with pytest.raises(EnvironmentFault, match=r"pip install 'vcelltools\[tpu\]'"):
        get_devices("v5e", "4x4")


HLO = """
  %all-reduce.1 = (f32[8,128]{1,0:T(8,128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%a, %b), replica_groups={{0,1}}
  %gte = f32[8,128]{1,0} get-tuple-element(%all-reduce.1), index=0
  %ag = s32[64,8]{1,0} all-gather-start(%c), dimensions={0}
"""


def test_collectives_are_read_from_the_program():
    assert count_collectives(HLO) == {"all-reduce": 1, "all-gather": 1}
    assert get_reduce_dtype(HLO, 1028) == "bf16,f32"
    assert get_reduce_dtype("", 10) == "none"
    with pytest.raises(RuntimeError, match="fewer values"):
        get_reduce_dtype(HLO, 5000)
