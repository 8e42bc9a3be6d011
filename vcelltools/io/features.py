"""Select the genes among the features of a matrix, which may include antibodies, guides or another species.

The types are those of Cell Ranger, in ``var`` under the names that scanpy gives them, so that a 10x file and the h5ad,
h5mu or zarr written from it hold the same genes. A biotype (``protein_coding``) is no such type.
"""

from __future__ import annotations

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.columns import select_columns
from vcelltools.io.hdf5.table import PickedTable
from vcelltools.io.opened import Dataset
from vcelltools.io.table import Table

ALL = "all"
GENES = ("Gene Expression", "GEX")  # as Cell Ranger names it, and as multiome files often do
OTHERS = (
    "Antibody Capture", "Antigen Capture", "CRISPR Guide Capture", "Multiplexing Capture", "Chromatin Accessibility",
    "Peaks", "Custom", "VDJ", "VDJ-T", "VDJ-B", "ADT", "HTO", "ATAC",
)  # fmt: skip
_COLUMNS = ("feature_types", "feature_type")


def read_types(var: Table) -> tuple[str, np.ndarray] | None:
    """Return the column with the types of the features and its (n,) labels; None if there is no such column.

    A column that holds types of Cell Ranger comes before one that holds something else, such as biotypes.
    """
    found = [(c, var.column(c).labels()) for c in _COLUMNS if c in var.columns]
    return next((f for f in found if {*GENES, *OTHERS} & set(_count(f[1]))), found[0] if found else None)


def list_types(var: Table) -> list[str]:
    """Return the types of the features that are types of Cell Ranger and not biotypes."""
    types = read_types(var)
    n_each = {} if types is None else _count(types[1])
    return list(n_each) if {*GENES, *OTHERS} & set(n_each) else []


def choose_features(ds: Dataset, modality: str | None, feature_type: str | None, genome: str | None) -> None:
    """Keep the features of one type and of one genome.

    Parameters
    ----------
    modality
        For a file that is not an h5mu: a type, a genome or ``all``, as a short form of the two others.
    feature_type
        A type, or ``all``; by default ``Gene Expression`` if there are several types of Cell Ranger.
    genome
        A genome; by default (and with ``all``) those of all features.

    Raises
    ------
    DataError
        If there is no such type or genome, or a choice is necessary.
    UsageError
        If ``modality`` contradicts the two others.
    """
    found = read_types(ds.var)
    column, types = found or (None, None)
    genomes = ds.var.column("genome").labels() if "genome" in ds.var.columns else None
    if modality is not None:
        ds.modality = modality
        as_type, as_genome = _read_modality(ds, modality, types, genomes)
        for name, short, given in (("feature_type", as_type, feature_type), ("genome", as_genome, genome)):
            if None not in (short, given) and short != given:
                raise UsageError(
                    f"{spell('modality', modality)} and {spell(name, given)} differ", hint="remove one of the two"
                )
        feature_type, genome = feature_type or as_type, genome or as_genome
    elif ds.kind.startswith("10x") and ds.modality is None:
        ds.modality = feature_type
    ds.feature_type, ds.genome = feature_type, genome or ds.genome
    keep = np.ones(ds.n_genes, bool)
    if feature_type is None:
        keep &= _choose_genes(ds, column, types)
    elif feature_type != ALL:
        keep &= _match(ds, types, feature_type, "feature_type", [*_count(types), ALL])
    species = _count(None if genomes is None else genomes[keep])
    if genome not in (None, ALL):
        keep &= _match(ds, genomes, genome, "genome", [*species, ALL])
        if not keep.any():
            raise DataError(
                f"{ds.label} has no features of genome {genome!r} among those of type {feature_type or GENES[0]!r}",
                hint=f"{spell('genome')}, one of: {', '.join([*species, ALL])}",
            )
    elif genome is None and len(species) > 1:
        listed = ", ".join(f"{k:,} of {g}" for g, k in species.items())
        ds.notes.append(f"the genes are of several genomes ({listed}); all are used ({spell('genome')} selects one)")
    if not keep.all():
        _keep(ds, keep)


def _read_modality(
    ds: Dataset, modality: str, types: np.ndarray | None, genomes: np.ndarray | None
) -> tuple[str | None, str | None]:
    """Return the type and the genome that ``modality`` means in a file without modalities."""
    if types is None and genomes is None:
        raise DataError(
            f"{ds.label} has no modalities (it is not an h5mu), so no {modality!r}",
            hint=f"leave {spell('modality')} out",
        )
    if modality == ALL or modality in _count(types):
        return modality, None
    if modality in _count(genomes):
        return None, modality
    known = ", ".join([*_count(types), *_count(genomes), ALL])
    raise DataError(
        f"{ds.label} has no feature type or genome {modality!r}", hint=f"{spell('modality')}, one of: {known}"
    )


def _choose_genes(ds: Dataset, column: str | None, types: np.ndarray | None) -> np.ndarray:
    """Return which features are genes where no type was requested, with a note on the others."""
    n_each = _count(types)
    everything = np.ones(ds.n_genes, bool)
    if len(n_each) < 2:
        return everything
    census = ", ".join(f"{k:,} {t}" for t, k in n_each.items())
    genes = next((g for g in GENES if g in n_each), None)
    if genes is not None:
        ds.notes.append(
            f"{n_each[genes]:,} features of type {genes} out of {census} are used ({spell('feature_type')} selects "
            f"others, or all)"
        )
        ds.modality = genes if ds.kind.startswith("10x") else ds.modality
        return np.asarray(types == genes)
    if ds.kind.startswith("10x") or set(OTHERS) & set(n_each):
        raise DataError(
            f"{ds.label} holds {census} and no {GENES[0]}", hint=f"{spell('feature_type')}, one of them, or all"
        )
    ds.notes.append(f"var.{column} holds {census}; all of them are used as genes")
    return everything


def _match(ds: Dataset, values: np.ndarray | None, wanted: str, name: str, known: list[str]) -> np.ndarray:
    what = name.replace("_", " ")
    if values is None:
        raise DataError(f"{ds.label} states no {what} of its features", hint=f"leave {spell(name)} out")
    if not (same := np.asarray(values == wanted)).any():
        raise DataError(f"{ds.label} has no {what} {wanted!r}", hint=f"{spell(name)}, one of: {', '.join(known)}")
    return same


def _count(labels: np.ndarray | None) -> dict[str, int]:
    some = [] if labels is None else [x for x in labels if x]
    return dict(zip(*(a.tolist() for a in np.unique(some, return_counts=True)), strict=True)) if some else {}


def _keep(ds: Dataset, keep: np.ndarray) -> None:
    ds.var_rows = np.flatnonzero(keep)
    ds.matrix = select_columns(ds.matrix, ds.var_rows)
    ds.var = PickedTable(ds.var, ds.var_rows)
