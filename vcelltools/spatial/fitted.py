"""The fitted models of a run on one tissue: derivatives, and the propagation of knockouts between genes and cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.stream import get_threads
from vcelltools.kernels.bilinear import map_cells, map_derivatives, map_differences, splash_cells, splash_rows
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
        If a cell or a cluster has no row.
    """
    if betas.per_cell:
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
    start_gn, delta_gn
        (g, n) expression before and its change, with the cells in the order of the engine.
    order
        (n,) row of every cell.
    changing
        The genes that may change.
    """

    genes: list[str]
    start_gn: np.ndarray
    delta_gn: np.ndarray
    order: np.ndarray
    changing: np.ndarray
    warnings: tuple[str, ...] = ()

    def _by_row(self, values_gn: np.ndarray) -> np.ndarray:
        out = np.empty((values_gn.shape[1], values_gn.shape[0]))
        out[self.order] = values_gn.T
        return out

    @cached_property
    def before(self) -> np.ndarray:
        """(n, g) expression before."""
        return self._by_row(self.start_gn)

    @cached_property
    def after(self) -> np.ndarray:
        """(n, g) expression after."""
        return self._by_row(self.start_gn + self.delta_gn)

    @cached_property
    def delta(self) -> np.ndarray:
        """(n, g) change of expression."""
        return self._by_row(self.delta_gn)


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
        if cap is not None and not cap > 0:
            raise UsageError(f"beta_cap is {cap}; a number above 0 is expected")
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
        """Features of the targets that share coefficients, by cluster: kind, a, b, ligand, indptr, beta."""
        out: dict[int, tuple[np.ndarray, ...]] = {}
        for c, start, _ in self._segments:
            parts: list[tuple[np.ndarray, ...]] = []
            ends = [0]
            for t in self._shared:
                beta = self._ordered[t][self._rows[t][start]]
                at = np.flatnonzero(beta)
                ends.append(ends[-1] + len(at))
                parts.append((*(v[at] for v in self._features[t].arrays), beta[at]))
            kind, a, b, ligand, beta = (np.concatenate(v) for v in zip(*parts, strict=True))
            out[c] = (kind, a, b, ligand, np.array(ends, np.int64), beta)
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
        pins = np.ix_(genes, scope)
        first = np.array(list(desired.values()), np.float64)[:, None] - self.x0[pins]
        changing = np.unique(np.concatenate([self._target_at, genes]))
        delta = self._propagate(pins, first, changing, hops, response == "exact")
        delta[pins] = first
        return Change(self.genes, self.x0, delta, self.order, changing, tuple(self._list_warnings(desired, response)))

    def _list_warnings(self, desired: Mapping[str, float], response: str) -> list[str]:
        out = [f"{g} modulates no fitted gene, so only itself changes" for g in desired if g not in self._modulating]
        if response == "derivative" and self.n_shared:
            out.append(
                f"{self.n_shared} pairs have the same gene as ligand and as receptor or TF of a target; the "
                "derivative scheme keeps a single change for both (the exact response does not)"
            )
        return out

    def _propagate(
        self, pins: tuple[np.ndarray, ...], first: np.ndarray, changing: np.ndarray, hops: int, exact: bool
    ) -> np.ndarray:
        """Return (g, n) changes after all hops; those of genes that are not ``changing`` stay 0."""
        delta = np.zeros(self.x0.shape)
        delta[pins] = first
        x, x1 = self.x0.copy(), self.x0.copy()
        W = self.W0
        for _ in range(hops):
            live = np.zeros(len(x), bool)
            live[changing] = delta[changing].any(1)
            x1[changing] = self.x0[changing] + delta[changing]
            W1 = self._receive(x1, live)
            if exact:
                new = self._map_exact(x1, W1, live)
            else:
                sent = np.flatnonzero(live[self._ligand_genes])
                delta[self._ligand_genes[sent]] += (W1[sent] - self.W0[sent]) - (
                    x1[self._ligand_genes[sent]] - self.x0[self._ligand_genes[sent]]
                )
                new = self._map_derivative(x, W, delta, live)
            delta[changing] = 0.0
            delta[self._target_at] = new
            held = delta[pins] if not exact else first
            if not exact:
                np.copyto(held, first, where=first != 0)
                delta[pins] = held
            self._clip(delta, changing)
            if exact:
                delta[pins] = held
            x, x1, W = x1, x, W1
        return delta

    def _receive(self, x1: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Return the received ligands of changed expression; only changed ligands are computed again."""
        changed = np.flatnonzero(live[self._ligand_genes])
        if not len(changed):
            return self.W0
        W1 = self.W0.copy()
        W1[changed] = self._receiver.receive_rows(x1[self._ligand_genes[changed]], [self.ligands[i] for i in changed])
        return W1

    def _clip(self, delta: np.ndarray, changing: np.ndarray) -> None:
        """Limit ``x0 + delta`` to the range from 0 to the observed maximum of each gene."""
        start = self.x0[changing]
        after = delta[changing]
        after += start
        np.clip(after, 0.0, self._top[changing, None], out=after)
        after -= start
        delta[changing] = after

    def _map_derivative(self, x: np.ndarray, W: np.ndarray, delta: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Return (t, n) the changes of the targets, to first order in ``delta``."""
        seen = np.zeros(delta.shape)
        at = np.flatnonzero(live)
        seen[at] = np.where(x[at] > TINY, delta[at], 0.0)

        def visit(part: tuple[int, int, int], out: np.ndarray) -> None:
            c, a, b = part
            map_derivatives(
                *self._by_cluster[c], a, b, x, W, self.W0, delta, seen, live, self._scale, out
            )  # fmt: skip

        return self._map(visit, x, W, delta, exact=False)

    def _map_exact(self, x: np.ndarray, W: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Return (t, n) the differences between the values of the models now and at the start."""

        def visit(part: tuple[int, int, int], out: np.ndarray) -> None:
            c, a, b = part
            map_differences(*self._by_cluster[c], a, b, x, W, self.x0, self.W0, live, self._scale, out)

        return self._map(visit, x, W, self.x0, exact=True)

    def _map(
        self,
        visit: Callable[[tuple[int, int, int], np.ndarray], None],
        x: np.ndarray,
        W: np.ndarray,
        delta: np.ndarray,
        *,
        exact: bool,
    ) -> np.ndarray:
        """Return (t, n): targets that share coefficients are computed by ``visit``, the others cell by cell."""
        out = np.empty((len(self._betas), x.shape[1]))
        if self._shared:
            whole = len(self._shared) == len(out)
            shared = out if whole else np.empty((len(self._shared), x.shape[1]))
            parts = [(c, i, min(i + _STEP, b)) for c, a, b in self._segments for i in range(a, b, _STEP)]
            share_work(parts, [lambda part: visit(part, shared)] * min(self._threads, len(parts)))
            if not whole:
                out[self._shared] = shared

        def visit_target(t: int) -> None:
            map_cells(
                *self._features[t].arrays, self._ordered[t], self._rows[t], x, W, self.x0, self.W0, delta, exact,
                self._scale, TINY, math.inf if self._cap is None else float(self._cap), out[t],
            )  # fmt: skip

        if self._alone:
            share_work(self._alone, [visit_target] * min(self._threads, len(self._alone)))
        return out
