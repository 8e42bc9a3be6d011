"""Suggest the next command, as a command line that runs as printed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcelltools.config import Config


def find_free(name: str) -> Path:
    """Return the name, or a similar one that is not taken."""
    path = Path(name)
    numbered = (path.with_stem(f"{path.stem}-{i}") for i in count(2))
    return path if not path.exists() else next(p for p in numbered if not p.exists())


def find_config() -> tuple[Config, Path] | None:
    """Return the configuration in the working directory and its folder; the parser is loaded only if there is one."""
    if not Path("vcelltools.toml").exists():
        return None
    from vcelltools.config import load_config

    return load_config()


def find_building(genes: Path, sources: Iterable[str | None]) -> tuple[object, ...]:
    """Return the command that builds stores of these genes, or the one that writes the configuration first."""
    if (found := find_config()) is not None:
        config, base = found
        if not config.datasets:
            return ()
        is_default = (base / config.basis.path).resolve() == genes.resolve()
        return ("build-store", *(() if is_default else ("--basis", genes)))
    folders = {Path(s).parent.resolve() for s in sources if s}
    return ("init",) if folders == {Path().resolve()} else ()


def find_scoring(out: Path) -> tuple[object, ...]:
    """Return the command that scores a prediction against the configured truth, or nothing without one."""
    from vcelltools.config import load_config

    return ("score", out) if load_config()[0].score.truth is not None else ()


def find_comparing(truth: Path) -> tuple[object, ...]:
    """Return the words that write a baseline of a log1p file, or inspect it where its labels are not known."""
    from vcelltools.config import load_config
    from vcelltools.io import open_dataset

    score = load_config()[0].score
    pert_col, control = score.pert_col or "target_gene", score.control or "non-targeting"
    with open_dataset(truth) as ds:
        labels = set(ds.obs.factorize(pert_col)[1]) if pert_col in ds.obs.columns else set()
    if len(labels) < 2 or control not in labels:
        return ("inspect", truth)
    return ("baseline", "--truth", truth, "--out", find_free("baseline.h5ad"))
