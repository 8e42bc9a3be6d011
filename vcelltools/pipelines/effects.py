"""From stores to effects: what every perturbation does in every cell line, and who may look at it.

The effect of a group (perturbation, cell line) is the mean of its cells minus the mean of the line's control cells,
batch by batch: controls are weighed as the group's cells are spread over the batches, so that a batch's own level
does not pass for an effect.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.errors import DataError
from vcelltools.pipelines.splits import Split, hold_out
from vcelltools.progress import SILENT, Progress
from vcelltools.textfile import read_text

if TYPE_CHECKING:
    import pandas as pd

    from vcelltools.model.baselines import Effects
    from vcelltools.pipelines.store import Store

_BLOCK_ROWS = 2048
_HELD_ROWS = 8192  # of a store that stay in memory after they have been read


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """Every group of some stores.

    Attributes
    ----------
    groups
        One row a group: ``store_id, line_id, pert_id, cells, part, perturbation, line``.
    effect_kg
        (k, g) float32: the groups' effects, log1p CP10K.
    control_cg
        (lines, g) float64: the mean of each line's control cells.
    variance_g
        (g,) float64: variance of one control cell about its line's mean.
    perturbations, lines
        The vocabularies; perturbation 0 is the control, a line is ``store / cell line``.
    target_p
        (p,) int64: the gene that a perturbation is named after, -1 where it is not in the basis.
    """

    stores: tuple[Store, ...]
    groups: pd.DataFrame
    effect_kg: np.ndarray
    control_cg: np.ndarray
    variance_g: np.ndarray
    perturbations: list[str]
    lines: list[str]
    target_p: np.ndarray

    def rows(self, part: str) -> np.ndarray:
        """Return the positions of the groups of ``train``, ``val`` or ``test``."""
        return np.flatnonzero(self.groups["part"].to_numpy() == part)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return perturbation and line ids of groups."""
        picked = self.groups.iloc[rows]
        return picked["pert_id"].to_numpy(np.int64), picked["line_id"].to_numpy(np.int64)

    def get_effects(self, features_pf: np.ndarray | None = None, *, relabel_cp: np.ndarray | None = None) -> Effects:
        """Return the training groups for the baselines; ``relabel_cp`` renames them by line (a sanity check)."""
        from vcelltools.model.baselines import Effects

        rows = self.rows("train")
        pert, line = self.ids(rows)
        return Effects(
            effect_kg=self.effect_kg[rows].astype(np.float64),
            pert_k=pert if relabel_cp is None else relabel_cp[line, pert],
            context_k=line,
            cells_k=self.groups["cells"].to_numpy(np.int64)[rows],
            control_cg=self.control_cg,
            n_perturbations=len(self.perturbations),
            target_p=self.target_p,
            features_pf=features_pf,
        )


def make_screen(
    stores: Sequence[Store], split: Split, perturbations: list[str], lines: list[str], *, progress: Progress = SILENT
) -> Screen:
    """Read the stores once, verified, and return their groups."""
    import pandas as pd

    pert_id = {p: i for i, p in enumerate(perturbations)}
    line_id = {name: i for i, name in enumerate(lines)}
    n_genes = stores[0].n_genes
    control_cg = np.zeros((len(lines), n_genes))
    records, effects = [], []
    progress.start("measure effects", sum(s.n_cells for s in stores), "cells")
    for k, store in enumerate(stores):
        runs, parts = store.runs, split.get_run_parts(store)
        controls, held = _mean_controls(store), 0
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
            name = f"{store.name} / {line}"
            records.append((k, line_id[name], pert_id[pert], cells, part, pert, name))
            effects.append(((total - baseline) / cells).astype(np.float32))
        for (line, context), mean in controls.items():
            if context is None:
                control_cg[line_id[f"{store.name} / {line}"]] = mean
        store.release()
    progress.finish()
    if not records:
        raise DataError("no perturbation has both cells and controls in its cell line")
    columns = ["store_id", "line_id", "pert_id", "cells", "part", "perturbation", "line"]
    position = {g: i for i, g in enumerate(stores[0].genes.tolist())}
    symbols = stores[0].gene_table["symbol"].tolist()
    position |= {s: i for i, s in reversed(list(enumerate(symbols))) if isinstance(s, str)}
    return Screen(
        stores=tuple(stores),
        groups=pd.DataFrame(records, columns=columns),
        effect_kg=np.stack(effects),
        control_cg=control_cg,
        variance_g=_pool_variance(stores),
        perturbations=perturbations,
        lines=lines,
        target_p=np.array([-1, *(position.get(p, -1) for p in perturbations[1:])], np.int64),
    )


def sum_rows(store: Store, start: int, length: int) -> np.ndarray:
    """Return the float64 sum (g,) of some neighbouring rows, verified."""
    total = np.zeros(store.n_genes)
    for a in range(start, start + length, _BLOCK_ROWS):
        rows = np.arange(a, min(a + _BLOCK_ROWS, start + length))
        if not store.is_checked(rows):
            store.check_rows(rows)
        total += store.X[rows[0] : rows[-1] + 1].astype(np.float32).sum(axis=0, dtype=np.float64)
    return total


def _pool_variance(stores: Sequence[Store], cells: int = 1000) -> np.ndarray:
    """Return the variance (g,) of control cells about the mean of their run, from up to so many cells of each."""
    total, freedom = np.zeros(stores[0].n_genes), 0
    for store in stores:
        runs = store.runs
        for run in runs[runs["is_control"]].itertuples():
            n = min(run.length, cells)
            if n > 1:  # the stored order within a run is random
                total += store.X[run.start : run.start + n].astype(np.float32).var(axis=0, dtype=np.float64) * n
                freedom += n - 1
        store.release()
    return total / max(freedom, 1)


def _mean_controls(store: Store) -> dict[tuple[str, str | None], np.ndarray]:
    """Return control means by (line, context) and, under (line, None), of the whole line."""
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
    """Return the split where none is given.

    With several cell lines and no features, each line holds out perturbations of its own choice that other lines
    have; else (``unseen``, or one line) some perturbations are held out everywhere.
    """
    lines = {(s.name, line) for s in stores for line in s.runs["cell_line"].unique()}
    if unseen or len(lines) == 1:
        return hold_out(stores, test=share, val=share / 2, seed=seed)
    return replace(_hold_pairs(stores, {"test": share, "val": share / 2}, seed), where="the default split")


def add_validation(split: Split, stores: Sequence[Store], *, seed: int, share: float = 0.1) -> Split:
    """Return the split, with some training groups moved to ``val`` where it has none."""
    parts = {p for s in stores for p in split.get_run_parts(s)}
    if "val" in parts:
        return split
    merged = {key: dict(table) for key, table in split.fewshot.items()}
    for (name, line), table in _hold_pairs(stores, {"val": share}, seed + 1, split).fewshot.items():
        merged[name, line] = {**table, **merged.get((name, line), {})}
    return replace(split, fewshot=merged)


def _hold_pairs(stores: Sequence[Store], shares: dict[str, float], seed: int, within: Split | None = None) -> Split:
    """Hold out shares of the (line, perturbation) pairs (``within`` a split: that train), by a seeded hash.

    Every perturbation keeps a line, and of the pairs that can be held out at least three are.
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
        for pair in pairs:
            _, name, line, pert = pair
            if wanted and lines_left[pert] > 1:
                few.setdefault((name, line), {})[pert] = part
                lines_left[pert] -= 1
                wanted -= 1
            else:
                rest.append(pair)
        pairs = rest
    return Split(fewshot=few)


def read_features(fpath: Path, perturbations: list[str]) -> np.ndarray:
    """Return the features (p, f) of the perturbations, NaN rows for those that the file lacks.

    The file is a table (.csv, .tsv, .parquet) with the names first, or an .npz with ``names`` and ``values``.

    Raises
    ------
    DataError
        When it cannot be read, holds other things than numbers, or knows none of the perturbations.
    """
    import pandas as pd

    what, hint = "a table of numbers with names first", "--features takes .csv, .tsv, .parquet or .npz"
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
        raise DataError(f"{fpath}: not {what}: {e}", hint=hint) from e
    if values.ndim != 2 or len(names) != len(values) or not np.isfinite(values).all():
        raise DataError(f"{fpath}: one row of finite numbers a name is expected; it has shape {values.shape}")
    row = {n: i for i, n in enumerate(names)}
    out = np.full((len(perturbations), values.shape[1]), np.nan)
    for i, p in enumerate(perturbations):
        if p in row:
            out[i] = values[row[p]]
    if not np.isfinite(out[1:]).any():
        raise DataError(
            f"{fpath}: none of the {len(perturbations) - 1:,} perturbations is in it",
            hint=f"it names {', '.join(names[:3]) or 'nothing'}, the stores {', '.join(perturbations[1:4])}",
        )
    return out
