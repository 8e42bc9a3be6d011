"""The fitted models of a run on one tissue: derivatives, and the propagation of knockouts between genes and cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.stream import get_threads
from vcelltools.kernels.bilinear import map_cells, map_changes, splash_cells, splash_rows
from vcelltools.runtime.threads import share_work
from vcelltools.spatial._received import Receiver
from vcelltools.spatial.betadata import Betas
from vcelltools.spatial.tissue import TINY, Tissue

RESPONSES = ("derivative", "exact")
_FEW = 16  # rows of coefficients are shared if each has at least this many cells
_STEP = 4096  # maximum number of cells per piece of work


@dataclass(frozen=True)
class Features:
    """Features in the form that kernels need: kind, genes and ligand columns."""

    kind: np.ndarray
    a: np.ndarray
    b: np.ndarray
    ligand: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The four arrays."""
        return self.kind, self.a, self.b, self.ligand


def make_features(betas: Betas, gene_at: Mapping[str, int], ligand_at: Mapping[str, int]) -> Features:
    """Return the features of one target, in the order of its ordered coefficients."""
    m = betas.modulators
    kind = np.array([0] * len(m.tf) + [1] * len(m.lr) + [2] * len(m.tfl), np.int8)
    pairs = [*m.lr, *m.tfl]
    a = np.array([gene_at[g] for g in (*m.tf, *(p[0] for p in pairs))], np.int64)
    b = np.array([0] * len(m.tf) + [gene_at[p[1]] for p in pairs], np.int64)
    ligand = np.array([0] * len(m.tf) + [ligand_at[p[0]] for p in pairs], np.int64)
    return Features(kind, a, b, ligand)


def find_rows(betas: Betas, tissue: Tissue) -> np.ndarray:
    """Return (n,) the row of every cell in the coefficients of a target.

    Raises
    ------
    DataError
        If a cell or a cluster has no row, or rows by cell are for two cells with the same name.
    """
    if betas.per_cell:
        tissue.place_cells()
        place = {str(c): i for i, c in enumerate(betas.keys)}
        rows = np.array([place.get(str(c), -1) for c in tissue.cells], np.int64)
        if (rows < 0).any():
            cell = tissue.cells[int(np.flatnonzero(rows < 0)[0])]
            raise DataError(f"{betas.target}: its betadata has no row for cell {cell}")
        return rows
    number = {int(c): i for i, c in enumerate(betas.keys)}
    missing = [c for c in np.unique(tissue.clusters) if int(c) not in number]
    if missing:
        label = tissue.labels.get(int(missing[0]), str(missing[0]))
        raise DataError(f"{betas.target}: its betadata has no row for cluster {label}")
    lookup = {c: number[int(c)] for c in np.unique(tissue.clusters)}
    return np.array([lookup[c] for c in tissue.clusters], np.int64)


def compute_splash(
    betas: Betas,
    tissue: Tissue,
    receiver: Receiver,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    threads: int | None = None,
) -> tuple[list[str], np.ndarray]:
    """Return the modulating genes of a target, and (n, k) its derivatives by them in every cell."""
    m = betas.modulators
    check_factors(scale, cap)
    check_genes([betas], tissue)
    genes, ligands = m.genes, m.ligands
    x = tissue.expression(genes)
    place = {g: i for i, g in enumerate(genes)}
    W = receiver.receive(np.ascontiguousarray(x[:, [place[g] for g in ligands]]), ligands)
    f = make_features(betas, place, {g: i for i, g in enumerate(ligands)})
    return genes, run_splash(f, betas.ordered, find_rows(betas, tissue), x, W, scale=scale, cap=cap, threads=threads)


def run_splash(
    f: Features,
    beta_rm: np.ndarray,
    rows: np.ndarray,
    x: np.ndarray,
    W: np.ndarray,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Return (n, k) derivatives by gene, from (r, m) coefficients, expression and received ligands."""
    out = np.empty(x.shape)
    top = math.inf if cap is None else float(cap)
    beta_rm = np.ascontiguousarray(beta_rm)
    n_threads = get_threads(threads)

    def visit_cells(part: slice) -> None:
        splash_cells(*f.arrays, beta_rm, rows[part], x[part], W[part], scale, TINY, top, out[part])

    def visit_rows(part: tuple[int, np.ndarray]) -> None:
        splash_rows(*f.arrays, beta_rm[part[0]], part[1], x, W, scale, TINY, top, out)

    if len(beta_rm) * _FEW > len(x):
        step = max(1024, -(-len(x) // n_threads))
        slices = [slice(i, i + step) for i in range(0, len(x), step)]
        share_work(slices, [visit_cells] * min(n_threads, len(slices)))
    else:
        parts = cut_segments({r: np.flatnonzero(rows == r) for r in range(len(beta_rm))})
        share_work(parts, [visit_rows] * min(n_threads, len(parts)))
    return out


def cut_segments(segments: Mapping[int, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """Return (key, rows) with at most ``_STEP`` rows each."""
    return [(k, rows[i : i + _STEP]) for k, rows in segments.items() for i in range(0, len(rows), _STEP)]


def check_factors(scale: float, cap: float | None) -> None:
    """Raise a :class:`UsageError` if ``beta_scale_factor`` or ``beta_cap`` is not usable."""
    if not math.isfinite(scale):
        raise UsageError(f"beta_scale_factor is {scale}; a finite number is expected")
    if cap is not None and not cap > 0:
        raise UsageError(f"beta_cap is {cap}; a number above 0 is expected")


def check_genes(betas: Sequence[Betas], tissue: Tissue) -> None:
    """Raise a :class:`DataError` if a target or modulator is not a gene of the tissue."""
    for b in betas:
        for g in (b.target, *b.modulators.genes):
            if g not in tissue.position:
                raise DataError(
                    f"{b.target}: its betadata contains {g!r}, which is not a gene of {tissue.where}",
                    hint="check that the run was fitted to these data",
                )


@dataclass(frozen=True)
class Change:
    """The effect of a perturbation on the genes of the models.

    Attributes
    ----------
    genes
        Names of the genes.
    start_gn
        (g, n) expression before, with the cells in the order of the engine.
    changing, delta_cn
        (c,) positions of the genes that may change, and (c, n) their change; that of the others is 0.
    order
        (n,) row of every cell.
    """

    genes: list[str]
    start_gn: np.ndarray
    changing: np.ndarray
    delta_cn: np.ndarray
    order: np.ndarray
    warnings: tuple[str, ...] = ()

    @cached_property
    def before(self) -> np.ndarray:
        """(n, g) expression before."""
        out = np.empty(self.start_gn.shape[::-1])
        out[self.order] = self.start_gn.T
        return out

    @cached_property
    def after(self) -> np.ndarray:
        """(n, g) expression after."""
        return self.before + self.delta

    @cached_property
    def delta(self) -> np.ndarray:
        """(n, g) change of expression."""
        out = np.zeros(self.start_gn.shape[::-1])
        out[np.ix_(self.order, self.changing)] = self.delta_cn.T
        return out


@dataclass(frozen=True)
class _Now:
    """The state of a propagation: the rows that can differ from the start.

    Attributes
    ----------
    genes, sent
        (c,) genes and (k,) ligands that can change.
    slots, w_slots
        Row of each gene among ``genes`` and of each ligand among ``sent``; -1 if it cannot change.
    x, W, delta
        (c, n) expression, (k, n) received ligands, and (c, n) changes to propagate.
    """

    genes: np.ndarray
    sent: np.ndarray
    slots: np.ndarray
    w_slots: np.ndarray
    x: np.ndarray
    W: np.ndarray
    delta: np.ndarray


class Engine:
    """The models of all targets of a run, for any number of perturbations.

    Parameters
    ----------
    tissue, receiver
        The cells, and the receiver of ligands.
    betas
        Coefficients of every target.
    also
        Further genes to load, such as those to perturb.
    scale, cap
        ``beta_scale_factor`` and ``beta_cap``.
    """

    def __init__(
        self,
        tissue: Tissue,
        receiver: Receiver,
        betas: Sequence[Betas],
        *,
        also: Sequence[str] = (),
        scale: float = 1.0,
        cap: float | None = None,
        threads: int | None = None,
    ) -> None:
        check_factors(scale, cap)
        check_genes(betas, tissue)
        self.tissue, self._betas = tissue, list(betas)
        self._scale, self._cap, self._threads = scale, cap, get_threads(threads)
        targets = [b.target for b in betas]
        modulators = [g for b in betas for g in b.modulators.genes]
        self.genes = list(dict.fromkeys([*targets, *modulators, *also]))
        self.ligands = list(dict.fromkeys(g for b in betas for g in b.modulators.ligands))
        self.gene_at = {g: i for i, g in enumerate(self.genes)}
        self.ligand_at = {g: i for i, g in enumerate(self.ligands)}
        self._ligand_genes = np.array([self.gene_at[g] for g in self.ligands], np.int64)
        self.order = np.argsort(tissue.clusters, kind="stable")  # sorts the cells by cluster
        self._receiver = receiver.reorder(self.order)
        self.x0 = np.ascontiguousarray(tissue.expression(self.genes)[self.order].T)
        self._top = self.x0.max(1)
        self.W0 = self._receiver.receive_rows(self.x0[self._ligand_genes], self.ligands)
        self._target_at = np.array([self.gene_at[g] for g in targets], np.int64)
        self._modulating = set(modulators)
        self._features = [make_features(b, self.gene_at, self.ligand_at) for b in self._betas]
        self._rows = [find_rows(b, tissue)[self.order] for b in self._betas]
        self._alone = [t for t, b in enumerate(self._betas) if b.per_cell or cap is not None]
        self._shared = [t for t in range(len(self._betas)) if t not in set(self._alone)]
        self._ordered = [np.ascontiguousarray(b.ordered) for b in self._betas]
        numbers, first = np.unique(tissue.clusters[self.order], return_index=True)
        ends = [*first[1:].tolist(), tissue.n_cells]
        self._segments = [(int(c), int(a), int(b)) for c, a, b in zip(numbers, first, ends, strict=True)]

    @property
    def error_bound(self) -> float:
        """The certified error of received ligands."""
        return self._receiver.error_bound

    @cached_property
    def _by_cluster(self) -> dict[int, tuple[np.ndarray, ...]]:
        """The targets that share coefficients, by cluster: kind, a, b and ligand of each term, indptr, term, beta."""
        parts = [self._features[t].arrays for t in self._shared]
        every, term = np.unique(np.column_stack([np.concatenate(v) for v in zip(*parts, strict=True)]), axis=0,
                                return_inverse=True)  # fmt: skip
        terms = np.split(term.ravel(), np.cumsum([len(p[0]) for p in parts])[:-1])
        out: dict[int, tuple[np.ndarray, ...]] = {}
        for c, start, _ in self._segments:
            betas = [self._ordered[t][self._rows[t][start]] for t in self._shared]
            ends = np.cumsum([0, *map(np.count_nonzero, betas)])
            used, column = np.unique(
                np.concatenate([u[beta != 0] for u, beta in zip(terms, betas, strict=True)]), return_inverse=True
            )
            beta = np.concatenate([beta[beta != 0] for beta in betas])
            kind = every[used, 0].astype(np.int8)
            beta[kind[column] != 0] *= self._scale
            out[c] = (kind, *np.ascontiguousarray(every[used, 1:].T), ends, column, beta)
        return out

    @cached_property
    def n_shared(self) -> int:
        """Number of pairs in which one gene is the ligand and the receptor or TF, so that both share one change."""
        out = 0
        for b in self._betas:
            m = b.modulators
            others = {*m.tf, *(r for _, r in m.lr), *(t for _, t in m.tfl)}
            out += sum(ligand in others for ligand, _ in (*m.lr, *m.tfl))
        return out

    def perturb(
        self,
        desired: Mapping[str, float],
        *,
        cells: np.ndarray | None = None,
        hops: int = 4,
        response: str = "derivative",
    ) -> Change:
        """Set genes to values in some cells, and propagate the change through the models.

        Parameters
        ----------
        desired
            Value that each gene is set to.
        cells
            (n,) bool or row numbers of the cells; all cells by default.
        hops
            Number of times that the change passes through the models and the tissue.
        response
            ``derivative``: the published scheme, which linearises the models at every hop. ``exact``: the difference
            of the values of the models, with recomputed received ligands.
        """
        if response not in RESPONSES:
            raise UsageError(f"response {response!r} is not known", hint=f"one of: {', '.join(RESPONSES)}")
        if hops < 1:
            raise UsageError(f"n_propagation is {hops}; at least 1 is expected")
        if not desired:
            raise UsageError("there is no gene to perturb", hint="name at least one gene")
        for gene, value in desired.items():
            if gene not in self.gene_at:
                self.tissue.need_genes([gene])
                raise DataError(f"{gene} was not loaded", hint="pass it to the engine in also")
            if not 0 <= value < math.inf:
                raise UsageError(f"{gene}: the desired value {value} is not a number of at least 0")
        inside = np.zeros(self.tissue.n_cells, bool)
        inside[slice(None) if cells is None else cells] = True
        scope = np.flatnonzero(inside[self.order])
        if not len(scope):
            raise DataError("the perturbation applies to no cell")
        genes = np.array([self.gene_at[g] for g in desired], np.int64)
        first = np.array(list(desired.values()), np.float64)[:, None] - self.x0[np.ix_(genes, scope)]
        changing = np.unique(np.concatenate([self._target_at, genes]))
        delta = self._propagate(genes, scope, first, changing, hops, response == "exact")
        warnings = tuple(self._list_warnings(desired, response))
        return Change(self.genes, self.x0, changing, delta, self.order, warnings)

    def _list_warnings(self, desired: Mapping[str, float], response: str) -> list[str]:
        out = [f"{g} modulates no fitted gene, so only itself changes" for g in desired if g not in self._modulating]
        if response == "derivative" and self.n_shared:
            out.append(
                f"{self.n_shared} pairs have the same gene as ligand and as receptor or TF of a target; the "
                "derivative scheme keeps a single change for both (the exact response does not)"
            )
        return out

    def _propagate(
        self, genes: np.ndarray, scope: np.ndarray, first: np.ndarray, changing: np.ndarray, hops: int, exact: bool
    ) -> np.ndarray:
        """Return (c, n) changes of ``changing`` after all hops; ``genes`` change by ``first`` in ``scope``."""
        start, top = self.x0[changing], self._top[changing, None]
        slots = np.full(len(self.x0), -1)
        slots[changing] = np.arange(len(changing))
        pins, targets = np.ix_(slots[genes], scope), slots[self._target_at]
        sent = np.flatnonzero(slots[self._ligand_genes] >= 0)  # ligands that can change, and their rows
        senders = slots[self._ligand_genes[sent]]
        w_slots = np.full(len(self.W0), -1)
        w_slots[sent] = np.arange(len(sent))
        delta = np.zeros(start.shape)
        delta[pins] = first
        x, W, W0 = start, self.W0[sent], self.W0[sent]
        for _ in range(hops):
            x1, W1 = start + delta, W0.copy()
            again = np.flatnonzero(np.asarray(delta.any(1))[senders])
            rows = senders[again]
            if len(again):  # only these are received again
                W1[again] = self._receiver.receive_rows(x1[rows], [self.ligands[i] for i in sent[again]])
            if not exact:
                delta[rows] += (W1[again] - W0[again]) - (x1[rows] - start[rows])
            now = _Now(changing, sent, slots, w_slots, *((x1, W1) if exact else (x, W)), delta)
            new = self._map(now, exact=exact)
            delta[:] = 0.0
            delta[targets] = new
            if not exact:
                delta[pins] = np.where(first != 0, first, delta[pins])
            delta += start
            np.clip(delta, 0.0, top, out=delta)
            delta -= start
            if exact:
                delta[pins] = first
            x, W = x1, W1
        delta[pins] = first
        return delta

    def _map(self, now: _Now, *, exact: bool) -> np.ndarray:
        """Return (t, n) the changes of the targets, to first order or exact.

        Targets that share coefficients are computed together, the others cell by cell.
        """
        out = np.empty((len(self._betas), self.x0.shape[1]))
        if self._shared:
            whole = len(self._shared) == len(out)
            shared = out if whole else np.empty((len(self._shared), self.x0.shape[1]))
            parts = [(c, i, min(i + _STEP, b)) for c, a, b in self._segments for i in range(a, b, _STEP)]
            live = np.zeros(len(self.x0), bool)
            live[now.genes] = now.delta.any(1)

            def visit(part: tuple[int, int, int]) -> None:
                map_changes(
                    *self._by_cluster[part[0]], *part[1:], self.x0, self.W0, now.slots, now.w_slots, now.x, now.W,
                    now.delta, live, exact, TINY, shared,
                )  # fmt: skip

            share_work(parts, [visit] * min(self._threads, len(parts)))
            if not whole:
                out[self._shared] = shared
        if self._alone:
            x, W, delta = self.x0.copy(), self.W0.copy(), np.zeros(self.x0.shape)
            x[now.genes], W[now.sent], delta[now.genes] = now.x, now.W, now.delta

            def visit_target(t: int) -> None:
                map_cells(
                    *self._features[t].arrays, self._ordered[t], self._rows[t], x, W, self.x0, self.W0, delta, exact,
                    self._scale, TINY, math.inf if self._cap is None else float(self._cap), out[t],
                )  # fmt: skip

            share_work(self._alone, [visit_target] * min(self._threads, len(self._alone)))
        return out
