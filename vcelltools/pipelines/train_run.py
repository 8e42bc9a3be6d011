"""The folder of a run: configuration, vocabulary, metrics, checkpoints, summary; and whether it fits the stores."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import DataError, UsageError
from vcelltools.io.atomic import atomic_file, check_kind, write_json, write_text
from vcelltools.pipelines.train_settings import FREE, TrainSettings, dump_toml, make_settings
from vcelltools.textfile import read_text

if TYPE_CHECKING:
    from vcelltools.model.checkpoint import Checkpointer
    from vcelltools.pipelines.train_setup import Setup


class RunFolder:
    """The files of one run."""

    def __init__(self, dpath: Path) -> None:
        self.dpath = dpath

    @property
    def metrics_fpath(self) -> Path:
        """JSON lines, one record each."""
        return self.dpath / "metrics.jsonl"

    @property
    def summary_fpath(self) -> Path:
        """Written when the run is complete."""
        return self.dpath / "summary.json"

    @property
    def config_fpath(self) -> Path:
        """The resolved settings, as TOML."""
        return self.dpath / "config.toml"

    def checkpoints(self) -> Checkpointer:
        """The last two states."""
        from vcelltools.model.checkpoint import Checkpointer

        return Checkpointer(self.dpath / "checkpoints", atomic_file)

    def best(self) -> Checkpointer:
        """The state that scored best on the validation groups."""
        from vcelltools.model.checkpoint import Checkpointer

        return Checkpointer(self.dpath / "best", atomic_file, keep=1)

    def open(self, setup: Setup, *, resume: bool, force: bool) -> bool:
        """Prepare the folder; return whether there is a run in it to continue.

        Raises
        ------
        UsageError
            When it holds a finished run, or any with ``resume`` off, and ``force`` is off.
        DataError
            When the run in it was made with other settings or stores.
        """
        started = self.config_fpath.exists()
        if started and resume and not force:
            if self.summary_fpath.exists():
                raise UsageError(f"{self.dpath} holds a finished run", hint="choose another --out, or --force")
            self._compare_settings(setup.settings)
            self.compare_vocabulary(setup)
            return True
        if started and not force:
            raise UsageError(f"{self.dpath} holds a run", hint="--resume continues it, --force starts it anew")
        check_kind(self.dpath, folder=True)
        if not started and self.dpath.exists() and any(self.dpath.iterdir()) and not force:
            raise UsageError(f"{self.dpath} is not empty and holds no run", hint="choose another --out, or --force")
        for keeper in (self.checkpoints(), self.best()):
            for fpath in sorted(keeper.dpath.glob("step-*"), reverse=True):
                fpath.unlink()
        for fpath in (self.metrics_fpath, self.summary_fpath, self.dpath / "loss.png"):
            fpath.unlink(missing_ok=True)
        write_text(self.config_fpath, dump_toml(setup.settings.to_json(), "train"), force=True)
        write_json(
            self.dpath / "vocabulary.json", {"identity": setup.identity, **setup.vocabulary}, force=True, indent=None
        )
        return False

    def _compare_settings(self, settings: TrainSettings) -> None:
        old, new = self.read_settings().to_json(), settings.to_json()
        for key in old:
            if key not in FREE and old[key] != new[key]:
                raise DataError(
                    f"{self.config_fpath}: {key} was {old[key]!r} and is now {new[key]!r}",
                    hint="continue with the old settings, choose another --out, or --force",
                )

    def read_settings(self) -> TrainSettings:
        """Return the settings that the run was made with."""
        if not self.config_fpath.exists():
            what = "not a run: it has no config.toml" if self.dpath.exists() else "no such run"
            raise DataError(f"{self.dpath}: {what}", hint="vcelltools train --out makes one")
        text = read_text(self.config_fpath, what="the configuration of a run")
        try:
            table = tomllib.loads(text)["train"]
        except (tomllib.TOMLDecodeError, KeyError) as e:
            raise DataError(f"{self.config_fpath}: damaged: {e}", hint="train into another folder") from e
        return make_settings(table, {})

    def compare_vocabulary(self, setup: Setup) -> None:
        """Raise a DataError, with both hashes and the first difference, where stores and run disagree."""
        fpath = self.dpath / "vocabulary.json"
        try:
            old = json.loads(fpath.read_text(encoding="utf-8"))
            was = old["identity"]
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"{fpath}: unreadable: {e}") from e
        for key, now in setup.identity.items():
            if was.get(key) == now:
                continue
            if key not in setup.vocabulary:
                raise DataError(f"{self.dpath}: trained with {key} {was.get(key)}; here it is {now}", hint="--stores")
            a, b = old[key], setup.vocabulary[key]
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            first = [x[at] if at < len(x) else "nothing" for x in (a, b)]
            raise DataError(
                f"{self.dpath}: trained with other {key} ({was.get(key, '')[:12]}) than the stores have ({now[:12]}): "
                f"number {at} was {first[0]!r} and is {first[1]!r}",
                hint="use the stores that the run was trained on",
            )

    def cut_metrics(self, step: int) -> None:
        """Drop the records after ``step``: the continued run writes them again."""
        if not self.metrics_fpath.exists():
            return
        kept = []
        for line in self.metrics_fpath.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line cut by a kill
                continue
            if record.get("step", 0) <= step:
                kept.append(line)
        write_text(self.metrics_fpath, "".join(f"{line}\n" for line in kept), force=True)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to the metrics."""
        from vcelltools.io.atomic import dump_json

        with open(self.metrics_fpath, "a", encoding="utf-8") as f:
            f.write(dump_json(record) + "\n")

    def plot(self) -> None:
        """Draw ``loss.png`` from the metrics: the loss above its floor, and the scores of the slice."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        records = [json.loads(line) for line in self.metrics_fpath.read_text(encoding="utf-8").splitlines()]
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
