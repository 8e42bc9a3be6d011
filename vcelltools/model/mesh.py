"""Devices, processes, and the placement of the store's rows.

There is one axis, ``data``: every device holds the parameters and processes its share of the sets. The rows are

- ``replicated``: complete in the memory of every device; a step receives only row numbers (some kilobytes);
- ``sharded``: spread over the devices; a step gathers the requested rows by one reduce-scatter;
- ``host``: in host memory; a step receives the cells themselves, which a thread reads ahead.

All three give the same batches and therefore the same results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vcelltools.errors import EnvironmentFault, UsageError, spell

AXIS = "data"
FEEDS = ("replicated", "sharded", "host")


def choose_platform(*, tpu: bool) -> None:
    """Restrict the platforms that JAX searches, before any device is used.

    If ``tpu`` is false and the machine has neither the device file of an accelerator nor ``JAX_PLATFORMS`` set, JAX is
    restricted to the CPU, so that an installed TPU or GPU plug-in neither searches nor warns.

    Raises
    ------
    EnvironmentFault
        If ``tpu`` is true and the TPU runtime or a TPU is missing.
    """
    has_tpu = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    if not tpu:
        if not has_tpu and not has_gpu and not os.environ.get("JAX_PLATFORMS"):
            jax.config.update("jax_platforms", "cpu")
        return
    if find_spec("libtpu") is None:
        raise EnvironmentFault(
            f"{spell('tpu', True)}: the TPU runtime is not installed", hint="pip install 'vcelltools[tpu]'"
        )
    if not has_tpu:
        raise EnvironmentFault(
            f"{spell('tpu', True)}: this machine has no TPU",
            hint=f"run on a TPU VM (docs/tpu.md), or {spell('dry_run', True)} {spell('topology', 'v5e-16')}",
        )
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        devices = jax.devices("tpu")
    except RuntimeError as e:
        raise EnvironmentFault(f"{spell('tpu', True)}: the TPU cannot be started: {str(e).splitlines()[0]}") from e
    if not devices:
        raise EnvironmentFault(f"{spell('tpu', True)}: this machine has no TPU")


def make_mesh(devices: Any = None) -> Mesh:
    """Return the one-axis mesh over all devices of all processes, or over the given devices."""
    return Mesh(np.array(jax.devices() if devices is None else devices).reshape(-1), (AXIS,))


def start_processes(spec: str) -> None:
    """Join a run of several processes; ``spec`` is ``auto`` (TPU pod or cluster) or ``ADDRESS:PORT,COUNT,ID``.

    Raises
    ------
    UsageError
        If ``spec`` has neither form.
    EnvironmentFault
        If the processes do not find each other.
    """
    if spec == "auto":
        arguments: dict[str, Any] = {}
    else:
        parts = spec.split(",")
        if len(parts) != 3 or not parts[1].isdigit() or not parts[2].isdigit():
            raise UsageError(f"{spell('distributed')} {spec} is not understood", hint="auto, or ADDRESS:PORT,COUNT,ID")
        arguments = {"coordinator_address": parts[0], "num_processes": int(parts[1]), "process_id": int(parts[2])}
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as e:
        line = str(e).splitlines()[0]
        raise EnvironmentFault(
            f"the processes did not find each other: {line}", hint=f"check {spell('distributed')}"
        ) from e


def sharding(mesh: Mesh, split: bool) -> NamedSharding:
    """Return the sharding of an array that is split along its first axis, or complete on every device."""
    return NamedSharding(mesh, P(AXIS) if split else P())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copy host arrays, which are equal in every process, to every device."""
    target = sharding(mesh, split=False)

    def put(a: Any) -> jax.Array:
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, target, lambda index: a[index])

    return jax.tree.map(put, tree)


def local_share(mesh: Mesh, n_sets: int) -> slice:
    """Return the slice of the ``n_sets`` global sets that this process provides.

    Raises
    ------
    UsageError
        If the sets do not divide evenly over the devices.
    """
    n_devices = mesh.devices.size
    if n_sets % n_devices:
        raise UsageError(
            f"{n_sets} sets per step do not divide evenly over {n_devices} devices",
            hint=f"choose a multiple of {n_devices}",
        )
    mine = [i for i, d in enumerate(mesh.devices.ravel()) if d.process_index == jax.process_index()]
    each = n_sets // n_devices
    if mine != list(range(mine[0], mine[-1] + 1)):
        raise EnvironmentFault("the devices of one process are not neighbours in the mesh")
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def feed(mesh: Mesh, batch: dict[str, np.ndarray], n_sets: int) -> dict[str, jax.Array]:
    """Add this process's share of a batch (arrays with sets as the first axis) to the global batch."""
    target = sharding(mesh, split=True)
    return {k: jax.make_array_from_process_local_data(target, v, (n_sets, *v.shape[1:])) for k, v in batch.items()}


def device_memory() -> int | None:
    """Return the memory of one accelerator in bytes; None on a CPU, which reports no limit."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def choose_feed(n_rows: int, columns: int, n_devices: int, memory: int | None, share: float = 0.5) -> str:
    """Return the feed of a float16 store: device memory if it takes at most ``share`` of it, otherwise shards.

    On a CPU (``memory`` is None), the cells stay in their memory map: ``host``.
    """
    if memory is None:
        return "host"
    n_bytes = 2 * n_rows * columns
    if n_bytes <= share * memory:
        return "replicated"
    return "sharded" if n_bytes / n_devices <= share * memory else "host"


def place_rows(mesh: Mesh, rows: np.ndarray | list[np.ndarray], how: str) -> jax.Array | None:
    """Copy the rows (n, columns) float16 of a store to the devices, ``replicated`` or ``sharded``; None for ``host``.

    ``rows`` may be a list of consecutive blocks (memory maps). The host never copies more than the share of one device.
    """
    if how == "host":
        return None
    blocks = rows if isinstance(rows, list) else [rows]
    starts = np.cumsum([0, *[len(b) for b in blocks]])
    n, columns = int(starts[-1]), blocks[0].shape[1]
    n_devices = mesh.devices.size
    padded = -(-n // n_devices) * n_devices if how == "sharded" else n

    def read(index: Any) -> np.ndarray:
        begin, end, _ = index[0].indices(padded)
        out = np.zeros((end - begin, columns), np.float16)
        for block, start in zip(blocks, starts[:-1], strict=True):
            a, b = max(begin, start), min(end, start + len(block))
            if a < b:
                out[a - begin : b - begin] = block[a - start : b - start]
        return out

    return jax.make_array_from_callback((padded, columns), sharding(mesh, how == "sharded"), read)


def row_reader(how: str, genes: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Return ``read(rows, wanted) -> cells``, to be called inside ``shard_map``.

    ``wanted`` comes from the batch: row numbers (b, s) int32, or for ``host`` the cells (b, s, columns) themselves.
    """
    if how == "host":
        return lambda rows, wanted: wanted[..., :genes]
    if how == "replicated":
        return lambda rows, wanted: rows.at[wanted].get(mode="promise_in_bounds")[..., :genes]
    if how == "sharded":
        return lambda rows, wanted: _gather_shards(rows, wanted)[..., :genes]
    raise UsageError(f"feed {how!r} is not known", hint=f"one of: {', '.join(FEEDS)}")


def _gather_shards(rows: jax.Array, wanted: jax.Array) -> jax.Array:
    """Collect rows from other devices by one reduce-scatter.

    Every device contributes the rows that it holds and zeros for all others, so the sum is exact in float16.
    """
    everyone = jax.lax.all_gather(wanted, AXIS, tiled=True)
    local = everyone - jax.lax.axis_index(AXIS) * rows.shape[0]
    mine = (local >= 0) & (local < rows.shape[0])
    found = rows.at[jnp.where(mine, local, 0)].get(mode="promise_in_bounds")
    offered = jnp.where(jnp.broadcast_to(mine[..., None], found.shape), found, jnp.zeros((), rows.dtype))
    return jax.lax.psum_scatter(offered, AXIS, scatter_dimension=0, tiled=True)
