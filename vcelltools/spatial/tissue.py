"""A tissue: the coordinates, expression and clusters of its cells, which are checked when it is opened."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.columns import read_columns
from vcelltools.io.dataset import open_dataset
from vcelltools.io.fingerprint import fingerprint_matrix, get_fingerprint, hash_text
from vcelltools.io.obsm import list_obsm, read_obsm

if TYPE_CHECKING:
    from anndata import AnnData

    from vcelltools.io.opened import Dataset
    from vcelltools.io.table import Column

COORDS = ("spatial", "X_spatial", "spatial_loc")  # arrays of obsm, in the order of preference
NONE = "none"  # as the cluster column: all cells are one cluster
TINY = 1e-9  # expression up to this value counts as 0
_NEAR = 3


@dataclass
class Tissue:
    """The cells of one data set.

    Attributes
    ----------
    source
        The path or the AnnData.
    layer
        Layer of the expression.
    cells
        (n,) object array of cell names.
    genes
        Gene names, in the order of the columns.
    xy
        (n, d) float64 coordinates, d = 2 or 3.
    clusters
        (n,) int64: cluster number of every cell, as in betadata files.
    labels
        Label of each cluster number.
    position, duplicated
        Column of each gene name, and the names that occur more than once.
    places
        Hash of the coordinates and clusters of all cells in the data set.
    rows
        (n,) rows of the data set that are used; None for all.
    """

    source: Any
    layer: str
    cells: np.ndarray
    genes: list[str]
    xy: np.ndarray
    clusters: np.ndarray
    labels: dict[int, str]
    position: dict[str, int] = field(repr=False, default_factory=dict)
    duplicated: set[str] = field(repr=False, default_factory=set)
    places: str = field(repr=False, default="")
    rows: np.ndarray | None = field(repr=False, default=None)
    _loaded: dict[str, np.ndarray] = field(repr=False, default_factory=dict)

    @property
    def where(self) -> str:
        """The path, or ``AnnData``, for messages."""
        return str(self.source) if isinstance(self.source, str | os.PathLike) else "AnnData"

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cells)

    def need_genes(self, names: Sequence[str], what: str = "gene") -> None:
        """Raise a :class:`DataError` with similar names if one of ``names`` is missing or occurs more than once."""
        for name in names:
            if name not in self.position:
                near = difflib.get_close_matches(name, self.genes, _NEAR, 0.6)
                by_case = [g for g in self.genes if g.lower() == name.lower()]
                hint = f"did you mean {', '.join(by_case or near)}?" if by_case or near else "names are read from var"
                raise DataError(f"{self.where} has no {what} {name!r}", hint=hint)
            if name in self.duplicated:
                raise DataError(f"{self.where}: {name!r} occurs more than once", hint="make the names unique")

    def place_cells(self) -> dict[str, int]:
        """Return the row of every cell name, or raise a :class:`DataError` if two cells have the same name."""
        place = {str(c): i for i, c in enumerate(self.cells)}
        if len(place) != self.n_cells:
            twice = next(c for i, c in enumerate(self.cells) if place[str(c)] != i)
            raise DataError(f"{self.where}: two cells have the same name, {twice}", hint="make the names unique")
        return place

    def expression(self, names: Sequence[str]) -> np.ndarray:
        """Return (n, k) float64 expression of some genes; each is read once. Values up to 1e-9 are 0.

        Raises
        ------
        DataError
            If a gene is missing or occurs more than once, or values are negative or NaN.
        """
        missing = list(dict.fromkeys(g for g in names if g not in self._loaded))
        if missing:
            self.need_genes(missing)
            with open_dataset(self.source, layer=self.layer) as ds:
                columns = np.array([self.position[g] for g in missing], np.int64)
                values = read_columns(ds.matrix, columns).astype(np.float64)
            if self.rows is not None:
                values = values[self.rows]
            self._check_values(values, missing)
            values[values <= TINY] = 0.0
            self._loaded |= {g: np.ascontiguousarray(values[:, i]) for i, g in enumerate(missing)}
        out = np.empty((self.n_cells, len(names)))
        for i, g in enumerate(names):
            out[:, i] = self._loaded[g]
        return out

    def _check_values(self, values: np.ndarray, names: list[str]) -> None:
        bad = ~np.isfinite(values) | (values < 0)
        if bad.any():
            i, j = (int(v[0]) for v in np.nonzero(bad))
            raise DataError(
                f"{self.where}: {self.layer} holds {values[i, j]:g} for {names[j]} in cell {self.cells[i]}; "
                "expression must be finite and not negative",
                hint="use a layer of counts, or of log-normalised or imputed counts",
            )

    def take(self, rows: np.ndarray) -> Tissue:
        """Return the tissue of some cells, which send and receive only among themselves."""
        return Tissue(
            source=self.source, layer=self.layer, cells=self.cells[rows], genes=self.genes, xy=self.xy[rows],
            clusters=self.clusters[rows], labels=self.labels, position=self.position, duplicated=self.duplicated,
            rows=rows if self.rows is None else self.rows[rows],
            places=self.places, _loaded={g: v[rows] for g, v in self._loaded.items()},
        )  # fmt: skip

    def get_fingerprint(self) -> str:
        """Return a fingerprint: of the bytes of a file, or the matrix, names, coordinates and clusters of an AnnData.

        It covers the whole data set and the layer, even if only some of the cells are used.
        """
        with open_dataset(self.source, layer=self.layer) as ds:
            if ds.source is not None and isinstance(ds.source, str | os.PathLike):
                return f"file:{get_fingerprint(ds)}"
            return f"memory:{hash_text([fingerprint_matrix(ds), self.places])}"

    def column(self, name: str) -> Column:
        """Return one column of obs."""
        with open_dataset(self.source, layer=self.layer) as ds:
            return ds.obs.column(name)


def open_tissue(
    source: str | os.PathLike | AnnData,
    *,
    layer: str = "imputed_count",
    cluster_annot: str = "cell_type_int",
    coords: str | None = None,
    dims: int | None = None,
) -> Tissue:
    """Open a data set with coordinates.

    Parameters
    ----------
    layer
        ``"X"`` or the name of a layer.
    cluster_annot
        obs column of the clusters; ``"none"`` makes all cells one cluster.
    coords
        Array of ``obsm``; by default ``spatial``, ``X_spatial`` or ``spatial_loc``.
    dims
        Number of its columns to use, 2 or 3. Required if it has three.

    Raises
    ------
    DataError
        If coordinates are missing, not finite or all equal, or the layer or cluster column is missing.
    """
    with open_dataset(source, layer=layer) as ds:
        n = ds.n_cells
        names = ds.var.index.astype(str).tolist()
        cells = np.asarray(ds.obs.index, dtype=object)
        clusters, labels = _read_clusters(ds, cluster_annot)
    seen: dict[str, int] = {}
    duplicated = set()
    for i, name in enumerate(names):
        if name in seen:
            duplicated.add(name)
        else:
            seen[name] = i
    xy = _read_coordinates(source, coords, dims, n)
    return Tissue(
        source=source, layer=layer, cells=cells, genes=names, xy=xy, clusters=clusters, labels=labels,
        position=seen, duplicated=duplicated, places=hash_text([xy.tobytes().hex(), clusters.tobytes().hex()]),
    )  # fmt: skip


def _read_coordinates(source: Any, coords: str | None, dims: int | None, n: int) -> np.ndarray:
    where = str(source) if isinstance(source, str | os.PathLike) else "AnnData"
    have = list_obsm(source)
    key = coords or next((k for k in COORDS if k in have), None)
    if key is None:
        raise DataError(
            f"{where} has no coordinates in obsm ({', '.join(COORDS)})",
            hint=f"set coords to the array of the coordinates; obsm has:  {', '.join(have) or 'nothing'}",
        )
    xy = read_obsm(source, key, n)
    if xy.shape[1] not in (2, 3):
        raise DataError(f"{where}: obsm/{key} has {xy.shape[1]} columns; 2 or 3 are expected")
    if xy.shape[1] == 3 and dims is None:
        raise DataError(f"{where}: obsm/{key} has three columns", hint="set dims to 2 (the first two) or 3 (all)")
    if dims is not None and dims > xy.shape[1]:
        raise UsageError(f"dims is {dims}, and obsm/{key} has {xy.shape[1]} columns", hint="leave it out")
    xy = np.ascontiguousarray(xy[:, : dims or 2])
    if not np.isfinite(xy).all():
        i = int(np.flatnonzero(~np.isfinite(xy).all(1))[0])
        raise DataError(f"{where}: obsm/{key} is not finite in row {i}")
    if (xy == xy[0]).all():
        raise DataError(f"{where}: in obsm/{key} all cells have the same coordinates")
    return xy


def _read_clusters(ds: Dataset, name: str) -> tuple[np.ndarray, dict[int, str]]:
    """Return the cluster number of each cell and the labels; whole numbers are kept."""
    if name == NONE and NONE not in ds.obs.columns:
        return np.zeros(ds.n_cells, np.int64), {0: "all"}
    column = ds.obs.column(name)
    missing = column.get_missing()
    if missing.any():
        i = int(np.flatnonzero(missing)[0])
        raise DataError(f"{ds.label}: obs/{name} has no value for {missing.sum():,} cells, the first is row {i}")
    codes, labels = column.factorize()
    whole = column.categories if column.codes is not None else column.values
    if whole is not None and whole.dtype.kind in "iu":
        numbers = np.array([int(v) for v in labels], np.int64)
        return numbers[codes], {int(v): str(v) for v in labels}
    ordered = sorted(labels)
    rank = np.array([ordered.index(v) for v in labels], np.int64)
    return rank[codes], dict(enumerate(ordered))
