"""``vcelltools hvg``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Modality, Quiet, Threads, Verbose, refuse, refuse_same

SPAN, MIN_SHARE, THETA = 0.3, 0.01, 100.0

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="h5ad, h5mu, 10x h5, 10x mtx folder, zarr store.",
    ),
]
Top = Annotated[int, typer.Option("--top", min=1, help="How many genes to select.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Gene list, best first; hvg_scores.json goes beside it.")]
BatchKey = Annotated[
    str | None, typer.Option("--batch-key", metavar="C", help="obs column: rank within each batch, then combine.")
]
Flavor = Annotated[
    str,
    typer.Option(
        "--flavor",
        help="seurat_v3, seurat_v3_paper, seurat, cell_ranger, dispersion, pearson_residuals or vcell_lowess.",
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option("--stats", metavar="DIR", help="Keep the exact statistics and library sizes here, or reuse them."),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="P.png", help="Plot variance against mean.")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would be read, how long and in what memory; then stop.")]
Span = Annotated[float, typer.Option("--span", min=0.01, max=1.0, help="Loess span (seurat_v3, seurat_v3_paper).")]
Dask = Annotated[
    str | None, typer.Option("--dask", metavar="ADDR", help="Count on a Dask cluster: its address, or local.")
]
MinShare = Annotated[
    float, typer.Option("--min-share", min=0.0, max=1.0, help="dispersion: least share of expressing cells.")
]
Theta = Annotated[float, typer.Option("--theta", min=1e-6, help="pearson_residuals: inverse dispersion.")]


def hvg(
    files: Files,
    top: Top = 2000,
    out: Out = Path("hvgs.txt"),
    modality: Modality = None,
    layer: Layer = None,
    batch_key: BatchKey = None,
    flavor: Flavor = "seurat_v3",
    stats: Stats = None,
    plot: Plot = None,
    plan: Plan = False,
    span: Span = SPAN,
    min_share: MinShare = MIN_SHARE,
    theta: Theta = THETA,
    dask: Dask = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Select highly variable genes in one pass over the file, exactly, in bounded memory.

    The genes, means, variances and normalised variances equal scanpy's (1.11.5); exact ties break by gene name.
    Several FILEs are merged on the genes that they share, each file a batch of its own. A FILE may also be a
    folder that --stats wrote.

    Example: vcelltools hvg KOLF.h5mu --modality rna --top 2000 --out hvgs_2k.txt
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render import show_hvg, show_hvg_plan
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    start(*files)
    many = [str(f) for f in files]
    if plan:
        from vcelltools.pipelines.hvg_plan import plan_hvg

        return show_hvg_plan(
            o, plan_hvg(many, flavor=flavor, batch_key=batch_key, modality=modality, layer=layer, threads=threads)
        )
    from vcelltools.errors import UsageError
    from vcelltools.io.atomic import check_kind, check_output
    from vcelltools.pipelines.hvg import compute_hvg

    refuse(
        {"--span": span != SPAN and not flavor.startswith("seurat_v3"),
         "--min-share": min_share != MIN_SHARE and flavor != "dispersion",
         "--theta": theta != THETA and flavor != "pearson_residuals"},
        f"--flavor {flavor}",
    )  # fmt: skip
    if stats is not None:
        check_kind(stats, folder=True)
    refuse_same(("--out", out), ("--plot", plot))
    for target in (out, plot):
        if target is not None:
            check_output(target, force=force, sources=many)
    if plot is not None and plot.suffix != ".png":
        raise UsageError(f"{plot}: the name does not end in .png", hint="name it so")
    result = compute_hvg(
        many, top=top, flavor=flavor, batch_key=batch_key, modality=modality, layer=layer, span=span,
        min_share=min_share, theta=theta, stats_dpath=stats, threads=threads, dask=dask,
        progress=o.progress,
    )  # fmt: skip
    result.write(out, force=force)
    if plot is not None:
        from vcelltools.pipelines.hvg_plot import plot_hvg

        plot_hvg(result, plot, force=force)
    return show_hvg(o, result, out, plot)
