"""``vcelltools score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose, refuse, refuse_same

Pred = Annotated[Path, typer.Argument(metavar="PRED", show_default=False, help="The prediction: an h5ad.")]
TruthFile = Annotated[
    Path | None,
    typer.Option("--truth", metavar="REAL", help="The true cells [default: [score] truth of vcelltools.toml]."),
]
Pack = Annotated[
    Path | None,
    typer.Option("--truth-pack", metavar="FILE", help="Read the reduced truth from here; write it where it is not."),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", help="vcc, full, minimal, de, anndata, pds or extended [default: vcc]."),
]
Compat = Annotated[
    str | None,
    typer.Option("--compat", help="ours, cell-eval (0.8.2), vcc2025 (0.6.6) or vcc2026 [default: ours]."),
]
PertCol = Annotated[
    str | None, typer.Option("--pert-col", metavar="C", help="obs column of the perturbation [default: target_gene].")
]
Control = Annotated[
    str | None, typer.Option("--control", metavar="LABEL", help="The control's label [default: non-targeting].")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the tables [default: score-PRED].")
]
Report = Annotated[Path | None, typer.Option("--report", metavar="R.html", help="Write an HTML report too.")]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", metavar="CSV", help="agg_results.csv of a baseline [default: the mean baseline]."),
]
Epsilon = Annotated[float, typer.Option("--epsilon", min=0, help="Added to both means of a fold change.")]
Cpm = Annotated[
    float | None,
    typer.Option("--cpm-filter", min=0, metavar="T", help="Genes at most this CPM in both groups leave the DE."),
]
Ceiling = Annotated[
    bool, typer.Option("--ceiling", help="Score one half of the truth against the other too (vcc2026 always does).")
]
Seed = Annotated[int, typer.Option("--ceiling-seed", help="Of the split in halves.")]
Discrete = Annotated[
    bool, typer.Option("--allow-discrete", help="Leave counts as they are, in place of log1p of the median library.")
]
Cp10k = Annotated[bool, typer.Option("--to-cp10k", help="Bring both files to log1p of counts per ten thousand.")]
Skip = Annotated[str, typer.Option("--skip-metrics", metavar="A,B", help="Metrics to leave out.")]
Continuity = Annotated[bool, typer.Option("--continuity/--no-continuity", help="vcc2026: continuity correction.")]
Anchors = Annotated[
    bool, typer.Option("--anchors/--no-anchors", help="vcc2026: compute the baseline and the replicate that scale it.")
]
GeneMap = Annotated[
    Path | None,
    typer.Option("--target-gene-map", metavar="CSV", help="vcc2026: perturbation,gene where names differ."),
]
ContextCol = Annotated[str, typer.Option("--context-col", metavar="C", help="vcc2026: obs column of the context.")]


def score(
    pred: Pred,
    truth: TruthFile = None,
    truth_pack: Pack = None,
    profile: Profile = None,
    compat: Compat = None,
    pert_col: PertCol = None,
    control: Control = None,
    out: Out = None,
    report: Report = None,
    baseline: Baseline = None,
    epsilon: Epsilon = 0.0,
    cpm_filter: Cpm = None,
    ceiling: Ceiling = False,
    ceiling_seed: Seed = 0,
    allow_discrete: Discrete = False,
    to_cp10k: Cp10k = False,
    skip_metrics: Skip = "",
    continuity: Continuity = True,
    context_col: ContextCol = "context",
    anchors: Anchors = True,
    target_gene_map: GeneMap = None,
    layer: Layer = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score a prediction against the true cells: 0 is the mean baseline, 1 the best possible.

    By default the truth's controls serve both sides, ties count half and undefined values are left out and counted;
    --compat gives the numbers of an official implementation instead, to the digit.

    Example: vcelltools score pred.h5ad --truth real.h5ad --profile vcc --out scored
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_score import get_defaults, run_2025, run_2026
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    given = {"truth": truth, "profile": profile, "compat": compat, "pert_col": pert_col, "control": control,
             "out": out, "report": report}  # fmt: skip
    common = {**get_defaults(given, pred, truth_pack), "force": force, "layer": layer, "threads": threads}
    refuse_same(("--out", common["out"]), ("--report", common["report"]))
    start(pred, common["truth"])
    if common["compat"] == "vcc2026":
        # --ceiling and --allow-discrete ask for what these rules do anyway
        others = {"--baseline": baseline, "--epsilon": epsilon, "--cpm-filter": cpm_filter is not None,
                  "--ceiling-seed": ceiling_seed, "--to-cp10k": to_cp10k, "--skip-metrics": skip_metrics}  # fmt: skip
        refuse(others, "--compat vcc2026")
        return run_2026(
            o, pred, truth_pack=truth_pack, continuity=continuity, context_col=context_col, anchors=anchors,
            target_gene_map=target_gene_map, **common,
        )  # fmt: skip
    others = {"--no-continuity": not continuity, "--context-col": context_col != "context",
              "--no-anchors": not anchors, "--target-gene-map": target_gene_map}  # fmt: skip
    refuse(others, f"--compat {common['compat']}")
    return run_2025(
        o, pred, truth_pack=truth_pack, baseline=baseline, epsilon=epsilon, cpm_filter=cpm_filter, ceiling=ceiling,
        ceiling_seed=ceiling_seed, allow_discrete=allow_discrete, to_cp10k=to_cp10k,
        skip=tuple(m.strip() for m in skip_metrics.split(",") if m.strip()), **common,
    )  # fmt: skip
