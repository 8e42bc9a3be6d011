"""``vcelltools atlas``: list, fetch and merge public atlases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vcelltools.cli.help import Command
from vcelltools.cli.options import Force, Json, Quiet, Threads, Verbose, refuse

if TYPE_CHECKING:
    from vcelltools.atlas import Access

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

SourceName = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", show_default=False,
        help="scbasecount, tahoe-100m, vcc-2025 or cellxgene; or the URL or folder of such a layout, a folder of h5ad "
        "files, or an index file (.parquet, .csv, .tsv, .json).",
    ),
]  # fmt: skip
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="E",
        help="Condition on a column, such as 'tissue=lung|blood', 'disease~covid' or 'obs_count>=1000'; all "
        "conditions must hold. "
        "Operators: = != ~ > >= < <=. An empty value matches a missing one.",
    ),
]  # fmt: skip
Values = Annotated[
    str | None,
    typer.Option("--values", metavar="COL", help="Count the experiments and cells of each value of this column."),
]
Release = Annotated[str | None, typer.Option("--release", metavar="R", help="Release of the preset.")]
Feature = Annotated[
    str | None,
    typer.Option("--feature", metavar="F", help="Counting method of scBaseCount [default: GeneFull_Ex50pAS]."),
]
Organism = Annotated[
    str | None, typer.Option("--organism", metavar="O", help="Organism in scBaseCount [default: Homo_sapiens].")
]
IdCol = Annotated[
    str | None, typer.Option("--id-col", metavar="C", help="Column of the index file that holds the experiment ids.")
]
PathCol = Annotated[
    str | None, typer.Option("--path-col", metavar="C", help="Column of the index file that holds the file paths.")
]
CountCol = Annotated[
    str | None, typer.Option("--count-col", metavar="C", help="Column of the index file that holds the cell counts.")
]
Billing = Annotated[
    str | None,
    typer.Option(
        "--billing-project", metavar="P",
        help="Google Cloud project to bill for reading a requester-pays bucket [default: none].",
    ),
]  # fmt: skip
Pays = Annotated[
    bool, typer.Option("--requester-pays", help="Bill your AWS account for reading a requester-pays bucket on S3.")
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the atlas.", show_default=False)]
Cells = Annotated[
    int | None, typer.Option("--cells", min=1, metavar="N", help="Take whole experiments until they hold N cells.")
]
Experiments = Annotated[
    int | None, typer.Option("--experiments", min=1, metavar="N", help="Number of experiments to take.")
]
Ids = Annotated[
    str | None,
    typer.Option("--ids", metavar="A,B|FILE", help="Experiment ids to take, or a file with one id per line."),
]
All = Annotated[bool, typer.Option("--all", help="Take every experiment that meets the conditions.")]
Cap = Annotated[
    list[str] | None,
    typer.Option("--cap", metavar="COL=K", help="Take at most K experiments for each value of a column."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Random seed of the order in which experiments are taken.")]
Plan = Annotated[
    bool,
    typer.Option("--plan", help="Show what would be downloaded, its size and its cost, without downloading anything."),
]
TopUp = Annotated[
    bool, typer.Option("--top-up", help="Replace experiments that fail with others until the target is met.")
]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Number of files to transfer at the same time.")]
Chunk = Annotated[str, typer.Option("--chunk", metavar="BYTES", help="Bytes per request, such as 16M.")]
Retries = Annotated[
    int, typer.Option("--retries", min=0, help="Number of retries after a transient failure of a request.")
]
MaxBytes = Annotated[
    str, typer.Option("--max-bytes", metavar="BYTES", help="Stop if the download would exceed this many bytes.")
]
MaxRate = Annotated[
    str | None,
    typer.Option("--max-rate", metavar="BYTES", help="Limit on the total transfer rate, in bytes per second."),
]
Price = Annotated[
    float | None,
    typer.Option("--price-per-gib", min=0, metavar="USD", help="Price per GiB, for the cost estimate."),
]
Dir = Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="Folder that atlas fetch wrote.")]
Format = Annotated[
    str, typer.Option("--format", help="Output format: h5ad, zarr, batches (dense files batch_0000.h5, …) or store.")
]
MergedOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="P", help="Output file or folder [default: inside DIR].")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="batches: number of experiments per file.")]
Genes = Annotated[
    Path | None,
    typer.Option(
        "--genes",
        "--basis",
        metavar="FILE",
        help="Gene list, one per line, which sets the genes and their order [default: all genes].",
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="T", help="Type of the values [default: the smallest that holds them].")
]
SkipFailed = Annotated[
    bool, typer.Option("--skip-failed", help="Merge the experiments that are present even if others are missing.")
]
Qc = Annotated[bool, typer.Option("--qc", help="Add quality metrics and flags to obs; see vcelltools qc.")]
DropRaw = Annotated[bool, typer.Option("--drop-raw", help="Delete the experiments' files once the merge is complete.")]
MergePlanned = Annotated[bool, typer.Option("--plan", help="Show what would be merged, without merging anything.")]


def _read_bytes(text: str, option: str) -> int:
    """Return the bytes of ``16M`` or ``50G``; K, M and G are 1024, 1024², 1024³, and KB, MB, GB decimal."""
    import re

    from vcelltools.errors import UsageError

    m = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(B?)\s*", text, re.I)
    try:
        number = float(m.group(1)) if m else 0.0
    except ValueError:
        number = 0.0
    if not m or number <= 0:
        raise UsageError(f"{option} {text!r} is not a number of bytes", hint="such as 16M, 50GB or 1000000")
    base = 1000 if m.group(3) else 1024
    return max(1, int(number * base ** " KMGT".index(m.group(2).upper() or " ")))


def _get_access(billing_project: str | None, requester_pays: bool, retries: int = 6) -> Access:
    from vcelltools.atlas import Access
    from vcelltools.config import load_config

    project = billing_project or load_config()[0].atlas.billing_project
    return Access(billing_project=project, requester_pays=requester_pays, retries=retries)


@app.command("list", short_help="List what a public atlas holds", cls=Command)
def list_(
    source: SourceName,
    where: Where = None,
    values: Values = None,
    release: Release = None,
    feature: Feature = None,
    organism: Organism = None,
    id_col: IdCol = None,
    path_col: PathCol = None,
    count_col: CountCol = None,
    billing_project: Billing = None,
    requester_pays: Pays = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count the experiments and cells of a public atlas, and list the columns that --where can use.

    Example: vcelltools atlas list scbasecount --where 'tissue=lung' --values disease
    """
    from vcelltools.atlas import list_experiments, open_source
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_atlas import show_listing

    o = Output(json=json, quiet=quiet, verbose=verbose)
    found = open_source(
        source, release=release, feature=feature, organism=organism, id_col=id_col, path_col=path_col,
        count_col=count_col, access=_get_access(billing_project, requester_pays),
    )  # fmt: skip
    show_listing(o, list_experiments(found, where=where or [], values=values))


@app.command("fetch", short_help="Download and verify experiments", cls=Command)
def fetch(
    source: SourceName,
    out: Out,
    cells: Cells = None,
    experiments: Experiments = None,
    ids: Ids = None,
    all: All = False,
    where: Where = None,
    cap: Cap = None,
    seed: Seed = 42,
    plan: Plan = False,
    top_up: TopUp = False,
    release: Release = None,
    feature: Feature = None,
    organism: Organism = None,
    id_col: IdCol = None,
    path_col: PathCol = None,
    count_col: CountCol = None,
    billing_project: Billing = None,
    requester_pays: Pays = False,
    jobs: Jobs = 8,
    chunk: Chunk = "16M",
    retries: Retries = 6,
    max_bytes: MaxBytes = "50GB",
    max_rate: MaxRate = None,
    price_per_gib: Price = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Choose experiments of a public atlas, download them and verify every byte.

    The same command resumes an interrupted download; a larger target extends it. An experiment that fails is listed
    with its reason, and the others continue. Nobody is billed unless --billing-project or --requester-pays is given.

    Example: vcelltools atlas fetch scbasecount --out atlas --cells 100000 --where 'tissue=lung' --plan
    """
    from vcelltools.atlas import Choice, Transfer, make_plan, open_source, read_ids
    from vcelltools.atlas import fetch as run
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_atlas import show_fetched, show_plan

    o = Output(json=json, quiet=quiet, verbose=verbose)
    choice = Choice(
        where=tuple(where or ()), cap=tuple(cap or ()), seed=seed, cells=cells, experiments=experiments,
        ids=read_ids(ids) if ids is not None else None, all=all,
    )  # fmt: skip
    limits: dict[str, Any] = {"jobs": jobs}
    limits |= {"chunk": _read_bytes(chunk, "--chunk"), "max_bytes": _read_bytes(max_bytes, "--max-bytes")}
    if max_rate is not None:
        limits["max_rate"] = _read_bytes(max_rate, "--max-rate")
    if price_per_gib is not None:
        limits["price_per_gib"] = price_per_gib
    transfer = Transfer(**limits)
    found = open_source(
        source, release=release, feature=feature, organism=organism, id_col=id_col, path_col=path_col,
        count_col=count_col, access=_get_access(billing_project, requester_pays, retries),
    )  # fmt: skip
    if plan:
        return show_plan(o, make_plan(found, choice, out, transfer))
    return show_fetched(o, run(found, choice, out, transfer=transfer, top_up=top_up, progress=o.progress))


@app.command("merge", short_help="Merge experiments into one matrix", cls=Command)
def merge(
    folder: Dir,
    format: Format = "h5ad",
    out: MergedOut = None,
    batch_size: BatchSize = 10,
    genes: Genes = None,
    dtype: Dtype = None,
    skip_failed: SkipFailed = False,
    qc: Qc = False,
    drop_raw: DropRaw = False,
    plan: MergePlanned = False,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge fetched experiments over the union of their genes (sorted by id), with the cells in download order.

    genes.parquet lists the experiments that lack each gene; config.json describes the merge for the public loader.

    Example: vcelltools atlas merge atlas --out merged.h5ad
    """
    from vcelltools.atlas import merge as run
    from vcelltools.atlas import plan_merge
    from vcelltools.cli.output import Output
    from vcelltools.cli.render_atlas import show_merge_plan, show_merged
    from vcelltools.cli.start import start

    o = Output(json=json, quiet=quiet, verbose=verbose)
    refuse({"--batch-size": batch_size != 10 and format != "batches"}, f"--format {format}")
    start()
    if plan:
        return show_merge_plan(o, plan_merge(folder, format=format, out=out, skip_failed=skip_failed))
    done = run(
        folder, format=format, out=out, genes=genes, batch_size=batch_size, dtype=dtype,
        skip_failed=skip_failed, qc=qc, drop_raw=drop_raw, force=force, threads=threads, progress=o.progress,
    )  # fmt: skip
    return show_merged(o, done)
