"""``vcelltools hvg``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    Dask,
    FeatureType,
    Force,
    Genome,
    Json,
    Layer,
    LibraryCol,
    Modality,
    Quiet,
    Threads,
    Verbose,
    refuse,
    refuse_same,
)

SPAN, MIN_SHARE, THETA = 0.3, 0.001, 100.0

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="h5ad, h5mu, 10x h5, 10x mtx folder, zarr store or batch file.",
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, help="Number of genes to select.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Gene list to write, best first; hvg_scores.json is written beside it.")
]
BatchKey = Annotated[
    str | None,
    typer.Option(
        "--batch-key", metavar="C", help="obs column of the batch; genes are ranked within each batch, then combined."
    ),
]
Flavor = Annotated[
    str,
    typer.Option(
        "--flavor",
        help="Ranking method: seurat_v3, seurat_v3_paper, seurat, cell_ranger, dispersion, pearson_residuals or "
        "vcell_lowess.",
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        metavar="DIR",
        help="Folder to save the exact statistics and library sizes to, or to reuse them from.",
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="P.png", help="Write a plot of variance against mean.")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Show what would be read and the expected time and memory, without reading it.")
]
Span = Annotated[
    float, typer.Option("--span", min=0.01, max=1.0, help="seurat_v3, seurat_v3_paper: span of the loess fit.")
]
MinShare = Annotated[
    float,
    typer.Option("--min-share", min=0.0, max=1.0, help="dispersion: minimum fraction of cells that express a gene."),
]
Pooled = Annotated[
    bool,
    typer.Option(
        "--pooled",
        help="Rank by dispersion over all files as one population, on the union of their genes, without batches.",
    ),
]
Values = Annotated[
    str, typer.Option("--values", metavar="V", help="pooled: values to rank on: counts, log1p, cp10k or log1p-cp10k.")
]
BatchEffect = Annotated[
    str | None,
    typer.Option(
        "--batch-effect", metavar="C",
        help="pooled: obs column of the batch, whose share of the variance is measured [default: each file is a "
        "batch].",
    ),
]  # fmt: skip
HvgInfo = Annotated[
    Path | None,
    typer.Option(
        "--hvg-info", metavar="P", help="pooled: hvg_info.json to write for the public loader, with a figure beside it."
    ),
]
Theta = Annotated[float, typer.Option("--theta", min=1e-6, help="pearson_residuals: inverse dispersion.")]


NonInteger = Annotated[
    str,
    typer.Option(
        "--non-integer",
        metavar="WHAT",
        help="Fractional counts: refuse, round (stochastically, by --seed) or keep (moments of floats).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed of --non-integer round.")]


def hvg(
    files: Files,
    top: Top = 2000,
    out: Out = Path("hvgs.txt"),
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    library_size: LibraryCol = None,
    batch_key: BatchKey = None,
    flavor: Flavor = "seurat_v3",
    stats: Stats = None,
    plot: Plot = None,
    plan: Plan = False,
    span: Span = SPAN,
    min_share: MinShare = MIN_SHARE,
    theta: Theta = THETA,
    dask: Dask = None,
    pooled: Pooled = False,
    values: Values = "counts",
    batch_effect: BatchEffect = None,
    hvg_info: HvgInfo = None,
    non_integer: NonInteger = "refuse",
    seed: Seed = 0,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Select highly variable genes, exactly, in one pass over the file and in bounded memory.

    The genes, means, variances and normalised variances equal scanpy's (1.11.5); exact ties are broken by gene name.
    Several FILEs are merged on the genes that they share, and each file is a batch. A FILE may also be a
    folder that --stats wrote. With --pooled, the files are one population over the union of their genes, and the
    share of the variance between batches is measured.

    Example: vcelltools hvg KOLF.h5mu --modality rna --top 2000 --out hvgs_2k.txt
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render import show_hvg, show_hvg_plan
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    start(*files)
    many = [str(f) for f in files]
    only = {"--values": values != "counts", "--batch-effect": batch_effect, "--hvg-info": hvg_info}
    if not pooled:
        refuse(only, "--pooled", without=True, hint="add --pooled")
    else:
        others = {"--batch-key": batch_key, "--stats": stats, "--dask": dask, "--plan": plan, "--span": span != SPAN,
                  "--theta": theta != THETA, "--flavor": flavor not in ("seurat_v3", "dispersion"),
                  "--non-integer": non_integer != "refuse", "--library-col": library_size}  # fmt: skip
        refuse(others, "--pooled")
        flavor = "dispersion"
    if plan:
        from vcelltools.selection.estimate import plan_hvg

        found_plan = plan_hvg(
            many, flavor=flavor, batch_key=batch_key, modality=modality, layer=layer, feature_type=feature_type,
            genome=genome, threads=threads,
        )  # fmt: skip
        return show_hvg_plan(o, found_plan)
    from vcelltools.errors import UsageError
    from vcelltools.selection.hvg import HvgResult, compute_hvg, writing

    refuse(
        {"--span": span != SPAN and not flavor.startswith("seurat_v3"),
         "--min-share": min_share != MIN_SHARE and flavor != "dispersion",
         "--theta": theta != THETA and flavor != "pearson_residuals"},
        f"--flavor {flavor}",
    )  # fmt: skip
    refuse_same(("--out", out), ("--plot", plot))
    with writing(many, out, plot=plot, stats_dpath=stats, hvg_info=hvg_info, force=force):
        if plot is not None and plot.suffix != ".png":
            raise UsageError(f"{plot}: the name does not end in .png", hint="end the name in .png")
        if pooled:
            from vcelltools.selection.hvg_info import write_info
            from vcelltools.selection.pooled import compute_pooled

            found = compute_pooled(
                many, top=top, values=values, min_share=min_share, batch_effect=batch_effect,
                compare=hvg_info is not None, modality=modality, layer=layer,
                feature_type=feature_type, genome=genome, threads=threads, progress=o.progress,
            )  # fmt: skip
            if hvg_info is not None:
                write_info(found, hvg_info, many, force=force)
            result: HvgResult = found
        else:
            result = compute_hvg(
                many, top=top, flavor=flavor, batch_key=batch_key, modality=modality, layer=layer,
                feature_type=feature_type, genome=genome, library_size=library_size, span=span,
                min_share=min_share, theta=theta, stats_dpath=stats, threads=threads, dask=dask,
                non_integer=non_integer, seed=seed, progress=o.progress,
            )  # fmt: skip
        result.write(out, force=force)
        if plot is not None:
            from vcelltools.selection.plot import plot_hvg

            plot_hvg(result, plot, force=force)
    return show_hvg(o, result, out, plot)
