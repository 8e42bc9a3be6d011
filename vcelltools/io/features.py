"""Select the genes among the features of a matrix, which may include antibodies, guides or another species."""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError, spell
from vcelltools.io.columns import select_columns
from vcelltools.io.hdf5.table import PickedTable
from vcelltools.io.opened import Dataset

GENES = "Gene Expression"
ALL = "all"
_TYPES = ("feature_types", "feature_type")


def choose_features(ds: Dataset, wanted: str | None) -> None:
    """Keep the features of one type or genome: ``wanted``, or by default ``Gene Expression`` among several types.

    The types are those of Cell Ranger, in ``var`` under the names that scanpy gives them. Types without
    ``Gene Expression`` among them (such as biotypes) do not restrict the genes by default.

    Parameters
    ----------
    wanted
        A feature type, a genome, ``all``, or None.

    Raises
    ------
    DataError
        If there is no such type or genome, or the file does not distinguish types.
    """
    column = next((c for c in _TYPES if c in ds.var.columns), None)
    types = None if column is None else ds.var.column(column).labels()
    genomes = ds.var.column("genome").labels() if "genome" in ds.var.columns else None
    n_each = _count(types)
    census = ", ".join(f"{k:,} {t}" for t, k in n_each.items())
    if wanted is None:
        if len(n_each) > 1 and GENES in n_each:
            ds.notes.append(
                f"{n_each[GENES]:,} features of type {GENES} out of {census} are used ({spell('modality')} selects "
                f"others, or all)"
            )
            _keep(ds, np.asarray(types == GENES))
            ds.modality = GENES if ds.kind.startswith("10x") else ds.modality
        elif len(n_each) > 1 and ds.kind.startswith("10x"):
            raise DataError(
                f"{ds.label} holds {census} and no {GENES}", hint=f"{spell('modality')}, one of them, or all"
            )
        elif len(n_each) > 1:
            ds.notes.append(f"var.{column} holds {census}; all of them are used as genes")
        genomes = None if genomes is None else genomes if ds.var_rows is None else genomes[ds.var_rows]
        if len(species := _count(genomes)) > 1:
            listed = ", ".join(f"{k:,} of {g}" for g, k in species.items())
            ds.notes.append(
                f"the genes are of several genomes ({listed}); all are used ({spell('modality')} selects one)"
            )
        return
    if types is None and genomes is None:
        raise DataError(
            f"{ds.label} has no modalities (it is not an h5mu), so no {wanted!r}",
            hint=f"leave {spell('modality')} out",
        )
    ds.modality = wanted
    if wanted == ALL:
        return
    for values in (types, genomes):
        if values is not None and (keep := np.asarray(values == wanted)).any():
            _keep(ds, keep)
            return
    known = ", ".join([*n_each, *_count(genomes), ALL])
    raise DataError(
        f"{ds.label} has no feature type or genome {wanted!r}", hint=f"{spell('modality')}, one of: {known}"
    )


def _count(labels: np.ndarray | None) -> dict[str, int]:
    some = [] if labels is None else [x for x in labels if x]
    return dict(zip(*(a.tolist() for a in np.unique(some, return_counts=True)), strict=True)) if some else {}


def _keep(ds: Dataset, keep: np.ndarray) -> None:
    ds.var_rows = np.flatnonzero(keep)
    ds.matrix = select_columns(ds.matrix, ds.var_rows)
    ds.var = PickedTable(ds.var, ds.var_rows)
