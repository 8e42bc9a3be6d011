"""Figures of the training step from the TPU compiler, without a TPU.

libtpu compiles for a described topology on any machine. Memory, FLOPs, bytes, donation and collectives are read from
the compiled program. The roofline is computed from the published peaks of the chip.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vcelltools.errors import EnvironmentFault, UsageError
from vcelltools.model.evidence import get_table_shapes
from vcelltools.model.loss_registry import need_rivals
from vcelltools.model.mesh import make_mesh, sharding
from vcelltools.model.network import ModelConfig, count_params
from vcelltools.model.step import StepConfig, init_state, make_step


@dataclass(frozen=True)
class Chip:
    """Published peak figures of one TPU chip (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float
    """In bfloat16."""
    link_bytes_per_s: float
    """All interchip links together."""


CHIPS = {
    "v4": Chip(32 << 30, 1228e9, 275e12, 300e9),
    "v5e": Chip(16 << 30, 819e9, 197e12, 200e9),
    "v5p": Chip(95 << 30, 2765e9, 459e12, 600e9),
    "v6e": Chip(32 << 30, 1640e9, 918e12, 448e9),
}
_SHAPES = {
    "v4": {8: "2x2x1", 16: "2x2x2"},
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {8: "2x2x1"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4"},
}
_CORES_PER_CHIP = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}  # slice names count TensorCores on v4 and v5p
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}


def parse_topology(text: str) -> tuple[str, str]:
    """Return (generation, shape) of ``v5e-16``, ``v5litepod-16`` or ``v5e:4x4``: ``("v5e", "4x4")``.

    Raises
    ------
    UsageError
        If the topology is not known.
    """
    match = re.fullmatch(r"(v\d+[a-z]*)[-:](\d+(?:x\d+)*)", text.strip().lower())
    known = ", ".join(f"{g}-{n}" for g, shapes in _SHAPES.items() for n in shapes)
    if match:
        generation = _ALIASES.get(match[1], match[1])
        shapes = _SHAPES.get(generation, {})
        if match[2].isdigit() and int(match[2]) in shapes:
            return generation, shapes[int(match[2])]
        if match[2] in shapes.values():
            return generation, match[2]
    raise UsageError(f"topology {text!r} is not known", hint=f"one of {known}, or a form such as v5e:4x4")


def get_devices(generation: str, shape: str) -> list[Any]:
    """Return the described TPU devices.

    Raises
    ------
    EnvironmentFault
        If libtpu is not installed or cannot describe the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to query
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compilation occupies no chip, so no lock is needed
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise EnvironmentFault(
            "the TPU compiler (libtpu) is not installed", hint="pip install 'vcelltools[tpu]'"
        ) from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(f"{generation}:{shape}", "tpu").devices
    except Exception as e:  # the plug-in raises its own error types
        line = str(e).splitlines()[0][:300]
        raise EnvironmentFault(f"the TPU compiler cannot describe {generation}:{shape}: {line}") from e


@dataclass(frozen=True)
class Plan:
    """Figures of the compiled step, per chip; None for those that only a program that fits has."""

    topology: str
    chips: int
    processes: int
    parameters: int
    hbm_bytes_per_chip: int
    hbm_limit_bytes: int
    fits: bool
    flops_per_chip: float | None
    bytes_per_chip: float | None
    collectives: dict[str, int] | None
    gradient_reduce_dtype: str | None
    roofline_seconds: float | None
    compile_seconds: float
    sets: int
    set_size: int
    feed: str
    store_bytes_per_chip: int
    temporary_bytes_per_chip: int | None
    donated_bytes_per_chip: int | None
    state_bytes_per_chip: int
    link_bytes_per_chip: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler reports about a step: its program, or only its memory if that exceeds the HBM of a chip.

    Attributes
    ----------
    program
        The compiled program, or None.
    hbm_bytes, temporary_bytes, donated_bytes
        Memory per chip; without a program, only the total is known.
    seconds
        Time of the compilation.
    """

    program: Any
    hbm_bytes: int
    temporary_bytes: int | None
    donated_bytes: int | None
    seconds: float

    def describe(self, chip: Chip, n_params: int) -> dict[str, Any]:
        """Return the fields of :class:`Plan` that follow from the program and the chip."""
        text = None if self.program is None else self.program.as_text()
        return {
            "hbm_bytes_per_chip": self.hbm_bytes,
            "hbm_limit_bytes": chip.hbm_bytes,
            "fits": text is not None and self.hbm_bytes <= chip.hbm_bytes,
            "collectives": None if text is None else count_collectives(text),
            "gradient_reduce_dtype": None if text is None else get_reduce_dtype(text, n_params),
            "compile_seconds": self.seconds,
            "temporary_bytes_per_chip": self.temporary_bytes,
            "donated_bytes_per_chip": self.donated_bytes,
        }


_SHORTAGE = re.compile(r"RESOURCE_EXHAUSTED.*HBM.*\((?P<size>[\d.]+)(?P<unit>[KMGT])\) exceeds available HBM", re.S)


def compile_step(lowered: Any) -> CompiledStep:
    """Compile a step; a step that needs more memory than a chip has is a result, not an error."""
    began = time.perf_counter()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        short = _SHORTAGE.search(str(e))
        if short is None:
            raise
        hbm = int(float(short["size"]) * (1 << 10 * (1 + "KMGT".index(short["unit"]))))
        return CompiledStep(None, hbm, None, None, time.perf_counter() - began)
    m = program.memory_analysis()
    hbm = int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )
    temporary, donated = int(m.temp_size_in_bytes), int(m.alias_size_in_bytes)
    return CompiledStep(program, hbm, temporary, donated, time.perf_counter() - began)


def get_roofline(chip: Chip, flops: float | None, moved: float | None, linked: float) -> float | None:
    """Return the least seconds of a step, from its operations, and the bytes through its memory and its links."""
    if flops is None or moved is None:
        return None
    return max(flops / chip.flops_per_s, moved / chip.hbm_bytes_per_s, linked / chip.link_bytes_per_s)


def _describe_inputs(
    model: ModelConfig,
    config: StepConfig,
    mesh: jax.sharding.Mesh,
    feed: str,
    *,
    sets: tuple[int, int],
    rows: tuple[int, int],
    runs: tuple[int, int],
    n_datasets: int,
    n_rivals: int,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the shapes, dtypes and shardings of the inputs of a step: state, resident data and batch."""
    (n_sets, set_size), (n_rows, columns), (n_runs, n_contexts) = sets, rows, runs
    whole, split = sharding(mesh, split=False), sharding(mesh, split=True)

    def struct(shape, dtype, where=whole):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    state = jax.tree.map(lambda a: struct(a.shape, a.dtype), jax.eval_shape(lambda: init_state(model, config, 0)))
    tables = get_table_shapes(n_runs, n_contexts, model.genes)
    data = {k: struct(shape, dtype) for k, (shape, dtype) in tables.items()}
    data |= {k: struct((n, model.genes), jnp.float32) for k, n in (("mask", n_datasets), ("effect", n_runs))}
    if model.features:
        data["features"] = struct((model.perturbations, model.features), jnp.float32)
    if feed != "host":
        held = -(-n_rows // mesh.devices.size) * mesh.devices.size if feed == "sharded" else n_rows
        data["rows"] = struct((held, columns), jnp.float16, split if feed == "sharded" else whole)
    ids = {k: struct((n_sets,), jnp.int32, split) for k in ("pert", "context", "prior", "dataset", "measured")}
    if feed == "host":
        cells = struct((n_sets, set_size, columns), jnp.float16, split)
    else:
        cells = struct((n_sets, set_size), jnp.int32, split)
    batch = {**ids, "control": cells, "target": cells}
    if need_rivals(config.weights):
        batch["rivals"] = struct((n_sets, n_rivals), jnp.int32, split)
    return state, data, batch


def plan_step(
    model: ModelConfig,
    config: StepConfig,
    *,
    topology: str,
    n_sets: int,
    set_size: int,
    n_rows: int,
    columns: int,
    n_runs: int,
    n_datasets: int = 1,
    n_contexts: int = 1,
    n_rivals: int = 15,
    feed: str,
) -> Plan:
    """Compile one training step for a TPU topology and return the compiler's figures.

    Parameters
    ----------
    n_sets
        Number of sets in a global batch.
    n_rows, columns
        Shape of the store's float16 rows.
    n_runs, n_contexts
        Number of rows of the tables by run, and of those by cell line.
    n_rivals
        Number of other runs that each set is compared with, if a loss needs them.
    feed
        Placement of the rows, see :mod:`vcelltools.model.mesh`.
    """
    generation, shape = parse_topology(topology)
    devices = get_devices(generation, shape)
    chip = CHIPS[generation]
    mesh = make_mesh(devices)
    n_devices = mesh.devices.size
    if n_sets % n_devices:
        raise UsageError(
            f"{n_sets} sets per step do not divide evenly over {n_devices} chips", hint="choose a multiple"
        )
    state, data, batch = _describe_inputs(
        model, config, mesh, feed, sets=(n_sets, set_size), rows=(n_rows, columns), runs=(n_runs, n_contexts),
        n_datasets=n_datasets, n_rivals=n_rivals,
    )  # fmt: skip
    step: Any = make_step(model, config, mesh, feed)
    compiled = compile_step(step.lower(state, data, batch))
    flops = moved = None
    if compiled.program:
        # the compiler counts the body of a scan once, so the work comes from the unrolled program
        unrolled: Any = make_step(model, replace(config, scan=False), mesh, feed) if config.scan else None
        cost = (unrolled.lower(state, data, batch).compile() if unrolled else compiled.program).cost_analysis()
        flops, moved = float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0))
    state_bytes = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(state))
    rows = data["rows"].shape if feed != "host" else (0, 0)
    store_bytes = 2 * rows[0] * rows[1] // (n_devices if feed == "sharded" else 1)
    linked = 2 * 4 * count_params(state.params) if n_devices > 1 else 0  # a ring sends every byte about twice
    return Plan(
        topology=f"{generation}:{shape}",
        chips=n_devices,
        processes=len({d.process_index for d in devices}),
        parameters=count_params(state.params),
        **compiled.describe(chip, count_params(state.params)),
        flops_per_chip=flops,
        bytes_per_chip=moved,
        roofline_seconds=get_roofline(chip, flops, moved, linked),
        sets=n_sets,
        set_size=set_size,
        feed=feed,
        store_bytes_per_chip=int(store_bytes),
        state_bytes_per_chip=state_bytes,
        link_bytes_per_chip=linked,
    )


_COLLECTIVE = re.compile(
    r"= (?P<type>[^\n]*?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def count_collectives(hlo: str) -> dict[str, int]:
    """Return the number of occurrences of each collective in a compiled program."""
    counts: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(hlo):
        counts[match["op"]] = counts.get(match["op"], 0) + 1
    return counts


def get_reduce_dtype(hlo: str, n_params: int) -> str:
    """Return the dtype in which the gradients are all-reduced: ``f32``, or a list if there are several.

    Integers are ignored: they are row numbers, and packed rows of a sharded store.

    Raises
    ------
    RuntimeError
        If the all-reduces together hold fewer values than the parameters, so that the gradients are not averaged.
    """
    elements: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(hlo):
        if match["op"] in ("all-reduce", "reduce-scatter"):
            for dtype, dims in re.findall(r"\b(b?f\d+)\[([\d,]*)\]", match["type"]):
                n = int(np.prod([int(d) for d in dims.split(",") if d] or [1]))
                elements[dtype] = elements.get(dtype, 0) + n
    if not elements:
        return "none"
    if sum(elements.values()) < 0.95 * n_params:  # equal gradients (of two biases of one sum) are reduced once
        raise RuntimeError("the compiled step reduces fewer values than the model has parameters")
    return ",".join(sorted(elements))
