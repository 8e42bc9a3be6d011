"""``hvg_info.json`` and the figure beside it: a pooled ranking as public training scripts read and write it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError, checked
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import staged, write_json
from vcelltools.selection.hvg import FIGURE
from vcelltools.selection.plot import draw_analysis
from vcelltools.selection.pooled import PooledResult


def find_gene_list(info_fpath: str | os.PathLike, files: Sequence[str | os.PathLike]) -> list[str] | None:
    """Return the gene list of the config.json beside ``info_fpath`` or above the files, or None.

    Raises
    ------
    DataError
        If there is a config.json without a gene list.
    """
    folders = [Path(info_fpath).parent, *(p for f in files for p in (Path(f).parent, Path(f).parent.parent))]
    for folder in dict.fromkeys(folders):
        fpath = folder / "config.json"
        if not fpath.is_file():
            continue
        try:
            genes = parse_json(fpath.read_text(encoding="utf-8"))["gene_list"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{fpath} holds no gene_list", hint="move it away, or merge again") from None
        if not isinstance(genes, list) or not all(isinstance(x, str) for x in genes) or len(set(genes)) < len(genes):
            raise DataError(f"{fpath}: its gene_list is not a list of distinct names", hint="merge again")
        return genes
    return None


def make_info(result: PooledResult, gene_list: list[str] | None) -> dict[str, Any]:
    """Return the content of ``hvg_info.json``.

    Raises
    ------
    DataError
        If a selected gene is not in ``gene_list``.
    """
    genes = gene_list if gene_list is not None else result.genes.tolist()
    at = {x: i for i, x in enumerate(genes)}
    lost = [x for x in result.selected if x not in at]
    if lost:
        raise DataError(
            f"{len(lost):,} selected genes are not in the gene_list of config.json (the first: {lost[0]!r})",
            hint="it belongs to another merge; merge again, or write to another folder",
        )
    indices = [at[x] for x in result.selected]
    order = result.order
    d, mean = result.columns["dispersions"][order], result.columns["means"][order]
    pct = 100.0 * result.n_positive[order] / max(result.n_cells, 1)
    none = len(order) == 0
    statistics = {
        "total_cells_analyzed": result.n_cells,
        "total_genes": len(genes),
        "expressed_genes": result.n_expressed,
        "n_hvgs": len(order),
        "mean_dispersion": None if none else d.mean(),
        "median_dispersion": None if none else np.median(d),
        "min_dispersion": None if none else d.min(),
        "max_dispersion": None if none else d.max(),
        "mean_expression": None if none else mean.mean(),
        "median_pct_cells": None if none else np.median(pct),
        "top_10_hvgs": result.selected[:10],
        "top_10_dispersions": d[:10],
        "top_10_pct_cells": pct[:10],
    }
    return {
        "hvg_indices": indices,
        "hvg_names": result.selected,
        "gene_to_hvg_idx": {str(i): k for k, i in enumerate(indices)},
        "gene_name_to_hvg_idx": {x: k for k, x in enumerate(result.selected)},
        "total_genes": len(genes),
        "statistics": statistics,
    }


def write_info(
    result: PooledResult, fpath: str | os.PathLike, files: Sequence[str | os.PathLike], *, force: bool = False
) -> tuple[Path, Path]:
    """Write ``hvg_info.json`` at ``fpath`` and the figure beside it, both or neither; return both paths."""
    out = Path(fpath)
    info = make_info(result, find_gene_list(out, files))
    figure = out.with_name(FIGURE)
    with staged([out, figure], force=force) as there:
        write_json(there / out.name, info)
        draw_analysis(result, there / figure.name)
    return out, figure


@dataclass(frozen=True, kw_only=True)
class HvgInfo:
    """A selection of genes, as ``hvg_info.json`` stores it.

    Attributes
    ----------
    indices
        (h,) int64 positions of the selected genes in the list of all genes, best first.
    names
        (h,) names.
    gene_to_hvg_idx
        Position in the list of all genes -> position among the selected genes, both as integers.
    statistics
        The statistics of the selection in the file.
    total_genes
        Length of the list of all genes, or None.
    """

    indices: np.ndarray
    names: list[str]
    gene_to_hvg_idx: dict[int, int]
    statistics: dict[str, Any]
    total_genes: int | None


@checked
def read_hvg_info(fpath: str | os.PathLike) -> HvgInfo:
    """Read ``hvg_info.json``, as written by this version or by the public script.

    Raises
    ------
    DataError
        If it is damaged or inconsistent.

    Examples
    --------
    >>> import vcelltools as vc
    >>> info = vc.read_hvg_info("hvg_info.json")
    >>> info.gene_to_hvg_idx[int(info.indices[0])]
    0
    """
    where = str(fpath)
    try:
        body = parse_json(Path(fpath).read_text(encoding="utf-8"))
        indices = np.array([int(x) for x in body["hvg_indices"]], np.int64)
        names = [str(x) for x in body.get("hvg_names") or body.get("hvg_genes") or []]
        total = body.get("total_genes")
        mapping = {int(k): int(v) for k, v in (body.get("gene_to_hvg_idx") or {}).items()}
    except OSError as e:
        raise DataError(f"{where}: {(e.strerror or str(e)).lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{where} is not a valid hvg_info.json ({type(e).__name__}: {e})") from None
    mapping = mapping or {int(i): k for k, i in enumerate(indices)}
    right = {int(i): k for k, i in enumerate(indices)}
    bad = len(right) < len(indices) or (len(indices) and int(indices.min()) < 0)
    if bad or mapping != right or (names and len(names) != len(indices)):
        raise DataError(f"{where}: its lists are inconsistent", hint="vcelltools hvg --pooled --hvg-info")
    if isinstance(total, int) and len(indices) and int(indices.max()) >= total:
        raise DataError(f"{where}: index {int(indices.max()):,} is beyond its {total:,} genes")
    statistics = body.get("statistics")
    return HvgInfo(
        indices=indices,
        names=names,
        gene_to_hvg_idx=mapping,
        statistics=statistics if isinstance(statistics, dict) else {},
        total_genes=total if isinstance(total, int) else None,
    )
