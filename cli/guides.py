"""``vcelltools guides``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, InFile, Json, Quiet, Threads, Verbose, refuse


def guides(
    file: InFile,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table of the cells to write: .parquet, .feather or .csv.")
    ] = Path("guides.parquet"),
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="NEW.h5ad", help="Also write the transcriptome with the guides in obs."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="With --write: keep only cells whose guides have exactly one target.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="PAGE.html", help="Calibration page [default: beside --out]."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Assignment: mixture, negative-binomial or threshold.")
    ] = "mixture",
    threshold: Annotated[
        int | None,
        typer.Option("--threshold", min=1, metavar="N", help="threshold: smallest count that assigns a guide."),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option("--targets", metavar="MAP.csv", help="Table of guides and targets [default: var or names]."),
    ] = None,
    target_col: Annotated[
        str | None, typer.Option("--target-col", metavar="C", help="var column with the guides' targets.")
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option("--modality", metavar="M", help="Modality or feature type of the guides [default: by name]."),
    ] = None,
    feature_type: Annotated[
        str | None,
        typer.Option("--feature-type", metavar="T", help="Type of the features that are guides [default: by name]."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="L", help="Layer with the guides' counts [default: X].")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="L", help="Layer with assignments to compare the result with."),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Assign guides to cells, and cells to the targets of their guides.

    The command fits a mixture of background and signal to the counts of each guide and derives a threshold from it.
    The calibration page shows all fits. obs of the new file has target_gene, guides, n_guides, n_targets, single_target
    (exactly one target) and guide_status. The input is not changed.

    Example: vcelltools guides screen.h5mu --write labelled.h5ad
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    refuse({"--single": single and write is None}, "no file to write", hint="add --write NEW.h5ad")
    start(file)
    from vcelltools.io.write.atomic import put_beside
    from vcelltools.io.write.guard import Target, get_kind, guard_outputs
    from vcelltools.screens import guides as run
    from vcelltools.screens.assignment import compare_assignments

    page = put_beside(out, ".html") if page is None else page
    outputs = [Target(out, get_kind(out)), Target(page, "html")]
    outputs += [Target(write, "hdf5")] if write is not None else []
    guard_outputs(outputs, reads=[file, targets], force=force)
    result = run(
        file, method=method, threshold=threshold, targets=targets, target_col=target_col, modality=modality,
        layer=layer, feature_type=feature_type, threads=threads, progress=o.progress,
    )  # fmt: skip
    result.write(out, force=force)
    result.write_page(page, force=force)
    o.note(*result.notes)
    s = result.to_json()
    body = {**s, "out": str(out), "page": str(page), "written": None if write is None else str(write)}
    o.table(
        ["cells", "number", "share"],
        [
            [name, s[key], f"{s[key] / s['n_cells']:.1%}"]
            for name, key in (
                ("unassigned", "unassigned"), ("one guide", "one_guide"), ("several guides", "several_guides"),
                ("one target", "one_target"), ("of these non-targeting", "non_targeting"),
            )
        ],
        title=f"{s['n_guides']:,} guides against {s['n_targets']:,} targets (from {s['targets_from']})",
    )  # fmt: skip
    if compare is not None:
        a = compare_assignments(result, file, compare, threads=threads)
        body["agreement"] = a.to_json()
        o.table(
            ["cells and assignments", "number", "of"],
            [
                ["cells with the same guides", a.same, a.n_cells],
                ["cells with one guide in both, the same", a.same_single, a.both_single],
                ["assignments found", a.found, a.pairs],
                ["assignments here alone", a.extra, a.found + a.extra],
            ],
            title=f"\nagreement with layer {compare}",
        )
    warnings = list(result.warnings)
    if write is not None:
        warnings += result.write_labelled(
            file, write, single=single, force=force, threads=threads, progress=o.progress
        ).warnings
    o.result(body)
    o.warn(warnings)
    said = f"wrote {out}, {page}" + (f" and {write}" if write is not None else "")
    o.done(said, _find_next(result.targets, write, single))


def _find_next(targets: Collection[str], write: Path | None, single: bool) -> tuple[object, ...]:
    """Return the words that go on from the new file."""
    from vcelltools.cli.hints import find_free
    from vcelltools.screens import NON_TARGETING

    if write is None:
        return ()
    if not single or NON_TARGETING not in targets:
        return ("inspect", write)
    return ("responders", write, "--write", find_free(f"responded_{write.name}"))
