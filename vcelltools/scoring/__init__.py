"""Scoring a prediction against the truth.

A rule set (``rule_set``) reads the truth, scores, and packs a truth for later; ``cell_eval/`` has cell-eval's, the 2025
challenge's and our own, ``calibrated/`` the metrics of our profile of that name, ``vcc2026/`` the 2026 challenge's. All
return one :class:`Result <vcelltools.scoring.result.Result>` (``result``), which writes the ``tables`` and
``score.json``; ``report/`` draws its page.

Shared by all rules: ``matching`` of genes and labels, ``gaming`` (signs that a score was gamed), ``comparison`` of two
predictions, ``truth_pack`` in the ``pack_format``, and ``rules`` of the challenges for submissions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vcelltools.errors import UsageError, checked, spell
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.runtime.threads import one_blas_thread

if TYPE_CHECKING:
    from anndata import AnnData
    from distributed import Client

    from vcelltools.scoring.result import Result

__all__ = ["guard_score", "score"]

TABLES = ("results.csv", "agg_results.csv", "pred_de.csv", "real_de.csv", "ceiling_results.csv",
          "agg_ceiling_results.csv")  # fmt: skip


def guard_score(
    *,
    out: str | os.PathLike | None,
    report: str | os.PathLike | None = None,
    truth_pack: str | os.PathLike | None = None,
    reads: Sequence[object] = (),
    force: bool = False,
) -> None:
    """Check all outputs of a scoring; an existing truth pack is an input.

    Raises
    ------
    UsageError
        If an output must not be written.
    """
    from vcelltools.io.write.guard import Target, guard_outputs

    targets = [] if report is None else [Target(report, "html")]
    if out is not None:
        targets += [Target(Path(out) / "score.json", "json"), *(Target(Path(out) / n) for n in TABLES)]
    if truth_pack is not None and Path(truth_pack).exists():
        reads = [*reads, truth_pack]
    elif truth_pack is not None:
        targets.append(Target(truth_pack, "pack"))
    guard_outputs(targets, reads=[*reads, "vcelltools.toml"], force=force)


@checked
@one_blas_thread()
def score(
    pred: str | os.PathLike | AnnData,
    truth: str | os.PathLike | AnnData | None = None,
    *,
    profile: str = "vcc",
    compat: str = "ours",
    pert_col: str = "target_gene",
    control: str = "non-targeting",
    layer: str | None = None,
    library_size: str | None = None,
    truth_pack: str | os.PathLike | None = None,
    baseline: str | os.PathLike | None = None,
    epsilon: float = 0.0,
    cpm_filter: float | None = None,
    allow_discrete: bool = False,
    to_cp10k: bool = False,
    skip: Sequence[str] = (),
    ceiling: bool = False,
    ceiling_seed: int = 0,
    bootstrap: int = 1000,
    context_col: str | None = None,
    target_gene_map: Mapping[str, str | None] | None = None,
    continuity: bool = True,
    anchors: bool = True,
    out: str | os.PathLike | None = None,
    force: bool = False,
    threads: int | None = None,
    dask: str | Client | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Score a predicted Perturb-seq data set against the true one.

    Parameters
    ----------
    pred, truth
        h5ad files (or AnnData in memory) with the same genes and perturbations; log1p values or counts.
    truth_pack
        A truth pack, which is read instead of ``truth`` if it exists (if ``truth`` is given too, it must be the one
        from which the pack was made), and written if it does not exist and ``truth`` is given.
    out
        A folder for ``results.csv``, ``agg_results.csv``, ``pred_de.csv``, ``real_de.csv`` and ``score.json``.
    force
        Overwrite existing files in ``out``.
    profile
        The metrics: ``vcc``, ``full``, ``minimal``, ``de``, ``anndata``, ``pds``, ``extended``, or ``calibrated``,
        which also says of every metric whether it tells anything on this data (:mod:`vcelltools.scoring.calibrated`).
    compat
        The rules: ``ours``, ``cell-eval``, ``vcc2025`` or ``vcc2026``.
    pert_col, control, layer, threads
        The obs column of the perturbation, the label of the controls in it, the layer to read, the number of worker
        threads.
    context_col
        An obs column (such as the cell line) whose values are scored separately and averaged; by default ``"context"``,
        if it exists, with ``compat="vcc2026"``, and none with the other rules.
    library_size
        For counts: the obs column in both files with the library sizes of the whole transcriptome, by which counts are
        divided instead of their sum if the files hold only some of the genes; not with ``compat="vcc2026"``.
    baseline, epsilon, cpm_filter, allow_discrete, to_cp10k, skip, ceiling, ceiling_seed, bootstrap
        See :class:`vcelltools.scoring.cell_eval.options.Options`; not used with ``compat="vcc2026"``.
    target_gene_map, continuity, anchors
        See :class:`vcelltools.scoring.vcc2026.truth.Options`; only used with ``compat="vcc2026"``.
    dask
        ``local``, the address of a Dask scheduler, or a Client, whose workers read and rank both files; they must be on
        storage that all workers can access. Metrics, and the energy distances of ``full``, are computed here. Not with
        ``compat="vcc2026"``. The results have the same bits.

    Returns
    -------
    Result
        ``.components``, ``.avg_score``, ``.to_frame()``, ``.to_json()``, ``.write(folder)``.

    Raises
    ------
    DataError
        If genes, perturbations or scales differ, there are no controls, or values are invalid.
    UsageError
        If options cannot be combined, or a cluster should read an AnnData in memory.
    EnvironmentFault
        If there is no cluster at the address, or it is lost.

    Examples
    --------
    >>> import vcelltools as vc
    >>> result = vc.score("pred.h5ad", "truth.h5ad", profile="minimal")
    >>> "mae" in result.components
    True
    """
    from vcelltools.io.frame import load_ahead
    from vcelltools.io.origin import find_stale
    from vcelltools.io.write.atomic import locked
    from vcelltools.runtime.cluster import connect
    from vcelltools.scoring.rule_set import make_rule_set
    from vcelltools.scoring.truth_pack import read_pack, write_pack

    cell_eval = {
        "profile": profile, "baseline": baseline, "epsilon": epsilon, "cpm_filter": cpm_filter,
        "allow_discrete": allow_discrete, "to_cp10k": to_cp10k, "skip": tuple(skip), "ceiling": ceiling,
        "ceiling_seed": ceiling_seed, "bootstrap": bootstrap, "library_size": library_size,
    }  # fmt: skip
    vcc2026 = {"target_gene_map": target_gene_map, "continuity": continuity, "anchors": anchors}
    options: dict[str, Any] = {"pert_col": pert_col, "control": control, "layer": layer, "threads": threads}
    if compat == "vcc2026":
        _refuse(cell_eval | {"dask": dask}, {"profile": "vcc", "skip": (), "bootstrap": 1000}, compat)
        options |= vcc2026 | {"context_col": context_col or "context"}
    else:
        _refuse(vcc2026, {"continuity": True, "anchors": True}, compat)
        options |= cell_eval | {"context_col": context_col}
    guard_score(out=out, truth_pack=truth_pack, reads=[pred, truth, baseline], force=force)
    with connect(dask) as client:
        rules = make_rule_set(compat, **options, **({} if client is None else {"client": client}))
        if out is not None:
            load_ahead("pyarrow.csv")
        pack = None if truth_pack is None else Path(truth_pack)
        with locked(out):
            has_pack = pack is not None and pack.exists()
            if pack is not None and has_pack:
                truths: Sequence[Any] = read_pack(pack, rules, truth, layer=layer)
            elif truth is None:
                raise UsageError(
                    "no truth to score against",
                    hint=f"give {spell('truth')} real.h5ad or an existing truth pack, or set [score] truth in "
                    "vcelltools.toml",
                )
            else:
                truths = rules.read_truth(truth, progress)
            result = rules.score(pred, truths, truth, progress)
            result = replace(result, warnings=(*result.warnings, *find_stale(pred)))
            if pack is not None and truth is not None and not has_pack:
                write_pack(pack, rules, truths, truth, layer=layer, force=force)
            if out is not None:
                result.write(out, force=force)
        return result


def _refuse(given: Mapping[str, Any], defaults: Mapping[str, Any], compat: str) -> None:
    """Raise a :class:`UsageError` for arguments that have no effect under these rules."""
    names = [k for k, v in given.items() if v not in (defaults.get(k), None, False, 0)]
    names += [k for k, v in given.items() if v is False and defaults.get(k) is True]
    if names:
        text = ", ".join(map(spell, names))
        raise UsageError(
            f"{text} cannot be used with {spell('compat', compat)}", hint="remove one of the two", field=names[0]
        )
