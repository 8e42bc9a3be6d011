"""How ``train`` and ``predict`` show what they found."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.model.topology import Plan
    from vcelltools.pipelines.sanity import SanityResult
    from vcelltools.pipelines.train import TrainResult


def show_plan(output: Output, plan: Plan) -> None:
    """Print what the TPU compiler says of the step."""
    gib = 1 << 30
    output.result(plan.to_json())
    collectives = ", ".join(f"{n} × {k}" for k, n in plan.collectives.items()) or "none"
    rows = [
        ["chips (processes)", f"{plan.chips} ({plan.processes})"],
        ["parameters", plan.parameters],
        ["batch", f"{plan.sets} sets of {plan.set_size} + {plan.set_size} cells"],
        ["store", f"{plan.feed}, {plan.store_bytes_per_chip / gib:.2f} GiB a chip"],
        ["HBM a chip", f"{plan.hbm_bytes_per_chip / gib:.2f} of {plan.hbm_limit_bytes / gib:.0f} GiB"],
        ["temporaries a chip", f"{plan.temporary_bytes_per_chip / gib:.3f} GiB"],
        ["work a chip and step", f"{plan.flops_per_chip / 1e9:.2f} GFLOP, {plan.bytes_per_chip / 1e9:.2f} GB"],
        ["collectives", f"{collectives}; gradients in {plan.gradient_reduce_dtype}"],
        ["roofline", f"{plan.roofline_seconds * 1e3:.3f} ms a step"],
        ["compilation", f"{plan.compile_seconds:.1f} s"],
    ]
    output.table(["plan", plan.topology], rows)
    output.done("the step fits" if plan.fits else "the step does NOT fit: fewer sets, a smaller size, or more chips")


def show_sanity(output: Output, found: SanityResult) -> None:
    """Print a sanity mode's verdict and figures."""
    output.result(found.to_json())
    output.table(["figure", "value"], [[k, v] for k, v in found.figures.items()], title=found.expected)
    output.done(f"{found.mode}: {'holds' if found.holds else 'does NOT hold'}")


def show_result(output: Output, result: TrainResult) -> None:
    """Print the closing table: the model beside the baselines."""
    from vcelltools.pipelines.evaluate import make_rows

    output.result(result.to_json())
    s = result.summary
    if "final" not in s:  # not the first of several processes
        return
    rows = [r.cells() for r in make_rows(s["final"]["model"], s["final"], s["baselines"])]
    title = f"{s['final']['n']} held-out groups ({s['final']['part']})"
    output.table(["model", "PDS", "Pearson Δ", "MAE"], rows, title=title)
    if s["final"]["model"] == "transformer":
        verdict = "beats" if s["beats_baselines"] else "does NOT beat"
        output.note(f"after {s['steps']:,} steps the model {verdict} every baseline in PDS and Pearson Δ")
        if s["final"]["best_step"] == 0:
            output.note("training added nothing here: the untrained start scored best on the validation groups")
    peak = f"peak memory {s['peak_memory_bytes'] / 1e9:.2f} GB"
    line = f" --line {shlex.quote(s['held_out_lines'][0])}" if len(s["held_out_stores"]) > 1 else ""
    output.done(f"wrote {result.out} ({peak}); next: vcelltools predict --run {result.out}{line} --out pred.h5ad")
