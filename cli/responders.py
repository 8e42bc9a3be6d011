"""``vcelltools responders``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    FeatureType,
    Force,
    Genome,
    InFile,
    Json,
    Layer,
    LibraryCol,
    Modality,
    Quiet,
    Threads,
    Verbose,
)


def responders(
    file: InFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table of the cells to write: .parquet, .feather or .csv.")
    ] = Path("responders.parquet"),
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="NEW.h5ad", help="Also write the file with the response of every cell in obs."),
    ] = None,
    pert_col: Annotated[
        str, typer.Option("--pert-col", metavar="C", help="obs column of the perturbation.")
    ] = "target_gene",
    control: Annotated[
        str, typer.Option("--control", metavar="LABEL", help="Label of the controls.")
    ] = "non-targeting",
    max_genes: Annotated[int, typer.Option("--max-genes", min=5, help="Number of most variable genes to use.")] = 2000,
    max_controls: Annotated[int, typer.Option("--max-controls", min=10, help="Maximum number of controls.")] = 3000,
    max_tested: Annotated[
        int, typer.Option("--max-tested", min=2, help="Maximum number of cells per group in an energy distance.")
    ] = 400,
    permutations: Annotated[int, typer.Option("--permutations", min=0, help="Permutations for each p-value.")] = 999,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    library_size: LibraryCol = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the response to every perturbation, and separate its responding cells from those that escaped.

    For each perturbation the command computes the knock-down of its target, the energy distance to the controls with a
    permutation p-value, and a mixture of escaping and responding cells along the direction of its effect. obs of the
    new file has response, response_posterior, response_score and control_or_responding. Pass the last one to de or
    build-store with --keep.

    Example: vcelltools responders labelled.h5ad --write responded.h5ad
    """
    from vcelltools.cli.hints import find_free
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    start(file)
    from vcelltools.io.write.guard import Target, get_kind, guard_outputs
    from vcelltools.screens.responding import responders as run

    outputs = [Target(out, get_kind(out)), *([Target(write, "hdf5")] if write is not None else [])]
    guard_outputs(outputs, reads=[file], force=force)
    result = run(
        file, pert_col=pert_col, control=control, max_genes=max_genes, max_controls=max_controls,
        max_tested=max_tested, permutations=permutations, seed=seed, modality=modality, layer=layer,
        feature_type=feature_type, genome=genome, library_size=library_size, threads=threads,
        progress=o.progress,
    )  # fmt: skip
    result.write(out, force=force)
    o.note(*result.notes)
    o.table(
        ["perturbation", "cells", "knock-down", "genes", "E-distance", "p", "responding"],
        [
            [r.perturbation, r.n_cells, r.knockdown_log2fc, r.n_genes, r.e_distance, r.p_value,
             f"{r.responding_share:.0%}"]
            for r in sorted(result.perturbations, key=lambda r: -r.e_distance)
        ],
    )  # fmt: skip
    body = {**result.to_json(), "out": str(out), "written": None if write is None else str(write)}
    warnings = []
    if write is not None:
        warnings += result.write_labelled(
            file,
            write,
            modality=modality,
            layer=layer,
            feature_type=feature_type,
            genome=genome,
            force=force,
            threads=threads,
            progress=o.progress,
        ).warnings
    o.result(body)
    o.warn(warnings)
    then = () if write is None else ("normalize", write, "--out", find_free(f"normalized_{write.name}"))
    o.done(f"wrote {out}" + (f" and {write}" if write is not None else ""), then)
