"""Score a prediction under the 2026 rules: six metrics between a mean-response baseline (0) and a replicate (1).

The definitions are those of cell-eval2's ``vcc2026`` preset (rule version 3). Both sides are compared with the
controls of the truth; contexts are scored separately and averaged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, find_pooled, read_cells, read_contexts
from vcelltools.differential.reduce import get_copied_share
from vcelltools.errors import DataError, spell
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.frame import arrow_numbers
from vcelltools.io.textfile import read_rows
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.scoring.gaming import Check, Evidence, check_gaming
from vcelltools.scoring.matching import (
    check_unique_genes,
    match_contexts,
    match_genes,
    match_perturbations,
    name_context,
    resolve_targets,
)
from vcelltools.scoring.result import Component, ContextScore, Result, average_contexts, average_scores
from vcelltools.scoring.rules import RULES_2026
from vcelltools.scoring.tables import Columns, ScoreTable, stack_tables, texts
from vcelltools.scoring.vcc2026.anchors import scale
from vcelltools.scoring.vcc2026.counts import Census, make_tables, read_part, take_census
from vcelltools.scoring.vcc2026.metrics import (
    EXPRESSION,
    LOWER_IS_BETTER,
    METRICS,
    Values,
    compare,
    get_interval,
    get_significant,
)
from vcelltools.scoring.vcc2026.pack import MAGIC, get_settings, pack_truth, unpack_truth
from vcelltools.scoring.vcc2026.profiles import TARGET_SUM, DeTable, Profiles, make_profiles
from vcelltools.scoring.vcc2026.truth import Groups, Options, Truth, make_truth

if TYPE_CHECKING:
    from anndata import AnnData

COUNT_SLACK = 1e-6
"""Largest deviation of a count from a whole number that cell-eval2 allows; it does not round counts."""


@dataclass(frozen=True, kw_only=True)
class Vcc2026Score(ContextScore):
    """The score of a prediction in one context, with the data for the report."""

    labels: np.ndarray
    genes: np.ndarray
    values: Values
    real: Profiles
    pred: Profiles

    def get_de(self, side: str) -> tuple[Columns, int, list[str]]:
        """Return the table of differential expression of ``"pred"`` or ``"real"``, its rows, and the texts in it."""
        de: DeTable = getattr(self, side).de
        p, h = de.lfc_ph.shape
        labels, genes = [str(v) for v in self.labels], [str(self.genes[g]) for g in de.genes]
        columns = {
            "target": texts(labels, each=h),
            "feature": texts(genes, times=p),
            "log2_fold_change": arrow_numbers(de.lfc_ph.ravel()),
            "p_value": arrow_numbers(de.p_ph.ravel()),
            "fdr": arrow_numbers(de.padj_ph.ravel()),
        }
        return columns, p * h, [*labels, *genes]


class Vcc2026:
    """The rule set of the 2026 challenge; see :class:`vcelltools.scoring.rule_set.RuleSet`."""

    magic = MAGIC

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self.settings = get_settings(self.options)

    def _read_cells(self, data: Dataset, what: str) -> Cells:
        """Return the labels; a cell without one is an error."""
        cells = read_cells(data, self.options.pert_col, None)
        if cells.n_missing:
            first = data.obs.index[int(np.flatnonzero(cells.codes < 0)[0])]
            raise DataError(
                f"{data.label}: {cells.n_missing:,} cells of the {what} have no {self.options.pert_col} "
                f"(first: cell {first})",
                hint="label every cell, or drop those cells",
            )
        return cells

    def _take_census(self, data: Dataset, part_n: np.ndarray, n_parts: int, what: str, progress: Progress) -> Census:
        return take_census(
            data, part_n, n_parts, what=what, max_total=RULES_2026.max_counts_per_cell, slack=COUNT_SLACK,
            threads=self.options.threads, progress=progress,
        )  # fmt: skip

    def read_truth(self, source: str | os.PathLike | AnnData, progress: Progress = SILENT) -> list[Truth]:
        """Prepare the truth of every context: profiles, DE, and the two ends of the scale."""
        o, out = self.options, []
        with open_dataset(source, layer=o.layer, name="truth") as data:
            cells = self._read_cells(data, "truth")
            contexts, context_n = [""], np.zeros(data.n_cells, np.int32)
            notes = []
            if o.context_col in data.obs.columns:
                contexts, context_n = read_contexts(data, o.context_col)
            elif pooled := find_pooled(data, cells, o.control):
                notes.append(pooled)
            genes = check_unique_genes(data, "truth")
            census = self._take_census(data, context_n, len(contexts), "truth", progress)
            for i, context in enumerate(contexts):
                here, where = cells.keep(context_n == i), name_context(data.label, context)
                here.need_control(o.control, f"{where}: no cell of obs/{o.pert_col}")
                if len(here.labels) < 2:
                    raise DataError(
                        f"{where}: every cell is the control {o.control!r}, so there is no perturbation to score"
                    )
                groups = Groups.of(here, o.control)
                target_p, warnings = resolve_targets(groups.labels, genes, o.target_gene_map, where)
                warnings = [*notes, *warnings]
                copied = get_copied_share(where, here, o.control, census.hash_n, warnings)
                read = partial(read_part, data, census, i, threads=o.threads, progress=progress)
                out.append(
                    make_truth(
                        read, groups, genes, target_p, o, progress=progress, context=context, copied_share=copied,
                        warnings=tuple(warnings),
                    )
                )  # fmt: skip
        return out

    def score(
        self,
        pred: str | os.PathLike | AnnData,
        truths: Sequence[Truth],
        truth: str | os.PathLike | AnnData | None = None,
        progress: Progress = SILENT,
    ) -> Result:
        """Score a prediction; its control cells, if any, are not read, because both sides use those of the truth."""
        o, warnings, scores = self.options, [], []
        with open_dataset(pred, layer=o.layer, name="prediction") as data:
            cells = self._read_cells(data, "prediction")
            gene_order = match_genes(check_unique_genes(data, "prediction"), truths[0].genes, data.label)
            wanted = match_contexts(data, [t.context for t in truths], o.context_col)
            is_control = np.zeros(data.n_cells, bool)
            if o.control in cells.labels:
                is_control = cells.codes == cells.labels.index(o.control)
                warnings.append(
                    f"{int(is_control.sum()):,} control cells of the prediction were ignored, because the controls "
                    "of the truth serve both "
                    "sides"
                )
            part_n = np.full(data.n_cells, -1, np.int32)
            for i, t in enumerate(truths):
                here = wanted[t.context] & ~is_control
                match_perturbations(
                    cells.keep(here).labels, list(t.labels), o.control, name_context(data.label, t.context)
                )
                part_n[here] = i
            census = self._take_census(data, part_n, len(truths), "prediction", progress)
            for i, t in enumerate(truths):
                mine = cells.keep(part_n == i)
                copied = get_copied_share(name_context(data.label, t.context), mine, o.control, census.hash_n, warnings)
                code = np.concatenate([Groups.of(mine, o.control).code_n, np.zeros(t.controls.n_cells, np.int32)])
                counts = read_part(
                    data, census, i, gene_order=gene_order, behind=t.controls, threads=o.threads, progress=progress
                )
                library = float(np.median(counts.library[: -t.controls.n_cells]))
                (tables,) = make_tables(
                    counts, [(code, 1)], len(t.labels) + 1, target_sum=TARGET_SUM, threads=o.threads, progress=progress
                )
                del counts
                profiles = make_profiles(tables, continuity=o.continuity)
                scores.append(score_context(t, profiles, library, copied, warnings))
        return self._assemble(scores, truths, warnings)

    def _assemble(self, scores: list[Vcc2026Score], truths: Sequence[Truth], warnings: list[str]) -> Result:
        problem = next((t.problem for t in truths if t.problem), "")
        components = average_contexts(scores)
        table = stack_tables({s.context: s.table for s in scores})
        aggregate = table.aggregate(interpolate=True)
        # the ratio is not a mean over perturbations
        aggregate[EXPRESSION] = dict.fromkeys(next(iter(aggregate.values())), None) | {
            "mean": _or_none(components[EXPRESSION].value)
        }
        return Result(
            compat="vcc2026",
            profile="vcc",
            contexts=tuple(scores),
            components=components,
            avg_score=float("nan") if problem else average_scores(scores),
            table=table,
            aggregate=aggregate,
            details={
                "rules": RULES_2026.version, "continuity": self.options.continuity, "problem": problem or None,
                "contexts": {},
            },
            from_pack=truths[0].from_pack,
            problem=problem,
            warnings=tuple(dict.fromkeys([*(w for t in truths for w in t.warnings), *warnings])),
        )  # fmt: skip

    def pack(self, truth: Truth) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the content of a truth pack for a truth."""
        return pack_truth(truth)

    def unpack(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Truth:
        """Return a truth of a pack."""
        return unpack_truth(header, arrays)


def _or_none(v: float | None) -> float | None:
    return None if v is None or np.isnan(v) else float(v)


def score_context(t: Truth, pred: Profiles, library: float, copied: float, warnings: list[str]) -> Vcc2026Score:
    """Compare the prediction with the truth of its context, and scale the values between the two ends."""
    values = compare(t.side, pred, t.target_p, t.name_rank_g)
    means, counts = values.means(), values.counts()
    nan = float("nan")
    components = {}
    for m in METRICS:
        b, r = t.baseline.get(m, nan), t.ceiling.get(m, nan)
        score, unclipped = scale(m, means[m], b, r) if t.baseline and not t.problem else (nan, nan)
        components[m] = Component(
            name=m, value=means[m], baseline=b, ceiling=r, score=score, score_unclipped=unclipped,
            ci95=get_interval(values, m), n=counts[m], best=float(m not in LOWER_IS_BETTER),
        )  # fmt: skip
    n = len(t.labels)
    for m in METRICS:
        if counts[m] < n:
            where = f" in context {t.context}" if t.context else ""
            warnings.append(
                f"{m} is undefined for {n - counts[m]} of {n} perturbations{where}, which are excluded from its mean"
            )
    if n == 1:
        where = f" in context {t.context}" if t.context else ""
        warnings.append(f"there is only one perturbation{where}, so a pds_cosine of 1 has no meaning")
    columns = {m: v for m, v in values.per.items() if m != EXPRESSION}
    columns |= {"expr_mse_unbiased_capped": values.error_p, "expr_distance_unbiased": values.distance_p}
    table = ScoreTable(
        names=[str(v) for v in t.labels], columns={k: [_or_none(v) for v in c] for k, c in columns.items()}
    )
    return Vcc2026Score(
        context=t.context, labels=t.labels, genes=t.genes, values=values, components=components, table=table,
        avg_score=float(np.mean([components[m].score for m in METRICS])), real=t.side, pred=pred,
        checks=tuple(_check(t, pred, library, copied)),
    )  # fmt: skip


def _check(t: Truth, pred: Profiles, library: float, copied: float) -> list[Check]:
    return check_gaming(
        Evidence(
            real_pg=t.side.profile_kg[1:],
            pred_pg=pred.profile_kg[1:],
            real_control_g=t.side.profile_kg[0],
            # the variance of a profile decreases with its number of cells
            real_spread_p=t.side.spread_k[1:] * t.side.size_k[1:],
            pred_spread_p=pred.spread_k[1:] * pred.size_k[1:],
            real_significant_p=get_significant(t.side.de, t.target_p).sum(axis=1),
            pred_significant_p=get_significant(pred.de, t.target_p).sum(axis=1),
            real_copied=t.copied_share,
            pred_copied=copied,
            library_ratio=library / t.library if t.library > 0 else None,
        )
    )


def read_gene_map(path: str | os.PathLike | None) -> dict[str, str | None] | None:
    """Return {perturbation: its gene, or None} from a CSV with these two columns; an empty gene means None.

    The perturbation ``*`` matches all that are not listed.
    """
    if path is None:
        return None
    rows = read_rows(path, what="a table of perturbations and their genes", hint=spell("target_gene_map"))
    rows = [r for r in rows if r[0].strip()]
    if rows and rows[0][0].strip().lower() in ("perturbation", "target", "target_gene", "label"):
        rows = rows[1:]
    if any(len(r) < 2 for r in rows) or not rows:
        raise DataError(
            f"{path}: the table must have two columns, the perturbation and its gene", hint=spell("target_gene_map")
        )
    return {r[0].strip(): r[1].strip() or None for r in rows}
