"""Write the prediction of a baseline, from the true cells or from stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import UsageError, checked, spell
from vcelltools.io.results import Result
from vcelltools.io.write.guard import Target, guard_outputs
from vcelltools.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from anndata import AnnData

    from vcelltools.prediction.predict import PredictResult

PERT_COL = "target_gene"
CONTROL = "non-targeting"


@dataclass(frozen=True, kw_only=True)
class BaselineResult(Result):
    """A baseline prediction that was written from the true cells.

    Attributes
    ----------
    out
        The file that was written.
    kind
        ``mean`` or ``control-mean``.
    n_cells
        Number of cells in it.
    scale
        Values of the truth: ``counts`` or ``log1p``. Those of the baseline are always log1p.
    """

    out: Path
    kind: str
    n_cells: int
    scale: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"out": str(self.out), "kind": self.kind, "n_cells": self.n_cells}


@checked
def baseline(
    out: str | os.PathLike = "baseline.h5ad",
    *,
    truth: str | os.PathLike | AnnData | None = None,
    stores: Sequence[str | os.PathLike] = (),
    kind: str | None = None,
    split: str | os.PathLike | None = None,
    features: str | os.PathLike | None = None,
    rules: int | None = None,
    pert_col: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> BaselineResult | PredictResult:
    """Write the prediction of a baseline: means of the true cells with ``truth``, otherwise learned from stores.

    Parameters
    ----------
    out
        The h5ad file to write.
    truth
        The true cells. The baseline uses their means, but does not discriminate perturbations.
    stores
        Folders of the stores to learn from; by default all stores in the configured folder.
    kind
        With a truth: ``mean`` (default) or ``control-mean``. From stores: ``perturbation-mean`` (default), ``ridge`` or
        ``control-mean``.
    split, features, rules
        With stores: the split, the features of the perturbations, and the rules to check, as in ``train`` and
        ``predict``.
    pert_col, control, layer, threads
        With a truth: its obs column (``target_gene``), the label of controls (``non-targeting``), the layer to read and
        the worker threads.

    Raises
    ------
    UsageError
        If arguments cannot be combined, ``kind`` is not known, or the output exists and ``force`` is false.
    DataError
        If truth, stores, split or features are invalid or do not match.

    Examples
    --------
    >>> import vcelltools as vc
    >>> vc.baseline("mean.h5ad", truth="truth.h5ad").kind
    'mean'
    """
    if truth is None:
        _refuse(
            {"pert_col": pert_col, "control": control, "layer": layer, "threads": threads}, "a baseline from stores"
        )
        from vcelltools.prediction.predict import predict_baseline
        from vcelltools.training.request import read_settings

        settings = read_settings({"stores": list(stores), "split": split, "features": features})
        return predict_baseline(
            kind or "perturbation-mean", out, settings=settings, rules=rules, force=force, progress=progress
        )
    from vcelltools.scoring.cell_eval.baseline import write_baseline
    from vcelltools.scoring.cell_eval.options import Options

    _refuse({"stores": stores, "split": split, "features": features, "rules": rules}, spell("truth"))
    if kind == "ridge":
        raise UsageError(
            f"{spell('kind', kind)} cannot be computed from the true cells",
            hint=f"with {spell('stores')}, the baseline learns from stores",
            field="kind",
        )
    if kind not in (None, "mean", "perturbation-mean", "control-mean"):
        raise UsageError(
            f"{spell('kind', kind)} cannot be computed from the true cells",
            hint="one of: mean, control-mean",
            field="kind",
        )
    kind = (
        "control-mean" if kind == "control-mean" else "mean"
    )  # cell-eval's mean is the mean of the perturbations' means
    guard_outputs([Target(out, "hdf5")], reads=[truth], force=force)
    options = Options(
        compat="cell-eval", pert_col=pert_col or PERT_COL, control=control or CONTROL, layer=layer, threads=threads
    )
    path, n, scale = write_baseline(truth, out, kind=kind, options=options, force=force, progress=progress)
    return BaselineResult(out=path, kind=kind, n_cells=n, scale=scale)


def _refuse(given: dict[str, Any], what: str) -> None:
    """Raise a :class:`UsageError` if an argument was given that ``what`` does not use."""
    names = [k for k, v in given.items() if v]
    if names:
        raise UsageError(f"{', '.join(map(spell, names))} cannot be used with {what}", hint="remove it", field=names[0])
