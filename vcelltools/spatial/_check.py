"""``spatial check`` and ``received``: check the network and radius against the data, and compute received ligands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from vcelltools.errors import checked
from vcelltools.io.frame import write_frame
from vcelltools.io.results import Result
from vcelltools.spatial._fit import make_finder, make_receiver
from vcelltools.spatial.betadata import CELL
from vcelltools.spatial.regulatory_network import find_network, guess_species, read_network
from vcelltools.spatial.settings import Options, load_toml, make_settings
from vcelltools.spatial.tissue import open_tissue

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

FLAT = 0.05  # received ligands with a smaller coefficient of variation hardly differ between cells
_MOST_LIGANDS = 64  # maximum number of ligands whose variation is computed


@dataclass(frozen=True, kw_only=True)
class CheckResult(Result):
    """The result of a check.

    Attributes
    ----------
    n_cells, n_genes, clusters
        Numbers of cells and genes, and the number of cells of each cluster.
    network, species
        The network file, and the species that the gene names suggest.
    edges
        Number of edges of each type in the panel.
    n_targets
        Number of genes with a modulator.
    spacing, radius, neighbors
        Median distance to the nearest cell, the radius, and the median number of cells within it.
    variation
        Median coefficient of variation of received ligands over cells.
    modulators
        Modulators by kind of each requested gene.
    problems
        Problems for a fit.
    unused
        Keys of the configuration that are not used.
    """

    n_cells: int
    n_genes: int
    clusters: dict[str, int]
    network: str
    species: str
    edges: dict[str, int]
    n_targets: int
    spacing: float
    radius: float
    neighbors: float
    variation: float | None
    modulators: dict[str, dict[str, list[str]]]
    problems: tuple[str, ...]
    unused: tuple[str, ...]


@checked
def check(
    adata_or_path: str | os.PathLike | AnnData,
    *,
    genes: Sequence[str] = (),
    config: str | os.PathLike | None = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> CheckResult:
    """Check the data, network and radius before a fit.

    Parameters
    ----------
    genes
        Targets whose modulators are listed.
    config
        A ``spaceship_config.toml``.
    **options
        See :class:`~vcelltools.spatial.settings.Settings`.
    """
    from scipy.spatial import cKDTree

    loaded = load_toml(config) if config is not None else None
    s = make_settings(options, loaded)
    tissue = open_tissue(adata_or_path, **s.tissue)
    path = find_network(network=s.network, folder=s.network_dir, species=s.species, genes=tissue.genes)
    finder = make_finder(tissue, s)
    tissue.need_genes(genes)
    problems = []
    tree = cKDTree(tissue.xy)
    spacing = float(np.median(tree.query(tissue.xy, k=2)[0][:, 1])) if tissue.n_cells > 1 else float("nan")
    sample = tissue.xy[:: max(1, tissue.n_cells // 2000)]
    neighbors = float(np.median(tree.query_ball_point(sample, s.radius, return_length=True))) - 1
    if s.radius < spacing:
        problems.append(f"the radius {s.radius:g} is below the cell spacing ({spacing:.3g}): nothing is received")
    ligands = list(dict.fromkeys(a for a, _, _ in finder.all_pairs))
    ligands = [g for g in ligands if g not in tissue.duplicated][:_MOST_LIGANDS]
    variation = None
    if ligands:
        W = make_receiver(tissue, s, finder, threads).receive(tissue.expression(ligands), ligands)
        mean = W.mean(0)
        if (mean > 0).any():
            variation = float(np.median(W.std(0)[mean > 0] / mean[mean > 0]))
            if variation < FLAT:
                problems.append(
                    f"at the radius {s.radius:g} received ligands hardly vary (coefficient of variation "
                    f"{variation:.1%}), so all cells receive nearly the same"
                )
    species = guess_species(tissue.genes)
    if s.species is not None and species != s.species:
        problems.append(f"the gene names look like those of {species}, not {s.species}")
    clusters = {label: int((tissue.clusters == c).sum()) for c, label in tissue.labels.items()}
    small = [label for label, n in clusters.items() if n < s.min_cells]
    if small:
        problems.append(f"clusters with fewer than {s.min_cells} cells get coefficients of 0: {', '.join(small)}")
    if tissue.duplicated:
        problems.append(f"{len(tissue.duplicated)} gene names occur more than once and cannot be used")
    edges = read_network(path, s.tf_prior).count_matches(set(tissue.genes))
    problems += [f"the network has no {kind} edge in the panel" for kind, n in edges.items() if n == 0]
    return CheckResult(
        n_cells=tissue.n_cells, n_genes=len(tissue.genes), clusters=clusters, network=str(path), species=species,
        edges=edges, n_targets=sum(finder.find(g).n > 0 for g in tissue.position), spacing=spacing, radius=s.radius,
        neighbors=neighbors, variation=variation, modulators={g: finder.find(g).to_json() for g in genes},
        problems=tuple(problems), unused=loaded.unused if loaded else (),
    )  # fmt: skip


@dataclass(frozen=True)
class Received:
    """Received ligands of every cell.

    Attributes
    ----------
    cells, ligands
        Names of the rows and columns.
    values
        (n, l) float64.
    kernel_error_bound
        The certified error, in units of ``s/N sum_j x_j``.
    """

    cells: np.ndarray
    ligands: list[str]
    values: np.ndarray
    kernel_error_bound: float

    def to_frame(self) -> pd.DataFrame:
        """Return cells × ligands."""
        import pandas as pd

        return pd.DataFrame(self.values, index=[str(c) for c in self.cells], columns=self.ligands)

    def write(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write ``CellID`` and the ligands as feather, parquet or CSV."""
        columns: dict[str, Any] = {CELL: [str(c) for c in self.cells]}
        return write_frame(path, columns | {g: self.values[:, i] for i, g in enumerate(self.ligands)}, force=force)


@checked
def received(
    adata_or_path: str | os.PathLike | AnnData,
    *,
    config: str | os.PathLike | None = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> Received:
    """Compute the received amount of every ligand of a pair in the panel, in every cell.

    The amount is ``W[i, l] = (s/N) sum_j exp(-d_ij^2 / 2 r_l^2) x[j, l]``, including the cell itself.

    Parameters
    ----------
    **options
        See :class:`~vcelltools.spatial.settings.Settings`, in particular ``radius``, ``radius_rule`` and ``kernel``.
    """
    s = make_settings(options, load_toml(config) if config is not None else None)
    tissue = open_tissue(adata_or_path, **s.tissue)
    finder = make_finder(tissue, s)
    ligands = list(dict.fromkeys(a for a, _, _ in finder.all_pairs))
    receiver = make_receiver(tissue, s, finder, threads)
    values = receiver.receive(tissue.expression(ligands), ligands)
    return Received(tissue.cells, ligands, values, receiver.error_bound)
