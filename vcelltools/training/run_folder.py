"""The files of a run (configuration, vocabulary, metrics, checkpoints, summary) and their comparison with stores."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.textfile import parse_json, parse_toml, read_text
from vcelltools.io.write.atomic import atomic_file, write_json, write_text
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.names import split_lines
from vcelltools.sampling.lines import respell
from vcelltools.training.settings import FREE, TrainSettings, dump_toml, make_settings

if TYPE_CHECKING:
    from vcelltools.model.checkpoint import Checkpoint, Checkpointer
    from vcelltools.training.cell_inputs import CellSetup
    from vcelltools.training.inputs import Setup


def is_run(dpath: Path) -> bool:
    """Return whether a folder has the settings that :class:`RunFolder` writes first."""
    try:
        return (dpath / "config.toml").read_bytes().startswith(b"[train]\n")
    except OSError:
        return False


class BestState(NamedTuple):
    """The parameters with the best score, and the share of the transformer's change, as stored in a checkpoint."""

    params: Any
    share: Any


class RunFolder:
    """The files of one run."""

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath

    @property
    def metrics_fpath(self) -> Path:
        """The metrics, one JSON record per line."""
        return self.dpath / "metrics.jsonl"

    @property
    def summary_fpath(self) -> Path:
        """The summary, which is written at the end of the run."""
        return self.dpath / "summary.json"

    @property
    def config_fpath(self) -> Path:
        """The resolved settings, as TOML."""
        return self.dpath / "config.toml"

    @property
    def stability_fpath(self) -> Path:
        """The effects of the last evaluation, if the run stops once they are stable."""
        return self.dpath / "stability.npz"

    def checkpoints(self) -> Checkpointer:
        """The checkpoints of the last two states."""
        from vcelltools.model.checkpoint import Checkpointer

        return Checkpointer(self.dpath / "checkpoints", atomic_file)

    def best(self) -> Checkpointer:
        """The checkpoint with the best score on the validation groups."""
        from vcelltools.model.checkpoint import Checkpointer

        return Checkpointer(self.dpath / "best", atomic_file, keep=1)

    @property
    def is_trained(self) -> bool:
        """Whether the folder holds a summary or a state after some steps; one before the first step is no training."""
        states = [*self.checkpoints().dpath.glob("step-*"), *self.best().dpath.glob("step-*")]
        some = self.summary_fpath.exists() or any(p.stem != "step-00000000" for p in states)
        return self.config_fpath.exists() and some

    def guard(self, reads: Iterable[Path]) -> None:
        """Raise a :class:`UsageError` if the folder is, contains or lies inside an input, or is not a run folder."""
        guard_outputs([Target(self.dpath, "run", owns=is_run, reuse=True)], reads=reads)

    def open(self, setup: Setup | CellSetup, *, resume: bool, force: bool, extend: bool = False) -> bool:
        """Prepare the folder, and return whether it holds a run to continue.

        With ``extend``, a finished run is continued with another number of steps (:meth:`reopen`).

        Raises
        ------
        UsageError
            If it holds a finished run, or any run without ``resume``, and ``force`` is off.
        DataError
            If its run has other settings or stores.
        """
        if self.is_trained and not force:
            if not resume:
                hint = f"choose another {spell('out')}, or start again with {spell('force', True)}"
                raise UsageError(f"{self.dpath} holds a run", hint=hint)
            trains = setup.settings.model in ("transformer", "diffusion")
            if self.summary_fpath.exists() and not extend:
                raise UsageError(
                    f"{self.dpath} holds a finished run",
                    hint=f"choose another {spell('out')}, start again with {spell('force', True)}"
                    + (f", or train it further with {spell('extend', str(self.dpath))}" if trains else ""),
                )
            self._compare_settings(setup.settings, free=(*FREE, "steps") if extend else FREE)
            self.compare_vocabulary(setup)
            return True
        for keeper in (self.checkpoints(), self.best()):
            for fpath in sorted(keeper.dpath.glob("step-*"), reverse=True):
                fpath.unlink()
        for fpath in (self.metrics_fpath, self.summary_fpath, self.stability_fpath, self.dpath / "loss.png"):
            fpath.unlink(missing_ok=True)
        self._write_settings(setup)
        write_json(
            self.dpath / "vocabulary.json", {"identity": setup.identity, **setup.vocabulary}, force=True, indent=None
        )
        return False

    def _write_settings(self, setup: Setup | CellSetup) -> None:
        # stores that are built later do not belong to this run
        stores = [os.path.abspath(s.path) for s in setup.stores]
        write_text(self.config_fpath, dump_toml({**setup.settings.to_json(), "stores": stores}, "train"), force=True)

    def load_state(self, template: Any) -> Checkpoint | None:
        """Return the newest undamaged checkpoint of the state; None if training stopped before the first one."""
        found = self.checkpoints().load(template)
        if found is None and self.summary_fpath.exists():
            raise DataError(
                f"{self.dpath} has no checkpoint to continue from",
                hint=f"start another run with {spell('from_run', str(self.dpath))}",
            )
        return found

    def reopen(self, setup: Setup | CellSetup) -> int | None:
        """Make a finished run an unfinished one with the settings of ``setup``, and return its former number of steps.

        Return None if the run is not finished.
        """
        if not self.summary_fpath.exists():
            return None
        was = self.read_settings().length[0]
        self._write_settings(setup)
        for fpath in (self.summary_fpath, self.dpath / "loss.png"):
            fpath.unlink(missing_ok=True)
        return was

    def _compare_settings(self, settings: TrainSettings, free: tuple[str, ...] = FREE) -> None:
        old, new = self.read_settings().to_json(), settings.to_json()
        for key in old:
            if key not in free and old[key] != new.get(key):
                raise DataError(
                    f"{self.config_fpath}: {key} was {old[key]!r} but is now {new.get(key)!r}",
                    hint=f"continue with the old settings, choose another {spell('out')}, or start again with "
                    f"{spell('force', True)}",
                )

    def read_settings(self) -> TrainSettings:
        """Return the settings of the run."""
        if not self.config_fpath.exists():
            what = "is not a run folder: it has no config.toml" if self.dpath.exists() else "does not exist"
            raise DataError(f"{self.dpath} {what}", hint="vcelltools train --out writes a run folder")
        text = read_text(self.config_fpath, what="the configuration of a run")
        hint = f"train again with another {spell('out')}"
        table = parse_toml(text, where=str(self.config_fpath), hint=hint).get("train")
        if not isinstance(table, dict):
            raise DataError(f"{self.config_fpath} is damaged: it has no table [train]", hint=hint)
        return make_settings(table, {})

    def complete(self, settings: TrainSettings) -> TrainSettings:
        """Return settings with the run's stores and length in place of those that are not given."""
        if settings.stores and settings.steps is not None and settings.eval_every is not None:
            return settings
        old = self.read_settings()
        return msgspec.structs.replace(
            settings,
            stores=settings.stores or old.stores,
            steps=old.steps if settings.steps is None else settings.steps,
            eval_every=old.eval_every if settings.eval_every is None else settings.eval_every,
        )

    def compare_vocabulary(self, setup: Setup | CellSetup) -> None:
        """Raise a DataError with both hashes and the first difference if stores and run disagree."""
        old = self.read_vocabulary()
        was = old["identity"]
        for key, now in setup.identity.items():
            if was.get(key) == now:
                continue
            if key not in setup.vocabulary or key not in old:
                raise DataError(
                    f"{self.dpath} was trained with {key} {was.get(key)}, but here it is {now}",
                    hint="use the stores and files that the run was trained on, or train again",
                )
            a, b = respell(old[key], setup.stores), setup.vocabulary[key]
            if a == b:
                continue
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            first = [x[at] if at < len(x) else "nothing" for x in (a, b)]
            raise DataError(
                f"{self.dpath} was trained with other {key} ({str(was.get(key))[:12]}) than those here ({now[:12]}): "
                f"number {at} was {first[0]!r} but is {first[1]!r}",
                hint="use the stores and files that the run was trained on, or train again",
            )

    def read_vocabulary(self) -> dict[str, Any]:
        """Return the names of genes, perturbations, lines and parts, and the hashes under ``identity``."""
        fpath = self.dpath / "vocabulary.json"
        try:
            old = msgspec.json.decode(fpath.read_bytes(), type=dict[str, dict[str, Any] | list[str]])
            identity: dict[str, Any] = dict(old["identity"])  # type: ignore[arg-type]  # a list is a ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(f"{fpath} is damaged: {e}", hint=f"train again with another {spell('out')}") from e
        return {**old, "identity": identity}

    def cut_metrics(self, step: int) -> None:
        """Remove the records after ``step``, which the resumed run writes again."""
        if not self.metrics_fpath.exists():
            return
        kept = []
        for line in split_lines(self.metrics_fpath.read_text(encoding="utf-8")):
            try:
                record = parse_json(line)
            except ValueError:  # a line that was cut when the process was killed
                continue
            if record.get("step", 0) <= step:
                kept.append(line)
        write_text(self.metrics_fpath, "".join(f"{line}\n" for line in kept), force=True)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics."""
        from vcelltools.io.write.atomic import dump_json

        with open(self.metrics_fpath, "a", encoding="utf-8") as f:
            f.write(dump_json(record) + "\n")

    def plot(self) -> None:
        """Draw ``loss.png`` from the metrics: the loss minus its floor, and the scores of the validation groups."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        records = [parse_json(line) for line in split_lines(self.metrics_fpath.read_text(encoding="utf-8"))]
        train = [r for r in records if "excess" in r]
        slices = [r for r in records if "eval" in r]
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        left.plot([r["step"] for r in train], [r["excess"] for r in train], lw=1)
        left.set(xlabel="step", ylabel="energy distance − floor", title="training")
        left.axhline(0, color="0.6", lw=0.8)
        for name in ("pds", "pearson_delta"):
            right.plot([r["step"] for r in slices], [r["eval"][name] for r in slices], marker=".", label=name)
        right.set(xlabel="step", title="validation groups")
        right.legend(frameon=False)
        with atomic_file(self.dpath / "loss.png", force=True) as tmp:
            figure.savefig(tmp, format="png", dpi=120)
