"""Simulate a tissue with known regulation: planted coefficients, feedback, responses to knockouts, and confounders.

Cell types occupy domains. TFs, ligands and receptors are log-normal by type, times smooth fields. Targets follow
planted sparse coefficients of TFs and received ligands. Some TFs are targets themselves and close loops. The true
response to a knockout is the difference between the steady states of the tissue with and without the gene.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import UsageError
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Result
from vcelltools.io.write.atomic import check_kind, put_beside, staged
from vcelltools.spatial._received import Exact, Fast

PATTERNS = ("layers", "patches", "gradient")
NETWORK = "mouse_network.parquet"
SPACING = 20.0  # units between cells
_TFS, _LIGANDS, _RECEPTORS = 24, 16, 16
_TFS_OF_TARGET, _PAIRS_OF_TARGET, _DECOYS = 3, 2, 6
_RESTS = 200  # maximum number of iterations
_KNOCKOUTS = 8
_AUTO_EXACT = 3000


@dataclass(frozen=True, kw_only=True)
class SimulatedTissue(Result):
    """The files that were written.

    Attributes
    ----------
    out, network, truth, knockouts
        The h5ad file, the network of true edges and decoys, the planted coefficients, and the true responses.
    n_cells, n_genes, n_targets, n_edges
        Numbers of cells, genes, targets, and planted edges over all clusters.
    contraction
        Factor by which feedback shrinks a disturbance in every iteration; below 1.
    """

    out: str
    network: str
    truth: str
    knockouts: str
    n_cells: int
    n_genes: int
    n_targets: int
    n_edges: int
    contraction: float


def _make_field(xy: np.ndarray, length: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (n, count) smooth fields of mean 0 and standard deviation 1 (random Fourier features)."""
    waves = rng.normal(size=(40, 2)) / length
    phases = rng.random((40, count)) * 2 * np.pi
    out = np.empty((len(xy), count))
    along = xy @ waves.T
    for i in range(count):
        out[:, i] = np.cos(along + phases[:, i]) @ rng.normal(size=40)
    return (out - out.mean(0)) / out.std(0)


def _place(n: int, clusters: int, pattern: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates and types."""
    side = SPACING * np.sqrt(n)
    xy = rng.random((n, 2)) * side
    if pattern == "layers":
        kind = np.minimum((xy[:, 1] / side + rng.normal(0, 0.02, n)).clip(0, 0.999) * clusters, clusters - 1)
        return xy, kind.astype(np.int64)
    if pattern == "patches":
        seeds = rng.random((5 * clusters, 2)) * side
        nearest = ((xy[:, None] - seeds[None]) ** 2).sum(2).argmin(1)
        return xy, nearest % clusters
    middle = (np.arange(clusters) + 0.5) / clusters
    weight = np.exp(-0.5 * ((xy[:, :1] / side - middle) * clusters) ** 2)
    weight /= weight.sum(1, keepdims=True)
    return xy, (rng.random((n, 1)) > weight.cumsum(1)).sum(1).clip(0, clusters - 1)


class _World:
    """The planted regulation of one tissue."""

    def __init__(
        self, n: int, genes: int, clusters: int, pattern: str, radius: float, ligand_share: float, confound: float,
        per_cell: bool, nonlinear: bool, seed: int,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        self.rng, self.nonlinear, self.clusters = rng, nonlinear, clusters
        self.xy, self.kind = _place(n, clusters, pattern, rng)
        self.tf = [f"Tf{i + 1}" for i in range(_TFS)]
        self.ligands = [f"Lig{i + 1}" for i in range(_LIGANDS)]
        self.receptors = [f"Rec{i + 1}" for i in range(_RECEPTORS)]
        self.targets = [f"Gene{i + 1}" for i in range(genes - _TFS - _LIGANDS - _RECEPTORS)]
        self.genes = [*self.tf, *self.ligands, *self.receptors, *self.targets]
        self.at = {g: i for i, g in enumerate(self.genes)}
        self._sum: Exact | Fast = Exact(self.xy, radius) if n <= _AUTO_EXACT else Fast(self.xy, radius)
        self._plant(ligand_share)
        free = len(self.genes) - len(self.targets)
        log = rng.normal(0, 0.6, (clusters, free))[self.kind] + 0.5 * _make_field(self.xy, 2 * radius, rng, free)
        hidden = _make_field(self.xy, 2 * radius, rng, 1)
        log[:, len(self.tf) : len(self.tf) + _LIGANDS] += confound * hidden
        base = np.zeros((n, len(self.genes)))
        base[:, :free] = np.exp(log + rng.normal(0, 0.3, (n, free)))
        self.base = base
        self.local = 1 + 0.5 * np.tanh(_make_field(self.xy, 3 * radius, rng, 1)[:, 0]) if per_cell else np.ones(n)
        self._scale(hidden[:, 0], confound)

    def _plant(self, ligand_share: float) -> None:
        """Draw the TFs, pairs and signs of every target, and the TFs that are targets."""
        rng = self.rng
        pairs = [(a, b) for a in self.ligands for b in rng.choice(self.receptors, 3, replace=False)]
        self.pairs = [(a, str(b)) for a, b in pairs]
        self.tfs_of: dict[str, list[str]] = {}
        self.pairs_of: dict[str, list[tuple[str, str]]] = {}
        for i, g in enumerate(self.targets):
            self.tfs_of[g] = [str(t) for t in rng.choice(self.tf, _TFS_OF_TARGET, replace=False)]
            spatial = i < round(ligand_share * len(self.targets))
            count = _PAIRS_OF_TARGET if spatial else 0
            chosen = rng.choice(len(self.pairs), count, replace=False)
            self.pairs_of[g] = [self.pairs[k] for k in chosen]
        for t in self.tf[:4]:  # regulated TFs, which close loops
            self.tfs_of[t] = [str(g) for g in rng.choice(self.targets[: max(2, len(self.targets) // 4)], 1)]
            self.pairs_of[t] = []
        null = [g for g in self.targets if not self.pairs_of[g]]
        self.confounded = null[: len(null) // 2]

    def _scale(self, hidden: np.ndarray, confound: float) -> None:
        """Scale coefficients so that every term has a similar share of a target's variance, and feedback decays."""
        rng = self.rng
        W = self.receive(self.base)
        self.beta: dict[str, dict[Any, np.ndarray]] = {}
        self.noise = np.zeros(self.base.shape)
        for g in [*self.targets, *self.tf[:4]]:
            terms: dict[Any, np.ndarray] = {}
            feedback = g not in self.targets
            for t in self.tfs_of[g]:
                sd = 1.0 if feedback else self.base[:, self.at[t]].std()
                on = rng.random(self.clusters) < 0.85
                terms[t] = rng.choice([-1, 1]) * rng.uniform(0.6, 1.2) / sd * on * (0.15 if feedback else 0.35)
            for pair in self.pairs_of[g]:
                sd = (W[:, self.at[pair[0]]] * self.base[:, self.at[pair[1]]]).std()
                on = rng.random(self.clusters) < 0.85
                terms[pair] = rng.choice([-1, 1]) * rng.uniform(0.8, 1.4) / sd * on * 0.35
            self.beta[g] = terms
            if not feedback:
                self.noise[:, self.at[g]] = 2.0 + rng.normal(0, 0.3, len(self.base))
                if g in self.confounded:
                    self.noise[:, self.at[g]] += 0.5 * confound * hidden
        self.contraction = 1.0
        for _ in range(20):
            self.contraction = self._measure_contraction()
            if self.contraction < 0.8:
                break
            for t in self.tf[:4]:
                self.beta[t] = {k: v * 0.6 for k, v in self.beta[t].items()}

    def receive(self, x: np.ndarray) -> np.ndarray:
        """Return (n, g) received ligands; 0 for other genes."""
        out = np.zeros(x.shape)
        at = [self.at[g] for g in self.ligands]
        out[:, at] = self._sum.sum(np.ascontiguousarray(x[:, at].T)).T / len(x)
        return out

    def step(self, x: np.ndarray) -> np.ndarray:
        """Return the expression of every gene given that of all genes."""
        W, out = self.receive(x), self.base + self.noise
        for g, terms in self.beta.items():
            total = np.zeros(len(x))
            for key, beta in terms.items():
                b = beta[self.kind] * self.local
                total += b * (
                    x[:, self.at[key]] if isinstance(key, str) else W[:, self.at[key[0]]] * x[:, self.at[key[1]]]
                )
            out[:, self.at[g]] += 2 * np.tanh(total / 2) if self.nonlinear else total
        return np.maximum(out, 0.0)

    def rest(
        self, pin: dict[str, tuple[np.ndarray, float]] | None = None, start: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the steady state, with some genes fixed in some cells."""
        x = (self.base + self.noise if start is None else start).copy()
        for _ in range(_RESTS):
            new = self.step(x)
            for g, (cells, value) in (pin or {}).items():
                new[cells, self.at[g]] = value
            if np.abs(new - x).max() < 1e-10:
                return new
            x = new
        return x

    def _measure_contraction(self) -> float:
        x = self.rest()
        moved = x.copy()
        moved[:, [self.at[t] for t in self.tf[:4]]] += 0.01
        sizes = []
        for _ in range(6):
            moved = self.step(moved)
            sizes.append(float(np.abs(moved - x).max()))
        return (sizes[-1] / max(sizes[1], 1e-300)) ** 0.25 if sizes[1] > 0 else 0.0


def simulate_tissue(
    out: str | os.PathLike,
    *,
    cells: int = 2000,
    genes: int = 120,
    clusters: int = 3,
    pattern: str = "layers",
    radius: float = 100.0,
    ligand_share: float = 0.5,
    per_cell_beta: bool = False,
    confound: float = 0.0,
    nonlinear: bool = False,
    seed: int = 0,
    force: bool = False,
) -> SimulatedTissue:
    """Simulate a tissue whose regulation is known.

    Parameters
    ----------
    out
        The h5ad file, with Poisson counts in X, the layer ``imputed_count``, coordinates and cell types.
    ligand_share
        Share of the targets that are regulated by ligands.
    per_cell_beta
        Whether coefficients vary smoothly over the tissue, by a factor that the file of the knockouts holds in
        ``obs["beta_factor"]``.
    confound
        Strength of a hidden field that drives ligands, and half of the targets without ligands.
    nonlinear
        Whether responses saturate.

    Raises
    ------
    UsageError
        If sizes or names are not valid.
    """
    least = _TFS + _LIGANDS + _RECEPTORS + 8
    if pattern not in PATTERNS:
        raise UsageError(f"pattern {pattern!r} is not known", hint=f"one of: {', '.join(PATTERNS)}")
    if genes < least:
        raise UsageError(f"genes is {genes}, but a tissue needs at least {least}")
    if clusters < 1 or cells < 20 * clusters:
        raise UsageError(f"{cells} cells are too few for {clusters} clusters", hint="use at least 20 cells per cluster")
    if not 0 <= ligand_share <= 1 or not radius > 0 or confound < 0:
        raise UsageError("ligand_share must be between 0 and 1, radius above 0, and confound at least 0")
    w = _World(
        cells, genes, clusters, pattern, radius, ligand_share, confound, per_cell_beta, nonlinear, seed
    )  # fmt: skip
    x = w.rest()
    p = check_kind(out, folder=False)
    paths = [p, p.with_name(NETWORK), put_beside(p, ".truth.parquet"), put_beside(p, ".knockouts.h5ad")]
    truth = _list_truth(w)
    with staged(paths, force=force) as tmp:
        _write_data(w, x, tmp / paths[0].name)
        write_frame(tmp / paths[1].name, _make_network(w))
        write_frame(tmp / paths[2].name, truth)
        _write_knockouts(w, x, radius, tmp / paths[3].name)
    return SimulatedTissue(
        out=str(p), network=str(paths[1]), truth=str(paths[2]), knockouts=str(paths[3]), n_cells=cells, n_genes=genes,
        n_targets=len(w.targets), n_edges=sum(k != "none" for k in truth["kind"]), contraction=w.contraction,
    )  # fmt: skip


def _get_obs(w: _World) -> Any:
    import pandas as pd

    types = pd.Categorical([f"type{k + 1}" for k in w.kind])
    return pd.DataFrame({"cell_type": types, "cell_type_int": w.kind}, index=[f"cell{i + 1}" for i in range(len(w.xy))])


def _write_data(w: _World, x: np.ndarray, path: Path) -> None:
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    depth = w.rng.lognormal(0, 0.2, (len(x), 1)) * 4.0
    counts = sparse.csr_matrix(w.rng.poisson(depth * x).astype(np.float32))
    adata = ad.AnnData(counts, obs=_get_obs(w), var=pd.DataFrame(index=w.genes))
    adata.layers["imputed_count"] = x
    adata.obsm["spatial"] = w.xy
    adata.write_h5ad(path)


def _make_network(w: _World) -> dict[str, list]:
    """Return true edges and decoys, in an order that does not distinguish them."""
    rows: list[tuple[str, str, str]] = []
    for g, tfs in w.tfs_of.items():
        others = [t for t in w.tf if t not in tfs and t != g]
        decoys = [str(t) for t in w.rng.choice(others, _DECOYS, replace=False)]
        rows += [(t, g, "grn") for t in w.rng.permutation([*tfs, *decoys]).tolist()]
    rows += [(a, b, "lr") for a, b in w.pairs]
    return {
        "source": [r[0] for r in rows], "target": [r[1] for r in rows], "edge_type": [r[2] for r in rows],
        "weight": [1.0] * len(rows),
        "signaling": ["Secreted Signaling" if r[2] == "lr" else None for r in rows],
    }  # fmt: skip


def _list_truth(w: _World) -> dict[str, list]:
    """Return target, cluster, modulator, kind and β; targets without an edge have the kind ``none``."""
    rows: list[tuple[str, int, str, str, float]] = []
    for g, terms in w.beta.items():
        for key, beta in terms.items():
            name, kind = (key, "tf") if isinstance(key, str) else ("$".join(key), "ligand-receptor")
            rows += [(g, c, name, kind, float(beta[c])) for c in range(w.clusters) if beta[c] != 0]
    rows += [(g, c, "", "none", 0.0) for g in w.confounded for c in range(w.clusters)]
    heads = ("target", "cluster", "modulator", "kind", "beta")
    return {h: [r[i] for r in rows] for i, h in enumerate(heads)}


def choose_knockouts(ligand_sources: Sequence[str], tf_sources: Sequence[str]) -> list[str]:
    """Return the genes to knock out: ligands and TFs with the most targets, half of each."""
    half = _KNOCKOUTS // 2
    return [*list(dict.fromkeys(ligand_sources))[:half], *list(dict.fromkeys(tf_sources))[:half]]


def _write_knockouts(w: _World, x: np.ndarray, radius: float, path: Path) -> None:
    """Write the true steady-state changes of knockouts in a disc: a layer per gene, and the distances to the disc."""
    import anndata as ad
    import pandas as pd

    used = [key for terms in w.beta.values() for key in terms]
    by_use = {g: sum(g in (k if isinstance(k, tuple) else (k,)) for k in used) for g in w.genes}
    order = sorted(w.genes, key=lambda g: -by_use[g])
    genes = choose_knockouts([g for g in order if g in w.ligands], [g for g in order if g in w.tf])
    centre = w.xy.mean(0)
    reach = 0.25 * float(np.ptp(w.xy[:, 0]))
    distance = np.maximum(np.linalg.norm(w.xy - centre, axis=1) - reach, 0.0)
    inside = np.flatnonzero(distance == 0)
    obs = _get_obs(w)
    obs["in_scope"], obs["distance"], obs["near"] = distance == 0, distance, distance <= 2 * radius
    obs["beta_factor"] = w.local
    adata = ad.AnnData(np.zeros(x.shape, np.float32), obs=obs, var=pd.DataFrame(index=w.genes))
    for g in genes:
        adata.layers[f"delta_{g}"] = w.rest({g: (inside, 0.0)}, x) - x
    adata.obsm["spatial"] = w.xy
    adata.uns["knockouts"] = genes
    adata.write_h5ad(path)
