"""How the demo ends: what was learned, and what to type next."""

from __future__ import annotations

from typing import Any

from vcelltools.cli.output import Output

NEXT = """\
For your own files:
  vcelltools inspect atlas.h5ad                what is in it, and which columns mean what
  vcelltools init                              writes vcelltools.toml from the files in this folder
  vcelltools basis && vcelltools build-store   one gene list, one store for each data set
  vcelltools train --out runs/first            the model beside its baselines, on held-out groups
  vcelltools predict --run runs/first --line LINE --out pred.h5ad
  vcelltools sample atlas.h5ad --where cell_line=LINE --by target_gene --matching pred.h5ad --out measured.h5ad
                                               the cells of what was predicted, by your file's own columns
  vcelltools normalize measured.h5ad --out truth.h5ad && vcelltools score pred.h5ad --truth truth.h5ad"""

_SLICE = {"pds": "PDS", "pearson_delta": "Pearson Δ", "mae": "MAE"}


def show_demo(o: Output, result: Any) -> None:
    """Print the held-out table, the components, the verdict and the next steps."""
    o.result(result.to_json())
    models = list(result.scores)
    rows = []
    for name, c in result.scores["transformer"]["components"].items():
        values = [result.scores[m]["components"][name]["value"] for m in models]
        rows.append([name, c["baseline"], *values, c["ceiling"]])
    rows.append(["average score", 0.0, *(result.scores[m]["avg_score"] for m in models), None])
    o.table(["metric", "mean baseline", *models, "split-half ceiling"], rows, title="\nWhat was learned")
    o.note("\n" + _verdict(result))
    o.note(f"\n{NEXT}\n")
    steps = f"{result.ran} steps ran" + (f", {result.skipped} were done before" if result.skipped else "")
    o.done(f"wrote {result.report_fpath}, the report; {steps}, {result.seconds:.0f} s in all")


def _verdict(result: Any) -> str:
    score = {m: s["avg_score"] or 0.0 for m, s in result.scores.items()}
    ours, bar = score["transformer"], score["perturbation-mean"]
    first = "beats" if result.beats_mean else "does NOT beat"
    d = result.difference
    second = "is level with" if d.level else ("is above" if d.value > 0 else "is below")
    lines = [
        f"On cells that it never saw, the transformer {first} the mean baseline: average score {ours:.3f}, where 0 is "
        f"the mean baseline\nand 1 the best possible. It {second} the perturbation-mean ({bar:.3f}), each "
        f"perturbation's mean effect in the other laboratories:\nthe difference is {d.value:+.3f}, and from "
        f"{d.ci95[0]:+.3f} to {d.ci95[1]:+.3f} in 95 % of the resamples of the {d.n} perturbations."
    ]
    for name, c in result.scores["transformer"]["components"].items():
        if c["score_unclipped"] is not None and c["score_unclipped"] < 0:
            lines.append(f"In {name} it is worse than the mean baseline; the average counts that as 0.")
    return "\n".join([*lines, _what_training_added(result.held_out["transformer"])])


def _what_training_added(final: dict[str, Any]) -> str:
    """Say how the model's own held-out scores compare with what it started from, a prior that is not trained."""
    start = final["untrained"]
    moved = [f"{name} from {start[m]:.3f} to {final[m]:.3f}" for m, name in _SLICE.items()]
    return f"Training took it from its untrained start, over the genes of the basis:\n{', '.join(moved)}."
