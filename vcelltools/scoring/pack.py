"""A truth pack: what of the truth a scoring needs in one small file, so that a leaderboard reads each file once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.scoring.effects import ALPHA, Effects
from vcelltools.scoring.genebuckets import RankSums
from vcelltools.scoring.packfile import code_p, decode_p, read_packfile, write_packfile
from vcelltools.scoring.sides import Side

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Options, Truth

MAGIC = b"vctruth3"
_KEYS = ("profile", "compat", "pert_col", "control", "epsilon", "cpm_filter", "allow_discrete", "to_cp10k")


def _settings(options: Options) -> dict[str, Any]:
    return {k: getattr(options, k) for k in _KEYS}


def write_pack(path: str | os.PathLike, truth: Truth, options: Options, *, force: bool = False) -> Path:
    """Write a reduced truth.

    Pseudobulks keep their precision; log2 fold changes are kept exactly (float32) for significant genes and follow
    from the pseudobulks for the others; adjusted p-values are kept for drawing, in a byte each.
    """
    side, effects = truth.side, truth.effects
    arrays: dict[str, np.ndarray] = {
        "mean_kg": side.sums.mean_kg.astype(side.dtype),
        "size_k": side.sums.size_k,
        "control_nnz_g": side.sums.nnz_kg[side.control].astype(np.int32),
    }
    if effects is not None:
        significant = effects.significant_pg
        arrays["significant"] = np.packbits(significant.ravel())
        arrays["log2fc"] = effects.log2fc_pg[significant].astype(np.float32)
        if effects.ratio_pg is not None:
            arrays["ratio"] = effects.ratio_pg[significant].astype(np.float32)
        arrays["fdr"] = code_p(effects.fdr_pg)
        if options.profile == "extended":  # its weights follow from p
            arrays["p_pg"] = effects.p_pg
        if effects.keep_pg is not None:
            arrays["keep"] = np.packbits(effects.keep_pg.ravel())
    if truth.energy_p is not None:
        arrays["energy_p"] = truth.energy_p
    header = {
        "label": side.label,
        "genes": [str(g) for g in side.genes],
        "labels": list(side.labels),
        "control": side.control,
        "order": list(side.order),
        "appearance": list(side.appearance),
        "scale": side.scale,
        "dtype": side.dtype.name,
        "sparse": side.sparse,
        "baseline": truth.base_means,
        "ceiling": truth.ceiling.values if truth.ceiling is not None else None,
        "notes": truth.notes,
    }
    return write_packfile(path, MAGIC, _settings(options), [(header, arrays)], force=force)


def read_pack(path: str | os.PathLike, options: Options) -> Truth:
    """Read a truth pack made with the same settings; errors as :func:`read_packfile` raises them."""
    (truth,) = read_packfile(path, MAGIC, _settings(options), lambda head, a: _make_truth(head, a, options))
    return truth


def _make_truth(header: dict[str, Any], arrays: dict[str, np.ndarray], options: Options) -> Truth:
    from vcelltools.scoring.evaluate import Truth
    from vcelltools.scoring.result import Ceiling, ScoreTable

    mean_kg, size_k = arrays["mean_kg"], arrays["size_k"]
    control = int(header["control"])
    labels = tuple(header["labels"])
    genes = np.array(header["genes"], dtype=object)
    if mean_kg.shape != (len(labels), len(genes)) or size_k.shape != (len(labels),):
        raise ValueError("its arrays do not fit its names")
    dtype = np.dtype(header["dtype"])
    nnz = np.zeros(mean_kg.shape, np.int64)
    nnz[control] = arrays["control_nnz_g"]
    sums = RankSums(
        size_k=size_k, sum_kg=mean_kg.astype(np.float64) * size_k[:, None], nnz_kg=nnz, moment_kg=None, single_kg=None,
        u_kg=None, tie_kg=None, p_kg=None, control_tie_g=None, max_value=0.0,
    )  # fmt: skip
    side = Side(
        label=header["label"], genes=genes, labels=labels, control=control, order=tuple(header["order"]),
        appearance=tuple(header["appearance"]), scale=header["scale"], dtype=dtype, sparse=bool(header["sparse"]),
        sums=sums,
    )  # fmt: skip
    effects = None
    if "significant" in arrays:
        shape = (len(labels) - 1, len(genes))
        n = shape[0] * shape[1]
        significant = np.unpackbits(arrays["significant"], count=n).astype(bool).reshape(shape)
        natural = np.expm1(mean_kg.astype(np.float64))
        target, base = natural[side.perts], natural[control]
        with np.errstate(divide="ignore", invalid="ignore"):
            log2fc = np.log2((target + options.epsilon) / (base + options.epsilon))
        log2fc[np.isnan(log2fc)] = 0
        log2fc[significant] = arrays["log2fc"]
        ratio = None
        if "ratio" in arrays:
            ratio = np.exp2(log2fc)
            ratio[significant] = arrays["ratio"]
        fdr = decode_p(arrays["fdr"].reshape(shape), significant, ALPHA)
        keep = None
        if "keep" in arrays:
            keep = np.unpackbits(arrays["keep"], count=n).astype(bool).reshape(shape)
        nothing = np.full(shape, np.nan)
        effects = Effects(
            names=side.names, mean_pg=target, control_mean_g=base, log2fc_pg=log2fc, percent_pg=nothing,
            ratio_pg=ratio, u_pg=nothing, p_pg=arrays.get("p_pg", nothing), fdr_pg=fdr, significant_pg=significant,
            keep_pg=keep,
        )  # fmt: skip
    ceiling = None
    if header["ceiling"] is not None:
        values = {k: float("nan") if v is None else float(v) for k, v in header["ceiling"].items()}
        ceiling = Ceiling(table=ScoreTable(names=[], columns={}), values=values, n_dropped=0)
    return Truth(
        side=side, effects=effects, opened=None, options=options, energy_p=arrays.get("energy_p"), ceiling=ceiling,
        base_means=header["baseline"], from_pack=True, notes=list(header["notes"]),
    )  # fmt: skip
