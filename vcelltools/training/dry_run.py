"""``train --dry-run``: figures of the training step from the TPU compiler, for a topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vcelltools.errors import UsageError, spell
from vcelltools.training.length import LONGEST
from vcelltools.training.settings import TrainSettings

if TYPE_CHECKING:
    from vcelltools.model.topology import Plan
    from vcelltools.stores.store import Store

# the sizes to plan for without a store: an atlas of the size of Replogle-Nadig on 2,000 genes
_TYPICAL = {
    "n_rows": 200_000,
    "columns": 2048,
    "genes": 2000,
    "perturbations": 2000,
    "groups": 4000,
    "stores": 1,
    "lines": 4,
}


def plan(settings: TrainSettings, topology: str, *, stores: Sequence[Store] | None = None) -> Plan:
    """Compile the step of these settings for a topology, without a TPU.

    Sizes come from the stores or, without stores, from a typical atlas. The number of sets per batch is rounded up to a
    multiple of the number of chips.

    Raises
    ------
    UsageError
        If the topology is not known.
    EnvironmentFault
        If libtpu is not installed.
    """
    import jax

    from vcelltools.model import mesh
    from vcelltools.model import topology as tpu
    from vcelltools.model.network import make_config
    from vcelltools.model.step import StepConfig
    from vcelltools.training.inputs import N_RIVALS

    if settings.model == "diffusion":
        return _plan_diffusion(settings, topology, stores)
    if settings.model != "transformer":
        raise UsageError(
            f"{spell('dry_run', True)}: {settings.model} is not trained on devices", hint=spell("model", "transformer")
        )
    generation, shape = tpu.parse_topology(topology)
    jax.config.update("jax_platforms", "cpu")
    devices = tpu.get_devices(generation, shape)
    size = _measure(settings, stores)
    n_sets = -(-settings.sets // len(devices)) * len(devices)
    feed: str = settings.feed
    if feed == "auto":
        feed = mesh.choose_feed(size["n_rows"], size["columns"], len(devices), tpu.CHIPS[generation].hbm_bytes)
    shared = {k: getattr(settings, k) for k in StepConfig.__dataclass_fields__ if hasattr(settings, k)}
    shared["steps"] = settings.steps or LONGEST  # the plan does not depend on it
    model = make_config(
        settings.size,
        genes=size["genes"],
        perturbations=size["perturbations"],
        nonnegative=settings.nonnegative,
        contexts=size["stores"] if settings.batch_embedding else 0,
    )
    return tpu.plan_step(
        model,
        StepConfig(**shared, bfloat16=settings.precision != "float32", scan=True),
        topology=topology,
        n_sets=n_sets,
        set_size=settings.set_size,
        n_rows=size["n_rows"],
        columns=size["columns"],
        n_runs=size["groups"] + 1,
        n_datasets=size["stores"],
        n_contexts=size["lines"],
        n_rivals=N_RIVALS,
        feed=feed,
    )


def _measure(settings: TrainSettings, stores: Sequence[Store] | None) -> dict[str, int]:
    from vcelltools.training.inputs import open_stores

    if stores is None:
        try:
            stores = open_stores(settings)
        except UsageError:
            return dict(_TYPICAL)
    runs = [s.runs[~s.runs["is_control"]] for s in stores]
    return {
        "n_rows": sum(s.n_cells for s in stores),
        "columns": stores[0].stride,
        "genes": stores[0].n_genes,
        "perturbations": len({p for r in runs for p in r["perturbation"]}) + 1,
        "groups": sum(len(r[["cell_line", "perturbation"]].drop_duplicates()) for r in runs),
        "stores": len(stores),
        "lines": sum(s.runs["cell_line"].nunique() for s in stores),
    }


def _plan_diffusion(settings: TrainSettings, topology: str, stores: Sequence[Store] | None) -> Plan:
    """Compile the step of a diffusion model; the cells per batch are rounded up to a multiple of the chips."""
    import jax

    from vcelltools.model import topology as tpu
    from vcelltools.model.diffusion import SIZES, make_diffusion_config
    from vcelltools.model.diffusion_plan import plan_diffusion

    chips = len(tpu.get_devices(*tpu.parse_topology(topology)))
    jax.config.update("jax_platforms", "cpu")
    size = _measure(settings, stores)
    cells = chips if settings.size == "moe-17b" else -(-settings.sets // chips) * chips
    config = make_diffusion_config(
        settings.size, genes=size["genes"], **({} if SIZES[settings.size].get("perturbations") else
        {"perturbations": size["perturbations"]}),
    )  # fmt: skip
    return plan_diffusion(config, topology=topology, n_cells=cells, bfloat16=settings.precision != "float32")
