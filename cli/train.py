"""``vcelltools train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def train(
    out: Annotated[Path | None, Opt("--out", "-o", help="The run's folder [default: runs/run].")] = None,
    store: Annotated[
        list[Path] | None, Opt("--store", help="A store; may be repeated [default: all of the configured folder].")
    ] = None,
    split: Annotated[
        Path | None,
        Opt(help="What is held out, in TOML: [training] [zeroshot] [fewshot] [default: some pairs, by a hash]."),
    ] = None,
    features: Annotated[
        Path | None, Opt(help="Features of the perturbations: .csv, .tsv, .parquet or .npz, names first.")
    ] = None,
    model: Annotated[
        str | None, Opt(help="control-mean, perturbation-mean, ridge or transformer [default: transformer].")
    ] = None,
    size: Annotated[str | None, Opt(help="Of the transformer: tiny, rn, base or large [default: rn].")] = None,
    steps: Annotated[int | None, Opt(min=1, help="Steps of the optimiser [default: 5000].")] = None,
    sets: Annotated[int | None, Opt(min=1, help="Sets in a global batch [default: 32].")] = None,
    set_size: Annotated[int | None, Opt(min=2, help="Cells in a set [default: 64].")] = None,
    seed: Annotated[int | None, Opt(min=0, help="Of everything random [default: 0].")] = None,
    learning_rate: Annotated[float | None, Opt(min=0, help="The highest of its schedule [default: 0.0003].")] = None,
    minutes: Annotated[float | None, Opt(min=0, help="Stop after so long, resumable [default: never].")] = None,
    tpu: Annotated[bool, Opt("--tpu", help="Require TPUs and use them.")] = False,
    topology: Annotated[str | None, Opt(help="A TPU slice: v5e-16, v5litepod-16, v5e:4x4, …")] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Compile for --topology without a TPU; print the plan.")] = False,
    distributed: Annotated[str | None, Opt(help="Several processes: auto, or ADDRESS:PORT,COUNT,ID.")] = None,
    sanity: Annotated[str | None, Opt(help="A training whose outcome is known: one of the modes above.")] = None,
    resume: Annotated[bool, Opt("--resume/--no-resume", help="Continue the run in --out.")] = True,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model on stores, or fit a baseline, and score it beside the baselines on held-out groups.

    Everything else (optimiser, losses, evaluation) is set in [train] of vcelltools.toml; options win over it. A run
    that was stopped (Ctrl-C, SIGTERM, --minutes; exit code 5) continues when the same command is given again, to the
    same bits as if it had never stopped.

    Sanity modes: overfit-batch, controls-same, controls-resampled, random-perturbations, random-genes, permutation.

    Example: vcelltools train --out runs/rn --split split.toml --steps 5000

    Plan for a TPU slice, without one: vcelltools train --dry-run --topology v5e-16
    """
    options = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS}
    from vcelltools.cli.render_train import show_plan, show_result, show_sanity
    from vcelltools.pipelines.train_command import prepare

    output = Output(json=json, quiet=quiet, verbose=verbose)
    job = prepare(options, tpu=tpu, topology=topology, dry_run=dry_run, distributed=distributed)
    if dry_run:
        show_plan(output, job.plan())
    elif sanity:
        show_sanity(output, job.check(sanity, output.progress))
    else:
        show_result(output, job.train(resume=resume, force=force, progress=output.progress))


_NOT_SETTINGS = (
    "tpu", "topology", "dry_run", "distributed", "sanity", "resume", "force", "json", "quiet", "verbose",
)  # fmt: skip
