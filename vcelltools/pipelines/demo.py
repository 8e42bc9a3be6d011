"""``demo``: the whole road on simulated data, every step the public command, shown as it runs.

Three laboratories measure perturbations in different cell lines, with partly other genes and other column names.
The model learns from two of them; the third's perturbed cells are held out and are the truth it is scored against.
A step whose outputs are whole, and whose command and inputs are the same, is not run again.
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

from vcelltools import __version__
from vcelltools.errors import DataError, EnvironmentFault, InterruptedRun, UsageError, VcellError
from vcelltools.io.atomic import check_kind, check_output, write_json, write_text
from vcelltools.results import Result
from vcelltools.scoring.paired import Difference, compare_scores

_STATE = "demo.json"
_FAILURES: dict[int, type[VcellError]] = {2: UsageError, 3: DataError, 4: EnvironmentFault, 5: InterruptedRun}
HELD_OUT = "lab_c"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the road.

    Attributes
    ----------
    why
        One sentence: what the step is for.
    argv
        The arguments after ``vcelltools``.
    makes
        Files and folders that it writes, relative to the demo's folder.
    resumes
        Whether the command itself continues what an interrupted run of it left.
    """

    why: str
    argv: tuple[str, ...]
    makes: tuple[str, ...] = ()
    resumes: bool = False

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return "vcelltools " + shlex.join(self.argv)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the demo is."""

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
    """What the road ended with.

    Attributes
    ----------
    dpath
        The demo's folder.
    ran, skipped
        Steps that ran, and steps whose outputs were whole.
    scores
        Model -> metric -> value, baseline, ceiling and score: of ``score.json``.
    held_out
        What ``summary.json`` of the transformer's run says of each model on the held-out groups.
    difference
        The transformer's average score less the perturbation-mean's, with its interval over perturbations.
    beats_mean
        Whether the transformer's average score is above 0, the mean baseline's.
    """

    dpath: Path
    ran: int
    skipped: int
    seconds: float
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
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
# What the commands of the demo read: one file says where the data sets are and which column means what.
# For your own files: vcelltools init writes one.

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
# Two laboratories train. All perturbed cells of the third are held out: the model sees its controls alone.

[training]
kolf = "train"
lab_b = "train"

[zeroshot]
"lab_c.line4" = "test"
"""


def make_road(s: Sizes) -> tuple[Step, ...]:
    """Return the steps, in order."""

    def simulate(out: str, cells: int, seed: int, *more: object) -> tuple[str, ...]:
        words = ("simulate", "--out", out, "--cells", cells, "--genes", s.genes, "--perturbations", s.perturbations)
        return tuple(map(str, (*words, "--inert", 0, "--seed", seed, "--effect-seed", 7, *more)))

    def predicted(model: str) -> str:
        return f"pred_{model.replace('-', '_')}.h5ad"

    def score(model: str, *more: str) -> tuple[str, ...]:
        return ("score", predicted(model), "--ceiling", "--out", f"scores/{model}", *more)

    stores = tuple(w for n in ("kolf", "lab_b", HELD_OUT) for w in ("--store", f"stores/{n}"))
    other_lab = ("--pert-col", "target_gene", "--control", "non-targeting", "--group-by", "batch")
    return (
        Step(
            why="A screen in one cell line, with the column names and the encoding of the KOLF atlas.",
            argv=simulate("kolf.h5mu", s.cells[0], 1, "--like", "kolf"),
            makes=("kolf.h5mu",),
        ),
        Step(
            why="The same biology in another laboratory: two other cell lines, a tenth of the genes not measured.",
            argv=simulate("lab_b.h5ad", s.cells[1], 2, "--cell-lines", 2, "--first-cell-line", 2, "--genes-drop", 0.1),
            makes=("lab_b.h5ad",),
        ),
        Step(
            why="A third laboratory and a fourth cell line. Its perturbed cells are the truth to be predicted.",
            argv=simulate(f"{HELD_OUT}.h5ad", s.cells[2], 3, "--first-cell-line", 4),
            makes=(f"{HELD_OUT}.h5ad",),
        ),
        Step(why="What is in a file: matrices, counts, and which columns mean what.", argv=("inspect", "kolf.h5mu")),
        Step(
            why="Highly variable genes of one file, and the statistics that later steps use again.",
            argv=("hvg", "kolf.h5mu", "--top", str(s.top), "--out", "hvgs_kolf.txt", "--plot", "hvgs_kolf.png"),
            makes=("hvgs_kolf.txt", "hvgs_kolf.png"),
        ),
        Step(
            why="One list of genes for the two training atlases; the held-out one has no say in it.",
            argv=("basis", "--top", str(s.top), "--out", "basis.txt"),
            makes=("basis.txt", "basis.json"),
        ),
        Step(
            why="The training atlases as compact stores: groups side by side, every byte with a checksum.",
            argv=("build-store", "--out", "stores"),
            makes=("stores/kolf", "stores/lab_b"),
            resumes=True,
        ),
        Step(
            why="The third atlas over the same genes, described by options alone.",
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
        Step(why="Are the stores whole?", argv=("verify", *(f"stores/{n}" for n in ("kolf", "lab_b", HELD_OUT)))),
        Step(
            why="A transformer over sets of cells; the split keeps the third atlas's perturbed cells out of it.",
            argv=("train", *stores, "--steps", str(s.steps), "--out", "runs/transformer"),
            makes=("runs/transformer/summary.json", "runs/transformer/best"),
            resumes=True,
        ),
        Step(
            why="The held-out atlas, predicted: its own controls moved by what the model has learned.",
            argv=("predict", "--run", "runs/transformer", "--out", predicted("transformer")),
            makes=(predicted("transformer"),),
        ),
        Step(
            why="The bar to clear, a model too: every perturbation's mean effect in the other laboratories.",
            argv=("train", "--model", "perturbation-mean", *stores, "--out", "runs/perturbation-mean"),
            makes=("runs/perturbation-mean/summary.json",),
            resumes=True,
        ),
        Step(
            why="Its prediction, by the same command.",
            argv=("predict", "--run", "runs/perturbation-mean", "--out", predicted("perturbation-mean")),
            makes=(predicted("perturbation-mean"),),
        ),
        Step(
            why="The held-out cells as log1p of counts per ten thousand, the scale of the predictions.",
            argv=("normalize", f"{HELD_OUT}.h5ad", "--out", "truth.h5ad"),
            makes=("truth.h5ad",),
        ),
        Step(
            why="The prediction against the held-out cells: 0 is the mean baseline, 1 the best possible.",
            argv=score("transformer", "--report", "report.html"),
            makes=("scores/transformer/score.json", "report.html"),
        ),
        Step(
            why="The bar, scored in the same way.",
            argv=score("perturbation-mean"),
            makes=("scores/perturbation-mean/score.json",),
        ),
    )


def run_demo(
    dpath: str | Path = "vcelltools-demo",
    *,
    quick: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    output: IO[str] | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> DemoResult:
    """Walk the road in a folder; a second walk skips what is done and whole.

    Parameters
    ----------
    quick
        Tiny data and few steps: shows the commands, not what a model can learn.
    force
        Run every step again; also take a folder that holds other files.
    say
        Receives the demo's own lines.
    output
        Where the commands' results go; default: this process's stdout.
    quiet
        Keep what the commands print, and show it only when one fails.
    verbose
        Give every command ``-v``.

    Raises
    ------
    UsageError
        Where the folder holds other files.
    VcellError
        Of the kind of the step that failed.
    """
    began = time.monotonic()
    folder = check_kind(dpath, folder=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / _STATE).exists() and not force:
        raise UsageError(f"{folder} holds other files", hint="choose another --dir, or --force to write beside them")
    sizes = QUICK if quick else FULL
    check_output(folder / _STATE, force=True, need_bytes=100 * sizes.genes * sum(sizes.cells) // 50)
    road = make_road(sizes)
    say = say or (lambda _: None)
    walk = _Walk(folder, road, force=force, say=say, output=output, quiet=quiet, verbose=verbose)
    walk.write_files({"vcelltools.toml": CONFIG.format(**_get_fields(sizes)), "split.toml": SPLIT})
    for number, step in enumerate(road, 1):
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
        difference=compare_scores(folder / "scores/transformer", folder / "scores/perturbation-mean"),
    )


class _Walk:
    """Runs steps in a folder and remembers what each one wrote, and from what."""

    def __init__(
        self,
        folder: Path,
        road: Sequence[Step],
        *,
        force: bool,
        say: Callable[[str], None],
        output: IO[str] | None,
        quiet: bool,
        verbose: bool,
    ) -> None:
        self.folder, self.road, self.force, self.say = folder, road, force, say
        self.output, self.quiet, self.verbose = output, quiet, verbose
        self.ran = self.skipped = 0
        state = _read(folder / _STATE) if (folder / _STATE).exists() else {}
        self.done: dict[str, Any] = state.get("steps", {}) if state.get("version") == __version__ else {}
        self.inputs = hashlib.sha256()  # of the files and of everything that the steps so far wrote

    def write_files(self, files: dict[str, str]) -> None:
        """Write what the steps read."""
        for name, text in files.items():
            path = self.folder / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_text(path, text, force=True)
            self.inputs.update(text.encode())

    def take(self, step: Step, number: int) -> None:
        """Run a step, or skip it where what it wrote is whole and was made from the same inputs."""
        key = hashlib.sha256(self.inputs.digest() + step.line.encode()).hexdigest()
        known = self.done.get(step.line)
        was_made = known is not None and known["key"] == key
        head = f"[{number}/{len(self.road)}]"
        if known is not None and was_made and not self.force and known["makes"] == self._digest(step):
            self.skipped += 1
            self.say(f"{head} $ {step.line}\n      done before")
        else:
            self.say(f"\n{head} {step.why}\n$ {step.line}")
            self._run(step, again=self.force or known is not None)
            self.done[step.line] = {"key": key, "makes": self._digest(step)}
            write_json(self.folder / _STATE, {"version": __version__, "steps": self.done}, force=True)
            self.ran += 1
        self.inputs.update(json.dumps(self.done[step.line]["makes"], sort_keys=True).encode())

    def _run(self, step: Step, *, again: bool) -> None:
        """Run the command. What is in its way is overwritten, unless the command itself continues it."""
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
                raise RuntimeError(f"{step.line}: ended with {done.returncode}")
            raise kind(f"the demo stopped at: {step.line}", hint="the same demo command continues there")

    def _digest(self, step: Step) -> dict[str, str]:
        """Return path -> hash of every file that a step makes; a missing one is missing here too."""
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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read: {e}", hint="vcelltools demo --force runs every step again") from e


def _get_fields(sizes: Sizes) -> dict[str, Any]:
    return {k: getattr(sizes, k) for k in sizes.__dataclass_fields__}
