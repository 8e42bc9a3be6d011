"""``vcelltools.toml``: strict TOML into frozen structs, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta, field

from vcelltools.errors import DataError, UsageError
from vcelltools.textfile import read_text

CONFIG_NAME = "vcelltools.toml"
T = TypeVar("T")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=100)]
Positive = Annotated[int, Meta(ge=1)]
Label = str | int | float | bool


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: every key known, every type exact."""


class Guides(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a label that names several guides or perturbations is read.

    Attributes
    ----------
    sep
        What stands between them (``"A|B"``).
    n_col
        An obs column with the number of guides in the cell; without it the parts of the label are counted.
    policy
        ``single`` keeps cells with exactly one; ``combination`` keeps the sorted combination as one
        perturbation; ``first`` keeps the first.
    """

    sep: Annotated[str, Meta(min_length=1)] = "|"
    n_col: str | None = None
    policy: Literal["single", "combination", "first"] = "single"


class DatasetConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set: where it is, and which of its columns say what.

    Attributes
    ----------
    name, path
        The name of its store, and the file.
    preset
        Name of a public atlas (:data:`vcelltools.presets.PRESETS`); supplies the keys that are not given.
    modality, layer
        Which matrix holds the counts; detected and ``X`` by default.
    pert_col
        obs column with the perturbation.
    control
        The label or labels of control cells.
    control_is_missing
        Whether cells without a perturbation label are controls.
    group_by
        obs columns within which controls are matched (batch, donor, lane).
    cell_line, cell_line_col
        One cell line for all cells, or the obs column that holds it.
    gene_id_col, gene_name_col
        var columns with Ensembl ids and symbols; ``"index"`` for the var index; found by default.
    guides
        How labels that name several guides are read; None takes labels as they are.
    min_cells
        Groups (cell line, perturbation) with fewer cells are left out and listed.
    keep
        obs columns (bool) that must be true for a cell to be kept.
    library_size
        ``"matrix"`` (the sum over all genes) or the name of an obs column with the total counts.
    stats
        Folder of saved statistics (``vcelltools hvg --stats``); saves a pass over CSC files.
    sums
        Genes whose per-group sums are kept: ``all``, ``basis``, or ``auto`` (all, but basis for CSC files).
    duplicates
        Columns that are the same gene: ``sum`` adds their counts, ``first`` takes the first and says so.
    weight
        Weight of the data set in the basis and in sampling.
    """

    name: Name
    path: str = ""
    preset: str | None = None
    modality: str | None = None
    layer: str | None = None
    pert_col: str | None = None
    control: Label | list[Label] = field(default_factory=list)
    control_is_missing: bool = False
    group_by: list[str] = field(default_factory=list)
    cell_line: str | None = None
    cell_line_col: str | None = None
    gene_id_col: str | None = None
    gene_name_col: str | None = None
    guides: Guides | None = None
    min_cells: Positive = 1
    keep: list[str] = field(default_factory=list)
    library_size: str = "matrix"
    stats: str | None = None
    sums: Literal["auto", "all", "basis"] = "auto"
    duplicates: Literal["sum", "first"] = "sum"
    weight: Annotated[float, Meta(gt=0)] = 1.0

    @property
    def controls(self) -> tuple[str, ...]:
        """The control labels, as strings."""
        labels = self.control if isinstance(self.control, list) else [self.control]
        return tuple(dict.fromkeys(str(x) for x in labels))


class BasisConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The global gene basis.

    Attributes
    ----------
    top, path
        Number of genes, and the file that lists them.
    rule
        ``mean-rank``, or ``intersection`` (genes that are HVG in all data sets first, then in most).
    force, exclude
        Genes that are always in; regular expressions of genes that never are.
    aliases
        A tab-separated table ``alias, symbol`` (or ``alias, id``).
    """

    top: Positive = 2000
    path: str = "basis.txt"
    rule: Literal["mean-rank", "intersection"] = "mean-rank"
    force: list[str] = field(default_factory=list)
    force_targets: bool = False
    exclude: list[str] = field(default_factory=list)
    aliases: str | None = None


class StoreConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the stores lie, and how their values are scaled."""

    path: str = "stores"
    target_sum: Annotated[float, Meta(gt=0)] = 10_000.0
    seed: int = 0


class ScoreConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults of ``vcelltools score``."""

    truth: str | None = None
    profile: str | None = None
    compat: str | None = None
    pert_col: str | None = None
    control: str | None = None
    out: str | None = None
    report: str | None = None


class Config(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``train`` is checked by the trainer, whose options it holds."""

    basis: BasisConfig = field(default_factory=BasisConfig)
    datasets: list[DatasetConfig] = field(default_factory=list)
    store: StoreConfig = field(default_factory=StoreConfig)
    train: dict[str, Any] = field(default_factory=dict)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def get_dataset(self, name: str) -> DatasetConfig:
        """Return the data set of that name.

        Raises
        ------
        UsageError
            With the names there are.
        """
        for d in self.datasets:
            if d.name == name:
                return d
        names = [d.name for d in self.datasets]
        near = difflib.get_close_matches(name, names, 1)
        raise UsageError(
            f"no data set is named {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"names: {', '.join(names)}",
        )


def _field_names(cls: type) -> list[str]:
    return [f.encode_name for f in msgspec.structs.fields(cls)]


_KNOWN: dict[str, type] = {
    "basis": BasisConfig,
    "datasets": DatasetConfig,
    "store": StoreConfig,
    "score": ScoreConfig,
    "guides": Guides,
}


def convert(obj: Any, cls: type[T], *, where: str) -> T:
    """Build a struct from plain values.

    Raises
    ------
    DataError
        For an unknown key (with the nearest valid one), a missing key or a wrong type.
    """
    try:
        return msgspec.convert(obj, cls, strict=True)
    except msgspec.ValidationError as e:
        raise _explain(str(e), cls, where) from e


def _explain(text: str, cls: type, where: str) -> DataError:
    """Turn the library's message into one that names the key and the remedy."""
    message, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    names = re.findall(r"[A-Za-z_]+", path)
    owner = next((_KNOWN[n] for n in reversed(names) if n in _KNOWN), cls)
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown:
        key = unknown.group(1)
        keys = _field_names(owner)
        near = difflib.get_close_matches(key, keys, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(keys)}"
        at = f"[{path}] " if path else ""
        return DataError(f"{where}: {at}unknown key {key!r}", hint=hint)
    missing = re.search(r"missing required field `(.*)`", message)
    if missing:
        return DataError(
            f"{where}: {f'[{path}] ' if path else ''}{missing.group(1)!r} is missing", hint="docs/guide.md shows one"
        )
    choice = re.search(r"Invalid enum value (.*)", message)
    if choice and names:
        values = get_args(get_type_hints(owner).get(names[-1]))
        allowed = f"one of: {', '.join(map(str, values))}" if values else None
        return DataError(f"{where}: {path} {choice.group(1)} is not known", hint=allowed)
    return DataError(
        f"{where}: {path or 'the file'}: {message[:1].lower()}{message[1:]}",
        hint="text stands in quotes, numbers and true or false do not, lists in [ ]",
    )


def parse_config(text: str, *, where: str) -> Config:
    """Parse the text of a ``vcelltools.toml``."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise DataError(f"{where}: not valid TOML: {e}", hint="docs/guide.md shows one") from e
    config = convert(raw, Config, where=where)
    names = [d.name for d in config.datasets]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise DataError(f"{where}: two data sets are named {twice!r}", hint="each names its store: give them two")
    return config


def load_config(path: str | os.PathLike | None = None) -> tuple[Config, Path]:
    """Read ``path``, or ``vcelltools.toml`` of the working directory where there is one.

    Returns
    -------
    The configuration (defaults where there is no file), and the folder that its paths are relative to.
    """
    fpath = Path(path) if path is not None else Path(CONFIG_NAME)
    if path is None and not fpath.exists():
        return Config(), Path()
    text = read_text(fpath, what="a configuration in TOML", hint="vcelltools init writes one")
    return parse_config(text, where=str(fpath)), fpath.parent
