"""The settings of a scoring under these rules, and the files that it opens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.differential.cell_labels import Cells, read_cells
from vcelltools.differential.expression import Scale, find_scale
from vcelltools.differential.reduce import ReadOptions, Reduced, reduce_cells
from vcelltools.errors import DataError, UsageError, check_number, spell
from vcelltools.io import Dataset, open_dataset
from vcelltools.io.remote import set_remote
from vcelltools.scoring.cell_eval.de_table import DeTable, make_de_table
from vcelltools.scoring.cell_eval.edistance import energy_distances
from vcelltools.scoring.cell_eval.rules import METRICS, Rules, get_metrics, get_rules

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client

PERT_COL = "target_gene"
CONTROL = "non-targeting"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of a scoring; see :func:`vcelltools.score`.

    Attributes
    ----------
    context_col
        obs column whose values are scored separately and averaged; None scores all cells together.
    library_size
        obs column with the library sizes by which the counts of both files are divided; None divides by their sums.
    client
        A client of the Dask cluster that reads the files, or None.
    """

    profile: str = "vcc"
    compat: str = "ours"
    pert_col: str = PERT_COL
    control: str = CONTROL
    epsilon: float = 0.0
    cpm_filter: float | None = None
    allow_discrete: bool = False
    to_cp10k: bool = False
    skip: tuple[str, ...] = ()
    ceiling: bool = False
    ceiling_seed: int = 0
    baseline: str | Path | None = None
    bootstrap: int = 1000
    context_col: str | None = None
    layer: str | None = None
    library_size: str | None = None
    threads: int | None = None
    client: Client | None = None

    def __post_init__(self) -> None:
        """Raise a :class:`UsageError` if settings cannot be combined."""
        rules, names = get_rules(self.compat), self.names
        check_number("epsilon", self.epsilon, low=0)
        check_number("cpm_filter", self.cpm_filter, low=0)
        check_number("ceiling_seed", self.ceiling_seed, low=0)
        check_number("bootstrap", self.bootstrap, low=0)
        extended = [m for m in names if METRICS[m].kind in ("extended", "calibrated")]
        if extended and rules.name != "ours":
            raise UsageError(
                f"the profile {self.profile!r} belongs to our rules, and {rules.name} has no {extended[0]!r}",
                hint=f"use another {spell('profile')}, or remove {spell('compat')}",
            )
        if self.profile == "calibrated":
            given = {"epsilon": self.epsilon, "cpm_filter": self.cpm_filter is not None, "baseline": self.baseline,
                     "allow_discrete": self.allow_discrete, "ceiling": self.ceiling}  # fmt: skip
            if used := [k for k, v in given.items() if v]:
                raise UsageError(
                    f"{', '.join(map(spell, used))} cannot be used with {spell('profile', 'calibrated')}, which has "
                    "its own controls "
                    "for both ends of the scale and no table of fold changes",
                    hint="remove one of the two",
                )
        if not self.needs_de and (used := [k for k in ("epsilon", "cpm_filter") if getattr(self, k)]):
            raise UsageError(
                f"{', '.join(map(spell, used))} cannot be used with {spell('profile', self.profile)}, which has no "
                "table of fold changes",
                hint="remove one of the two",
            )
        if self.cpm_filter is not None and rules.global_bh:
            raise UsageError(f"{spell('cpm_filter')} is not part of the rules of vcc2025", hint="remove one of the two")
        others = {"to_cp10k": (True, "converts"), "library_size": (self.library_size, "scales")}
        for name, (value, does) in others.items() if self.allow_discrete else ():
            if getattr(self, name):
                raise UsageError(
                    f"{spell('allow_discrete', True)} keeps counts, but {spell(name, value)} {does} them",
                    hint="remove one of the two",
                )

    @property
    def rules(self) -> Rules:
        """The rule set."""
        return get_rules(self.compat)

    @property
    def names(self) -> list[str]:
        """The metrics of the profile, in the order of their columns."""
        return get_metrics(self.profile, self.skip)

    @property
    def scores_de(self) -> bool:
        """Whether a metric reads differential expression."""
        return any(METRICS[m].kind in ("de", "extended") for m in self.names)

    @property
    def needs_de(self) -> bool:
        """Whether a metric reads differential expression, or the profile includes its tables."""
        return self.profile != "pds" or self.scores_de

    def make_de_table(self, reduced: Reduced) -> DeTable:
        """Compute the table of differential expression of a reduced file."""
        return make_de_table(
            reduced, self.rules, epsilon=self.epsilon, cpm_filter=self.cpm_filter, discrete=self.allow_discrete
        )

    def get_read_options(self, *, test: bool) -> ReadOptions:
        """Return the options with which the kernel reduces a file."""
        rules, moment = self.rules, None
        if self.allow_discrete:
            moment = "log1p"
        elif self.cpm_filter is not None:
            moment = "expm1"
        return ReadOptions(
            test=test,
            exact=rules.exact_p,
            moment=moment,
            # pdex 0.3 sums over cells, and 0.1 over each gene of a group separately, both in the precision of the data
            single=rules.peer_precision and rules.fold_limit is None and test and not self.allow_discrete,
            pairwise=rules.fold_limit is not None and test,
            raw=self.allow_discrete,
            cp10k=self.to_cp10k,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An open file, its cells that are scored together, and its scale."""

    dataset: Dataset
    cells: Cells
    scale: Scale
    options: Options

    def reduce(self, *, test: bool, **how: Any) -> Reduced:
        """Reduce the cells; ``how`` is passed to :func:`vcelltools.differential.reduce.reduce_cells`."""
        options = self.options.get_read_options(test=test)
        cells = how.pop("cells", self.cells)
        return reduce_cells(self.dataset, cells, self.options.control, self.scale, options, **how)

    def get_energy(self, cells: Cells | None = None, control_from: Opened | None = None, **how: Any) -> np.ndarray:
        """Return (p,) energy distances to the controls, here or of another file; ``how`` as in
        :func:`energy_distances`."""
        o, other = self.options, control_from
        return energy_distances(
            self.dataset, cells or self.cells, self.scale, o.control, raw=o.allow_discrete, cp10k=o.to_cp10k,
            threads=o.threads, control_from=None if other is None else (other.dataset, other.cells, other.scale), **how,
        )  # fmt: skip


def open_file(source: str | os.PathLike | AnnData, options: Options, *, name: str, need_control: bool = True) -> Opened:
    """Open a file and read its labels and scale; the caller closes the data set. ``name``: prediction or truth."""
    dataset = open_dataset(source, layer=options.layer, library_size=options.library_size, name=name)
    try:
        set_remote(dataset, options.client, layer=options.layer)
        cells = read_cells(dataset, options.pert_col, options.control if need_control else None)
        if len(cells.labels) < 2:
            raise DataError(f"{dataset.label}: obs/{options.pert_col} holds no perturbation except the control")
        scale = find_scale(
            dataset, with_library=options.to_cp10k, assume_natural=options.compat != "ours", threads=options.threads
        )
    except BaseException:
        dataset.close()
        raise
    return Opened(dataset=dataset, cells=cells, scale=scale, options=options)


def check_scales(pred: Opened, real: Opened) -> list[str]:
    """Raise if the scales differ; return warnings about counts that are scaled differently."""
    options = pred.options
    if options.to_cp10k or pred.scale.empty or real.scale.empty:
        return []
    if pred.scale.kind != real.scale.kind:
        raise DataError(
            f"{pred.dataset.label} holds {pred.scale.kind} and {real.dataset.label} holds {real.scale.kind}: "
            "they are on different scales",
            hint=f"{spell('to_cp10k', True)} converts both to log1p of counts per 10,000",
        )
    a, b = pred.scale.target_sum, real.scale.target_sum
    if a is not None and b is not None and abs(a / b - 1) > 0.01:
        return [
            f"cells were scaled to {a:,.6g} counts in the prediction and to {b:,.6g} in the truth; "
            f"{spell('to_cp10k', True)} scales both to the same total"
        ]
    if pred.scale.kind == "counts" and not options.allow_discrete:
        a, b = (float(np.median(s.scale.library_n)) for s in (pred, real))  # type: ignore[arg-type]
        if b > 0 and abs(a / b - 1) > 0.05:
            return [
                f"counts are scaled to each file's own median library size, {a:g} in the prediction and {b:g} in the "
                f"truth; {spell('to_cp10k', True)} scales both to the same total"
            ]
    return []
