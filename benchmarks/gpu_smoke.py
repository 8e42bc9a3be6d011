"""The training step on one accelerator: speed in float32 and bfloat16, and equality with the CPU.

Needs jax, numpy and optax alone (any accelerator's build of jax); a store is made in memory.

    python benchmarks/gpu_smoke.py [--size rn] [--steps 50]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from vcelltools.model.mesh import feed, make_mesh, place_rows, replicate
from vcelltools.model.network import make_config
from vcelltools.model.step import StepConfig, init_state, make_data, make_step

GENES, STRIDE, GROUPS = 2000, 2048, 200


def make_rows(n_rows: int) -> np.ndarray:
    """Return sparse-looking float16 rows, log1p CP10K in size."""
    rng = np.random.default_rng(0)
    rows = np.zeros((n_rows, STRIDE), np.float16)
    for a in range(0, n_rows, 8192):
        block = rng.gamma(0.6, 1.2, (min(8192, n_rows - a), GENES)) * (rng.random((1, GENES)) < 0.6)
        rows[a : a + len(block), :GENES] = block
    return rows


def make_batch(step: int, n_rows: int, sets: int, set_size: int) -> dict[str, np.ndarray]:
    """Return the row numbers of a step."""
    rng = np.random.default_rng(step)
    ids = {k: rng.integers(0, n, sets, dtype=np.int32) for k, n in (("pert", GROUPS), ("prior", GROUPS))}
    rows = {k: rng.integers(0, n_rows, (sets, set_size), dtype=np.int32) for k in ("control", "target")}
    return {**ids, **rows, "context": np.zeros(sets, np.int32), "dataset": np.zeros(sets, np.int32)}


def run(device: jax.Device, rows: np.ndarray, args: argparse.Namespace, steps: int, **fields: object) -> dict:
    """Train some steps on one device; return losses and speed."""
    mesh = make_mesh([device])
    model = make_config(args.size, genes=GENES, perturbations=GROUPS)
    config = StepConfig(steps=1000, scan=False, **fields)
    data = replicate(mesh, make_data(np.random.default_rng(1).normal(0, 0.05, (GROUPS, GENES)), np.ones((1, GENES))))
    data["rows"] = place_rows(mesh, rows, "replicated")
    state = replicate(mesh, init_state(model, config, 0))
    step = make_step(model, config, mesh, "replicated")
    losses = []
    began = 0.0
    for i in range(steps + 1):
        if i == 1:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = step(state, data, feed(mesh, make_batch(i, len(rows), args.sets, args.set_size), args.sets))
        losses.append(metrics["excess"])
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "steps_per_s": steps / seconds,
        "cells_per_s": 2 * args.sets * args.set_size * steps / seconds,
        "losses": [float(x) for x in losses],
        "peak_device_bytes": stats.get("peak_bytes_in_use"),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="rn")
    parser.add_argument("--sets", type=int, default=32)
    parser.add_argument("--set-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    rows = make_rows(args.rows)
    with jax.default_matmul_precision("highest"):
        exact = run(device, rows, args, 10)
        reference = run(cpu, rows, args, 10)
    report = {
        "float32_highest": exact,
        "float32": run(device, rows, args, args.steps),
        "bfloat16": run(device, rows, args, args.steps, bfloat16=True),
        "cpu": reference,
        "largest_difference_to_cpu": float(np.abs(np.subtract(exact["losses"], reference["losses"])).max()),
    }
    for r in report.values():
        if isinstance(r, dict):
            r["losses"] = [r["losses"][0], r["losses"][-1]]
    print(json.dumps(report, indent=1))
    if report["largest_difference_to_cpu"] > 1e-3:
        raise SystemExit("the accelerator's losses differ from the CPU's")


if __name__ == "__main__":
    main()
