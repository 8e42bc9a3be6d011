"""``vcelltools de``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import (
    Dask,
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
    refuse,
)
from vcelltools.cli.output import Output


def de(
    file: InFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Table to write: .parquet or .csv.")] = Path("de.parquet"),
    test: Annotated[
        str | None,
        typer.Option(
            "--test",
            help="Test: wilcoxon, nb, welch, or energy for whole perturbations [default: nb with --replicate-col, else "
            "welch with --covariates, else wilcoxon].",
        ),
    ] = None,
    pert_col: Annotated[
        str, typer.Option("--pert-col", metavar="C", help="obs column of the perturbation.")
    ] = "target_gene",
    control: Annotated[
        str, typer.Option("--control", metavar="LABEL", help="Label of the controls.")
    ] = "non-targeting",
    reference: Annotated[
        str,
        typer.Option("--reference", help="Compare with the controls (control) or all other perturbed cells (rest)."),
    ] = "control",
    context_col: Annotated[
        str | None,
        typer.Option(
            "--context-col",
            "--group-by",
            metavar="C",
            help="obs column of cell lines or other contexts, each of which is compared with its own controls.",
        ),
    ] = None,
    stratify: Annotated[
        str | None,
        typer.Option(
            "--stratify", metavar="C", help="wilcoxon: compare within the groups of an obs column, such as batches."
        ),
    ] = None,
    covariates: Annotated[
        str,
        typer.Option(
            "--covariates", metavar="A,B", help="obs columns of labels, such as donor and lane, to correct for."
        ),
    ] = "",
    replicate_col: Annotated[
        str | None,
        typer.Option(
            "--replicate-col", metavar="C", help="nb: obs column of the replicates, which are the unit of the test."
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="C", help="Boolean obs column that selects the cells to use.")
    ] = None,
    epsilon: Annotated[
        float, typer.Option(min=0, help="Pseudocount added to both means of a fold change, in counts per 10,000.")
    ] = 1e-9,
    min_cpm: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="T", help="Exclude genes with at most this CPM in both groups before the p-value adjustment."
        ),
    ] = None,
    continuity: Annotated[
        bool, typer.Option("--continuity/--no-continuity", help="wilcoxon: apply the continuity correction.")
    ] = True,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="wilcoxon: compute exact p-values for samples of at most 8 cells without ties."),
    ] = False,
    permutations: Annotated[
        int | None, typer.Option("--permutations", min=0, help="energy: permutations for each p-value [default: 999].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="energy: random seed [default: 0].")] = None,
    modality: Modality = None,
    layer: Layer = None,
    feature_type: FeatureType = None,
    genome: Genome = None,
    library_size: LibraryCol = None,
    threads: Threads = None,
    dask: Dask = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Test every perturbation against the controls, for all genes, in one pass.

    wilcoxon is the Mann-Whitney U test on log1p CP10K values. nb is a negative-binomial test on counts, fitted by the
    method of moments. welch tests means of log1p CP10K values, with covariates fitted on the controls alone. Cells are
    not replicates: --replicate-col makes replicates the unit of the test. energy tests each perturbation as a whole, by
    the energy distance of its cells to the controls and permutations; its table has one row per perturbation.

    Example: vcelltools de atlas.h5ad --pert-col perturbation --control non-targeting --out de.parquet
    """
    from vcelltools.cli.start import start

    start(file)
    from vcelltools.differential.de import check_name
    from vcelltools.differential.de import de as compute
    from vcelltools.io.frame import load_ahead
    from vcelltools.io.write.guard import Target, get_kind, guard_outputs

    o = Output(json=json, quiet=quiet, verbose=verbose)
    guard_outputs([Target(out, get_kind(out))], reads=[file], force=force)
    check_name(out)
    load_ahead(f"pyarrow.{out.suffix[1:]}")
    columns = [c.strip() for c in covariates.split(",") if c.strip()]
    if test is None:
        test = "nb" if replicate_col is not None else "welch" if columns else "wilcoxon"
    if test != "wilcoxon":
        refuse({"--exact": exact, "--no-continuity": not continuity}, f"--test {test}")
    if test != "energy":
        refuse({"--permutations": permutations is not None, "--seed": seed is not None}, f"--test {test}")
    else:
        refuse(
            {"--reference": reference != "control", "--stratify": stratify, "--covariates": columns,
             "--replicate-col": replicate_col, "--epsilon": epsilon != 1e-9, "--min-cpm": min_cpm is not None,
             "--dask": dask},
            "--test energy",
        )  # fmt: skip
        from vcelltools.differential.energy import energy

        chosen = {k: v for k, v in (("permutations", permutations), ("seed", seed)) if v is not None}
        distances = energy(
            file, pert_col=pert_col, control=control, context_col=context_col, keep=keep, modality=modality,
            layer=layer, feature_type=feature_type, genome=genome, library_size=library_size, threads=threads,
            progress=o.progress, **chosen,
        )  # fmt: skip
        distances.write(out, force=force)
        o.note(*distances.notes)
        rows = distances.get_rows()
        head = ["perturbation", "cells", "controls", "E-distance", "p", "adjusted p"]
        o.table(head if context_col is None else ["context", *head], rows)
        o.result({**distances.to_json(), "out": str(out)})
        o.done(f"wrote {out}: {len(rows):,} perturbations")
        return
    result = compute(
        file, test=test, pert_col=pert_col, control=control, reference=reference, context_col=context_col,
        stratify=stratify, covariates=columns, replicate_col=replicate_col, keep=keep, epsilon=epsilon,
        min_cpm=min_cpm, continuity=continuity, exact=exact, modality=modality, layer=layer,
        feature_type=feature_type, genome=genome, library_size=library_size, threads=threads,
        dask=dask, progress=o.progress,
    )  # fmt: skip
    result.write(out, force=force)
    for n in result.notes:
        o.note(n)
    found = result.count_significant()
    head = ["perturbation", "genes with FDR < 0.05"]
    o.table(head if context_col is None else ["context", *head], found)
    o.result({**result.to_json(), "out": str(out)})
    o.done(
        f"wrote {out}: {len(found):,} perturbations × {len(result.genes):,} genes "
        f"against {'the other perturbed cells' if reference == 'rest' else f'{result.n_controls:,} controls'}"
    )
