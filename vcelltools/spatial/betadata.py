"""``{gene}_betadata.feather``: the coefficients of a target by cluster or by cell, in the layout of SpaceTravLR."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.frame import FORMATS, read_frame, write_frame
from vcelltools.io.write.atomic import write_text
from vcelltools.spatial.modulators import Modulators

SUFFIX = "_betadata"
ORPHAN = ".orphan"
CLUSTER, CELL = "Cluster", "CellID"
_CELL_NAMES = ("cell_id", "index", "obs_names")
_INTERCEPTS = ("beta0", "intercept")


@dataclass(frozen=True)
class Betas:
    """The coefficients of one target.

    Attributes
    ----------
    target
        Name of the target gene.
    names
        Modulators, one per column: ``TF``, ``L$R``, ``L#TF``.
    keys
        (r,) cluster numbers, or cell names if :attr:`per_cell`.
    intercept, values
        (r,) and (r, m) float64.
    per_cell
        Whether the rows are cells.
    """

    target: str
    names: tuple[str, ...]
    keys: np.ndarray
    intercept: np.ndarray
    values: np.ndarray
    per_cell: bool

    @cached_property
    def modulators(self) -> Modulators:
        """The modulators by kind; a name without ``$`` and ``#`` is treated as a TF."""
        lr = tuple(_cut(n, "$") for n in self.names if "$" in n)
        tfl = tuple(_cut(n, "#") for n in self.names if "#" in n and "$" not in n)
        return Modulators(tf=tuple(n for n in self.names if "$" not in n and "#" not in n), lr=lr, tfl=tfl)

    @cached_property
    def ordered(self) -> np.ndarray:
        """(r, m) values in the order of :attr:`modulators`."""
        place = {n: i for i, n in enumerate(self.names)}
        return self.values[:, [place[n] for n in self.modulators.names]]

    def to_columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the file, without those that are zero everywhere."""
        out: dict[str, np.ndarray] = {CELL if self.per_cell else CLUSTER: self.keys, "beta0": self.intercept}
        for i, name in enumerate(self.names):
            if self.values[:, i].any():
                out[f"beta_{name}"] = self.values[:, i]
        return out


def _cut(name: str, mark: str) -> tuple[str, str]:
    a, _, b = name.partition(mark)
    return a, b


def write_betas(folder: Path, betas: Betas) -> Path:
    """Write the betadata, or an empty ``{gene}.orphan`` if no modulator is left, and return the path."""
    if not betas.values.any():
        return write_text(folder / f"{betas.target}{ORPHAN}", "", force=True)
    return write_frame(folder / f"{betas.target}{SUFFIX}.feather", betas.to_columns(), force=True)


def list_betas(folder: str | os.PathLike) -> dict[str, Path]:
    """Return the betadata file of each target, sorted by name; feather is preferred to Parquet, and that to CSV."""
    out: dict[str, Path] = {}
    for ending in FORMATS:
        for p in sorted(Path(folder).glob(f"*{SUFFIX}{ending}")):
            if not p.name.startswith("."):
                out.setdefault(p.name.removesuffix(SUFFIX + ending), p)
    return dict(sorted(out.items()))


def read_betas(path: str | os.PathLike, target: str, labels: Mapping[int, str]) -> Betas:
    """Read a betadata file of any layout: feather, Parquet or CSV, by cluster or cell, with or without ``beta_``.

    Parameters
    ----------
    labels
        Label of each cluster number, for files with cluster labels.

    Raises
    ------
    DataError
        If the table has no row names, a column that is not numeric, or duplicate rows.
    """
    p = Path(path)
    table = read_frame(p, what="betadata")
    names = table.column_names
    if len(set(names)) != len(names):
        raise DataError(f"{p} has two columns with the same name")
    numeric = {n for n in names if _is_number(table.schema.field(n).type)}
    intercept = next((n for n in _INTERCEPTS if n in names), None)
    cell = next((n for n in names if n in (CELL, *_CELL_NAMES) or re.fullmatch(r"__index.*", n)), None)
    key = CLUSTER if CLUSTER in names else cell
    if key is None:
        raise DataError(f"{p} has neither a column {CLUSTER!r} nor one of cell names", hint=f"columns: {names[:6]}")
    drop = {key, intercept, *_CELL_NAMES, CELL, CLUSTER, *(n for n in names if n.startswith("__index"))}
    beta = [n for n in names if n not in drop]
    for n in [*beta, *([intercept] if intercept is not None else [])]:
        if n not in numeric:
            raise DataError(f"{p}: column {n!r} does not hold numbers")
    per_cell = key != CLUSTER
    raw = table.column(key).to_pylist()
    if any(v is None for v in raw):
        raise DataError(f"{p}: {key} has empty rows")
    keys = np.array([str(v) for v in raw], dtype=object) if per_cell else _number_clusters(p, raw, labels)
    if len(set(keys.tolist())) != len(keys):
        raise DataError(f"{p}: {key} contains a row twice")
    values = np.empty((table.num_rows, len(beta)))
    for i, n in enumerate(beta):
        values[:, i] = table.column(n).to_numpy()
    base = np.zeros(table.num_rows) if intercept is None else table.column(intercept).to_numpy().astype(np.float64)
    if not np.isfinite(values).all() or not np.isfinite(base).all():
        raise DataError(f"{p} holds coefficients that are not finite")
    return Betas(target, tuple(n.removeprefix("beta_") for n in beta), keys, base, values, per_cell)


def _is_number(kind: object) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind)


def _number_clusters(path: Path, raw: list, labels: Mapping[int, str]) -> np.ndarray:
    """Return cluster numbers, where labels are replaced by their numbers in the run or the data."""
    by_label = {v: k for k, v in labels.items()}
    out = []
    for v in raw:
        if isinstance(v, int) or (isinstance(v, float) and v.is_integer()):
            out.append(int(v))
        elif str(v) in by_label:
            out.append(by_label[str(v)])
        elif re.fullmatch(r"-?\d+", str(v)):
            out.append(int(v))
        else:
            raise DataError(f"{path}: the data have no cluster {v!r}", hint=f"clusters: {', '.join(labels.values())}")
    return np.array(out, np.int64)
