"""The settings of this room, from a ``spaceship_config.toml`` and from options, which override it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from vcelltools.errors import DataError, UsageError
from vcelltools.io.textfile import checking, parse_toml, read_text
from vcelltools.spatial._received import KERNELS, RADIUS_RULES
from vcelltools.spatial.lasso import SCALES
from vcelltools.spatial.modulators import Choice, read_names

CONFIG_NAME = "spaceship_config.toml"
RUN_NAME = "spacetravlr_run_repro.toml"
MODES = ("seed", "full")  # one lasso per cluster; coefficients that vary around it from cell to cell
ENCODERS = ("position", "map")
TRUNKS = ("shared", "own")
_MESH = 8  # the mesh of the map is halved three times
# settings of the mode full only, with their keys in the TOML
FULL_ONLY = {
    "epochs": ("training", "epochs"), "lr": ("training", "learning_rate"), "encoder": ("training", "encoder"),
    "trunk": ("training", "trunk"), "spatial_dim": ("spatial", "spatial_dim"),
}  # fmt: skip


class Options(TypedDict, total=False):
    """The settings as keyword arguments; :class:`Settings` describes each of them."""

    layer: str
    cluster_annot: str
    coords: str | None
    dims: int | None
    condition: str | None
    radius: float
    contact_distance: float
    radius_rule: str
    kernel: str
    weighted_ligand_scale_factor: float
    network: str | os.PathLike | None
    network_dir: str | os.PathLike | None
    species: str | None
    tf_ligand_cutoff: float
    max_ligands: int | None
    extra_modulators: tuple[str, ...]
    extra_lr: tuple[str, ...]
    use_tf_modulators: bool
    use_lr_modulators: bool
    use_tfl_modulators: bool
    tf_prior: str | os.PathLike | None
    l1_reg: float | None
    group_reg: float | None
    scale_reg: str
    standardize: bool
    tol: float
    mode: str
    epochs: int
    lr: float
    encoder: str
    trunk: str
    spatial_dim: int
    score_threshold: float
    min_cells: int
    min_nonzero: int
    validate: bool
    null: int
    stability: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a fit.

    Attributes
    ----------
    layer, cluster_annot, coords, dims
        Layer of the expression, obs column of the clusters, array of obsm, and number of its columns to use.
    condition
        obs column, each value of which is fitted separately.
    radius, contact_distance, radius_rule
        Radius of received ligands, and that of contact ligands if the rule is ``by-signaling``.
    kernel
        ``exact``, ``fast`` or ``auto``.
    weighted_ligand_scale_factor
        Factor on received ligands.
    network, network_dir, species
        The network file, or the folder and species to find it.
    tf_ligand_cutoff, max_ligands, extra_modulators, extra_lr, use_tf_modulators, use_lr_modulators, use_tfl_modulators
        The choice of modulators.
    tf_prior
        A table of source and target that replaces the TF edges of the network.
    l1_reg, group_reg, scale_reg, standardize, tol
        The penalties (None: chosen by block cross-validation), their scaling with the group size, whether they act on
        standardised columns, and the certificate to reach.
    mode
        ``seed``: one lasso per cluster. ``full``: coefficients that vary around it from cell to cell, where they
        predict held-out blocks better.
    epochs, lr
        The most epochs, and the learning rate; in mode ``full``, like the next ones.
    encoder, spatial_dim
        How the network sees a cell's place: ``position`` (its coordinates) or ``map`` (its distances to a mesh with
        ``spatial_dim`` nodes on each side).
    trunk
        ``shared``: one network for all clusters. ``own``: one for each.
    score_threshold, min_cells, min_nonzero
        Minimum R² for coefficients other than 0, minimum cells per cluster, and minimum non-zero cells per column.
    validate, null, stability
        Whether R² is measured on held-out blocks, number of rearrangements of senders, and number of half-samples.
    seed
        Random seed.
    """

    layer: str = "imputed_count"
    cluster_annot: str = "cell_type_int"
    coords: str | None = None
    dims: int | None = None
    condition: str | None = None
    radius: float = 200.0
    contact_distance: float = 50.0
    radius_rule: str = "one"
    kernel: str = "auto"
    weighted_ligand_scale_factor: float = 1.0
    network: str | None = None
    network_dir: str | None = None
    species: str | None = None
    tf_ligand_cutoff: float = 0.15
    max_ligands: int | None = None
    extra_modulators: tuple[str, ...] = ()
    extra_lr: tuple[str, ...] = ()
    use_tf_modulators: bool = True
    use_lr_modulators: bool = True
    use_tfl_modulators: bool = True
    tf_prior: str | None = None
    l1_reg: float | None = None
    group_reg: float | None = None
    scale_reg: str = "group-size"
    standardize: bool = False
    tol: float = 1e-6
    mode: str = "seed"
    epochs: int = 100
    lr: float = 3e-3
    encoder: str = "position"
    trunk: str = "shared"
    spatial_dim: int = 32
    score_threshold: float = 0.0
    min_cells: int = 20
    min_nonzero: int = 10
    validate: bool = True
    null: int = 0
    stability: int = 0
    seed: int = 0

    def check(self) -> Settings:
        """Return the settings, or raise a :class:`UsageError` that names an invalid one."""
        for name, known in (
            ("kernel", KERNELS), ("radius_rule", RADIUS_RULES), ("scale_reg", SCALES), ("mode", MODES),
            ("encoder", ENCODERS), ("trunk", TRUNKS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", hint=f"one of: {', '.join(known)}")
        for name in ("radius", "contact_distance", "weighted_ligand_scale_factor", "tol", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} is {getattr(self, name)}; a number above 0 is expected")
        for name in ("l1_reg", "group_reg"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value}; a number from 0 on is expected")
        for name in ("min_cells", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; at least 1 is expected")
        for name in ("null", "stability", "min_nonzero", "seed"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; 0 or more is expected")
        if self.dims not in (None, 2, 3):
            raise UsageError(f"dims is {self.dims}; 2 or 3 is expected")
        if self.null and not self.validate:
            raise UsageError("null compares held-out gains, so it needs validate", hint="remove one of the two")
        if self.mode == "full" and not self.validate:
            raise UsageError("mode full compares held-out R², so it needs validate", hint="remove one of the two")
        if self.spatial_dim < _MESH or self.spatial_dim % _MESH:
            raise UsageError(f"spatial_dim is {self.spatial_dim}; a multiple of {_MESH} is expected")
        return self

    @property
    def choice(self) -> Choice:
        """The choice of modulators."""
        return Choice(
            cutoff=self.tf_ligand_cutoff, max_ligands=self.max_ligands, extra_modulators=self.extra_modulators,
            extra_lr=self.extra_lr, use_tf=self.use_tf_modulators, use_lr=self.use_lr_modulators,
            use_tfl=self.use_tfl_modulators,
        )  # fmt: skip

    @property
    def tissue(self) -> dict[str, Any]:
        """The arguments of :func:`vcelltools.spatial.tissue.open_tissue`."""
        return {k: getattr(self, k) for k in ("layer", "cluster_annot", "coords", "dims")}


_NAMES = [f.name for f in fields(Settings)]
# setting of each (section, key) of the TOML; the first key of a setting is written
_KEYS: dict[tuple[str, str], str] = {
    ("data", "layer"): "layer",
    ("data", "cluster_annot"): "cluster_annot",
    ("data", "condition"): "condition",
    ("data", "coords"): "coords",
    ("data", "dims"): "dims",
    ("spatial", "radius"): "radius",
    ("spatial", "contact_distance"): "contact_distance",
    ("spatial", "weighted_ligand_scale_factor"): "weighted_ligand_scale_factor",
    ("spatial", "kernel"): "kernel",
    ("spatial", "radius_rule"): "radius_rule",
    ("grn", "network_data_dir"): "network_dir",
    ("grn", "network"): "network",
    ("grn", "species"): "species",
    ("grn", "tf_ligand_cutoff"): "tf_ligand_cutoff",
    ("grn", "max_ligands"): "max_ligands",
    ("grn", "max_lr_pairs"): "max_ligands",
    ("grn", "extra_modulators"): "extra_modulators",
    ("grn", "extra_lr"): "extra_lr",
    ("grn", "use_tf_modulators"): "use_tf_modulators",
    ("grn", "use_lr_modulators"): "use_lr_modulators",
    ("grn", "use_tfl_modulators"): "use_tfl_modulators",
    ("grn", "tf_priors_feather"): "tf_prior",
    ("lasso", "l1_reg"): "l1_reg",
    ("lasso", "group_reg"): "group_reg",
    ("lasso", "tol"): "tol",
    ("lasso", "scale_reg"): "scale_reg",
    ("lasso", "standardize"): "standardize",
    ("training", "mode"): "mode",
    **{key: name for name, key in FULL_ONLY.items()},
    ("training", "score_threshold"): "score_threshold",
    ("training", "min_cells"): "min_cells",
    ("training", "min_nonzero"): "min_nonzero",
    ("training", "validate"): "validate",
    ("training", "null"): "null",
    ("training", "stability"): "stability",
    ("training", "seed"): "seed",
}
_PATHS = ("network", "network_dir", "tf_prior")
# keys that belong to a command and not to the model, with the type of the value
_COMMAND = {
    ("data", "adata_path"): "text", ("data", "condition_value"): "text", ("training", "genes"): "a list of names",
    ("training", "max_genes"): "a whole number", ("execution", "output_dir"): "text",
    ("execution", "n_parallel"): "a whole number", ("perturbation", "beta_scale_factor"): "a number",
    ("perturbation", "beta_cap"): "a number", ("perturbation", "n_propagation"): "a whole number",
    ("perturbation", "cells_csv"): "text", ("perturbation", "cells_csv_column"): "text",
    ("perturbation", "ligand_grid_factor"): "a number", ("grn", "extra_modulators_file"): "text",
    ("grn", "extra_lr_file"): "text", ("identity", "data"): "text", ("identity", "network"): "text",
}  # fmt: skip


def _is_a(value: Any, kind: str) -> bool:
    if kind == "a list of names":
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    types = {"text": str, "a number": int | float, "a whole number": int, "true or false": bool}[kind]
    return isinstance(value, types) and (kind == "true or false" or not isinstance(value, bool))


@dataclass(frozen=True)
class Loaded:
    """A configuration file.

    Attributes
    ----------
    settings
        The settings in the file.
    command
        The keys that belong to a command, as ``section.key``.
    unused
        The keys that are not used.
    clusters
        Label of each cluster number, for a finished run.
    condition
        The obs column and its value for a run that was fitted to one condition.
    """

    settings: dict[str, Any]
    command: dict[str, Any]
    unused: tuple[str, ...]
    clusters: dict[int, str]
    condition: tuple[str, str] | None = None


def load_toml(path: str | os.PathLike) -> Loaded:
    """Read a ``spaceship_config.toml`` or the TOML of a finished run; paths are relative to its folder.

    Raises
    ------
    DataError
        If it is missing, not valid TOML, or has a value of the wrong type.
    """
    p = Path(path)
    raw = parse_toml(read_text(p, what="a configuration in TOML"), where=str(p))
    settings: dict[str, Any] = {}
    command: dict[str, Any] = {}
    unused: list[str] = []
    clusters: dict[int, str] = {}
    for section, body in raw.items():
        if section == "clusters" and isinstance(body, dict):
            with checking(p):
                clusters = {int(k): str(v) for k, v in body.items()}
            continue
        if not isinstance(body, dict):
            unused.append(section)
            continue
        for key, value in body.items():
            if (section, key) in _KEYS:
                name = _KEYS[section, key]
                settings[name] = _convert(value, name, f"{p}: [{section}] {key}", p.parent)
            elif (section, key) in _COMMAND:
                _need(value, _COMMAND[section, key], f"{p}: [{section}] {key}")
                command[f"{section}.{key}"] = value
            else:
                unused.append(f"{section}.{key}")
    for name in ("extra_modulators", "extra_lr"):
        if said := command.pop(f"grn.{name}_file", None):
            settings[name] = tuple(dict.fromkeys([*settings.get(name, ()), *read_names(None, p.parent / str(said))]))
    for key in ("data.adata_path", "execution.output_dir", "perturbation.cells_csv"):
        if isinstance(command.get(key), str) and command[key]:
            command[key] = str(p.parent / command[key])
    if command.pop("perturbation.ligand_grid_factor", None) is not None:
        settings.setdefault("kernel", "fast")
    value = command.pop("data.condition_value", None)
    condition = (str(settings.pop("condition", "")), str(value)) if value is not None else None
    return Loaded(settings, command, tuple(unused), clusters, condition)


def _need(value: Any, kind: str, where: str) -> None:
    if not _is_a(value, kind):
        raise DataError(f"{where} is {value!r}; {kind} is expected")


def _convert(value: Any, name: str, where: str, folder: Path) -> Any:
    default = getattr(Settings(), name)
    if name in ("extra_modulators", "extra_lr"):
        if not isinstance(value, str):
            _need(value, "a list of names", where)
        return read_names(value)
    if name in ("l1_reg", "group_reg") or isinstance(default, float):
        _need(value, "a number", where)
        return float(value)
    whole = isinstance(default, int) or name in ("dims", "max_ligands")
    _need(value, "true or false" if isinstance(default, bool) else "a whole number" if whole else "text", where)
    if name in _PATHS:
        return str(folder / value) if value else None
    return (value or None) if default is None and isinstance(value, str) else value


def make_settings(options: Mapping[str, Any], loaded: Loaded | None = None) -> Settings:
    """Return the settings of a configuration, overridden by the options.

    Raises
    ------
    UsageError
        If an option does not exist; the hint names the most similar one.
    """
    for name in options:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1)
            raise UsageError(f"no option is named {name!r}", hint=f"did you mean {near[0]!r}?" if near else None)
    given = {k: os.fspath(v) if k in _PATHS and v is not None else v for k, v in options.items()}
    for name in ("extra_modulators", "extra_lr"):
        if name in given:
            given[name] = read_names(given[name])
    out = replace(Settings(), **{**(loaded.settings if loaded else {}), **given}).check()
    if out.mode != "full":
        for name in FULL_ONLY:
            if name in given:
                raise UsageError(f"{name} is an option of training mode full", hint="set mode to full")
    if "spatial_dim" in given and out.encoder != "map":
        raise UsageError("spatial_dim is the mesh of the encoder map", hint="set encoder to map")
    return out


def dump_toml(settings: Settings, *, command: Mapping[str, Any], clusters: Mapping[int, str]) -> str:
    """Return the TOML that describes a run, which :func:`load_toml` can read."""
    values = asdict(settings)
    sections: dict[str, dict[str, Any]] = {}
    written: set[str] = set()
    for (section, key), name in _KEYS.items():
        value = values[name]
        if name in written or value is None or (name in FULL_ONLY and settings.mode != "full"):
            continue
        written.add(name)
        sections.setdefault(section, {})[key] = os.path.abspath(value) if name in _PATHS else value
    for name, value in command.items():
        section, key = name.split(".")
        if value is not None:
            sections.setdefault(section, {})[key] = value
    lines = []
    for section, body in sections.items():
        lines += [f"[{section}]", *(f"{k} = {_say(v)}" for k, v in body.items()), ""]
    lines += ["[clusters]", *(f"{_say(str(k))} = {_say(v)}" for k, v in clusters.items()), ""]
    return "\n".join(lines)


def _say(value: Any) -> str:
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_say(v) for v in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
