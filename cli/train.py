"""``vcelltools train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vcelltools.cli.options import Force, Json, Quiet, Verbose
from vcelltools.cli.output import Output

Opt = typer.Option


def train(
    out: Annotated[Path | None, Opt("--out", "-o", help="Folder to write the run to [default: runs/run].")] = None,
    stores: Annotated[
        list[Path] | None,
        Opt("--store", help="Store to train on; may be repeated [default: all stores in the configured folder]."),
    ] = None,
    split: Annotated[
        Path | None,
        Opt(
            help="TOML file of held-out groups, with [training], [zeroshot] and [fewshot] [default: pairs "
            "of cell line and perturbation, chosen by a hash]."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        Opt(help="Perturbation features (.csv, .tsv, .parquet or .npz), with the names in the first column."),
    ] = None,
    network: Annotated[
        list[Path] | None,
        Opt(help="Edge list of genes for neighbours: two symbols, optionally a weight; may be repeated."),
    ] = None,
    from_run: Annotated[
        Path | None, Opt("--from", help="Finished run of the same model, whose weights the training starts from.")
    ] = None,
    extend: Annotated[
        Path | None, Opt(help="Finished run to train to a larger number of steps, with its own settings.")
    ] = None,
    model: Annotated[
        str | None,
        Opt(
            help="transformer, diffusion, ridge, neighbours, kernel-ridge, transfer or a baseline "
            "[default: transformer]."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        Opt(help="What a model's last, fitted step aims at: discrimination, error or balanced."),
    ] = None,
    size: Annotated[
        str | None, Opt(help="Model size: tiny, rn, base or large; for diffusion: tiny, mini or moe-17b [default: rn].")
    ] = None,
    steps: Annotated[
        int | None,
        Opt(
            min=1,
            help="Number of optimiser steps [default: each training cell is drawn 10 times, in 500 to 5,000 steps].",
        ),
    ] = None,
    sets: Annotated[int | None, Opt(min=1, help="Number of sets per global batch [default: 32].")] = None,
    set_size: Annotated[int | None, Opt(min=2, help="Number of cells per set [default: 64].")] = None,
    seed: Annotated[int | None, Opt(min=0, help="Random seed [default: 0].")] = None,
    learning_rate: Annotated[float | None, Opt(min=0, help="Peak learning rate [default: 0.0003].")] = None,
    optimizer: Annotated[str | None, Opt(help="adamw, adam, sgd or muon [default: adamw].")] = None,
    scale_rate: Annotated[
        bool, Opt("--scale-rate", help="Multiply the learning rate by sets / 128, at most by 4.")
    ] = False,
    minutes: Annotated[
        float | None, Opt(min=0, help="Stop after this many minutes; the run can be resumed [default: never].")
    ] = None,
    wandb: Annotated[
        bool,
        Opt(
            "--wandb",
            help="Also write an offline run of Weights & Biases into the run folder, which wandb sync uploads.",
        ),
    ] = False,
    tpu: Annotated[bool, Opt("--tpu", help="Train on TPUs, and stop if there are none.")] = False,
    topology: Annotated[str | None, Opt(help="TPU slice, such as v5e-16, v5litepod-16, v5e:4x4, …")] = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Compile for --topology without a TPU, and show the plan.")] = False,
    distributed: Annotated[
        str | None, Opt(help="Train across several processes: auto, or ADDRESS:PORT,COUNT,ID.")
    ] = None,
    sanity: Annotated[
        str | None, Opt(help="Run a training with a known outcome: one of the sanity modes above.")
    ] = None,
    resume: Annotated[bool, Opt("--resume/--no-resume", help="Resume the run in --out.")] = True,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a model on stores, or fit a baseline, and compare it with the baselines on held-out groups.

    All other settings (optimiser, losses, evaluation) come from [train] in vcelltools.toml; options override it. To
    resume an interrupted run (Ctrl-C, SIGTERM or --minutes; exit code 5), run the same command again: the result is the
    same, to the bit, as that of an uninterrupted run.

    To train a finished run further: vcelltools train --extend runs/rn --steps 10000. To start from its weights on other
    stores with the same genes: vcelltools train --from runs/rn --store stores/other --out runs/tuned

    Baselines: perturbation-mean and control-mean.

    Sanity modes: overfit-batch, controls-same, controls-resampled, random-perturbations, random-genes, permutation.

    Example: vcelltools train --out runs/rn --split split.toml --steps 5000

    To plan for a TPU slice that you do not have: vcelltools train --dry-run --topology v5e-16
    """
    options = {
        "out": out, "stores": stores, "split": split, "features": features, "network": network, "from_run": from_run,
        "model": model, "objective": objective, "size": size, "steps": steps, "sets": sets, "set_size": set_size,
        "seed": seed, "optimizer": optimizer, "learning_rate": learning_rate, "scale_rate": scale_rate or None,
        "minutes": minutes, "wandb": wandb or None,
    }  # fmt: skip
    from vcelltools.cli.render_train import show_plan, show_result, show_sanity
    from vcelltools.errors import UsageError, spell
    from vcelltools.training.request import prepare

    output = Output(json=json, quiet=quiet, verbose=verbose)
    if extend and (given := [k for k, v in (("dry_run", dry_run), ("sanity", sanity), ("force", force)) if v]):
        raise UsageError(f"{spell('extend')} cannot be combined with {spell(given[0], True)}")
    job = prepare(options, tpu=tpu, topology=topology, dry_run=dry_run, distributed=distributed, extend=extend)
    if dry_run:
        show_plan(output, job.plan())
    elif sanity:
        show_sanity(output, job.check(sanity, output.progress))
    else:
        show_result(output, job.train(resume=resume, force=force, progress=output.progress))
