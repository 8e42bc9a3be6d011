"""``vcelltools train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def train(
    out: Annotated[Path | None, Opt("--out", "-o", help="The run's folder.", show_default=False)] = None,
    store: Annotated[
        list[Path] | None, Opt("--store", help="A store; several may be given [default: all].", show_default=False)
    ] = None,
    split: Annotated[Path | None, Opt(help="TOML: [training] [zeroshot] [fewshot].", show_default=False)] = None,
    features: Annotated[Path | None, Opt(help="Perturbation features: table or npz.", show_default=False)] = None,
    model: Annotated[
        str | None, Opt(help="control-mean, perturbation-mean, ridge or transformer.", show_default=False)
    ] = None,
    size: Annotated[str | None, Opt(help="tiny, rn, base or large.", show_default=False)] = None,
    steps: Annotated[int | None, Opt(min=1, help="Steps of the optimiser.", show_default=False)] = None,
    sets: Annotated[int | None, Opt(min=1, help="Sets in a global batch.", show_default=False)] = None,
    set_size: Annotated[int | None, Opt(min=2, help="Cells in a set.", show_default=False)] = None,
    seed: Annotated[int | None, Opt(min=0, help="Of everything random.", show_default=False)] = None,
    learning_rate: Annotated[float | None, Opt(min=0, help="The highest of its schedule.", show_default=False)] = None,
    minutes: Annotated[float | None, Opt(min=0, help="Stop after so long, resumable.", show_default=False)] = None,
    tpu: Annotated[bool, Opt("--tpu", help="Require TPUs and use them.")] = False,
    topology: Annotated[str | None, Opt(help="v5e-16, v5litepod-16, v5e:4x4, …", show_default=False)] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Compile for --topology without a TPU; print the plan.")] = False,
    distributed: Annotated[
        str | None, Opt(help="auto, or ADDRESS:PORT,COUNT,ID: several processes.", show_default=False)
    ] = None,
    sanity: Annotated[str | None, Opt(help="A training whose outcome is known.", show_default=False)] = None,
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
