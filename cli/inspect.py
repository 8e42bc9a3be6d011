"""``vcelltools inspect``."""

from __future__ import annotations

from vcelltools.cli.options import InFile, Json, Layer, Modality, Quiet, Verbose


def inspect(
    file: InFile,
    modality: Modality = None,
    layer: Layer = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Describe a file without reading it whole: matrices, counts, columns with a role, genes, problems.

    -v lists every column.

    Example: vcelltools inspect KOLF.h5mu
    """
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_inspect import show_inspect
    from vcelltools.pipelines.inspect import inspect as run

    show_inspect(Output(json=json, quiet=quiet, verbose=verbose), run(file, modality=modality, layer=layer))
