"""Read the perturbation, cell line and context of the cells, and check them against the configuration.

Everything is computed on codes of labels, one range of cells at a time, so that a column of millions of strings is
never in memory.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import numpy as np

from vcelltools.config import DatasetConfig, Guides
from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.table import RANGE, Table
from vcelltools.stores.directions import UNKNOWN, parse_direction

_CENSUS = 12
_MAX_TABLE = 1 << 26  # maximum number of combinations of contexts for a lookup table


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of every cell.

    Attributes
    ----------
    line, perturbation, context
        (n,) int32 codes into the lists below; perturbation 0 is the control; -1 for dropped cells.
    lines, perturbations, contexts
        The labels; a context is a tuple of the values of ``group_by``.
    dropped
        Reason -> number of dropped cells.
    small
        (cell line, perturbation, cells) of the groups below ``min_cells``.
    direction
        (lines, perturbations) object: the direction of each group, or None if none was given.
    """

    line: np.ndarray
    perturbation: np.ndarray
    context: np.ndarray
    lines: list[str]
    perturbations: list[str]
    contexts: list[tuple[str, ...]]
    dropped: dict[str, int]
    small: list[tuple[str, str, int]]
    direction: np.ndarray | None = None

    def without_cells(self) -> Labels:
        """Return the lists without the codes, which are not needed once the order is known."""
        none = np.empty(0, np.int32)
        return replace(self, line=none, perturbation=none, context=none)


def _census(codes: np.ndarray, found: list[str]) -> str:
    """Return the most frequent labels; code -1 is a missing label."""
    sizes = np.bincount(codes + 1, minlength=len(found) + 1)
    names = ["(missing)", *found]
    order = [i for i in np.argsort(-sizes, kind="stable").tolist() if sizes[i]]
    top = ", ".join(f"{names[i]} {sizes[i]:,}" for i in order[:_CENSUS])
    more = f", and {len(order) - _CENSUS:,} more" if len(order) > _CENSUS else ""
    return f"labels found: {top}{more}"


def _factorize(obs: Table, name: str) -> tuple[np.ndarray, list[str]]:
    codes, labels = obs.factorize(name)
    if (codes < 0).any():
        codes[codes < 0] = len(labels)
        labels = [*labels, "(missing)"]
    return codes, labels


def _check_controls(codes: np.ndarray, found: list[str], controls: tuple[str, ...], where: str) -> None:
    """Raise a :class:`DataError` that lists the labels if a control label matches no cell."""
    sizes = np.bincount(codes[codes >= 0], minlength=len(found))
    there = {x for x, n in zip(found, sizes.tolist(), strict=True) if n}
    for c in controls:
        if c not in there:
            near = difflib.get_close_matches(c, list(there), 1, 0.6)
            guess = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{where}: no cell has the control label {c!r}", hint=f"{guess}{_census(codes, found)}")


def _read_guides(
    codes: np.ndarray, found: list[str], obs: Table, guides: Guides | None
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return (codes, labels, keep) after applying the policy for labels with several guides."""
    if guides is None:
        return codes, found, np.ones(len(codes), bool)
    parts = [list(dict.fromkeys(p for p in x.split(guides.sep) if p)) for x in found]
    if guides.policy == "first":
        read = [p[0] if p else None for p in parts]
    else:  # two guides of one target are one perturbation, and A|B equals B|A
        read = [guides.sep.join(sorted(p)) or None for p in parts]
    keep = np.ones(len(codes), bool)
    if guides.policy == "single":
        if guides.n_col is not None:
            few, alone = _count_guides(obs, guides.n_col), np.ones(len(found) + 1, bool)
        else:
            few = np.ones(len(codes), bool)
            alone = np.array([*(len(set(x.split(guides.sep))) <= 1 for x in found), True], bool)
        alone &= np.array([*(x is not None and guides.sep not in x for x in read), True], bool)
        nothing = np.array(
            [*(x is None for x in read), True], bool
        )  # a cell without a guide does not have several guides
        keep = (alone[codes] & few) | nothing[codes]
    names = sorted({x for x in read if x is not None})
    position = {x: i for i, x in enumerate(names)}
    lookup = np.array([*(-1 if x is None else position[x] for x in read), -1], np.int32)
    return lookup[codes], names, keep


def _count_guides(obs: Table, name: str) -> np.ndarray:
    """Return (n,) bool: cells with at most one guide according to a numeric column; a missing number counts as none."""
    out = np.empty(obs.n, bool)
    for a, col in obs.ranges(name):
        if col.kind not in ("number", "bool"):
            raise DataError(f"obs/{name} does not hold the number of guides ({col.kind})")
        assert col.values is not None
        out[a : a + len(col)] = (col.values.astype(float) <= 1) | ~np.isfinite(col.values.astype(float))
        out[a : a + len(col)] |= col.get_missing()
    return out


def read_labels(obs: Table, spec: DatasetConfig, *, where: str) -> Labels:
    """Read the labels of the cells and check them against the configuration.

    Raises
    ------
    DataError
        If a column is missing, or a control label matches no cell (the message lists the labels).
    UsageError
        If the perturbation column or the controls are not given.
    """
    codes, found = _read_perturbations(obs, spec)
    codes, found, keep = _read_guides(codes, found, obs, spec.guides)
    dropped: dict[str, int] = {}

    def drop(mask: np.ndarray, why: str) -> None:
        n = int((mask & keep).sum())
        if n:
            dropped[why] = n
        keep[mask] = False

    if not keep.all():
        dropped["several guides"] = int((~keep).sum())
    for name in spec.keep:
        drop(~_read_flags(obs, name, where), f"not {name}")
    if not (spec.control_is_missing or spec.unperturbed):
        drop(codes < 0, "no perturbation label")
    _check_controls(codes[keep], found, spec.controls, where)
    used = np.bincount(codes[keep] + 1, minlength=len(found) + 1)[1:] > 0
    control = set(spec.controls)
    names = sorted({x for x, n in zip(found, used.tolist(), strict=True) if n and x not in control})
    perturbations = [spec.controls[0] if spec.controls else "control", *names]
    position = {x: i for i, x in enumerate(names, 1)}
    lookup = [0 if x in control else position.get(x, -1) for x in found]
    perturbation = np.array([*lookup, 0 if spec.control_is_missing or spec.unperturbed else -1], np.int32)[codes]
    line, lines = _read_lines(obs, spec)
    context, contexts = _read_contexts(obs, spec.group_by)
    small = _drop_small(line, perturbation, keep, spec.min_cells, lines, perturbations, dropped)
    for part in (line, perturbation, context):
        part[~keep] = -1
    if not (perturbation == 0).any():
        raise DataError(f"{where}: no control cell is left", hint=_census(codes, found))
    direction = _read_directions(obs, spec, line, perturbation, lines, perturbations, where)
    return Labels(
        line=line,
        perturbation=perturbation,
        context=context,
        lines=lines,
        perturbations=perturbations,
        contexts=contexts,
        dropped=dropped,
        small=small,
        direction=direction,
    )


def _read_perturbations(obs: Table, spec: DatasetConfig) -> tuple[np.ndarray, list[str]]:
    """Return (codes, labels) of the perturbation column; without perturbations every cell has code -1."""
    if spec.unperturbed:
        if spec.pert_col or spec.controls or spec.guides:
            raise UsageError(
                "unperturbed cells have no perturbation column, controls or guides",
                hint="remove them, or remove unperturbed",
            )
        return np.full(obs.n, -1, np.int32), []
    if not spec.pert_col:
        columns = ", ".join(obs.columns[:30]) or "none"
        raise UsageError(
            "the obs column of the perturbation is not given",
            hint=f"{spell('pert_col')}, or {spell('unperturbed')} if there is none; columns: {columns}",
        )
    codes, found = obs.factorize(spec.pert_col)
    if not spec.controls and not spec.control_is_missing:
        raise UsageError(
            "the label of the control cells is not given", hint=f"{spell('control')}; {_census(codes, found)}"
        )
    return codes, found


def _read_flags(obs: Table, name: str, where: str) -> np.ndarray:
    """Return (n,) bool from a column of booleans, or of 0 and 1; a missing value counts as False."""
    out = np.zeros(obs.n, bool)
    for a, col in obs.ranges(name):
        values = col.values
        if values is None or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
            raise DataError(f"{where}: obs/{name} is not a column of booleans (or of 0 and 1)")
        out[a : a + len(col)] = values.astype(bool) & ~col.get_missing()
    return out


def _read_lines(obs: Table, spec: DatasetConfig) -> tuple[np.ndarray, list[str]]:
    if spec.cell_line is not None and spec.cell_line_col is not None:
        raise UsageError("cell_line and cell_line_col are both given", hint="use one of them")
    if spec.cell_line_col is not None:
        return _factorize(obs, spec.cell_line_col)
    return np.zeros(obs.n, np.int32), [spec.cell_line or spec.name]


def _read_directions(
    obs: Table,
    spec: DatasetConfig,
    line: np.ndarray,
    perturbation: np.ndarray,
    lines: list[str],
    perturbations: list[str],
    where: str,
) -> np.ndarray | None:
    """Return the direction (lines, perturbations) of each group, or None if the description has none.

    Raises
    ------
    DataError
        If a direction is not known, or a perturbation has cells of two directions in a line.
    """
    if spec.direction is not None and spec.direction_col is not None:
        raise UsageError("direction and direction_col are both given", hint="use one of them")
    shape = len(lines), len(perturbations)
    if spec.direction is not None:
        return np.full(shape, parse_direction(spec.direction, where=where), object)
    if spec.direction_col is None:
        return None
    codes, found = obs.factorize(spec.direction_col)
    names = [*(parse_direction(x, where=f"{where}: obs/{spec.direction_col}") for x in found), UNKNOWN]
    every = sorted(set(names))
    codes = np.array([every.index(x) for x in names], np.int32)[codes]  # a missing label, -1, is unknown
    kept = line >= 0
    group = line[kept].astype(np.int64) * len(perturbations) + perturbation[kept]
    of_group = np.full(shape[0] * shape[1], -1, np.int32)
    of_group[group] = codes[kept]
    mixed = np.unique(group[of_group[group] != codes[kept]])
    if len(bad := mixed[mixed % len(perturbations) > 0]):
        at, p = divmod(int(bad[0]), len(perturbations))
        raise DataError(
            f"{where}: obs/{spec.direction_col}: {perturbations[p]!r} has cells of two directions in {lines[at]!r}",
            hint="build one store for each direction, from the cells that a boolean obs column keeps: "
            f"{spell('keep')} COLUMN",
        )
    of_group[mixed] = every.index(UNKNOWN) if UNKNOWN in every else -1  # controls that several directions share
    return np.array([*every, UNKNOWN], object)[of_group].reshape(shape)


def _read_contexts(obs: Table, columns: list[str]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return (codes, tuples of values) of the combinations of the columns, in sorted order."""
    code: np.ndarray = np.zeros(obs.n, np.int32)
    tuples: list[tuple[str, ...]] = [()]
    for name in columns:
        codes, labels = _factorize(obs, name)
        if len(tuples) * len(labels) <= _MAX_TABLE:
            code *= len(labels)
            code += codes
            there = np.zeros(len(tuples) * len(labels), bool)
            there[code] = True
            present = np.flatnonzero(there)
            rank = np.empty(len(there), np.int32)
            rank[present] = np.arange(len(present))
            code = rank[code]
        else:
            present, code = np.unique(code.astype(np.int64) * len(labels) + codes, return_inverse=True)
            code = code.astype(np.int32)
        at, last = np.divmod(present, len(labels))
        tuples = [(*tuples[i], labels[k]) for i, k in zip(at.tolist(), last.tolist(), strict=True)]
    return code, tuples


def _drop_small(line, perturbation, keep, min_cells, lines, perturbations, dropped) -> list[tuple[str, str, int]]:
    """Remove cells of groups below ``min_cells`` from ``keep`` (in place); return the groups."""
    if min_cells <= 1:
        return []
    counts = np.zeros(len(lines) * len(perturbations), np.int64)

    def iterate():
        for a in range(0, len(line), RANGE):
            part = slice(a, a + RANGE)
            yield part, line[part].astype(np.int64) * len(perturbations) + np.maximum(perturbation[part], 0)

    for part, group in iterate():
        counts += np.bincount(group[keep[part]], minlength=len(counts))
    bad = (counts > 0) & (counts < min_cells)
    bad[:: len(perturbations)] = False  # controls are always kept
    if bad.any():
        dropped[f"group below {min_cells} cells"] = int(counts[bad].sum())
        for part, group in iterate():
            keep[part] &= ~bad[group]
    found = np.flatnonzero(bad)
    return [(lines[g // len(perturbations)], perturbations[g % len(perturbations)], int(counts[g])) for g in found]
