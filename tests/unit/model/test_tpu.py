"""The training step, compiled by the TPU compiler for v5e-16 without a TPU; skipped without libtpu."""

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
    n_sets=64, set_size=64, n_rows=int(sys.argv[2]), columns=2048, n_runs=4000, feed=sys.argv[1],
)
print(json.dumps(plan.to_json()))
"""


def compile_plan(feed: str, n_rows: int = 200_000) -> dict:
    python = sys.executable if find_spec("libtpu") else peer_python("tpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [str(python), "-c", SCRIPT, feed, str(n_rows)]
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
    assert plan["flops_per_chip"] > 6 * 1e6 * cells / 2  # about six operations per parameter and control cell
    assert 0 < plan["roofline_seconds"] < 1


def test_a_store_that_is_too_large_for_a_chip_is_a_result():
    plan = compile_plan("replicated", 20_000_000)
    assert not plan["fits"]
    assert plan["hbm_bytes_per_chip"] > plan["store_bytes_per_chip"] == 20_000_000 * 2048 * 2 > plan["hbm_limit_bytes"]
    assert plan["collectives"] is plan["roofline_seconds"] is plan["flops_per_chip"] is None


MIXTURE = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from vcelltools.model.diffusion import make_diffusion_config
from vcelltools.model.diffusion_plan import plan_diffusion
topology, n_cells, fields = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
config = make_diffusion_config("moe-17b", **fields)
print(json.dumps(plan_diffusion(config, topology=topology, n_cells=n_cells).to_json()))
"""


def compile_mixture(topology: str, n_cells: int, timeout: float, **fields) -> dict:
    python = sys.executable if find_spec("libtpu") else peer_python("tpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [str(python), "-c", MIXTURE, topology, str(n_cells), json.dumps(fields)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_narrow_mixture_of_experts_for_v5e_16():
    """Return a narrow moe-17b with few layers, which compiles in seconds."""
    plan = compile_mixture("v5e-16", 16, 300, genes=64, dim=128, heads=1, layers=1, pairs=1, perturbations=160)
    assert plan["chips"] == 16 and plan["fits"]
    d, layer = 128, 12 * 128**2 + 13 * 128
    experts = 16 * (8 * d**2 + 5 * d)
    rest = 160 * d + 160 * 32 + 32 * d + 65 * d + 64 * d + 2 * d + (d + 1) * 64 + 33 * d
    assert plan["parameters"] == 2 * layer + experts + 16 * d + 2 * d + rest
    assert plan["active_parameters"] < plan["parameters"] - experts * 14 // 16
    # three numbers of four bytes per trained parameter, spread over the chips
    assert plan["state_bytes_per_chip"] == pytest.approx((12 * plan["parameters"] - 8 * 160 * d) / 16, rel=0.25)
    assert sum(plan["collectives"].values()) > 0 and "f32" in plan["gradient_reduce_dtype"]
    assert plan["flops_per_chip"] > 6 * 2 * layer * 64, "a cell of 64 genes a chip, forward and backward"


ASKED = os.environ.get("VCELLTOOLS_COMPILE_MOE")


@pytest.mark.slow
@pytest.mark.skipif(not ASKED, reason="takes many minutes a topology: VCELLTOOLS_COMPILE_MOE=1 asks for it")
@pytest.mark.parametrize("topology", ["v6e-16", "v5e-64"])
def test_the_large_mixture_of_experts(topology):
    chips = int(topology.split("-")[1])
    plan = compile_mixture(topology, chips, 7200, genes=2000)
    print(json.dumps(plan))
    assert plan["parameters"] == 17_684_196_928 + 2000 * 3072 and plan["fits"]


@pytest.mark.slow
def test_the_large_mixture_of_experts_is_too_large_for_v5e_16():
    plan = compile_mixture("v5e-16", 16, 300, genes=2000)
    assert plan["parameters"] == 17_684_196_928 + 2000 * 3072 and not plan["fits"]
    assert plan["hbm_bytes_per_chip"] > plan["hbm_limit_bytes"] > plan["state_bytes_per_chip"] > 12e9
    assert plan["flops_per_chip"] > 58e12 and plan["collectives"] is None


def test_the_work_of_the_large_mixture_is_the_published_one():
    """58 TFLOP per cell: six operations per active parameter and gene, and attention, plus capacity and remat."""
    from vcelltools.model.diffusion import make_diffusion_config
    from vcelltools.model.diffusion_plan import count_flops

    found = count_flops(make_diffusion_config("moe-17b", genes=2000), 1) / 1e12
    assert 58 * 4 / 3 < found < 58 * 4 / 3 * 1.25


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
