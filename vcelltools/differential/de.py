"""Differential expression of every perturbation against the controls, by one of three streamed tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, read_parts
from vcelltools.differential.runners import RUNNERS, Task
from vcelltools.errors import UsageError, check_number, checked, spell
from vcelltools.io import open_dataset
from vcelltools.io.frame import arrow_numbers, arrow_texts
from vcelltools.io.remote import set_remote
from vcelltools.io.results import Shown
from vcelltools.io.write.atomic import atomic_file, check_output
from vcelltools.kernels.pvalues import adjust_bh
from vcelltools.runtime.cluster import connect
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from distributed import Client

TESTS = ("wilcoxon", "nb", "welch")
REFERENCES = ("control", "rest")
ROW_GROUP = 1 << 18
"""Number of rows of a table that are written at once."""
REPEATED = ("context", "perturbation", "gene", "n_cells", "n_controls", "control_mean")
"""Columns of few different values, which Parquet keeps in a dictionary."""


@dataclass(frozen=True, kw_only=True)
class DeResult(Shown):
    """The comparison of every perturbation with its reference; rows are perturbations and columns genes.

    The reference are the controls of the same context by default.

    Attributes
    ----------
    perturbations, genes
        Names.
    contexts
        The context of each row, or None if all cells were pooled.
    n_cells_p, n_controls_p
        Numbers of cells of each perturbation and of its reference (the controls, or the other perturbations).
    mean_pg, control_mean_pg
        Mean counts per ten thousand. If log1p values do not have the same sum in every cell (because the file has only
        some of the genes), their scale is unknown, and the means are in the units of the file.
    log2fc_pg
        log2((mean + ε) / (control mean + ε)).
    statistic_pg
        Mann-Whitney U of the perturbation (wilcoxon; z with strata), the difference between the count and its
        expectation in standard deviations (nb), or Welch's t.
    p_pg, fdr_pg
        Two-sided p-values, and their Benjamini-Hochberg adjustment within each perturbation (NaN for excluded genes).
    dispersion_pg
        nb: dispersion per context, with variance = mean + dispersion · mean²; None otherwise.
    effect_pg
        welch: mean residuals of log1p values; None otherwise.
    settings, notes
        The settings of the computation, and notes for the user.
    """

    perturbations: list[str]
    genes: np.ndarray
    contexts: list[str] | None
    n_cells_p: np.ndarray
    n_controls_p: np.ndarray
    mean_pg: np.ndarray
    control_mean_pg: np.ndarray
    log2fc_pg: np.ndarray
    statistic_pg: np.ndarray
    p_pg: np.ndarray
    fdr_pg: np.ndarray
    dispersion_pg: np.ndarray | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    effect_pg: np.ndarray | None = None

    @property
    def n_controls(self) -> int:
        """Number of control cells in all contexts."""
        contexts = self.contexts or [""] * len(self.n_controls_p)
        return sum(dict(zip(contexts, self.n_controls_p.tolist(), strict=True)).values())

    @property
    def control_mean_g(self) -> np.ndarray:
        """(g,) means of the controls, if there is one context."""
        return self.control_mean_pg[0]

    @property
    def dispersion_g(self) -> np.ndarray | None:
        """(g,) dispersions, if there is one context."""
        return None if self.dispersion_pg is None else self.dispersion_pg[0]

    def count_significant(self, fdr: float = 0.05) -> list[list[Any]]:
        """Return the context (if there are any), the perturbation and the number of its significant genes, by row.

        The rows are sorted by this number, largest first.
        """
        names = [self.perturbations] if self.contexts is None else [self.contexts, self.perturbations]
        rows = zip(*names, (self.fdr_pg < fdr).sum(axis=1).tolist(), strict=True)
        return sorted(map(list, rows), key=lambda row: -row[-1])

    def significant(self, fdr: float = 0.05) -> dict[str, Any]:
        """Return the number of genes with an adjusted p below ``fdr``, by perturbation (and by context, if any)."""
        n = (self.fdr_pg < fdr).sum(axis=1).tolist()
        if self.contexts is None:
            return dict(zip(self.perturbations, n, strict=True))
        out: dict[str, Any] = {}
        for c, p, k in zip(self.contexts, self.perturbations, n, strict=True):
            out.setdefault(c, {})[p] = k
        return out

    def _columns(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Return the columns of some perturbations; those of text as (values, codes)."""
        p = self.p_pg[rows]
        keep = ~np.isnan(self.fdr_pg[rows])

        def code(names: list[str]) -> tuple[list[str], np.ndarray]:
            place = {v: i for i, v in enumerate(dict.fromkeys(names))}  # a name is stored once if several genes have it
            return list(place), np.array([place[v] for v in names], np.int32)

        def of_rows(names: list[str]) -> tuple[list[str], np.ndarray]:
            texts, codes = code(names[rows])
            return texts, np.broadcast_to(codes[:, None], p.shape)[keep]

        genes, code_g = code([str(g) for g in self.genes])

        columns = {
            "n_cells": self.n_cells_p[rows, None], "n_controls": self.n_controls_p[rows, None],
            "mean": self.mean_pg[rows], "control_mean": self.control_mean_pg[rows],
            "log2_fold_change": self.log2fc_pg[rows],
            **({} if self.effect_pg is None else {"mean_residual": self.effect_pg[rows]}),
            "statistic": self.statistic_pg[rows], "p_value": p, "fdr": self.fdr_pg[rows],
        }  # fmt: skip
        return {
            **({} if self.contexts is None else {"context": of_rows(self.contexts)}),
            "perturbation": of_rows(self.perturbations),
            "gene": (genes, np.broadcast_to(code_g, p.shape)[keep]),
            **{name: np.broadcast_to(values, p.shape)[keep] for name, values in columns.items()},
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the tidy table, with one row per perturbation and gene."""
        import pandas as pd

        out = {}
        for name, v in self._columns().items():
            out[name] = pd.Categorical.from_codes(v[1], categories=pd.Index(v[0])) if isinstance(v, tuple) else v
        return pd.DataFrame(out)

    def to_json(self) -> dict[str, Any]:
        """Return the summary."""
        return {
            "n_perturbations": len(self.perturbations),
            "n_genes": len(self.genes),
            "n_controls": self.n_controls,
            "significant": self.significant(),
            "settings": self.settings,
            "notes": self.notes,
        }

    def write(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the tidy table, as Parquet or CSV according to the file name."""
        p = check_output(path, force=force)
        check_name(p)
        n_p, n_g = self.p_pg.shape
        step = max(1, ROW_GROUP // max(n_g, 1))  # some perturbations at a time, to bound the memory
        with atomic_file(p, force=force) as tmp:
            _write_parts(
                tmp, p.suffix == ".csv", (self._columns(slice(a, a + step)) for a in range(0, max(n_p, 1), step))
            )
        return p


def _write_parts(path: Path, as_csv: bool, parts: Iterator[dict[str, Any]]) -> None:
    """Write one table from the columns of parts of its rows; text columns are (values, codes)."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    writer: Any = None
    with ExitStack() as stack:
        for columns in parts:
            arrays = [
                pa.DictionaryArray.from_arrays(arrow_numbers(v[1]), arrow_texts(v[0]))
                if isinstance(v, tuple)
                else arrow_numbers(v)
                for v in columns.values()
            ]
            table = pa.Table.from_arrays(arrays, names=list(columns))
            if as_csv:
                plain = [c.cast(pa.string()) if pa.types.is_dictionary(c.type) else c for c in table.columns]
                table = pa.Table.from_arrays(plain, names=table.column_names)
                writer = writer or stack.enter_context(csv.CSVWriter(path, table.schema))
            else:
                repeated = [c for c in table.column_names if c in REPEATED]
                numbers = [f.name for f in table.schema if pa.types.is_floating(f.type) and f.name not in repeated]
                writer = writer or stack.enter_context(
                    parquet.ParquetWriter(
                        path, table.schema, compression="zstd", use_dictionary=repeated, write_statistics=repeated,
                        use_byte_stream_split=numbers,  # packs floats as small in two thirds of the time
                    )
                )  # fmt: skip
            writer.write_table(table)


def check_name(path: str | Path) -> None:
    """Raise a :class:`UsageError` unless the file name ends in a format of :meth:`DeResult.write`."""
    if Path(path).suffix not in (".parquet", ".csv"):
        raise UsageError(f"{path} ends in neither .parquet nor .csv", hint=f"choose another {spell('out')}")


@checked
def de(
    source: str | os.PathLike | AnnData,
    *,
    test: str = "wilcoxon",
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    reference: str = "control",
    context_col: str | None = None,
    stratify: str | None = None,
    covariates: Sequence[str] = (),
    replicate_col: str | None = None,
    keep: str | None = None,
    epsilon: float = 1e-9,
    min_cpm: float | None = None,
    continuity: bool = True,
    exact: bool = False,
    modality: str | None = None,
    layer: str | None = None,
    feature_type: str | None = None,
    genome: str | None = None,
    library_size: str | None = None,
    threads: int | None = None,
    dask: str | Client | None = None,
    progress: Progress = SILENT,
) -> DeResult:
    """Compare every perturbation with the controls, or with all other perturbed cells.

    Parameters
    ----------
    source
        A file or an AnnData: counts, or (wilcoxon) log1p-normalised values.
    test
        ``"wilcoxon"``: two-sided Mann-Whitney U on log1p of counts per ten thousand, with mid-ranks and tie correction.
        ``"nb"``: a negative binomial test by the method of moments, which needs counts
        (:func:`vcelltools.differential.negative_binomial.compare_counts`).
        ``"welch"``: Welch's t-test of the mean residuals of log1p of counts per ten thousand
        (:func:`vcelltools.differential.residuals.compare_residuals`).
    reference
        ``"control"``, or ``"rest"`` for all other perturbed cells (not with welch or covariates).
    context_col
        obs column of contexts, such as cell lines. Each context is compared with its own controls. By default all cells
        are pooled, with a warning if a column distinguishes kinds of cells.
    stratify
        wilcoxon: obs column, for example of batches, within whose groups cells are compared. The statistics of the
        groups are added with the weights of van Elteren 1960, without a continuity correction if several groups count.
    covariates
        obs columns of labels (donor, lane) to correct for. welch: each gene is regressed on them in the control cells,
        and effects are mean residuals (Feng et al. 2026). nb with ``replicate_col``: a regression of the samples
        (:mod:`vcelltools.differential.glm`).
    replicate_col
        nb: obs column of replicates. Their summed counts, and not cells, are then the unit of the test.
    keep
        Boolean obs column that selects the cells to use.
    epsilon
        Pseudocount added to both means of the fold change, in the units of ``mean_pg``.
    min_cpm
        Exclude genes with at most this pooled CPM in both groups before the p-value adjustment.
    library_size
        obs column with the library sizes of the whole transcriptome, by which counts are divided instead of their sum
        if the file holds only some of the genes.
    continuity, exact
        wilcoxon: apply the continuity correction; compute exact p if a group has at most eight cells without ties.
    dask
        ``local``, the address of a Dask scheduler, or a Client: its workers read ranges of cells (of genes, if the file
        is stored gene by gene) and rank ranges of genes. The source must be on storage that all workers can access. The
        results have the same bits.

    Raises
    ------
    UsageError
        If options cannot be combined, or a cluster should read an AnnData in memory.
    EnvironmentFault
        If there is no cluster at the address, or it is lost.
    DataError
        If a column or the control is missing, or values are invalid.
    NotCountsError
        If the values for nb are not counts.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.de("atlas.h5ad", pert_col="target_gene", control="non-targeting")
    >>> len(result.genes)
    100
    """
    check_number("epsilon", epsilon, low=0)
    check_number("min_cpm", min_cpm, low=0)
    options: dict[str, Any] = {
        "rest": reference == "rest", "continuity": continuity, "exact": exact, "strata": stratify,
        "covariates": tuple(covariates), "replicates": replicate_col, "threads": threads, "progress": progress,
    }  # fmt: skip
    _check_options(test, reference, options)
    with (
        open_dataset(
            source, modality=modality, layer=layer, feature_type=feature_type, genome=genome, library_size=library_size
        ) as dataset,
        connect(dask) as client,
    ):
        set_remote(dataset, client, modality=modality, layer=layer, feature_type=feature_type, genome=genome)
        notes: list[str] = []
        cells, parts = read_parts(dataset, pert_col, control, keep, context_col, notes)
        found = []
        for name, part in parts.items():
            where = f"{dataset.label}, context {name}" if name else dataset.label
            groups = RUNNERS[test](Task(dataset=dataset, cells=part, control=control, where=where, **options))
            found.append(_compare(groups, part, control, epsilon, min_cpm, notes))
        genes = dataset.var.index
    if cells.n_missing:
        notes.append(f"{cells.n_missing:,} cells without a label (or not selected) were left out")
    rows = found[0] if len(found) == 1 else {k: np.concatenate([f[k] for f in found]) for k in found[0]}
    contexts = None
    if context_col is not None:
        contexts = [name for name, f in zip(parts, found, strict=True) for _ in f["n_cells_p"]]
    extra = {"library_size": library_size, "context_col": context_col, "stratify": stratify,
             "replicate_col": replicate_col, "covariates": list(covariates) or None}  # fmt: skip
    return DeResult(
        perturbations=rows.pop("perturbations").tolist(),
        genes=genes,
        contexts=contexts,
        dispersion_pg=rows.pop("dispersion_pg", None),
        effect_pg=rows.pop("effect_pg", None),
        settings={
            "test": test, "pert_col": pert_col, "control": control, "keep": keep,
            "epsilon": epsilon, "min_cpm": min_cpm,
            **({"continuity": continuity, "exact": exact} if test == "wilcoxon" else {}),
            **({} if reference == "control" else {"reference": reference}),
            **{k: v for k, v in extra.items() if v is not None},
        },
        notes=list(dict.fromkeys([*dataset.notes, *notes])),
        **rows,
    )  # fmt: skip


def _check_options(test: str, reference: str, options: dict[str, Any]) -> None:
    """Raise a :class:`UsageError` for an unknown test or reference, or for options that have no effect."""
    for name, value, known in (("test", test, TESTS), ("reference", reference, REFERENCES)):
        if value not in known:
            raise UsageError(f"{name} {value!r} is not known", hint=f"set {spell(name)} to one of: {', '.join(known)}")
    used = {"reference": options["rest"], "stratify": options["strata"], "covariates": options["covariates"],
            "replicate_col": options["replicates"], "exact": options["exact"]}  # fmt: skip
    of_test = {"wilcoxon": {"reference", "stratify", "exact"}, "nb": {"reference", "covariates", "replicate_col"},
               "welch": {"covariates"}}  # fmt: skip
    for name in (k for k, v in used.items() if v and k not in of_test[test]):
        raise UsageError(
            f"{spell(name)} cannot be used with {spell('test', test)}", hint="remove one of the two", field=name
        )
    pairs = [("exact", "stratify"), ("exact", "reference"), ("covariates", "reference")]
    for a, b in pairs:
        if used[a] and used[b]:
            raise UsageError(f"{spell(a)} cannot be used with {spell(b)}", hint="remove one of the two", field=a)
    if test == "nb" and used["covariates"] and not used["replicate_col"]:
        raise UsageError(
            f"{spell('test', 'nb')} with {spell('covariates')} needs replicates",
            hint=f"set {spell('replicate_col')} to the column of the replicates",
        )


def _compare(
    found: dict[str, Any], cells: Cells, control: str, epsilon: float, min_cpm: float | None, notes: list[str]
) -> dict[str, np.ndarray]:
    """Return the rows of one context's perturbations from the results of a test."""
    k = cells.labels.index(control)
    perts = np.delete(np.arange(len(cells.labels)), k)
    # groups that share no stratum with their reference are left out
    perts = perts[~np.isnan(found["p_kg"][perts]).all(axis=1)]
    mean, base = found["mean_kg"][perts], found["mean_kg"][k][None, :]
    n_reference = np.full(len(perts), cells.size_k[k])
    if "reference_mean_kg" in found:
        base, n_reference = found["reference_mean_kg"][perts], found["reference_n_k"][perts]
    with np.errstate(divide="ignore", invalid="ignore"):
        log2fc = np.log2((mean + epsilon) / (base + epsilon))
    log2fc[np.isnan(log2fc)] = 0
    p, kept = found["p_kg"][perts], None
    if min_cpm is not None:
        total = found["mean_kg"].sum(axis=1, keepdims=True)
        cpm = found["mean_kg"] / np.where(total > 0, total, 1) * 1e6
        total = base.sum(axis=1, keepdims=True)
        kept = (cpm[perts] > min_cpm) | (base / np.where(total > 0, total, 1) * 1e6 > min_cpm)
    notes += found["notes"]
    out = {
        "perturbations": np.array([cells.labels[i] for i in perts], dtype=object),
        "n_cells_p": cells.size_k[perts],
        "n_controls_p": n_reference,
        "mean_pg": mean,
        "control_mean_pg": np.broadcast_to(base, mean.shape),
        "log2fc_pg": log2fc,
        "statistic_pg": found["statistic_kg"][perts],
        "p_pg": p,
        "fdr_pg": adjust_kept(p, kept),
    }
    if "effect_kg" in found:
        out["effect_pg"] = found["effect_kg"][perts]
    if "dispersion_g" in found:
        out["dispersion_pg"] = np.broadcast_to(found["dispersion_g"], mean.shape)
    return out


def adjust_kept(p_pg: np.ndarray, kept_pg: np.ndarray | None) -> np.ndarray:
    """Return p-values adjusted within each row by Benjamini and Hochberg over the kept genes; NaN for the others."""
    fdr = np.full_like(p_pg, np.nan)
    if kept_pg is None:
        fdr[...] = adjust_bh(p_pg)
        return fdr
    for row, p, kept in zip(fdr, p_pg, kept_pg, strict=True):
        if kept.any():
            row[kept] = adjust_bh(p[kept])
    return fdr
