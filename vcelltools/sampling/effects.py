"""Compute the effect of every perturbation in every cell line from stores, and its part of the split.

The effect of a group (perturbation, cell line) is the mean of its cells minus the mean of the control cells of the
line, batch by batch: controls are weighted like the cells of the group are distributed over batches, so that a batch
effect does not count as an effect of the perturbation.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io.textfile import read_text
from vcelltools.names import fold
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.sampling.lines import list_lines, name_line
from vcelltools.sampling.splits import Split, hold_out, rank_perturbations
from vcelltools.stores.directions import get_senses

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.model.baselines import Effects, Pseudobulk
    from vcelltools.stores.store import Store

_BLOCK_ROWS = 2048
_JOINS = re.compile(r"[+|]")
_HELD_ROWS = 8192  # bytes of a store that are kept in memory after reading


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """All groups of some stores.

    Attributes
    ----------
    groups
        One row per group: ``store_id, line_id, pert_id, cells, part, perturbation, line, direction`` (a position in
        :data:`vcelltools.stores.directions.SENSES`, -1 if it is unknown).
    effect_kg
        (k, g) float32: effects of the groups, log1p CP10K.
    control_cg
        (lines, g) float64: mean of the control cells of each line.
    variance_g
        (g,) float64: variance of control cells about the mean of their line.
    perturbations, lines
        The vocabularies; perturbation 0 is the control, a line is ``STORE.LINE``.
    target_p
        (p,) int64: position of the targeted gene, -1 if it is not in the basis.
    direction_c
        (lines,) int64: the direction of the perturbations of each line, -1 if it is unknown or differs.
    pseudobulk
        Mean CP10K of all groups, if they were requested.
    """

    stores: tuple[Store, ...]
    groups: pd.DataFrame
    effect_kg: np.ndarray
    control_cg: np.ndarray
    variance_g: np.ndarray
    perturbations: list[str]
    lines: list[str]
    target_p: np.ndarray
    direction_c: np.ndarray
    pseudobulk: Pseudobulk | None = None

    @cached_property
    def places(self) -> dict[str, tuple[int, str]]:
        """Line -> (position of its store, its name there)."""
        return list_lines(self.stores)

    def rows(self, part: str) -> np.ndarray:
        """Return the positions of the groups of ``train``, ``val`` or ``test``."""
        return np.flatnonzero(self.groups["part"].to_numpy() == part)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return perturbation and line ids of groups."""
        picked = self.groups.iloc[rows]
        return picked["pert_id"].to_numpy(np.int64), picked["line_id"].to_numpy(np.int64)

    def with_split(self, split: Split) -> Screen:
        """Return the same groups with the parts of another split; groups that it does not use are ``unused``."""
        parts = []
        for r in self.groups.itertuples():
            store, line = self.places[r.line]
            parts.append(split.get_part(self.stores[store].name, line, r.perturbation) or "unused")
        return replace(self, groups=self.groups.assign(part=parts))

    def get_effects(
        self,
        features_pf: np.ndarray | None = None,
        *,
        network_pp: np.ndarray | None = None,
        relabel_cp: np.ndarray | None = None,
    ) -> Effects:
        """Return the training groups for models of effects; ``relabel_cp`` replaces their labels (a sanity check)."""
        from vcelltools.model.baselines import Effects

        rows = self.rows("train")
        pert, line = self.ids(rows)
        bulk, direction = self.pseudobulk, self.groups["direction"].to_numpy(np.int64)
        if bulk is not None:
            bulk = replace(bulk, cp10k_kg=bulk.cp10k_kg[rows], base_kg=bulk.base_kg[rows])
        return Effects(
            effect_kg=self.effect_kg[rows].astype(np.float64),
            pert_k=pert if relabel_cp is None else relabel_cp[line, pert],
            context_k=line,
            cells_k=self.groups["cells"].to_numpy(np.int64)[rows],
            control_cg=self.control_cg,
            n_perturbations=len(self.perturbations),
            target_p=self.target_p,
            features_pf=features_pf,
            network_pp=network_pp,
            pseudobulk=bulk,
            parts_p=find_parts(self.perturbations),
            direction_k=direction[rows] if (direction >= 0).any() else None,
            direction_pc=self._list_directions() if (direction >= 0).any() else None,
        )

    def _list_directions(self) -> np.ndarray:
        """Return the direction (p, lines) of every group, and that of its line for groups that were not measured."""
        out = np.tile(self.direction_c, (len(self.perturbations), 1))
        pert, line = self.ids(np.arange(len(self.groups)))
        out[pert, line] = self.groups["direction"].to_numpy(np.int64)
        return out


def make_screen(
    stores: Sequence[Store], split: Split, perturbations: list[str], lines: list[str], *, progress: Progress = SILENT
) -> Screen:
    """Read and verify the stores once, and return their groups."""
    import pandas as pd

    pert_id = {p: i for i, p in enumerate(perturbations)}
    line_id = {name: i for i, name in enumerate(lines)}
    n_genes = stores[0].n_genes
    control_cg = np.zeros((len(lines), n_genes))
    direction_c = np.full(len(lines), -1)
    records, effects = [], []
    progress.start("measure effects", sum(s.n_cells for s in stores), "cells")
    for k, store in enumerate(stores):
        runs, parts = store.runs, split.get_run_parts(store)
        controls, held, sense = _mean_controls(store), 0, get_senses(store.directions)
        for line, members in runs.groupby("cell_line"):
            some = np.unique(sense[members.index])
            some = some[some >= 0]
            direction_c[line_id[name_line(store.name, line)]] = some[0] if len(some) == 1 else -1
        for (line, pert), members in runs[~runs["is_control"]].groupby(["cell_line", "perturbation"], sort=True):
            part = parts[members.index[0]]
            if part is None or (line, None) not in controls:
                continue
            total, cells, baseline = np.zeros(n_genes), 0, np.zeros(n_genes)
            for run in members.itertuples():
                total += sum_rows(store, run.start, run.length)
                baseline += run.length * controls.get((line, run.context), controls[line, None])
                cells += run.length
                progress.advance(run.length)
            held += cells
            if held > _HELD_ROWS:
                store.release()
                held = 0
            name = name_line(store.name, line)
            records.append((k, line_id[name], pert_id[pert], cells, part, pert, name, sense[members.index[0]]))
            effects.append(((total - baseline) / cells).astype(np.float32))
        for (line, context), mean in controls.items():
            if context is None:
                control_cg[line_id[name_line(store.name, line)]] = mean
        store.release()
    progress.finish()
    if not records:
        raise DataError("no perturbation has both cells and controls in its cell line")
    columns = ["store_id", "line_id", "pert_id", "cells", "part", "perturbation", "line", "direction"]
    return Screen(
        stores=tuple(stores),
        groups=pd.DataFrame(records, columns=columns),
        effect_kg=np.stack(effects),
        control_cg=control_cg,
        variance_g=_pool_variance(stores),
        perturbations=perturbations,
        lines=lines,
        target_p=find_targets(stores[0], perturbations),
        direction_c=direction_c,
    )


def split_name(name: str) -> tuple[str, ...]:
    """Return the sorted parts of a combination, ``A+B`` or ``A|B``; an empty tuple for a single perturbation."""
    parts = [p.strip() for p in _JOINS.split(name)]
    return tuple(sorted(parts)) if len(parts) > 1 and all(parts) else ()


def find_parts(perturbations: Sequence[str]) -> dict[int, tuple[int, ...]] | None:
    """Return the positions of the parts of each combination whose parts are all listed; None without any."""
    position = {p: i for i, p in enumerate(perturbations)}
    out = {}
    for i, name in enumerate(perturbations[1:], 1):
        parts = split_name(name)
        if parts and all(position.get(p, 0) > 0 for p in parts):
            out[i] = tuple(position[p] for p in parts)
    return out or None


def find_targets(store: Store, perturbations: Sequence[str]) -> np.ndarray:
    """Return the column (p,) int64 of the gene that each perturbation targets, -1 if the basis lacks it."""
    position = {g: i for i, g in enumerate(store.genes.tolist())}
    symbols = store.gene_table["symbol"].tolist()
    position |= {s: i for i, s in reversed(list(enumerate(symbols))) if isinstance(s, str)}
    return np.array([-1, *(position.get(p, -1) for p in perturbations[1:])], np.int64)


def sum_rows(store: Store, start: int, length: int) -> np.ndarray:
    """Return the float64 sum (g,) of some neighbouring rows, after verifying them."""
    total = np.zeros(store.n_genes)
    for a in range(start, start + length, _BLOCK_ROWS):
        rows = np.arange(a, min(a + _BLOCK_ROWS, start + length))
        if not store.is_checked(rows):
            store.check_rows(rows)
        total += store.X[rows[0] : rows[-1] + 1].astype(np.float32).sum(axis=0, dtype=np.float64)
    return total


def _pool_variance(stores: Sequence[Store], cells: int = 1000) -> np.ndarray:
    """Return the variance (g,) of control cells about the mean of their run, from a limited number of cells per run."""
    total, freedom = np.zeros(stores[0].n_genes), 0
    for store in stores:
        runs = store.runs
        for run in runs[runs["is_control"]].itertuples():
            n = min(run.length, cells)
            if n > 1:  # cells are stored in random order within a run
                total += store.X[run.start : run.start + n].astype(np.float32).var(axis=0, dtype=np.float64) * n
                freedom += n - 1
        store.release()
    return total / max(freedom, 1)


def _mean_controls(store: Store) -> dict[tuple[str, str | None], np.ndarray]:
    """Return control means by (line, context), and of the whole line under (line, None)."""
    runs = store.runs
    means: dict[tuple[str, str | None], np.ndarray] = {}
    for line, members in runs[runs["is_control"]].groupby("cell_line"):
        pooled, cells = np.zeros(store.n_genes), 0
        for run in members.itertuples():
            total = sum_rows(store, run.start, run.length)
            means[line, run.context] = total / run.length
            pooled, cells = pooled + total, cells + run.length
            store.release()
        means[line, None] = pooled / cells
    return means


def choose_split(stores: Sequence[Store], *, seed: int, unseen: bool, share: float = 0.15) -> Split:
    """Return the default split.

    With several cell lines and no features, each line holds out perturbations that other lines
    have. Otherwise (``unseen``, one line, or nothing in common), at least one perturbation is held out everywhere.
    """
    lines = {(s.name, line) for s in stores for line in s.runs.loc[~s.runs["is_control"], "cell_line"].unique()}
    if not unseen and len(lines) > 1:
        split = replace(_hold_pairs(stores, {"test": share, "val": share / 2}, seed), where="the default split")
        if split.fewshot:
            return split
    split = hold_out(stores, test=share, val=share / 2, seed=seed)
    perturbations = rank_perturbations(stores, seed)
    if "test" not in split.heldout.values() and len(perturbations) > 1:  # the hash may select none if there are few
        split = replace(split, heldout={**split.heldout, perturbations[0]: "test"})
    return split


def add_validation(split: Split, stores: Sequence[Store], *, seed: int, share: float = 0.1) -> Split:
    """Return the split, with some training groups moved to ``val`` if it has none.

    Groups of perturbations that keep another training line are moved first. If there are none (with one training line),
    other groups are moved, up to half of them, because test groups must never be used for model selection.
    """
    parts = {p for s in stores for p in split.get_run_parts(s)}
    if "val" in parts:
        return split
    held = _hold_pairs(stores, {"val": share}, seed + 1, split)
    if not held.fewshot:
        held = _hold_pairs(stores, {"val": share}, seed + 1, split, keep_a_line=False)
    merged = {key: dict(table) for key, table in split.fewshot.items()}
    for (name, line), table in held.fewshot.items():
        merged[name, line] = {**table, **merged.get((name, line), {})}
    return replace(split, fewshot=merged)


def _hold_pairs(
    stores: Sequence[Store],
    shares: dict[str, float],
    seed: int,
    within: Split | None = None,
    *,
    keep_a_line: bool = True,
) -> Split:
    """Hold out fractions of the (line, perturbation) pairs (or of training pairs ``within`` a split) by a seeded hash.

    At least three pairs are held out if possible: those whose perturbation keeps another line, or any pairs, up to
    half of them.
    """
    from xxhash import xxh3_64_intdigest

    pairs: list[tuple] = []
    lines_left: dict = {}
    for s in stores:
        table = s.runs.loc[~s.runs["is_control"], ["cell_line", "perturbation"]].drop_duplicates()
        for line, pert in table.itertuples(index=False):
            if within is not None and within.get_part(s.name, line, pert) != "train":
                continue
            pairs.append((xxh3_64_intdigest(f"{s.name}\0{line}\0{pert}".encode(), seed), s.name, line, pert))
            lines_left[pert] = lines_left.get(pert, 0) + 1
    pairs.sort()
    few: dict[tuple[str, str], dict[str, str]] = {}
    for part, share in shares.items():
        wanted, rest = max(3, round(share * len(pairs))), []
        if not keep_a_line:
            wanted = min(wanted, len(pairs) // 2)
        for pair in pairs:
            _, name, line, pert = pair
            if wanted and (lines_left[pert] > 1 or not keep_a_line):
                few.setdefault((name, line), {})[pert] = part
                lines_left[pert] -= 1
                wanted -= 1
            else:
                rest.append(pair)
        pairs = rest
    return Split(fewshot=few)


def read_features(fpath: Path, perturbations: list[str], progress: Progress = SILENT) -> np.ndarray:
    """Return the features (p, f) of the perturbations, with NaN rows for those that the file lacks.

    The file is a table (.csv, .tsv, .parquet) with the names in the first column, or an .npz with ``names`` and
    ``values``.

    Raises
    ------
    DataError
        If it cannot be read, holds values that are not numbers, or has none of the perturbations.
    """
    import pandas as pd

    what, hint = (
        "a table of numbers with names in the first column",
        f"{spell('features')} takes .csv, .tsv, .parquet or .npz",
    )
    try:
        if fpath.suffix == ".npz":
            with np.load(fpath, allow_pickle=False) as z:
                names, values = z["names"].astype(str).tolist(), np.asarray(z["values"], np.float64)
        else:
            if fpath.suffix == ".parquet":
                table = pd.read_parquet(fpath)
                if isinstance(table.index, pd.RangeIndex):
                    table = table.set_index(table.columns[0])
            else:
                text = read_text(fpath, what=what, hint=hint)
                table = pd.read_csv(io.StringIO(text), sep="\t" if fpath.suffix == ".tsv" else ",", index_col=0)
            names, values = table.index.astype(str).tolist(), table.to_numpy(np.float64)
    except FileNotFoundError as e:
        raise DataError(f"{fpath}: no such file", hint=hint) from e
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{fpath} is not {what}: {e}", hint=hint) from e
    if values.ndim != 2 or len(names) != len(values) or not np.isfinite(values).all():
        raise DataError(f"{fpath} has the shape {values.shape} instead of one row of finite numbers per name")
    names = [n.strip() for n in names]
    row = {n: i for i, n in enumerate(names)}
    if len(row) < len(names):
        twice = next(n for n, k in Counter(names).items() if k > 1)
        raise DataError(
            f"{fpath} contains {twice!r} {names.count(twice)} times", hint="one row per perturbation is expected"
        )
    out = np.full((len(perturbations), values.shape[1]), np.nan)
    for i, p in enumerate(perturbations):
        if p in row:
            out[i] = values[row[p]]
    lacking = [
        p for p, described in zip(perturbations[1:], np.isfinite(out[1:]).all(axis=1), strict=True) if not described
    ]
    if len(lacking) == len(perturbations) - 1:
        raise DataError(
            f"{fpath} has none of the {len(perturbations) - 1:,} perturbations",
            hint=f"its names: {', '.join(names[:3]) or 'none'}; names in the stores: {', '.join(perturbations[1:4])}",
        )
    if lacking:
        folded = {fold(n): n for n in names}
        near = [(p, folded[fold(p)]) for p in lacking if fold(p) in folded]
        but = f"; its name {near[0][1]!r} may be {near[0][0]!r} in the stores" if near else ""
        progress.note(
            f"{fpath}: {len(lacking):,} of the {len(perturbations) - 1:,} perturbations have no features there and are "
            f"treated as average ones ({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}){but}"
        )
    return out
