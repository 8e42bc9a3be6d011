"""Parse ``vcelltools.toml`` into frozen structs; errors name the key and the nearest valid one."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta, field

from vcelltools.errors import DataError, UsageError, check_number
from vcelltools.io.textfile import parse_toml, read_text

CONFIG_NAME = "vcelltools.toml"
T = TypeVar("T")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=100)]
Positive = Annotated[int, Meta(ge=1)]
Label = str | int | float | bool


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the tables, which rejects unknown keys and wrong types."""


class Guides(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How labels that name several guides or perturbations are read.

    Attributes
    ----------
    sep
        The separator between them (``"A|B"``).
    n_col
        An obs column with the number of guides in the cell; without it, the parts of the label are counted.
    policy
        ``single`` keeps cells with exactly one; ``combination`` keeps the sorted combination as one
        perturbation; ``first`` keeps the first.
    """

    sep: Annotated[str, Meta(min_length=1)] = "|"
    n_col: str | None = None
    policy: Literal["single", "combination", "first"] = "single"


class DatasetConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set: its file and the meaning of its columns.

    Attributes
    ----------
    name, path
        The name of its store, and its file.
    preset
        Name of a public atlas (:data:`vcelltools.presets.PRESETS`), which supplies the missing keys.
    modality, layer
        The matrix that holds the counts. By default, the modality is detected and the layer is ``X``.
    feature_type, genome
        Which features are genes: by default those of type ``Gene Expression``, of all genomes.
    pert_col
        obs column with the perturbation.
    control
        The label or labels of the control cells.
    control_is_missing
        Whether cells without a perturbation label are controls.
    unperturbed
        Whether the data set has no perturbations, so that every cell is a control.
    non_integer
        Whether fractional counts are an error, or are rounded stochastically with the seed of the store.
    group_by
        obs columns within which controls are matched (batch, donor, lane).
    cell_line, cell_line_col
        One cell line for all cells, or the obs column that holds it.
    direction, direction_col
        How the perturbations change their targets: ``crispri``, ``knockout``, ``knockdown``, ``crispra``,
        ``overexpression`` or ``treatment`` for all cells, or the obs column that holds it.
    gene_id_col, gene_name_col
        var columns with Ensembl ids and symbols, or ``"index"`` for the var index; detected by default.
    guides
        How labels that name several guides are read; None leaves labels unchanged.
    min_cells
        Groups (cell line, perturbation) with fewer cells are dropped and listed.
    keep
        obs columns (bool) that must be true for a cell to be kept.
    library_size
        ``"matrix"`` (the sum over all genes) or the name of an obs column with the total counts.
    stats
        Folder of saved statistics (``vcelltools hvg --stats``), which save a pass over CSC files.
    sums
        Genes whose group sums are stored: ``all``, ``basis``, or ``auto`` (``basis`` for CSC files, otherwise ``all``).
    duplicates
        Columns of the same gene: ``sum`` adds their counts, ``first`` takes the first, with a note.
    weight
        Weight of the data set in the basis and in sampling.
    """

    name: Name
    path: str = ""
    preset: str | None = None
    modality: str | None = None
    layer: str | None = None
    feature_type: str | None = None
    genome: str | None = None
    pert_col: str | None = None
    control: Label | list[Label] = field(default_factory=list)
    control_is_missing: bool = False
    unperturbed: bool = False
    non_integer: Literal["refuse", "round"] = "refuse"
    group_by: list[str] = field(default_factory=list)
    cell_line: str | None = None
    cell_line_col: str | None = None
    direction: str | None = None
    direction_col: str | None = None
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
        Number of genes, and the file of the list.
    rule
        ``mean-rank``, or ``intersection`` (genes that are HVG in all data sets first, then in most).
    force, exclude
        Genes that are always included, and regular expressions of genes that are always excluded.
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
    """The folder of the stores, and the scale of their values."""

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


class AtlasConfig(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults of ``vcelltools atlas``.

    Attributes
    ----------
    billing_project
        Google Cloud project to bill for reading a requester-pays bucket; without it, nothing is billed.
    """

    billing_project: str | None = None


class Config(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. The trainer validates ``train``, which holds its options."""

    basis: BasisConfig = field(default_factory=BasisConfig)
    datasets: list[DatasetConfig] = field(default_factory=list)
    store: StoreConfig = field(default_factory=StoreConfig)
    train: dict[str, Any] = field(default_factory=dict)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    atlas: AtlasConfig = field(default_factory=AtlasConfig)

    def get_dataset(self, name: str) -> DatasetConfig:
        """Return the data set with a name.

        Raises
        ------
        UsageError
            If there is none; the message lists the names.
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
    "atlas": AtlasConfig,
    "guides": Guides,
}


_DEPTH = 20


def convert(obj: Any, cls: type[T], *, where: str) -> T:
    """Build a struct from plain values.

    Raises
    ------
    DataError
        If a key is unknown (the message names the nearest valid one) or missing, or has the wrong type.
    """
    _check_numbers(obj, where)
    try:
        return msgspec.convert(obj, cls, strict=True)
    except msgspec.ValidationError as e:
        raise _explain(str(e), cls, where) from e


def _check_numbers(obj: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Raise a :class:`DataError` for a number that is infinite, NaN or too large, and for tables nested too deeply."""
    if depth > _DEPTH:
        raise DataError(f"{where}: {key} is nested too deeply", hint="tables are nested a few levels at most")
    if isinstance(obj, dict):
        for k, v in obj.items():
            _check_numbers(v, where, f"{key}.{k}".lstrip("."), depth + 1)
    elif isinstance(obj, list | tuple):
        for v in obj:
            _check_numbers(v, where, key, depth + 1)
    elif isinstance(obj, int | float) and not isinstance(obj, bool):
        try:
            check_number(key, obj)
        except UsageError as e:
            raise DataError(f"{where}: {key} is {obj}", hint="use a finite number of a reasonable size") from e


def _explain(text: str, cls: type, where: str) -> DataError:
    """Rewrite the message of msgspec so that it names the key and the remedy."""
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
            f"{where}: {f'[{path}] ' if path else ''}{missing.group(1)!r} is missing",
            hint="see the example in docs/guide.md",
        )
    choice = re.search(r"Invalid enum value (.*)", message)
    if choice and names:
        values = get_args(get_type_hints(owner).get(names[-1]))
        allowed = f"one of: {', '.join(map(str, values))}" if values else None
        return DataError(f"{where}: {path} {choice.group(1)} is not known", hint=allowed)
    return DataError(
        f"{where}: {path or 'the file'}: {message[:1].lower()}{message[1:]}",
        hint="write text in quotes, lists in [ ], and numbers, true and false without quotes",
    )


def parse_config(text: str, *, where: str) -> Config:
    """Parse the text of a ``vcelltools.toml``."""
    raw = parse_toml(text, where=where, hint="see the example in docs/guide.md")
    config = convert(raw, Config, where=where)
    names = [d.name for d in config.datasets]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise DataError(
            f"{where}: two data sets are named {twice!r}",
            hint="give each data set its own name, which is also the name of its store",
        )
    return config


def load_config(path: str | os.PathLike | None = None) -> tuple[Config, Path]:
    """Read ``path``, or ``vcelltools.toml`` in the working directory if it exists.

    Returns
    -------
    The configuration (the defaults without a file), and the folder to which its paths are relative.
    """
    fpath = Path(path) if path is not None else Path(CONFIG_NAME)
    if path is None and not fpath.exists():
        return Config(), Path()
    text = read_text(fpath, what="a configuration in TOML", hint="write one with vcelltools init")
    return parse_config(text, where=str(fpath)), fpath.parent
