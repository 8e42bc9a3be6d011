"""``vcelltools simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Threads, Verbose
from vcelltools.cli.output import Output


def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="sim.h5ad or sim.h5mu.", show_default=False)],
    cells: Annotated[int, typer.Option(min=1, help="Cells in all.")] = 10_000,
    genes: Annotated[int, typer.Option(min=1, help="Genes in all.")] = 36_000,
    perturbations: Annotated[int, typer.Option(min=0, help="Besides the control.")] = 100,
    cell_lines: Annotated[int, typer.Option(min=1, help="Cell lines that share the cells.")] = 1,
    batches: Annotated[int, typer.Option(min=1, help="Batches of each cell line.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of this atlas's cells.")] = 0,
    like: Annotated[str, typer.Option(help="generic, or kolf: KOLF's column names and control.")] = "generic",
    layout: Annotated[str, typer.Option(help="csr, csc or dense.")] = "csr",
    dtype: Annotated[str, typer.Option(help="Of the values: uint8 … int64, float32, float64.")] = "float32",
    index_dtype: Annotated[str, typer.Option(help="int32 or int64.")] = "int32",
    compression: Annotated[str, typer.Option(help="none, gzip, lzf or zstd.")] = "none",
    level: Annotated[int | None, typer.Option(help="Of gzip (1 to 12; 4) or zstd (1 to 22; 3).")] = None,
    chunk_len: Annotated[
        int | None, typer.Option(min=1, help="Values a chunk, of a dense matrix in whole rows [default: 262144].")
    ] = None,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="No chunks: dense alone, not compressed.")] = False,
    modality: Annotated[str | None, typer.Option(help="Of an h5mu [default: rna].")] = None,
    guides: Annotated[
        bool, typer.Option("--guides", help="h5mu: a modality guide with the guides' counts too.")
    ] = False,
    depth: Annotated[
        float | None, typer.Option(help="Median molecules a cell [default: 6819, less for panels under 12,000 genes].")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Or: the share of non-zeros.")] = None,
    multiplets: Annotated[
        float | None, typer.Option(help="Share of cells with two guides, A|B [default: 0; like kolf 0.1].")
    ] = None,
    unassigned: Annotated[
        float | None, typer.Option(help="Share of cells without a guide [default: 0; like kolf 0.02].")
    ] = None,
    control_share: Annotated[float, typer.Option(help="Share of control cells.")] = 0.12,
    inert: Annotated[float, typer.Option(help="Share of perturbations that lower their target only.")] = 0.2,
    escape: Annotated[float, typer.Option(help="Share of perturbed cells that do not respond.")] = 0.0,
    shared: Annotated[float, typer.Option(help="Share of an effect that all cell lines have.")] = 0.7,
    effect_seed: Annotated[
        int | None,
        typer.Option(min=0, help="Atlases with the same one share genes, lines and effects [default: --seed]."),
    ] = None,
    perturbation_universe: Annotated[
        int | None, typer.Option(help="How many there are to draw --perturbations from [default: as many].")
    ] = None,
    first_cell_line: Annotated[int, typer.Option(min=1, help="Number of the first cell line.")] = 1,
    genes_drop: Annotated[float, typer.Option(help="Share of the genes that this atlas lacks.")] = 0.0,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Simulate a realistic Perturb-seq atlas with known effects.

    Counts are negative binomial with gene means, dispersions and depths like real 10x data. Perturbations lower
    their target, act on some genes directly and on others through programmes that perturbations share. The same
    seed gives the same file, whatever the threads.

    Beside sim.h5ad lie sim.truth.h5ad (log2 fold changes by perturbation and cell line, means),
    sim.truth_cells.parquet (who every cell is) and sim.features.parquet (gene embeddings that foretell effects).

    Example: vcelltools simulate --out sim.h5mu --cells 20000 --perturbations 200 --like kolf

    Two labs, one biology: --effect-seed 1 in both, another --seed, --genes-drop 0.1, --first-cell-line 3.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("json", "quiet", "verbose")}
    from vcelltools.cli.start import start

    start()
    from vcelltools.pipelines.simulate import simulate as run

    output = Output(json=json, quiet=quiet, verbose=verbose)
    r = run(**arguments, progress=output.progress)
    output.result(r.to_json(), f"{r.n_cells:,} cells × {r.n_genes:,} genes, {r.nnz:,} non-zeros ({r.density:.2%})")
    output.done(f"wrote {r.out} and its truth {r.truth.name}; next: vcelltools inspect {r.out}")
