"""The columns of the regressions, built once per cluster for all targets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vcelltools.spatial._received import Receiver
from vcelltools.spatial.modulators import EXTRA, KINDS, LR, TF, TFL, Modulators
from vcelltools.spatial.tissue import Tissue


@dataclass(frozen=True)
class Columns:
    """The union of the modulators of some targets; the columns are sorted by kind.

    Attributes
    ----------
    kinds
        (p,) kind of every column, as a position in ``KINDS``.
    first, second
        (p,) names: TF or extra and "", ligand and receptor, or ligand and TF.
    at
        Columns (m,) of each target, by kind.
    starts
        Start of each kind among the columns of each target (5,).
    """

    kinds: np.ndarray
    first: list[str]
    second: list[str]
    at: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]

    @property
    def ligands(self) -> list[str]:
        """All ligands, each once."""
        paired = (self.kinds == KINDS.index(LR)) | (self.kinds == KINDS.index(TFL))
        return list(dict.fromkeys(self.first[i] for i in np.flatnonzero(paired)))

    @property
    def genes(self) -> list[str]:
        """All genes of the columns, each once."""
        return list(dict.fromkeys(g for g in [*self.first, *self.second] if g))


def join_columns(modulators: Mapping[str, Modulators]) -> Columns:
    """Return the union of the columns of some targets."""
    kinds: list[int] = []
    first: list[str] = []
    second: list[str] = []
    place: dict[tuple[int, str, str], int] = {}
    by_kind = [_list_kind(modulators, kind) for kind in KINDS]
    for k, names in enumerate(by_kind):
        for a, b in names:
            place[k, a, b] = len(kinds)
            kinds.append(k)
            first.append(a)
            second.append(b)
    at, starts = {}, {}
    for target, m in modulators.items():
        parts = [[place[k, a, b] for a, b in _pairs(m, kind)] for k, kind in enumerate(KINDS)]
        at[target] = np.array([i for part in parts for i in part], np.int64)
        starts[target] = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Columns(np.array(kinds, np.int8), first, second, at, starts)


def _pairs(m: Modulators, kind: str) -> list[tuple[str, str]]:
    if kind in (LR, TFL):
        return list(getattr(m, kind))
    return [(g, "") for g in getattr(m, kind)]


def _list_kind(modulators: Mapping[str, Modulators], kind: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(p for m in modulators.values() for p in _pairs(m, kind)))


class Features:
    """Expression and received ligands of a tissue, to build the columns of any cells."""

    def __init__(self, tissue: Tissue, columns: Columns, receiver: Receiver) -> None:
        self._columns = columns
        self.genes = columns.genes
        self._x = tissue.expression(self.genes)
        self._at = {g: i for i, g in enumerate(self.genes)}
        self.ligands = columns.ligands
        self._ligand_at = {g: i for i, g in enumerate(self.ligands)}
        self.W = self.receive(receiver)

    def receive(self, receiver: Receiver) -> np.ndarray:
        """Return (n, l) received ligands by any receiver."""
        return receiver.receive(self._x[:, [self._at[g] for g in self.ligands]], self.ligands)

    def narrow(self, columns: Columns) -> Features:
        """Return the features for some of the columns; the data are shared."""
        out = copy.copy(self)
        out._columns = columns
        return out

    def build(self, rows: np.ndarray, W: np.ndarray | None = None, *, own: bool = False) -> np.ndarray:
        """Return the (b, p) columns of some cells.

        Parameters
        ----------
        W
            (n, l) received ligands that replace the true ones.
        own
            Whether to replace received ligands by the cell's own ligands, for the model without neighbours.
        """
        c = self._columns
        x = self._x[rows]
        sent = self._x[rows][:, [self._at[g] for g in self.ligands]] if own else (self.W if W is None else W)[rows]
        out = np.empty((len(rows), len(c.kinds)))
        single = np.flatnonzero((c.kinds == KINDS.index(TF)) | (c.kinds == KINDS.index(EXTRA)))
        out[:, single] = x[:, [self._at[c.first[i]] for i in single]]
        paired = np.setdiff1d(np.arange(len(c.kinds)), single)
        if len(paired):
            left = sent[:, [self._ligand_at[c.first[i]] for i in paired]]
            out[:, paired] = left * x[:, [self._at[c.second[i]] for i in paired]]
        return out


@dataclass(frozen=True)
class Moments:
    """Inner products of the centred (and optionally scaled) columns and targets of some cells.

    Attributes
    ----------
    gram, c
        (u, u) and (t, u) inner products of the usable columns, divided by the number of cells.
    mean, sd
        (p,) means and divisors of the columns; ``sd`` has ddof 0.
    usable, position
        (p,) bool: not constant, and not 0 in enough cells; and (p,) position among the usable columns.
    y_mean, y_low, y_high
        (t,) mean, minimum and maximum of the targets.
    n
        Number of cells.
    """

    gram: np.ndarray
    c: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    usable: np.ndarray
    position: np.ndarray
    y_mean: np.ndarray
    y_low: np.ndarray
    y_high: np.ndarray
    n: int


def measure(X_bp: np.ndarray, Y_bt: np.ndarray, *, min_nonzero: int, standardize: bool) -> Moments:
    """Return the moments of some cells; those of a target do not depend on the other targets."""
    n = len(X_bp)
    enough = np.count_nonzero(X_bp, axis=0) >= min_nonzero
    mean, sd = X_bp.mean(0), np.ones(X_bp.shape[1])
    keep = np.flatnonzero(enough)
    Z = X_bp[:, keep] - mean[keep]
    spread = np.sqrt(np.einsum("ij,ij->j", Z, Z) / n)
    varies = spread > 1e-12 * np.abs(mean[keep])
    if not varies.all():
        keep, spread, Z = keep[varies], spread[varies], np.ascontiguousarray(Z[:, varies])
    if standardize:
        sd[keep] = spread
        Z /= spread
    usable = np.zeros(X_bp.shape[1], bool)
    usable[keep] = True
    position = np.full(X_bp.shape[1], -1, np.int64)
    position[keep] = np.arange(len(keep))
    y_mean = np.array([y.mean() for y in np.ascontiguousarray(Y_bt.T)])  # one at a time: the same bytes in any batch
    c = np.empty((Y_bt.shape[1], len(keep)))
    for t in range(len(c)):
        c[t] = (Y_bt[:, t] - y_mean[t]) @ Z / n
    return Moments(
        gram=Z.T @ Z / n, c=c, mean=mean, sd=sd, usable=usable, position=position,
        y_mean=y_mean, y_low=Y_bt.min(0), y_high=Y_bt.max(0), n=n,
    )  # fmt: skip


def pick(
    columns: Columns, target: str, usable: np.ndarray, kinds: Sequence[str] = KINDS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the usable columns of a target of some kinds, and the start of each kind among them."""
    cols, starts = columns.at[target], columns.starts[target]
    parts = []
    for k, kind in enumerate(KINDS):
        mine = cols[starts[k] : starts[k + 1]] if kind in kinds else cols[:0]
        parts.append(mine[usable[mine]])
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)]).astype(np.int64)
