"""``vcelltools evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose, refuse
from vcelltools.cli.output import Output

Opt = typer.Option


def evaluate(
    models: Annotated[
        list[str] | None,
        Opt(
            "--model",
            help="Model of train to evaluate; NAME:OBJECTIVE sets its objective; may be repeated.",
            show_default=False,
        ),
    ] = None,
    splits: Annotated[
        list[str] | None,
        Opt(
            "--splits",
            help="Split: leave-one-perturbation-out, leave-one-context-out, few-shot, or a TOML file; may be repeated "
            "[default: leave-one-perturbation-out].",
        ),
    ] = None,
    out: Annotated[Path, Opt("--out", "-o", help="Folder for the tables.")] = Path("evaluation"),
    stores: Annotated[
        list[Path] | None,
        Opt("--store", help="Store with the cells; may be repeated [default: all in the configured folder]."),
    ] = None,
    features: Annotated[Path | None, Opt(help="Features that vcelltools features wrote.")] = None,
    network: Annotated[list[Path] | None, Opt(help="Edge list of genes, for neighbours; may be repeated.")] = None,
    predictions: Annotated[
        list[str] | None,
        Opt("--prediction", metavar="NAME=FILE", help="h5ad file of predicted cells, from any tool; may be repeated."),
    ] = None,
    pert_col: Annotated[str, Opt(metavar="C", help="--prediction: obs column with the perturbation.")] = "target_gene",
    control: Annotated[
        str | None, Opt(help="--prediction: label of its control cells [default: as in the store].")
    ] = None,
    context_col: Annotated[str, Opt(metavar="C", help="--prediction: obs column with the cell line.")] = "context",
    seen: Annotated[
        float,
        Opt(
            min=0.0,
            max=1.0,
            show_default="1/3",
            help="few-shot: share of a cell line's perturbations that is used for training.",
        ),
    ] = 1 / 3,
    repeats: Annotated[int, Opt(min=1, help="few-shot: number of random draws of that share.")] = 1,
    seed: Annotated[int, Opt(min=0, help="Random seed of few-shot.")] = 0,
    compare: Annotated[
        tuple[Path, Path] | None,
        Opt(metavar="RUN RUN", help="Compare two runs of train on the groups that both of them hold out."),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score models on the held-out groups of one or more splits, with paired confidence intervals.

    The baselines are always among the models. The folder keeps every result as soon as it is computed: after Ctrl-C,
    the same command continues. groups.parquet has a row for each split, model and held-out group. table.parquet has the
    means, their 95 % bootstrap intervals over perturbations, and the paired gains over perturbation-mean.

    Example: vcelltools evaluate --model ridge --model transfer:error --splits few-shot --out compared
    """
    from vcelltools.errors import UsageError
    from vcelltools.evaluation.evaluate import evaluate as run
    from vcelltools.evaluation.evaluate import summarise
    from vcelltools.model.mesh import choose_platform

    output = Output(json=json, quiet=quiet, verbose=verbose)
    choose_platform(tpu=False)
    if compare is not None:
        from vcelltools.evaluation.pair import compare_runs

        refuse({"--model": models, "--splits": splits, "--prediction": predictions}, "--compare")
        pair = compare_runs(*compare, progress=output.progress)
        output.result(pair.to_json())
        rows = [[m, v["first"], v["second"], v["gain"], v["gain_low"], v["gain_high"]] for m, v in pair.metrics.items()]
        head = ["metric", compare[0].name, compare[1].name, "gain", "low", "high"]
        output.table(head, rows, title=f"{pair.n_groups} held-out groups")
        return output.done("the gain is the second run's over the first, with a paired 95 % interval")
    files = {}
    for text in predictions or ():
        name, mark, path = text.partition("=")
        if not (name and mark and path):
            raise UsageError(f"--prediction {text!r} is not NAME=FILE", hint="--prediction mine=pred.h5ad")
        files[name] = path
    r = run(
        models or (), splits or ("leave-one-perturbation-out",), out, stores=stores or (), features=features,
        network=network or (), predictions=files, pert_col=pert_col, control=control, context_col=context_col,
        seen=seen, repeats=repeats, seed=seed, force=force, progress=output.progress,
    )  # fmt: skip
    output.result(r.to_json())
    for family, part in r.groups.groupby("family", sort=False):
        head = ["model", "PDS", "Pearson Δ", "MAE", "error", "PDS gain", "Pearson Δ gain"]
        title = f"{family}: {part['split'].nunique()} splits, {len(part[part['model'] == 'control-mean'])} groups"
        output.table(head, summarise(r.table, str(family)), title=title)
    reused = f"; {r.n_reused:,} results were reused" if r.n_reused else ""
    return output.done(f"wrote {r.out}/table.csv and groups.csv{reused}")
