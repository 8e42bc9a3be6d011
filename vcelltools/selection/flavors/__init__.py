"""The flavours of highly variable genes, one per file, listed in :data:`FLAVORS`.

``seurat_v3``, ``binned`` (seurat and cell_ranger), ``dispersion``, ``pearson_residuals``, ``vcell_lowess``. To add one,
write a module with ``rank(task) -> (columns, order)`` and register it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from vcelltools.io import Dataset
    from vcelltools.selection.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One way to rank genes.

    Attributes
    ----------
    module
        The module in this folder that defines ``rank``; it is loaded when the flavour is used.
    needs_values
        Whether a second pass over the matrix is needed, so that only one file at a time can be ranked.
    options
        Options that only this flavour reads, with their defaults.
    takes_log
        Whether log1p values can replace counts.
    """

    module: str
    needs_values: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    takes_log: bool = False


FLAVORS: dict[str, Flavor] = {
    "seurat_v3": Flavor(module="seurat_v3", options={"span": 0.3}),
    "seurat_v3_paper": Flavor(module="seurat_v3", options={"span": 0.3}),
    "seurat": Flavor(module="binned", needs_values=True, takes_log=True),
    "cell_ranger": Flavor(module="binned", needs_values=True, takes_log=True),
    "dispersion": Flavor(module="dispersion", options={"min_share": 0.001}),
    "pearson_residuals": Flavor(module="pearson_residuals", needs_values=True, options={"theta": 100.0}),
    "vcell_lowess": Flavor(module="vcell_lowess", needs_values=True),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """The input of a flavour: the statistics of the count pass, and the matrix if values are needed.

    Attributes
    ----------
    mean, variance
        (g,) float64 mean and variance (ddof 1) of the counts over all cells.
    options
        Values of the options of the flavour.
    open_dataset
        Opens the file again, for flavours that need values.
    notes
        A list that receives messages for the user.
    """

    stats: Statistics
    flavor: str
    top: int
    mean: np.ndarray
    variance: np.ndarray
    options: Mapping[str, float]
    open_dataset: Callable[[], AbstractContextManager[Dataset]]
    threads: int | None = None
    progress: Progress = SILENT
    notes: list[str] = field(default_factory=list)


def rank(task: Task) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the per-gene columns of the flavour and the positions of the selected genes, best first."""
    return import_module(f"{__name__}.{FLAVORS[task.flavor].module}").rank(task)
