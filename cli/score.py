"""``vcelltools score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Dask, Force, Json, Layer, LibraryCol, Quiet, Threads, Verbose, refuse, refuse_same

Pred = Annotated[Path, typer.Argument(metavar="PRED", show_default=False, help="Prediction: an h5ad.")]
TruthFile = Annotated[
    Path | None,
    typer.Option("--truth", metavar="REAL", help="File of the true cells [default: [score] truth in vcelltools.toml]."),
]
Pack = Annotated[
    Path | None,
    typer.Option(
        "--truth-pack",
        metavar="FILE",
        help="File of the reduced truth, which is read if it exists and written otherwise.",
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Set of metrics: vcc, full, minimal, de, anndata, pds, extended or calibrated [default: vcc].",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option("--compat", help="Rule set: ours, cell-eval (0.8.2), vcc2025 (0.6.6) or vcc2026 [default: ours]."),
]
PertCol = Annotated[
    str | None, typer.Option("--pert-col", metavar="C", help="obs column of the perturbation [default: target_gene].")
]
Control = Annotated[
    str | None, typer.Option("--control", metavar="LABEL", help="Label of the controls [default: non-targeting].")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder for the tables [default: score-PRED].")
]
Report = Annotated[Path | None, typer.Option("--report", metavar="R.html", help="HTML report to write.")]
Baseline = Annotated[
    Path | None,
    typer.Option(
        "--baseline", metavar="CSV", help="agg_results.csv of the baseline to scale by [default: the mean baseline]."
    ),
]
Epsilon = Annotated[float, typer.Option("--epsilon", min=0, help="Pseudocount added to both means of a fold change.")]
Cpm = Annotated[
    float | None,
    typer.Option(
        "--cpm-filter",
        min=0,
        metavar="T",
        help="Exclude genes with at most this CPM in both groups from differential expression.",
    ),
]
Ceiling = Annotated[
    bool, typer.Option("--ceiling", help="Also score one half of the truth against the other; vcc2026 always does.")
]
Seed = Annotated[int, typer.Option("--ceiling-seed", help="Random seed for splitting the truth into halves.")]
Discrete = Annotated[
    bool,
    typer.Option(
        "--allow-discrete", help="Score counts as they are, without normalising to the median library size and log1p."
    ),
]
Cp10k = Annotated[bool, typer.Option("--to-cp10k", help="Convert both files to log1p of counts per 10,000.")]
Skip = Annotated[str, typer.Option("--skip-metrics", metavar="A,B", help="Metrics to skip.")]
Continuity = Annotated[
    bool, typer.Option("--continuity/--no-continuity", help="vcc2026: apply the continuity correction.")
]
Anchors = Annotated[
    bool,
    typer.Option(
        "--anchors/--no-anchors", help="vcc2026: compute the baseline and the replicate by which scores are scaled."
    ),
]
GeneMap = Annotated[
    Path | None,
    typer.Option(
        "--target-gene-map",
        metavar="CSV",
        help="vcc2026: CSV that maps perturbations to genes where their names differ.",
    ),
]
ContextCol = Annotated[
    str | None,
    typer.Option(
        "--context-col", metavar="C",
        help="obs column of cell lines or other contexts, which are scored separately and averaged [default: context "
        "with vcc2026, otherwise none].",
    ),
]  # fmt: skip


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
    skip: Skip = "",
    continuity: Continuity = True,
    context_col: ContextCol = None,
    anchors: Anchors = True,
    target_gene_map: GeneMap = None,
    layer: Layer = None,
    library_size: LibraryCol = None,
    threads: Threads = None,
    dask: Dask = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score a prediction against the true cells, where 0 is the mean baseline and 1 the best possible.

    By default, both files use the controls of the truth, ties count half, and undefined values are excluded and
    counted; --compat reproduces the numbers of an official implementation exactly. --profile calibrated also shows
    which metrics distinguish good predictions from bad ones on this data.

    Example: vcelltools score pred.h5ad --truth real.h5ad --profile vcc --out scored
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_score import get_defaults, run
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    given = {"truth": truth, "profile": profile, "compat": compat, "pert_col": pert_col, "control": control,
             "out": out, "report": report}  # fmt: skip
    common = {**get_defaults(given, pred, truth_pack), "force": force, "layer": layer, "threads": threads, "dask": dask}
    refuse_same(("--out", common["out"]), ("--report", common["report"]))
    start(pred, common["truth"])
    is_2026 = common["compat"] == "vcc2026"
    # the 2026 rules do what --ceiling and --allow-discrete ask for in any case
    of_others = {"--baseline": baseline, "--epsilon": epsilon, "--cpm-filter": cpm_filter is not None,
                 "--ceiling-seed": ceiling_seed, "--to-cp10k": to_cp10k, "--skip-metrics": skip,
                 "--library-col": library_size, "--dask": dask}  # fmt: skip
    of_2026 = {"--no-continuity": not continuity, "--no-anchors": not anchors, "--target-gene-map": target_gene_map}
    refuse(of_others if is_2026 else of_2026, f"--compat {common['compat']}")
    if is_2026:
        from vcelltools.scoring.vcc2026.score import read_gene_map

        common |= {"continuity": continuity, "anchors": anchors, "target_gene_map": read_gene_map(target_gene_map)}
    else:
        common |= {
            "baseline": baseline, "epsilon": epsilon, "cpm_filter": cpm_filter, "ceiling": ceiling,
            "ceiling_seed": ceiling_seed, "allow_discrete": allow_discrete, "to_cp10k": to_cp10k,
            "library_size": library_size,
            "skip": tuple(m.strip() for m in skip.split(",") if m.strip()),
        }  # fmt: skip
    if context_col is not None:
        common["context_col"] = context_col
    run(o, pred, truth_pack=truth_pack, need_score=is_2026 and anchors, reads=[baseline, target_gene_map], **common)
