"""The rule set of the profile ``calibrated``: the metrics of a prediction, and the calibration of each metric.

Only means and variances of groups are kept, so the cells are read once and in bounded memory. The controls of the
prediction are not used: effects are measured from those of the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vcelltools.differential.groupsums import GroupSums
from vcelltools.errors import DataError
from vcelltools.io.frame import load_ahead
from vcelltools.runtime.progress import Progress
from vcelltools.runtime.threads import get_threads
from vcelltools.scoring.calibrated.controls import (
    LITTLE_RANGE,
    LITTLE_WINS,
    MIN_CELLS,
    Population,
    calibrate,
    compute_negative,
    make_negatives,
    make_view,
)
from vcelltools.scoring.calibrated.metrics import Candidate, View, compute_metrics
from vcelltools.scoring.calibrated.moments import Moments, compare_means, make_moments, read_sums
from vcelltools.scoring.cell_eval.options import Opened, check_scales
from vcelltools.scoring.cell_eval.rules import METRICS
from vcelltools.scoring.cell_eval.score import CellEval, average_components, find_problem, make_component
from vcelltools.scoring.gaming import Evidence, check_gaming
from vcelltools.scoring.matching import match_genes, match_perturbations, name_context
from vcelltools.scoring.result import Calibration, ContextScore, Result
from vcelltools.scoring.tables import ScoreTable


@dataclass(kw_only=True)
class CalibratedTruth:
    """The true cells of one context.

    Attributes
    ----------
    context, label, genes, names
        Name of the context, the file, the genes and the perturbations (sorted as text).
    whole, first, second
        All cells of each perturbation, and its halves; a perturbation with fewer than 30 cells has empty halves.
    control
        The controls, in one row.
    population
        Sums over all perturbed cells.
    scale_kind
        ``"counts"`` or ``"log1p"``.
    """

    context: str
    label: str
    genes: np.ndarray
    names: list[str]
    whole: Moments
    first: Moments
    second: Moments
    control: Moments
    reference: Moments
    scale_kind: str
    notes: list[str]
    opened: Opened | None = None
    from_pack: bool = False
    ceiling: None = None
    reopen: Any = None

    def close(self) -> None:
        """Close the file, and keep the moments."""
        if self.opened is not None:
            self.opened.dataset.close()


@dataclass(frozen=True, kw_only=True)
class CalibratedScore(ContextScore):
    """The score of a prediction in one context, with the data for the report.

    Attributes
    ----------
    names, genes
        Names of the perturbations and genes.
    distance_pp
        Euclidean distance of each prediction (rows) to each truth.
    """

    names: list[str]
    genes: np.ndarray
    distance_pp: np.ndarray
    n_without_de: int

    @property
    def has_de(self) -> bool:
        """Return False, because there are no tables of differential expression."""
        return False


def split_cells(codes: np.ndarray, perts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) the half of each perturbed cell (0, 1, or −1 for none), and which perturbations were split.

    One random stream shuffles the cells of each perturbation in turn, in text order. The first ⌊n/2⌋ are the first
    half. Perturbations with fewer than :data:`~vcelltools.scoring.calibrated.controls.MIN_CELLS` cells are skipped.
    """
    rng = np.random.default_rng(seed)
    half_n = np.full(len(codes), -1, np.int8)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(int(codes.max(initial=-1)) + 2))
    split = np.zeros(len(perts), bool)
    for i, k in enumerate(perts):
        cells = order[bounds[k] : bounds[k + 1]].copy()
        if len(cells) < MIN_CELLS:
            continue
        rng.shuffle(cells)
        half_n[cells[: len(cells) // 2]], half_n[cells[len(cells) // 2 :]] = 0, 1
        split[i] = True
    return half_n, split


class Calibrated(CellEval):
    """The profile ``calibrated``; see :class:`vcelltools.scoring.rule_set.RuleSet`."""

    magic = b"vctruthc"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.settings = self.settings | {"ceiling_seed": self.options.ceiling_seed}

    def _reduce_truth(self, opened: Opened, context: str, progress: Progress) -> CalibratedTruth:
        load_ahead("scipy.special")
        cells, o = opened.cells, self.options
        control = cells.labels.index(o.control)
        perts = np.delete(np.arange(len(cells.labels)), control)
        half_n, split = split_cells(cells.codes, perts, o.ceiling_seed)
        n = len(cells.labels)
        # first halves (and cells of no half) keep the code of their label, second halves follow
        codes = np.where(cells.codes >= 0, cells.codes + n * (half_n == 1), -1)
        sums, notes = read_sums(opened, codes, 2 * n, progress=progress, phase="truth")
        if cells.n_missing:
            notes.append(f"{opened.dataset.label}: {cells.n_missing:,} cells without a label were left out")
        number = np.arange(n)
        whole = _moments(sums.pool(np.concatenate([number, number]), n))
        halves = [_moments(sums, rows + perts) for rows in (0, n)]
        all_codes = np.concatenate([number, number])
        pooled = sums.pool(np.where(all_codes == control, -1, 0), 1)
        population = Population(
            size=int(pooled.size_k[0]), sum_g=pooled.sum_kg[0], square_g=pooled.square_kg[0]
        )  # fmt: skip
        own = sums.pool(all_codes, n)
        reference = population.leave_out(own.size_k[perts], own.sum_kg[perts], own.square_kg[perts])
        none = np.flatnonzero(~split)
        for h in halves:
            h.size_k[none] = 0
        return CalibratedTruth(
            context=context, label=opened.dataset.label, genes=opened.dataset.var.index,
            names=[cells.labels[i] for i in perts], whole=whole[perts], first=halves[0], second=halves[1],
            control=whole[np.array([control])], reference=reference, scale_kind=opened.scale.kind, notes=notes,
            opened=opened,
        )  # fmt: skip

    def _score_context(
        self, opened: Opened, truth: CalibratedTruth, warnings: list[str], progress: Progress
    ) -> CalibratedScore:
        o, data, cells = self.options, opened.dataset, opened.cells
        where = name_context(data.label, truth.context)
        match_perturbations(cells.labels, [*truth.names, o.control], o.control, where)
        order = match_genes(data.var.index, truth.genes, where)
        if truth.opened is not None:
            warnings += check_scales(opened, truth.opened)
        elif opened.scale.kind != truth.scale_kind and not (o.to_cp10k or opened.scale.empty):
            raise DataError(
                f"{data.label} holds {opened.scale.kind} values, but the truth pack holds {truth.scale_kind} values"
            )
        position = {v: i for i, v in enumerate(truth.names)}
        lookup = np.array([position.get(v, -1) for v in cells.labels] + [-1], np.int32)
        sums, notes = read_sums(
            opened, lookup[cells.codes], len(truth.names), gene_order=order, progress=progress, phase="prediction"
        )
        warnings += notes
        pred = _moments(sums)
        threads = get_threads(o.threads)
        view = make_view(truth.whole, truth.whole.mean_kg, truth.reference, truth.control.mean_kg[0], threads)
        strength = np.abs(compare_means(pred, truth.reference, with_p=False).t_pg)
        candidate = Candidate(mean_pg=pred.mean_kg, strength_pg=strength)
        values = compute_metrics(view, {"pred": candidate}, {"pred": tuple(o.names)}, threads)["pred"]
        negatives = make_negatives(truth.whole.mean_kg, truth.reference, truth.control)
        floor = compute_negative(view, negatives, o.names, threads)
        return self._judge_values(view, pred, truth, values, floor, self._calibrate(truth, where, warnings), warnings)

    def _calibrate(self, truth: CalibratedTruth, where: str, warnings: list[str]) -> dict[str, Calibration]:
        some = np.flatnonzero(truth.first.size_k > 0)
        left = len(truth.names) - len(some)
        if left:
            warnings.append(
                f"{where}: {left} of {len(truth.names)} perturbations have fewer than {MIN_CELLS} true cells, so "
                "the metrics are calibrated without them"
            )
        if len(some) < 2:
            warnings.append(f"{where}: fewer than two perturbations can be split in halves, so no metric is calibrated")
            return {}
        found = calibrate(
            truth.first[some], truth.second[some], truth.whole[some], truth.reference[some], truth.control,
            self.options.names, get_threads(self.options.threads),
        )  # fmt: skip
        return {m: c for m, (c, _) in found.items()}

    def _judge_values(
        self, view: View, pred: Moments, truth: CalibratedTruth, values: dict[str, np.ndarray],
        floor: dict[str, np.ndarray], calibrations: dict[str, Calibration], warnings: list[str],
    ) -> CalibratedScore:  # fmt: skip
        o, n = self.options, len(truth.names)
        table = ScoreTable(
            names=truth.names, columns={m: [None if math.isnan(v) else float(v) for v in x] for m, x in values.items()}
        )
        aggregate = table.aggregate()
        components = {}
        for m, x in values.items():
            known = floor[m][np.isfinite(floor[m])]
            base = float(known.mean()) if len(known) else None
            component = make_component(m, x, aggregate[m], base, None, float(METRICS[m].best or 0), o.bootstrap)
            components[m] = replace(component, calibration=calibrations.get(m))
            if component.value is None:
                warnings.append(f"{m} is undefined for every perturbation, so it has no score")
        weak = [m for m, c in components.items() if c.calibration is not None and not c.calibration.discriminates]
        if weak:
            warnings.append(
                f"{', '.join(weak)}: the range on this data is too small to discriminate between models (a Dynamic "
                f"Range Fraction below {LITTLE_RANGE:g} or a Bound Discrimination Score below {LITTLE_WINS:g}), so "
                "the average excludes them"
            )
        n_empty = int((view.effects.padj_pg.min(axis=1) >= 0.05).sum())
        if n_empty:
            warnings.append(
                f"{n_empty} of {n} perturbations have no true DE genes, so metrics on DE genes have no value for them"
            )
        squared = np.sqrt(
            np.maximum(
                (pred.mean_kg**2).sum(axis=1)[:, None] + (truth.whole.mean_kg**2).sum(axis=1)
                - 2 * pred.mean_kg @ truth.whole.mean_kg.T, 0,
            )
        )  # fmt: skip
        trusted = {m: c for m, c in components.items() if m not in weak}
        return CalibratedScore(
            context=truth.context,
            components=components,
            avg_score=average_components(trusted, skip_undefined=True) if n > 1 else None,
            problem="" if n > 1 else find_problem(n, {}),
            table=table,
            checks=check_gaming(
                Evidence(
                    real_pg=truth.whole.mean_kg,
                    pred_pg=pred.mean_kg,
                    real_control_g=truth.control.mean_kg[0],
                    real_spread_p=truth.whole.var_kg.sum(axis=1),
                    pred_spread_p=pred.var_kg.sum(axis=1),
                )
            ),
            names=truth.names,
            genes=truth.genes,
            distance_pp=squared,
            n_without_de=n_empty,
        )

    def _assemble(self, scores: list[Any], truths: Sequence[Any], pred_label: str, warnings: list[str]) -> Result:
        result = super()._assemble(scores, truths, pred_label, warnings)
        settings = result.details["settings"]
        for k in ("epsilon", "cpm_filter", "allow_discrete"):
            settings.pop(k)
        settings |= {"baseline": "negative control", "ceiling_seed": self.options.ceiling_seed}
        return replace(result, ceiling=None)

    def pack(self, truth: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the content of a truth pack for a truth."""
        header = {
            "context": truth.context, "label": truth.label, "genes": [str(g) for g in truth.genes],
            "names": truth.names, "scale": truth.scale_kind, "notes": truth.notes,
        }  # fmt: skip
        parts = {"whole": truth.whole, "first": truth.first, "second": truth.second, "control": truth.control,
                 "reference": truth.reference}  # fmt: skip
        return header, {f"{p}.{k}": getattr(m, k) for p, m in parts.items() for k in ("size_k", "mean_kg", "var_kg")}

    def unpack(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
        """Return the truth of a pack; raise a ValueError, KeyError or TypeError if it is invalid."""
        names, genes = list(header["names"]), np.array(header["genes"], dtype=object)
        parts = {}
        for p in ("whole", "first", "second", "control", "reference"):
            n = 1 if p == "control" else len(names)
            size, mean, var = (arrays[f"{p}.{k}"] for k in ("size_k", "mean_kg", "var_kg"))
            if size.shape != (n,) or mean.shape != (n, len(genes)) or var.shape != mean.shape:
                raise ValueError("the shapes of its arrays do not match its names")
            parts[p] = Moments(size_k=size, mean_kg=mean, var_kg=var)
        return CalibratedTruth(
            context=str(header["context"]), label=str(header["label"]), genes=genes, names=names,
            scale_kind=str(header["scale"]), notes=list(header["notes"]), from_pack=True, whole=parts["whole"],
            first=parts["first"], second=parts["second"], control=parts["control"], reference=parts["reference"],
        )  # fmt: skip


def _moments(sums: GroupSums, rows: np.ndarray | None = None) -> Moments:
    m = make_moments(sums.size_k, sums.sum_kg, sums.square_kg)
    return m if rows is None else m[rows]
