"""``vcelltools prep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Layer, Quiet, Threads, Verbose

Pred = Annotated[
    Path, typer.Argument(metavar="PRED", show_default=False, help="Prediction to pack: h5ad, h5mu or zarr.")
]
Genes = Annotated[Path, typer.Option("--genes", "-g", help="CSV of the challenge's genes, in order, one per line.")]
Out = Annotated[Path, typer.Option("--out", "-o", help=".vcc file to write.")]
Year = Annotated[
    int | None,
    typer.Option("--rules", metavar="YEAR", help="Challenge rules: 2025 or 2026 [default: 2026 if obs has contexts]."),
]
Perturbations = Annotated[
    Path | None, typer.Option("--perturbations", "--perts", metavar="CSV", help="2026: the file pert_counts.csv.")
]
Contexts = Annotated[
    str | None,
    typer.Option(
        "--contexts", metavar="A,B,C", help="2026: contexts to pack [default: those of manifest.json, or A,B,C]."
    ),
]
CellsPer = Annotated[
    int | None, typer.Option("--cells-per-perturbation", min=1, help="2026: cells per perturbation [default: 400].")
]
PertCol = Annotated[str, typer.Option("--pert-col", metavar="C", help="obs column of the perturbation.")]
Control = Annotated[str, typer.Option("--control", metavar="LABEL", help="Label of the controls.")]
ContextCol = Annotated[str, typer.Option("--context-col", metavar="C", help="2026: obs column of the context.")]
CelltypeCol = Annotated[
    str | None, typer.Option("--celltype-col", metavar="C", help="obs column to write as celltype.")
]
Encoding = Annotated[int, typer.Option("--encoding", metavar="BITS", help="Bits per value: 32 or 64.")]
Discrete = Annotated[bool, typer.Option("--allow-discrete", help="2025: keep counts as they are.")]
Day = Annotated[str | None, typer.Option("--date", metavar="YYYY-MM-DD", help="2025: date on which the rules applied.")]
MaxCells = Annotated[
    int | None, typer.Option("--max-cells", min=1, help="Maximum number of cells, instead of the limit in the rules.")
]


def prep(
    pred: Pred,
    genes: Genes,
    out: Out,
    year: Year = None,
    perturbations: Perturbations = None,
    contexts: Contexts = None,
    cells_per_perturbation: CellsPer = None,
    pert_col: PertCol = "target_gene",
    control: Control = "non-targeting",
    context_col: ContextCol = "context",
    celltype_col: CelltypeCol = None,
    layer: Layer = None,
    encoding: Encoding = 32,
    allow_discrete: Discrete = False,
    day: Day = None,
    max_cells: MaxCells = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a prediction against the rules of the challenge and pack it into a .vcc.

    All violations are listed at once, with the perturbations, cells and genes concerned.

    Example: vcelltools prep pred.h5ad --genes gene_names.csv --out submission.vcc

    vcelltools prep pred.h5ad --genes gene_names.csv --perts pert_counts.csv --contexts D,E,F --out final.vcc
    """
    from vcelltools.challenge import vcc
    from vcelltools.cli.output import Output

    output = Output(json=json, quiet=quiet, verbose=verbose)
    result = vcc.prep(
        pred, out, genes=genes, year=year, perturbations=perturbations, contexts=vcc.parse_contexts(contexts),
        cells_per_perturbation=cells_per_perturbation, pert_col=pert_col, control=control, context_col=context_col,
        celltype_col=celltype_col, layer=layer, encoding=encoding, allow_discrete=allow_discrete,
        day=vcc.parse_day(day), max_cells=max_cells, force=force, threads=threads, progress=output.progress,
    )  # fmt: skip
    output.warn(result.warnings)
    output.result(result.to_json())
    output.done(
        f"wrote {out}: {result.n_cells:,} cells × {result.n_genes:,} genes, {result.n_bytes / 1e6:,.1f} MB, "
        f"{result.rules} rules",
        ("lint", out),
    )
