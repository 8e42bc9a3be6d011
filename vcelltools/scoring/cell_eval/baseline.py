"""Compute the mean baseline, the lower end of the scale, and write it as a file that any scorer can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vcelltools.differential.expression import make_transform
from vcelltools.differential.reduce import Reduced
from vcelltools.errors import UsageError, spell
from vcelltools.io import Buffers
from vcelltools.io.chunks import CsrChunk, DenseChunk, compress_rows
from vcelltools.runtime.progress import SILENT, Progress
from vcelltools.scoring.cell_eval.edistance import DenseRows
from vcelltools.scoring.cell_eval.options import Opened, Options, open_file

if TYPE_CHECKING:
    from anndata import AnnData

KINDS = ("mean", "control-mean")
_ROWS = 1024


def get_mean_profile(side: Reduced, kind: str = "mean") -> np.ndarray:
    """Return (g,) the single profile of the baseline, in the precision of the data.

    ``mean`` is the mean of the group means, including that of the controls (as in cell-eval);
    ``control-mean`` is the mean of the controls.
    """
    mean_kg = side.sums.mean_kg.astype(side.dtype)
    return mean_kg[side.control] if kind == "control-mean" else mean_kg.mean(axis=0, dtype=side.dtype)


def make_mean_baseline(
    real: Reduced, value_g: np.ndarray, u_pg: np.ndarray | None, p_pg: np.ndarray | None, options: Options
) -> Reduced:
    """Return the mean baseline as a reduced file in which every perturbed cell has the same profile.

    Its statistics ``u_pg`` and ``p_pg`` follow from counting the controls below each value, without creating cells.
    """
    sums, value = real.sums, value_g.astype(np.float64)
    size = sums.size_k[:, None].astype(np.float64)
    is_control = np.arange(len(size))[:, None] == real.control
    changed: dict[str, np.ndarray | None] = {"sum_kg": np.where(is_control, sums.sum_kg, size * value)}
    if sums.single_kg is not None:
        single = np.broadcast_to(value_g.astype(sums.single_kg.dtype), sums.single_kg.shape).copy()
        if not real.sparse or options.rules.fold_limit is not None:  # these are sums, and the others are means
            single *= size.astype(single.dtype)
        changed["single_kg"] = np.where(is_control, sums.single_kg, single)
    if sums.moment_kg is not None:
        moment = size * (np.log1p(value) if options.allow_discrete else np.expm1(value))
        changed["moment_kg"] = np.where(is_control, sums.moment_kg, moment)
    if u_pg is not None and sums.u_kg is not None and sums.p_kg is not None:
        u, p = sums.u_kg.copy(), sums.p_kg.copy()
        u[real.perts], p[real.perts] = u_pg, p_pg
        changed |= {"u_kg": u, "p_kg": p}
    return replace(real, label="mean baseline", sums=replace(sums, **changed))  # type: ignore[arg-type]


def write_baseline(
    source: str | os.PathLike | AnnData,
    out: str | os.PathLike,
    *,
    kind: str = "mean",
    options: Options,
    force: bool = False,
    progress: Progress = SILENT,
) -> tuple[Path, int, str]:
    """Write the mean baseline of a truth as an h5ad for any scorer; return its path, cells and the scale of the truth.

    Every perturbation has as many cells as in the truth, all with the same log1p profile (see
    :func:`get_mean_profile`), followed by the controls of the truth, as they are scored.
    """
    import pandas as pd

    from vcelltools.io.write.h5ad import H5adWriter

    if kind not in KINDS:
        raise UsageError(f"no baseline {kind!r}", hint=f"{spell('kind')}, one of: {', '.join(KINDS)}")
    # the h5ad does not state a base, so natural logarithms are written
    opened = replace(open_file(source, replace(options, compat="ours"), name="truth"), options=options)
    try:
        side = opened.reduce(test=False, progress=progress)
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
            for block in _read_controls(opened):
                w.append_csr(*block)
    finally:
        opened.dataset.close()
    return Path(out), len(labels), opened.scale.kind


def _read_controls(opened: Opened) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the controls as CSR blocks, in the order of the file and as they are scored."""
    matrix, options = opened.dataset.matrix, opened.options
    wanted = opened.cells.codes == opened.cells.labels.index(options.control)
    raw = options.allow_discrete and opened.scale.kind == "counts"
    if matrix.by_gene:
        rows = DenseRows(opened.dataset, opened.scale, raw=raw, cp10k=options.to_cp10k, threads=options.threads)
        positions = np.flatnonzero(wanted)
        for i in range(0, len(positions), _ROWS):
            yield compress_rows(rows.take(positions[i : i + _ROWS]))
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
            yield compress_rows(data.reshape(chunk.block.shape)[keep])
        else:
            assert isinstance(chunk, CsrChunk)
            lengths = np.diff(chunk.indptr)
            mask = np.repeat(keep, lengths)
            yield np.concatenate([[0], np.cumsum(lengths[keep])]), chunk.indices[mask], data[mask]
