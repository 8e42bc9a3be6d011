"""Scoring a prediction against the truth: metrics, rule sets, baselines, ceilings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.progress import SILENT, Progress

if TYPE_CHECKING:
    from anndata import AnnData

    from vcelltools.scoring.result import Result
    from vcelltools.scoring.result26 import Score2026

__all__ = ["score"]


def score(
    pred: str | os.PathLike | AnnData,
    truth: str | os.PathLike | AnnData | None = None,
    *,
    truth_pack: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> Result | Score2026:
    """Score a predicted Perturb-seq data set against the true one.

    Parameters
    ----------
    pred, truth
        h5ad files (or AnnData in memory) with the same genes and perturbations; log1p values or counts.
    truth_pack
        A truth pack: read in place of ``truth`` where it exists; written where it does not and ``truth`` is given.
    out
        A folder for ``results.csv``, ``agg_results.csv``, ``pred_de.csv``, ``real_de.csv`` and ``score.json``.
    force
        Overwrite what is in ``out``.
    **options
        ``profile`` (``vcc``, ``full``, ``minimal``, ``de``, ``anndata``, ``pds``, ``extended``), ``compat``
        (``ours``, ``cell-eval``, ``vcc2025``), ``pert_col``, ``control``, ``epsilon``, ``cpm_filter``,
        ``allow_discrete``, ``to_cp10k``, ``skip``, ``ceiling``, ``ceiling_seed``, ``baseline``, ``bootstrap``,
        ``layer``, ``threads``; see :class:`vcelltools.scoring.evaluate.Options`. With ``compat="vcc2026"`` those of
        :class:`vcelltools.scoring.options26.Options2026`.

    Returns
    -------
    Result
        ``.components``, ``.avg_score``, ``.to_frame()``, ``.to_json()``, ``.write(folder)``.

    Raises
    ------
    DataError
        Different genes, perturbations or scales; no controls; invalid values.
    UsageError
        Options that do not go together.
    """
    if options.get("compat") == "vcc2026":
        from vcelltools.scoring.run26 import run_vcc2026

        del options["compat"]
        return run_vcc2026(pred, truth, truth_pack=truth_pack, out=out, force=force, progress=progress, **options)
    from vcelltools.scoring.evaluate import Options, evaluate

    settings = Options(**options)
    reduced = None
    if truth_pack is not None:
        from vcelltools.scoring.pack import read_pack, write_pack

        if Path(truth_pack).exists():
            reduced = read_pack(truth_pack, settings)
    result = evaluate(pred, truth, settings, truth=reduced, progress=progress)
    if truth_pack is not None and reduced is None:
        write_pack(truth_pack, result.truth, settings, force=force)
    if out is not None:
        result.write(out, force=force)
    return result
