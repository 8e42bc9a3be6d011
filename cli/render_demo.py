"""Print the end of the demo: what was learned and what to run next."""

from __future__ import annotations

from typing import Any

from vcelltools.cli.output import Output

NEXT = """\
For your own files:
  vcelltools inspect atlas.h5ad                shows what is in a file, and what its columns mean
  vcelltools init                              writes vcelltools.toml from the files in this folder
  vcelltools basis && vcelltools build-store   chooses one gene list and builds a store per data set
  vcelltools train --out runs/first            compares the model with baselines on held-out groups
  vcelltools predict --run runs/first --line LINE --out pred.h5ad
  vcelltools sample atlas.h5ad --where cell_line=LINE --by target_gene --matching pred.h5ad --out measured.h5ad
                                               picks the true cells for the prediction, by the columns of your file
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
    o.note("", *_verdict(result), "", *NEXT.split("\n"), "")
    steps = f"{result.ran} steps ran" + (f", {result.skipped} were done before" if result.skipped else "")
    o.done(f"wrote {result.report_fpath}, the report; {steps}, {result.seconds:.0f} s in all")


def _verdict(result: Any) -> list[str]:
    score = {m: s["avg_score"] or 0.0 for m, s in result.scores.items()}
    ours, bar = score["transformer"], score["perturbation-mean"]
    first = "beats" if result.beats_mean else "does NOT beat"
    d = result.difference
    second = "is level with" if d.level else ("is above" if d.value > 0 else "is below")
    lines = [
        f"On cells that it never saw, the transformer {first} the mean baseline: average score {ours:.3f}, where 0 is "
        "the mean baseline",
        f"and 1 the best possible. It {second} the perturbation-mean ({bar:.3f}), each perturbation's mean effect in "
        "the other laboratories:",
        f"the difference is {d.value:+.3f}, and from {d.ci95[0]:+.3f} to {d.ci95[1]:+.3f} in 95 % of the resamples of "
        f"the {d.n} perturbations.",
    ]
    for name, c in result.scores["transformer"]["components"].items():
        if c["score_unclipped"] is not None and c["score_unclipped"] < 0:
            lines.append(f"In {name} it is worse than the mean baseline; the average counts that as 0.")
    return [*lines, *_what_training_added(result.held_out["transformer"])]


def _what_training_added(final: dict[str, Any]) -> list[str]:
    """Print how the held-out scores of the model compare with the untrained prior that it started from."""
    start = final["untrained"]
    moved = [f"{name} from {start[m]:.3f} to {final[m]:.3f}" for m, name in _SLICE.items()]
    return ["Compared with its untrained start, on the genes of the basis, training changed", f"{', '.join(moved)}."]
