"""Compile a training step of a diffusion model for a TPU, without one: parameters are spread over the chips."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vcelltools.model import topology as tpu
from vcelltools.model.diffusion import (
    DiffusionConfig,
    count_active,
    init_diffusion_state,
    make_diffusion_optimizer,
    make_diffusion_step,
)
from vcelltools.model.network import count_params

_DATA, _EXPERT = "data", "expert"


@dataclass(frozen=True)
class DiffusionPlan(tpu.Plan):
    """Figures of the compiled step, per chip."""

    active_parameters: int = 0
    """Number of parameters that one gene uses."""


def make_plan_mesh(devices: list[Any], experts: int) -> Mesh:
    """Return a mesh (data, expert) whose second axis divides the numbers of experts and devices."""
    n = len(devices)
    across = int(np.gcd(n, experts)) if experts else 1
    return Mesh(np.array(devices).reshape(n // across, across), (_DATA, _EXPERT))


def place_params(shapes: Any, mesh: Mesh) -> Any:
    """Return the sharding of a state: experts by expert, other arrays along their longest axis that divides evenly."""
    n = mesh.devices.size
    experts = mesh.shape[_EXPERT]

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = {str(getattr(p, "key", getattr(p, "name", ""))) for p in path}
        spec: list[Any] = [None] * leaf.ndim
        if names & {"expert_up", "expert_down"} and leaf.ndim >= 3 and experts > 1:
            spec[1] = _EXPERT
            rest = [i for i in range(2, leaf.ndim) if leaf.shape[i] % mesh.shape[_DATA] == 0]
            if rest and mesh.shape[_DATA] > 1:
                spec[max(rest, key=lambda i: leaf.shape[i])] = _DATA
        else:
            fits = [i for i in range(leaf.ndim) if leaf.shape[i] % n == 0]
            if fits:
                spec[max(fits, key=lambda i: leaf.shape[i])] = (_DATA, _EXPERT)
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, shapes)


def plan_diffusion(config: DiffusionConfig, *, topology: str, n_cells: int, bfloat16: bool = True) -> DiffusionPlan:
    """Compile one training step of ``n_cells`` cells for a TPU topology and return the compiler's figures.

    The work is counted before compiling (:func:`count_flops`) and divided evenly over the chips. The compiler counts
    the body of a loop over layers only once, so its memory traffic is scaled by the same factor as the work; it is an
    estimate. If a chip has too little memory, the compiler reports only how much the step needs.
    """
    generation, shape = tpu.parse_topology(topology)
    devices = tpu.get_devices(generation, shape)
    chip = tpu.CHIPS[generation]
    mesh = make_plan_mesh(devices, config.experts)
    n = mesh.devices.size
    lowered, state = _lower(config, mesh, n_cells, bfloat16)
    compiled = tpu.compile_step(lowered)
    flops = count_flops(config, n_cells, bfloat16) / n
    moved = None
    if compiled.program:
        cost = compiled.program.cost_analysis()
        moved = float(cost.get("bytes accessed", 0.0)) * max(1.0, flops / max(float(cost.get("flops", 0.0)), 1.0))
    parameters = count_params(state.params)
    places = place_params(state, mesh)
    held = sum(
        int(np.prod(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True)
    )
    linked = 3 * 2 * parameters // n * (n - 1) // n * 1 if n > 1 else 0
    return DiffusionPlan(
        topology=f"{generation}:{shape}",
        chips=n,
        processes=len({d.process_index for d in devices}),
        parameters=parameters,
        **compiled.describe(chip, 0),
        flops_per_chip=flops,
        bytes_per_chip=moved,
        roofline_seconds=tpu.get_roofline(chip, flops, moved, linked),
        sets=n_cells,
        set_size=1,
        feed="host",
        store_bytes_per_chip=0,
        state_bytes_per_chip=held,
        link_bytes_per_chip=linked,
        active_parameters=count_active(config, state.params),
    )


def _describe(config: DiffusionConfig, n_cells: int, bfloat16: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Return (step, shapes of its state, shapes of a batch)."""
    optimizer = make_diffusion_optimizer(
        steps=100_000, learning_rate=3e-4, warmup=1000, schedule="cosine", weight_decay=0.01, clip=1.0
    )
    state = jax.eval_shape(lambda: init_diffusion_state(config, optimizer, 0, ema=0.0))
    batch = {"tokens": jax.ShapeDtypeStruct((n_cells, config.genes), jnp.int32)}
    batch["log_library"] = jax.ShapeDtypeStruct((n_cells,), jnp.float32)
    batch |= {k: jax.ShapeDtypeStruct((n_cells,), jnp.int32) for k in ("pert", "context")}
    if config.features:
        batch["features"] = jax.ShapeDtypeStruct((n_cells, config.features), jnp.float32)
    step: Any = make_diffusion_step(config, optimizer, seed=0, ema=0.0, bfloat16=bfloat16, remat=True)
    return step, state, batch


def _lower(config: DiffusionConfig, mesh: Mesh, n_cells: int, bfloat16: bool) -> tuple[Any, Any]:
    """Return (step before compilation, shapes of its state)."""
    step, state, batch = _describe(config, n_cells, bfloat16)

    def put(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    rows = NamedSharding(mesh, P((_DATA, _EXPERT)))
    placed = jax.tree.map(put, state, place_params(state, mesh))
    return step.lower(placed, jax.tree.map(lambda a: put(a, rows), batch)), state


def count_flops(config: DiffusionConfig, n_cells: int, bfloat16: bool = True) -> float:
    """Return the FLOPs of a step on ``n_cells`` cells, at full depth; layers are computed twice (remat).

    They are counted in the unrolled program before compilation, with one and two layers of each kind, and extrapolated,
    because a loop would count its body once.
    """

    def count(pairs: int, layers: int) -> float:
        step, state, batch = _describe(replace(config, pairs=pairs, layers=layers, unroll=True), n_cells, bfloat16)
        return float(step.lower(state, batch).cost_analysis()["flops"])

    few_pairs, few_layers = min(config.pairs, 1), min(config.layers, 1)
    total = base = count(few_pairs, few_layers)
    if config.pairs > 1:
        total += (config.pairs - 1) * (count(2, few_layers) - base)
    if config.layers > 1:
        total += (config.layers - 1) * (count(few_pairs, 2) - base)
    return total
