"""Print the results of ``train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vcelltools.cli.hints import find_free
from vcelltools.cli.output import Output

if TYPE_CHECKING:
    from vcelltools.model.topology import Plan
    from vcelltools.training.sanity import SanityResult
    from vcelltools.training.train import TrainResult


def show_plan(output: Output, plan: Plan) -> None:
    """Print what the TPU compiler reports about the step."""
    gib = 1 << 30
    output.result(plan.to_json())
    active = getattr(plan, "active_parameters", None)
    collectives = ", ".join(f"{n} × {k}" for k, n in (plan.collectives or {}).items()) or "none"
    work = [f"{v / 1e9:.2f} {u}" for v, u in ((plan.flops_per_chip, "GFLOP"), (plan.bytes_per_chip, "GB")) if v]
    rows = [
        ["chips (processes)", f"{plan.chips} ({plan.processes})"],
        ["parameters", plan.parameters],
        *([] if active is None else [["active parameters per gene", active]]),
        [
            "batch",
            f"{plan.sets} sets of {plan.set_size} + {plan.set_size} cells" if active is None else f"{plan.sets} cells",
        ],
        ["store", f"{plan.feed}, {plan.store_bytes_per_chip / gib:.2f} GiB a chip"],
        ["HBM a chip", f"{plan.hbm_bytes_per_chip / gib:.2f} of {plan.hbm_limit_bytes / gib:.0f} GiB"],
        ["work per chip and step", ", ".join(work) or "not known"],
    ]
    if plan.temporary_bytes_per_chip is not None and plan.roofline_seconds is not None:  # otherwise not compiled
        rows += [
            ["temporaries a chip", f"{plan.temporary_bytes_per_chip / gib:.3f} GiB"],
            ["collectives", f"{collectives}; gradients in {plan.gradient_reduce_dtype}"],
            ["roofline", f"{plan.roofline_seconds * 1e3:.3f} ms a step"],
        ]
    rows.append(["compilation", f"{plan.compile_seconds:.1f} s"])
    output.table(["plan", plan.topology], rows)
    output.done("the step fits" if plan.fits else "the step does NOT fit: use fewer sets, a smaller size or more chips")


def show_sanity(output: Output, found: SanityResult) -> None:
    """Print the verdict and figures of a sanity mode."""
    output.result(found.to_json())
    output.table(["figure", "value"], [[k, v] for k, v in found.figures.items()], title=found.expected)
    output.done(f"{found.mode}: {'holds' if found.holds else 'does NOT hold'}")


def show_result(output: Output, result: TrainResult) -> None:
    """Print the closing table, which compares the model with the baselines."""
    from vcelltools.training.evaluate import make_rows

    output.result(result.to_json())
    s = result.summary
    if "final" not in s:  # only the first of several processes prints
        return
    if s["final"]["model"] == "diffusion":
        final, low = s["final"], s["final"]["gain_ci95"]
        rows = [["marginal entropy", final["marginal_entropy"]], ["diffusion", final["loss"]]]
        output.table(["model", "nats per masked gene"], rows, title=f"{final['n']:,} held-out cells ({final['part']})")
        verdict = "beats" if s["beats_baselines"] else "does NOT beat"
        output.note(f"the model {verdict} the marginals by {final['gain']:.4f} nats ({low[0]:.4f} to {low[1]:.4f})")
        output.done(f"wrote {result.out} (peak memory {s['peak_memory_bytes'] / 1e9:.2f} GB)")
        return
    rows = [r.cells() for r in make_rows(s)]
    title = f"{s['final']['n']} held-out groups ({s['final']['part']})"
    output.table(["model", "PDS", "Pearson Δ", "MAE", "error"], rows, title=title)
    for kind, c in s.get("choices", {}).items():
        chosen = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in c.items() if k != "nested")
        how = f"{s['final']['objective']} chose {chosen}" if c["n"] else "training holds no such groups to choose on"
        output.note(f"{kind}: {how}")
    if s["final"]["model"] == "transformer":
        verdict = "beats" if s["beats_baselines"] else "does NOT beat"
        output.note(f"after {s['steps']:,} steps the model {verdict} every baseline in PDS and Pearson Δ")
        if s["final"]["best_step"] == 0:
            output.note("training did not help: the untrained start scored best on the validation groups")
    peak = f"peak memory {s['peak_memory_bytes'] / 1e9:.2f} GB"
    line = ["--line", s["held_out_lines"][0]] if len(s["held_out_stores"]) > 1 else []
    out = find_free(f"pred-{result.out.name}.h5ad")
    output.done(f"wrote {result.out} ({peak})", ("predict", "--run", result.out, *line, "--out", out))
