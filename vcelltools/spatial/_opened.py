"""The coefficients of a fitted run on its tissue, their derivatives, and perturbations."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.frame import write_frame
from vcelltools.io.textfile import read_rows
from vcelltools.spatial._fit import make_finder, make_receiver
from vcelltools.spatial._received import Receiver
from vcelltools.spatial.betadata import CELL, Betas, list_betas, read_betas
from vcelltools.spatial.fitted import Change, Engine, compute_splash
from vcelltools.spatial.settings import Loaded, Settings
from vcelltools.spatial.tissue import Tissue

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@dataclass(frozen=True)
class Table:
    """Named columns of equal length, which can become a data frame or a file."""

    columns: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.columns)

    def write(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write feather, Parquet or CSV, according to the file name."""
        return write_frame(path, self.columns, force=force)


@dataclass(frozen=True)
class Perturbation:
    """The effect of a perturbation on every cell.

    Attributes
    ----------
    desired
        The value that each perturbed gene was set to.
    genes, cells
        The genes of the models, and the cells.
    change
        Expression before and after.
    """

    desired: dict[str, float]
    cells: np.ndarray
    change: Change
    run: FittedRun = field(repr=False)

    @property
    def genes(self) -> list[str]:
        """The genes of the models."""
        return self.change.genes

    @property
    def simulated(self) -> np.ndarray:
        """(n, g) expression after the perturbation."""
        return self.change.after

    @property
    def delta(self) -> np.ndarray:
        """(n, g) change of expression."""
        return self.change.delta

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user."""
        return self.change.warnings

    def to_frame(self) -> pd.DataFrame:
        """Return the simulated expression, cells × genes."""
        import pandas as pd

        return pd.DataFrame(self.simulated, index=list(self.cells), columns=self.genes)

    def to_anndata(self) -> AnnData:
        """Return an AnnData with the expression before, the layers ``simulated`` and ``delta``, and coordinates."""
        import anndata as ad
        import pandas as pd

        tissue = self.run.tissue
        obs = pd.DataFrame(
            {"cluster": pd.Categorical([tissue.labels[int(c)] for c in tissue.clusters])},
            index=[str(c) for c in self.cells],
        )
        out = ad.AnnData(self.change.before, obs=obs, var=pd.DataFrame(index=self.genes))
        out.layers["simulated"], out.layers["delta"] = self.simulated, self.delta
        out.obsm["spatial"] = tissue.xy
        out.uns["perturbation"] = {k: float(v) for k, v in self.desired.items()}
        return out

    def write(self, path: str | os.PathLike, *, force: bool = False) -> Path:
        """Write ``CellID`` and simulated expression (feather, Parquet, CSV), or an h5ad file with both layers."""
        p = Path(path)
        if p.suffix == ".h5ad":
            from vcelltools.io.write.atomic import atomic_file

            with atomic_file(p, force=force) as tmp:
                self.to_anndata().write_h5ad(tmp)
            return p
        columns: dict[str, Any] = {CELL: [str(c) for c in self.cells]}
        columns |= {g: self.simulated[:, i] for i, g in enumerate(self.genes)}
        return write_frame(p, columns, force=force)


class FittedRun:
    """The coefficients of a run on its tissue, with derivatives and perturbations."""

    def __init__(
        self, folder: Path, tissue: Tissue, settings: Settings, loaded: Loaded | None, threads: int | None
    ) -> None:
        self.folder, self.tissue, self.settings = folder, tissue, settings
        self.loaded, self._threads = loaded, threads
        self._files = list_betas(folder)
        self._read: dict[str, Betas] = {}
        self._engines: dict[tuple, Engine] = {}
        if not self._files and not any(folder.glob("*.orphan")):
            raise DataError(f"{folder} holds no betadata", hint="write it with vcelltools spatial fit")

    @property
    def genes(self) -> list[str]:
        """The targets with coefficients, sorted by name."""
        return list(self._files)

    def betas(self, gene: str) -> Betas:
        """Return the coefficients of one target, or raise a :class:`DataError` that suggests similar names."""
        if gene not in self._files:
            near = difflib.get_close_matches(gene, self.genes, 3, 0.6)
            orphan = (self.folder / f"{gene}.orphan").exists()
            hint = "no modulator was kept for it" if orphan else f"did you mean {', '.join(near)}?" if near else None
            raise DataError(f"{self.folder} has no betadata of {gene!r}", hint=hint)
        if gene not in self._read:
            labels = dict(self.tissue.labels)
            if self.loaded is not None and self.loaded.clusters and self.loaded.clusters != labels:
                raise DataError(
                    f"{self.folder} was fitted to other clusters than those in obs/{self.settings.cluster_annot}",
                    hint="set the column of the run's clusters",
                )
            self._read[gene] = read_betas(self._files[gene], gene, labels)
        return self._read[gene]

    @cached_property
    def receiver(self) -> Receiver:
        """The receiver of ligands; radii by signaling need the network of the run."""
        s = self.settings
        if s.radius_rule == "one":
            return Receiver(
                self.tissue.xy, radius=s.radius, scale=s.weighted_ligand_scale_factor, kernel=s.kernel,
                threads=self._threads,
            )  # fmt: skip
        return make_receiver(self.tissue, s, make_finder(self.tissue, s), self._threads)

    def splash(self, gene: str, *, beta_scale_factor: float = 1.0, beta_cap: float | None = None) -> Table:
        """Return the derivatives of a target by each of its modulating genes, in every cell."""
        genes, out = compute_splash(
            self.betas(gene), self.tissue, self.receiver, scale=beta_scale_factor, cap=beta_cap, threads=self._threads
        )
        columns: dict[str, Any] = {CELL: [str(c) for c in self.tissue.cells]}
        return Table(columns | {f"beta_{g}": out[:, i] for i, g in enumerate(genes)})

    def engine(
        self, also: Sequence[str] = (), *, beta_scale_factor: float = 1.0, beta_cap: float | None = None
    ) -> Engine:
        """Return the models of all targets, extended by the genes ``also``; they are kept for the next call."""
        self.tissue.need_genes(also, "gene to perturb,")
        for (scale, cap, genes), engine in self._engines.items():
            if (scale, cap) == (beta_scale_factor, beta_cap) and set(also) <= genes:
                return engine
        engine = Engine(
            self.tissue, self.receiver, [self.betas(g) for g in self.genes], also=also, scale=beta_scale_factor,
            cap=beta_cap, threads=self._threads,
        )  # fmt: skip
        self._engines = {(beta_scale_factor, beta_cap, frozenset(engine.genes)): engine}
        return engine

    def perturb(
        self,
        desired: Mapping[str, float],
        *,
        cells: np.ndarray | Sequence[str] | None = None,
        hops: int = 4,
        response: str = "derivative",
        beta_scale_factor: float = 1.0,
        beta_cap: float | None = None,
    ) -> Perturbation:
        """Set genes to values in some cells, and propagate the change through the tissue.

        Parameters
        ----------
        desired
            Value that each gene is set to; 0 is a knockout.
        cells
            The cells, as a mask, row numbers or cell names; all cells by default.
        hops
            Number of times that the change passes from gene to gene and from cell to cell.
        response
            ``derivative`` (the published scheme) or ``exact``.
        beta_scale_factor, beta_cap
            A factor on ligand terms, and a bound on every derivative.
        """
        engine = self.engine(list(desired), beta_scale_factor=beta_scale_factor, beta_cap=beta_cap)
        scope = self.find_cells(cells)
        change = engine.perturb(desired, cells=scope, hops=hops, response=response)
        return Perturbation(dict(desired), self.tissue.cells, change, self)

    def find_cells(self, cells: np.ndarray | Sequence[str] | None) -> np.ndarray | None:
        """Return a mask or row numbers of the given cells."""
        if cells is None:
            return None
        given = np.asarray(cells)
        if given.dtype == bool:
            if given.shape != (self.tissue.n_cells,):
                raise UsageError(f"the mask has the shape {given.shape}, but there are {self.tissue.n_cells:,} cells")
            return given
        if given.dtype.kind in "iu":
            return given
        place = self.tissue.place_cells()
        for c in given.tolist():
            if str(c) not in place:
                raise DataError(f"{self.tissue.where} has no cell {c!r}")
        return np.array([place[str(c)] for c in given.tolist()], np.int64)

    def read_cells(self, path: str | os.PathLike, column: str | None = None) -> np.ndarray:
        """Return the rows of the cells in a column of a CSV file (by default its first column)."""
        rows = read_rows(path, what="a list of cells")
        if not rows:
            raise DataError(f"{path} is empty")
        head = [c.strip() for c in rows[0]]
        if column is None:
            at = 0
        elif column in head:
            at = head.index(column)
        else:
            raise DataError(f"{path} has no column {column!r}", hint=f"columns: {', '.join(head)}")
        names = [r[at].strip() for r in rows[1:] if len(r) > at and r[at].strip()]
        found = self.find_cells(names)
        assert found is not None
        return found

    def where(self, text: str) -> np.ndarray:
        """Return (n,) bool: the cells whose obs column has one of the labels, from ``COL=LABEL[,LABEL]``."""
        name, mark, labels = text.partition("=")
        if not mark or not labels:
            raise UsageError(f"{text!r} is not a valid choice of cells", hint="write COLUMN=LABEL[,LABEL]")
        have = self.tissue.column(name).labels()
        have = have if self.tissue.rows is None else have[self.tissue.rows]
        wanted = labels.split(",")
        for label in wanted:
            if label not in set(have):
                known = sorted({str(v) for v in have})[:8]
                raise DataError(f"obs/{name}: no cell has the label {label!r}", hint=f"labels: {', '.join(known)}")
        return np.isin(have.astype(str), wanted)
