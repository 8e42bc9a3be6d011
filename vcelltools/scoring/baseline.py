"""The mean baseline: the floor that a prediction has to leave, and the file that anybody can score."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.chunks import CsrChunk, DenseChunk
from vcelltools.errors import UsageError
from vcelltools.io import Buffers, CscMatrix
from vcelltools.progress import SILENT, Progress
from vcelltools.scoring.compat import METRICS, Rules
from vcelltools.scoring.effects import make_effects
from vcelltools.scoring.frames import ScoreTable
from vcelltools.scoring.sides import Side, make_transform, reduce_side

if TYPE_CHECKING:
    from anndata import AnnData

    from vcelltools.scoring.evaluate import Opened, Options, Truth

KINDS = ("mean", "control-mean")
_ROWS = 1024


def get_mean_profile(side: Side, kind: str = "mean") -> np.ndarray:
    """Return (g,) the baseline's one profile, in the precision of the data.

    ``mean`` is the mean of the group means, the control group's among them (as in cell-eval);
    ``control-mean`` the mean of the controls.
    """
    mean_kg = side.sums.mean_kg.astype(side.dtype)
    return mean_kg[side.control] if kind == "control-mean" else mean_kg.mean(axis=0, dtype=side.dtype)


def baseline_table(truth: Truth, rules: Rules, names: list[str], options: Options) -> ScoreTable:
    """Score the mean baseline without writing it: every cell of every perturbation is the same profile.

    Its ranks follow from counting the controls below each value, so no cell of it ever exists.
    """
    from vcelltools.scoring.evaluate import compute_all, make_pair
    from vcelltools.stream import get_threads

    real = truth.side
    assert truth.base_value_g is not None
    value = truth.base_value_g.astype(np.float64)
    sums = real.sums
    size = sums.size_k[:, None].astype(np.float64)
    sum_kg = np.where(np.arange(len(size))[:, None] == real.control, sums.sum_kg, size * value)
    changed: dict[str, np.ndarray | None] = {"sum_kg": sum_kg}
    if sums.single_kg is not None:
        kind = sums.single_kg.dtype
        single = np.broadcast_to(truth.base_value_g.astype(kind), sums.single_kg.shape).copy()
        if not real.sparse or rules.fold_limit is not None:  # these are sums, the others means
            single *= size.astype(kind)
        single[real.control] = sums.single_kg[real.control]
        changed["single_kg"] = single
    if sums.moment_kg is not None:
        moment = size * (np.log1p(value) if options.allow_discrete else np.expm1(value))
        moment[real.control] = sums.moment_kg[real.control]
        changed["moment_kg"] = moment
    effects = None
    if truth.base_p_pg is not None and any(METRICS[n].kind in ("de", "extended") for n in names):
        assert sums.u_kg is not None
        assert sums.p_kg is not None
        u, p = sums.u_kg.copy(), sums.p_kg.copy()
        u[real.perts], p[real.perts] = truth.base_u_pg, truth.base_p_pg
        changed |= {"u_kg": u, "p_kg": p}
    side = replace(real, label="mean baseline", sums=replace(sums, **changed))  # type: ignore[arg-type]
    if "u_kg" in changed:
        effects = make_effects(
            side, rules, epsilon=options.epsilon, cpm_filter=options.cpm_filter, discrete=options.allow_discrete
        )
    pair = make_pair(side, real, effects, truth.effects, rules, get_threads(options.threads))
    return compute_all(pair, names)


def write_baseline(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    kind: str = "mean",
    options: Options,
    force: bool = False,
    progress: Progress = SILENT,
) -> tuple[Path, int, str]:
    """Write the mean baseline of a truth as an h5ad that any scorer takes; return its path, cells, the truth's scale.

    Every perturbation has as many cells as in the truth, all of them the same log1p profile (see
    :func:`get_mean_profile`); the truth's controls follow, as they are scored.
    """
    import pandas as pd

    from vcelltools.io.write import H5adWriter
    from vcelltools.scoring.compat import get_rules
    from vcelltools.scoring.evaluate import open_side

    if kind not in KINDS:
        raise UsageError(f"no baseline {kind!r}", hint=f"--kind, one of: {', '.join(KINDS)}")
    opened = open_side(source, options)
    try:
        read = options.read_options(get_rules(options.compat), test=False)
        side = reduce_side(opened.dataset, opened.cells, options.control, opened.scale, read, progress=progress)
        value = get_mean_profile(side, kind)
        genes = np.flatnonzero(value)
        sizes = [(v, int(side.sums.size_k[side.labels.index(v)])) for v in side.order if v != options.control]
        n_controls = int(side.sums.size_k[side.control])
        labels = [v for v, n in sizes for _ in range(n)] + [options.control] * n_controls
        obs = pd.DataFrame(
            {options.pert_col: pd.Categorical(labels, categories=[*[v for v, _ in sizes], options.control])},
            index=[f"p.{i}" for i in range(len(labels) - n_controls)] + [f"c.{i}" for i in range(n_controls)],
        )
        var = pd.DataFrame(index=pd.Index([str(g) for g in side.genes]))
        with H5adWriter(
            out, n_genes=len(side.genes), var=var, obs=obs, dtype=side.dtype, force=force, threads=options.threads
        ) as w:
            row = value[genes].astype(side.dtype)
            left = len(labels) - n_controls
            while left:
                n = min(left, _ROWS)
                w.append_csr(np.arange(n + 1) * len(genes), np.tile(genes, n).astype(np.int32), np.tile(row, n))
                left -= n
            for block in _control_rows(opened, options):
                w.append_csr(*block)
    finally:
        opened.dataset.close()
    return Path(out), len(labels), opened.scale.kind


def _control_rows(opened: Opened, options: Options) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the controls as CSR blocks, in the file's order and as they are scored."""
    from vcelltools.scoring.edistance import Rows

    matrix = opened.dataset.matrix
    wanted = opened.cells.codes == opened.cells.labels.index(options.control)
    raw = options.allow_discrete and opened.scale.kind == "counts"
    if isinstance(matrix, CscMatrix) or getattr(matrix, "axis", 0) == 1:
        rows = Rows(opened.dataset, opened.scale, raw=raw, cp10k=options.to_cp10k, threads=options.threads)
        positions = np.flatnonzero(wanted)
        for i in range(0, len(positions), _ROWS):
            yield _to_csr(rows.take(positions[i : i + _ROWS]))
        return
    transform = make_transform(matrix, opened.scale, raw=raw, cp10k=options.to_cp10k)
    buffers = Buffers()
    for span in matrix.plan():
        if not wanted[span.start : span.stop].any():
            continue
        chunk = matrix.read(span, buffers)
        data = transform(chunk)
        keep = wanted[span.start : span.stop]
        if isinstance(chunk, DenseChunk):
            yield _to_csr(data.reshape(chunk.block.shape)[keep])
        else:
            assert isinstance(chunk, CsrChunk)
            lengths = np.diff(chunk.indptr)
            mask = np.repeat(keep, lengths)
            yield np.concatenate([[0], np.cumsum(lengths[keep])]), chunk.indices[mask], data[mask]


def _to_csr(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cols = np.nonzero(block)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(block)))])
    return indptr, cols.astype(np.int32), block[rows, cols]
