"""``features``: a table of features of perturbations, from networks, gene sets, annotations, tables and stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.descriptors.sources import Source, read_source
from vcelltools.errors import DataError, UsageError, checked, spell
from vcelltools.genes.identity import make_basis, match_genes
from vcelltools.genes.table import read_aliases
from vcelltools.io.results import Result
from vcelltools.io.textfile import read_rows, read_text
from vcelltools.io.write.atomic import atomic_file
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.names import read_lines
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import one_blas_thread
from vcelltools.stores.store import open_store

if TYPE_CHECKING:
    from scipy import sparse


@dataclass(frozen=True, kw_only=True)
class FeaturesResult(Result):
    """The features that were written.

    Attributes
    ----------
    n_wanted, n_covered
        Number of requested perturbations, and of those in at least one source.
    coverage
        By source: kind, number of columns, and number of known perturbations.
    missing
        Perturbations in no source; they have no row.
    """

    out: Path
    n_wanted: int
    n_covered: int
    n_features: int
    coverage: dict[str, dict[str, str | int]]
    missing: tuple[str, ...]


@checked
@one_blas_thread()
def features(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike = "features.parquet",
    *,
    perturbations: str | os.PathLike | None = None,
    stores: Sequence[str | os.PathLike] = (),
    dims: int = 64,
    weights: Sequence[float] = (),
    varm: str | None = None,
    aliases: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> FeaturesResult:
    """Write features of perturbations: the sources are reduced, standardised, weighted and joined column by column.

    A source with more than ``dims`` columns is reduced by a truncated singular value decomposition over all of its
    genes. Each source is centred over the perturbations that it has, and scaled so that the mean squared length of its
    rows is its squared weight. Perturbations that a source lacks are zero there.

    Parameters
    ----------
    sources
        Edge lists, gene sets (GMT), annotations (GAF), tables of numbers (parquet, npy, npz, csv, ``varm`` of an
        h5ad file), and stores, whose co-expression in the control cells is used.
    out
        The Parquet file to write, with the names as its index.
    perturbations
        File of names, one per line, or a CSV file with a column ``target_gene``.
    stores
        Stores whose perturbations are used; without these and ``perturbations``, every gene of the sources is used.
    dims
        Maximum number of columns per source.
    weights
        One weight per source; by default 1.
    varm
        Key of varm in an h5ad source.
    aliases
        A table of two columns: alias, and symbol or id.

    Raises
    ------
    UsageError
        If weights are invalid, or the output exists and ``force`` is false.
    DataError
        If a source cannot be read, or no source has any of the perturbations.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.features(["stores/atlas"], "coexpression.parquet", dims=8).n_features
    8
    """
    import pandas as pd

    if not sources:
        raise UsageError(
            "no source of features is given", hint="pass an edge list, gene sets, a table of numbers or a store"
        )
    if weights and (len(weights) != len(sources) or not all(0 < w < np.inf for w in weights)):
        raise UsageError(
            f"there are {len(weights)} weights for {len(sources)} sources, but each source needs one above 0",
            field="weights",
        )
    if dims < 1:
        raise UsageError(f"{spell('dims', dims)} is not at least 1", field="dims")
    guard_outputs([Target(out, "parquet")], reads=[*sources, *stores, perturbations, aliases], force=force)
    progress.start("reading sources", len(sources), "sources")
    tables = []
    for path in sources:
        tables.append(read_source(Path(path), varm=varm, dims=dims))
        progress.advance(1)
    progress.finish()
    known = _list_wanted(perturbations, stores) or {x: (None, None) for s in tables for x in s.labels}
    wanted = list(known)
    parts, coverage = [], {}
    other = read_aliases(aliases) if aliases is not None else None
    for k, source in enumerate(tables):
        values = _reduce(source, dims)
        found = match_genes(make_basis(wanted, known=known), source.genes, policy="first", aliases=other)
        part = np.full((len(wanted), values.shape[1]), np.nan)
        inside = found.gene_of >= 0
        part[inside] = values[_find_rows(source)[found.gene_of[inside]]]
        parts.append(_standardise(part, weights[k] if weights else 1.0))
        label = source.name if source.name not in coverage else f"{source.name}-{k + 1}"
        coverage[label] = {"kind": source.kind, "columns": values.shape[1], "known": int(inside.sum())}
    joined = np.concatenate(parts, axis=1)
    covered = np.isfinite(joined).any(axis=1)
    if not covered.any():
        raise DataError(
            f"no source has any of the {len(wanted):,} perturbations ({', '.join(wanted[:3])}, …)",
            hint=f"compare the names: the first source has {', '.join(tables[0].labels[:3])}",
        )
    names = [f"{label}_{i}" for label, c in coverage.items() for i in range(int(c["columns"]))]
    rows = [w for w, c in zip(wanted, covered, strict=True) if c]
    missing = tuple(w for w, c in zip(wanted, covered, strict=True) if not c)
    table = pd.DataFrame(np.nan_to_num(joined[covered]), index=pd.Index(rows, name="gene"), columns=names)
    with atomic_file(Path(out), force=force) as tmp:
        table.astype(np.float32).to_parquet(tmp)
    return FeaturesResult(
        out=Path(out), n_wanted=len(wanted), n_covered=int(covered.sum()), n_features=joined.shape[1],
        coverage=coverage, missing=missing,
    )  # fmt: skip


def _list_wanted(
    perturbations: str | os.PathLike | None, stores: Sequence[str | os.PathLike]
) -> dict[str, tuple[str | None, str | None]]:
    """Return the requested names, each with its (id, symbol) in a store; control labels are left out."""
    known: dict[str, tuple[str | None, str | None]] = {}
    out: dict[str, tuple[str | None, str | None]] = {}
    for path in stores:
        store = open_store(path)
        for gene_id, symbol in zip(store.measured["id"], store.measured["symbol"], strict=True):
            pair = (gene_id if isinstance(gene_id, str) else None, symbol if isinstance(symbol, str) else None)
            known |= {x: pair for x in pair if x}
        runs = store.runs
        for name in sorted(runs.loc[~runs["is_control"], "perturbation"].unique()):
            out[str(name)] = known.get(str(name), (None, None))
    if perturbations is not None:
        for name in _read_list(perturbations):
            out[name] = known.get(name, (None, None))
    return out


def _read_list(path: str | os.PathLike) -> list[str]:
    """Return the names in a list with one per line, or in the column ``target_gene`` of a CSV file."""
    what = "a list of perturbations, one per line,"
    lines = read_lines(read_text(path, what=what))
    head = [c.strip() for c in lines[0].split(",")] if lines else []
    if "target_gene" in head:
        at = head.index("target_gene")
        return list(dict.fromkeys(x for row in read_rows(path, what=what)[1:] if (x := row[at].strip())))
    if not lines:
        raise DataError(f"{path}: lists no perturbation")
    return list(dict.fromkeys(lines))


def _find_rows(source: Source) -> np.ndarray:
    """Return the first row of each distinct gene of a source, in the order of :func:`match_genes`."""
    first: dict[str, int] = {}
    for i, key in enumerate(source.genes.keys):
        first.setdefault(key, i)
    return np.array(list(first.values()), np.int64)


def _reduce(source: Source, dims: int) -> np.ndarray:
    """Return the values (n, at most dims), reduced by a truncated singular value decomposition if necessary."""
    from scipy import sparse

    values = source.values
    if not sparse.issparse(values) and source.kind == "table":
        values = np.asarray(values, np.float64)
        spread = values.std(axis=0)
        values = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    if values.shape[1] <= dims:
        return np.asarray(values.todense() if isinstance(values, sparse.csr_matrix) else values)
    return _decompose(values, min(dims, *values.shape))


def _decompose(values: np.ndarray | sparse.csr_matrix, k: int, rounds: int = 8) -> np.ndarray:
    """Return the first ``k`` left singular vectors times their singular values (n, k).

    It uses subspace iteration from a fixed random start (Halko, Martinsson & Tropp 2011, algorithm 4.4). Networks have
    a singular value of 1 for each of their components, for which Lanczos methods are very slow.
    """
    wide = min(k + 16, *values.shape)
    span = np.random.default_rng(0).normal(size=(values.shape[1], wide))
    for _ in range(rounds):
        span = np.linalg.qr(values @ span)[0]
        span = np.linalg.qr(values.T @ span)[0]
    left, size, right = np.linalg.svd(values @ span, full_matrices=False)
    right = right @ span.T
    sign = np.sign(right[np.arange(len(right)), np.abs(right).argmax(axis=1)])  # fixes the arbitrary sign
    return (left * (size * sign))[:, :k]


def _standardise(part: np.ndarray, weight: float) -> np.ndarray:
    """Return the centred rows of a source, scaled to a mean squared length of weight²; NaN for missing rows."""
    centred = part - np.nanmean(part, axis=0) if np.isfinite(part).any() else part
    length = np.sqrt(np.nanmean((centred**2).sum(axis=1))) if np.isfinite(part).any() else 1.0
    return weight * centred / (length if length > 0 else 1.0)
