"""``demo``: run the whole workflow on simulated data, where every step is a public command, printed as it runs.

Three laboratories measure perturbations in different cell lines, with partly different genes and column names.
The model learns from two of them. The perturbed cells of the third are held out and serve as the truth.
A step whose outputs are complete, and whose command and inputs are unchanged, is not run again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vcelltools.errors import DataError, EnvironmentFault, InterruptedRun, UsageError, VcellError
from vcelltools.io.results import Result
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import locked, write_json, write_text
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.scoring.comparison import Difference, compare_scores
from vcelltools.version import __version__

_STATE = "demo.json"
_FAILURES: dict[int, type[VcellError]] = {2: UsageError, 3: DataError, 4: EnvironmentFault, 5: InterruptedRun}
HELD_OUT = "lab_c"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the workflow.

    Attributes
    ----------
    why
        One sentence on the purpose of the step.
    argv
        The arguments after ``vcelltools``.
    makes
        Files and folders that it writes, relative to the folder of the demo.
    resumes
        Whether the command itself resumes an interrupted run.
    """

    why: str
    argv: tuple[str, ...]
    makes: tuple[str, ...] = ()
    resumes: bool = False

    @property
    def line(self) -> str:
        """The command as typed."""
        return "vcelltools " + shlex.join(self.argv)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size of the demo."""

    genes: int
    perturbations: int
    cells: tuple[int, int, int]
    top: int
    steps: int
    sets: int
    set_size: int


FULL = Sizes(genes=4000, perturbations=80, cells=(16_000, 28_000, 16_000), top=1000, steps=400, sets=16, set_size=32)
QUICK = Sizes(genes=600, perturbations=12, cells=(1500, 2400, 1500), top=200, steps=20, sets=4, set_size=16)


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    """The result of the workflow.

    Attributes
    ----------
    dpath
        The demo's folder.
    ran, skipped
        Number of steps that ran, and of steps whose outputs were already complete.
    scores
        Model -> metric -> value, baseline, ceiling and score, from ``score.json``.
    held_out
        The results of each model on the held-out groups, from ``summary.json`` of the transformer's run.
    table
        The rows of ``compared/table.csv``: models on the held-out groups, with intervals.
    difference
        The difference between the average scores of the transformer and perturbation-mean, with its interval over
        perturbations.
    beats_mean
        Whether the average score of the transformer is above 0, that of the mean baseline.
    """

    dpath: Path
    ran: int
    skipped: int
    seconds: float
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    difference: Difference

    @property
    def beats_mean(self) -> bool:
        """Whether the transformer scores above the mean baseline."""
        return (self.scores["transformer"]["avg_score"] or 0.0) > 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        report = str(self.report_fpath)
        return {**super().to_json(), "beats_mean": self.beats_mean, "level": self.difference.level, "report": report}

    @property
    def report_fpath(self) -> Path:
        """The HTML report."""
        return self.dpath / "report.html"


CONFIG = """\
# The configuration of the demo: where the data sets are and what their columns mean.
# For your own files, run vcelltools init to write one.

[basis]
top = {top}
path = "basis.txt"

[[datasets]]
name = "kolf"
path = "kolf.h5mu"
modality = "rna"
pert_col = "feature_call"
control = "Non-Targeting"
group_by = ["batch"]
cell_line = "KOLF2.1J"
gene_id_col = "gene_ids"
guides = {{ sep = "|", n_col = "num_features", policy = "single" }}

[[datasets]]
name = "lab_b"
path = "lab_b.h5ad"
pert_col = "target_gene"
control = "non-targeting"
group_by = ["batch"]
cell_line_col = "cell_line"
gene_id_col = "gene_ids"

[train]
split = "split.toml"
sets = {sets}
set_size = {set_size}

[score]
truth = "truth.h5ad"
"""

SPLIT = """\
# Two laboratories train. All perturbed cells of the third are held out: the model sees only its controls.

[training]
kolf = "train"
lab_b = "train"

[zeroshot]
"lab_c.line4" = "test"
"""


def make_steps(sizes: Sizes) -> tuple[Step, ...]:
    """Return the steps, in order."""
    return *_make_data(sizes), *_make_stores(sizes), *_make_models(sizes), *_make_scores()


def _make_data(s: Sizes) -> tuple[Step, ...]:
    def simulate(out: str, cells: int, seed: int, *more: object) -> tuple[str, ...]:
        words = ("simulate", "--out", out, "--cells", cells, "--genes", s.genes, "--perturbations", s.perturbations)
        return tuple(map(str, (*words, "--inert", 0, "--seed", seed, "--effect-seed", 7, *more)))

    return (
        Step(
            why="Simulate a screen in one cell line, with the column names and the encoding of the KOLF atlas.",
            argv=simulate("kolf.h5mu", s.cells[0], 1, "--like", "kolf"),
            makes=("kolf.h5mu",),
        ),
        Step(
            why="Simulate the same biology in another laboratory: two other cell lines, with a tenth of the genes "
            "missing.",
            argv=simulate("lab_b.h5ad", s.cells[1], 2, "--cell-lines", 2, "--first-cell-line", 2, "--genes-drop", 0.1),
            makes=("lab_b.h5ad",),
        ),
        Step(
            why="Simulate a third laboratory with a fourth cell line, whose perturbed cells are the truth to predict.",
            argv=simulate(f"{HELD_OUT}.h5ad", s.cells[2], 3, "--first-cell-line", 4),
            makes=(f"{HELD_OUT}.h5ad",),
        ),
        Step(why="Show what is in a file: matrices, counts, and what its columns mean.", argv=("inspect", "kolf.h5mu")),
        Step(
            why="Select the highly variable genes of one file, and save statistics for later steps.",
            argv=("hvg", "kolf.h5mu", "--top", str(s.top), "--out", "hvgs_kolf.txt", "--plot", "hvgs_kolf.png"),
            makes=("hvgs_kolf.txt", "hvgs_kolf.png"),
        ),
    )


def _make_stores(s: Sizes) -> tuple[Step, ...]:
    other_lab = ("--pert-col", "target_gene", "--control", "non-targeting", "--group-by", "batch")
    return (
        Step(
            why="Choose one gene list for the two training atlases, without the held-out one.",
            argv=("basis", "--top", str(s.top), "--out", "basis.txt"),
            makes=("basis.txt", "basis.json"),
        ),
        Step(
            why="Build compact stores of the training atlases, ordered by group, with checksums.",
            argv=("build-store", "--out", "stores"),
            makes=("stores/kolf", "stores/lab_b"),
            resumes=True,
        ),
        Step(
            why="Build a store of the third atlas on the same genes, described by options only.",
            argv=(
                "build-store",
                f"{HELD_OUT}.h5ad",
                "--name",
                HELD_OUT,
                "--basis",
                "basis.txt",
                "--out",
                "stores",
                *other_lab,
                "--cell-line-col",
                "cell_line",
                "--gene-id-col",
                "gene_ids",
            ),
            makes=(f"stores/{HELD_OUT}",),
            resumes=True,
        ),
        Step(
            why="Check that the stores are intact.",
            argv=("verify", *(f"stores/{n}" for n in ("kolf", "lab_b", HELD_OUT))),
        ),
    )


def _make_models(s: Sizes) -> tuple[Step, ...]:
    stores = tuple(w for n in ("kolf", "lab_b", HELD_OUT) for w in ("--store", f"stores/{n}"))
    return (
        Step(
            why="Train a transformer on sets of cells; the split holds out the perturbed cells of the third atlas.",
            argv=("train", *stores, "--steps", str(s.steps), "--out", "runs/transformer"),
            makes=("runs/transformer/summary.json", "runs/transformer/best"),
            resumes=True,
        ),
        Step(
            why="Predict the held-out atlas: its own controls, shifted by the effects that the model predicts.",
            argv=("predict", "--run", "runs/transformer", "--out", _name_prediction("transformer")),
            makes=(_name_prediction("transformer"),),
        ),
        Step(
            why="Fit the baseline to beat: the mean effect of every perturbation in the other laboratories.",
            argv=("train", "--model", "perturbation-mean", *stores, "--out", "runs/perturbation-mean"),
            makes=("runs/perturbation-mean/summary.json",),
            resumes=True,
        ),
        Step(
            why="Predict with the baseline, by the same command.",
            argv=("predict", "--run", "runs/perturbation-mean", "--out", _name_prediction("perturbation-mean")),
            makes=(_name_prediction("perturbation-mean"),),
        ),
        Step(
            why="Compare the transformer with quick models on the held-out groups, with paired intervals.",
            argv=(
                "evaluate",
                *stores,
                "--splits",
                "split.toml",
                "--model",
                "ridge",
                "--model",
                "transfer",
                "--prediction",
                f"transformer={_name_prediction('transformer')}",
                "--out",
                "compared",
            ),
            makes=("compared/table.csv", "compared/groups.csv"),
            resumes=True,
        ),
    )


def _make_scores() -> tuple[Step, ...]:
    def score(model: str, *more: str) -> tuple[str, ...]:
        return ("score", _name_prediction(model), "--ceiling", "--out", f"scores/{model}", *more)

    return (
        Step(
            why="Normalize the held-out cells to log1p of counts per 10,000, the scale of the predictions.",
            argv=("normalize", f"{HELD_OUT}.h5ad", "--out", "truth.h5ad"),
            makes=("truth.h5ad",),
        ),
        Step(
            why="Score the prediction against the held-out cells: 0 is the mean baseline, 1 the best possible.",
            argv=score("transformer", "--report", "report.html"),
            makes=("scores/transformer/score.json", "report.html"),
        ),
        Step(
            why="Score the baseline in the same way.",
            argv=score("perturbation-mean"),
            makes=("scores/perturbation-mean/score.json",),
        ),
    )


def _name_prediction(model: str) -> str:
    return f"pred_{model.replace('-', '_')}.h5ad"


def is_demo(folder: Path) -> bool:
    """Whether a folder has the list of steps that a demo keeps."""
    try:
        return "steps" in parse_json((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def run_demo(
    dpath: str | Path = "vcelltools-demo",
    *,
    quick: bool = False,
    force: bool = False,
    say: Callable[..., None] | None = None,
    output: IO[str] | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> DemoResult:
    """Run the workflow in a folder; a second run skips the steps whose outputs are complete.

    Parameters
    ----------
    quick
        Use tiny data and few steps, which show the commands but not what a model can learn.
    force
        Run every step again, and replace the results of an earlier demo.
    say
        Receives the lines that the demo prints.
    output
        Stream for the results of the commands; stdout by default.
    quiet
        Hide the output of the commands unless one fails.
    verbose
        Pass ``-v`` to every command.

    Raises
    ------
    UsageError
        If the folder holds other files and no demo.
    VcellError
        If a step fails; the error has the same kind.
    """
    began = time.monotonic()
    folder = Path(dpath)
    sizes = QUICK if quick else FULL
    guard_outputs(
        [Target(folder, "demo", owns=is_demo, reuse=True)], need_bytes=100 * sizes.genes * sum(sizes.cells) // 50
    )
    steps = make_steps(sizes)
    say = say or (lambda *_: None)
    walk = _Walk(folder, steps, force=force, say=say, output=output, quiet=quiet, verbose=verbose)
    with locked(folder):
        walk.write_files({"vcelltools.toml": CONFIG.format(**_get_fields(sizes)), "split.toml": SPLIT})
        for number, step in enumerate(steps, 1):
            walk.take(step, number)
    scores = {m: _read(folder / f"scores/{m}/score.json") for m in ("perturbation-mean", "transformer")}
    summary = _read(folder / "runs/transformer/summary.json")
    return DemoResult(
        dpath=folder,
        ran=walk.ran,
        skipped=walk.skipped,
        seconds=round(time.monotonic() - began, 1),
        scores={m: {"avg_score": s["avg_score"], "components": s["components"]} for m, s in scores.items()},
        held_out={**summary["baselines"], "transformer": summary["final"]},
        table=_read_table(folder / "compared" / "table.csv"),
        difference=compare_scores(folder / "scores/transformer", folder / "scores/perturbation-mean"),
    )


def _read_table(path: Path) -> list[dict[str, Any]]:
    from pyarrow import csv

    rows: list[dict[str, Any]] = csv.read_csv(path).to_pylist()
    return rows


class _Walk:
    """Runs steps in a folder and records the inputs and outputs of each."""

    def __init__(
        self,
        folder: Path,
        steps: Sequence[Step],
        *,
        force: bool,
        say: Callable[..., None],
        output: IO[str] | None,
        quiet: bool,
        verbose: bool,
    ) -> None:
        self.folder, self.steps, self.force, self.say = folder, steps, force, say
        self.output, self.quiet, self.verbose = output, quiet, verbose
        self.ran = self.skipped = 0
        state = _read(folder / _STATE) if (folder / _STATE).exists() else {}
        self.files: dict[str, str] = state.get("files", {})
        self.done: dict[str, Any] = state.get("steps", {}) if state.get("version") == __version__ else {}
        self.inputs = hashlib.sha256()  # hash of the files and of everything that earlier steps wrote

    def write_files(self, files: dict[str, str]) -> None:
        """Write the files that the steps read, but do not overwrite a file that was changed since."""
        new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
        for name in files:
            path = self.folder / name
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() not in (new[name], self.files.get(name)):
                raise UsageError(
                    f"{path} was changed since the demo wrote it", hint="move it away, or choose another --dir"
                )
        self.files = new
        self._save()
        for name, text in files.items():
            write_text(self.folder / name, text, force=True)
            self.inputs.update(text.encode())

    def _save(self) -> None:
        write_json(self.folder / _STATE, {"version": __version__, "files": self.files, "steps": self.done}, force=True)

    def take(self, step: Step, number: int) -> None:
        """Run a step, or skip it if its outputs are complete and were made from the same inputs."""
        key = hashlib.sha256(self.inputs.digest() + step.line.encode()).hexdigest()
        known = self.done.get(step.line)
        was_made = known is not None and known["key"] == key
        head = f"[{number}/{len(self.steps)}]"
        if known is not None and was_made and not self.force and known["makes"] == self._digest(step):
            self.skipped += 1
            self.say(f"{head} $ {step.line}", "      already done")
        else:
            self.say("", f"{head} {step.why}", f"$ {step.line}")
            self._run(step, again=self.force or known is not None)
            self.done[step.line] = {"key": key, "makes": self._digest(step)}
            self._save()
            self.ran += 1
        self.inputs.update(json.dumps(self.done[step.line]["makes"], sort_keys=True).encode())

    def _run(self, step: Step, *, again: bool) -> None:
        """Run the command. Existing outputs are overwritten, unless the command resumes them."""
        there = [(self.folder / m).exists() for m in step.makes]
        finished = any(there[:1]) if step.resumes else any(there)
        extra = ["--force"] if finished or (again and step.resumes) else []
        extra += ["-v"] if self.verbose else []
        command = [sys.executable, "-m", "vcelltools.cli.main", *step.argv, *extra]
        if self.quiet:
            done: subprocess.CompletedProcess = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.stderr.write(done.stderr)
        else:
            done = subprocess.run(command, cwd=self.folder, stdout=self.output, check=False)
        if done.returncode:
            kind = _FAILURES.get(done.returncode)
            if kind is None:
                raise RuntimeError(f"{step.line} exited with code {done.returncode}")
            raise kind(f"the demo stopped at: {step.line}", hint="run the same demo command again to resume there")

    def _digest(self, step: Step) -> dict[str, str]:
        """Return path -> hash of every file that a step makes; missing files are left out."""
        out = {}
        for name in step.makes:
            path = self.folder / name
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            for f in files:
                if f.exists():
                    out[str(f.relative_to(self.folder))] = _hash(f)
        return out


def _hash(path: Path) -> str:
    from xxhash import xxh3_128

    h = xxh3_128()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            h.update(block)
    return h.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read: {e}", hint="vcelltools demo --force runs every step again") from e


def _get_fields(sizes: Sizes) -> dict[str, Any]:
    return {k: getattr(sizes, k) for k in sizes.__dataclass_fields__}
