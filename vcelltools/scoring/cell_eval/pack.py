"""A truth pack: everything that scoring needs from the truth in a small file, so that the truth is read only once."""

from __future__ import annotations

from typing import Any

import numpy as np

from vcelltools.differential.expression import Scale
from vcelltools.differential.ranks import RankSums
from vcelltools.differential.reduce import Reduced
from vcelltools.scoring.cell_eval.de_table import ALPHA, DeTable
from vcelltools.scoring.cell_eval.options import Options
from vcelltools.scoring.cell_eval.truth import Truth
from vcelltools.scoring.pack_format import code_p, decode_p
from vcelltools.scoring.result import Ceiling
from vcelltools.scoring.tables import ScoreTable

MAGIC = b"vctruth4"
_KEYS = (
    "profile", "compat", "pert_col", "control", "context_col", "epsilon", "cpm_filter", "allow_discrete", "to_cp10k",
)  # fmt: skip


def get_settings(options: Options) -> dict[str, Any]:
    """Return the settings on which a pack depends."""
    more = {} if options.library_size is None else {"library_size": options.library_size}
    return {k: getattr(options, k) for k in _KEYS} | more


def pack_truth(truth: Truth) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the arrays of a reduced truth.

    Pseudobulks keep their precision; log2 fold changes are kept exactly (float32) for significant genes and follow
    from the pseudobulks for the others; adjusted p-values are kept for the plots, in one byte each.
    """
    side, effects = truth.reduced, truth.effects
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
        if truth.options.profile == "extended":  # its weights depend on p
            arrays["p_pg"] = effects.p_pg
        if effects.keep_pg is not None:
            arrays["keep"] = np.packbits(effects.keep_pg.ravel())
    if side.spread_k is not None:
        arrays["spread_k"] = side.spread_k
    if truth.energy_p is not None:
        arrays["energy_p"] = truth.energy_p
    header = {
        "context": truth.context,
        "label": side.label,
        "genes": [str(g) for g in side.genes],
        "labels": list(side.labels),
        "control": side.control,
        "order": list(side.order),
        "appearance": list(side.appearance),
        "scale": side.scale.kind,
        "dtype": side.dtype.name,
        "sparse": side.sparse,
        "baseline": truth.base_means,
        "ceiling": truth.ceiling.values if truth.ceiling is not None else None,
        "copied_share": side.copied_share,
        "notes": truth.notes,
    }
    return header, arrays


def unpack_truth(header: dict[str, Any], arrays: dict[str, np.ndarray], options: Options) -> Truth:
    """Return the truth from a header and arrays; invalid content raises a ValueError, KeyError or TypeError."""
    mean_kg, size_k = arrays["mean_kg"], arrays["size_k"]
    control = int(header["control"])
    labels = tuple(header["labels"])
    genes = np.array(header["genes"], dtype=object)
    if mean_kg.shape != (len(labels), len(genes)) or size_k.shape != (len(labels),):
        raise ValueError("its arrays do not match its names")
    dtype = np.dtype(header["dtype"])
    nnz = np.zeros(mean_kg.shape, np.int64)
    nnz[control] = arrays["control_nnz_g"]
    sums = RankSums(
        size_k=size_k, sum_kg=mean_kg.astype(np.float64) * size_k[:, None], nnz_kg=nnz, moment_kg=None, single_kg=None,
        u_kg=None, tie_kg=None, p_kg=None, control_tie_g=None, max_value=0.0,
    )  # fmt: skip
    side = Reduced(
        label=header["label"], genes=genes, labels=labels, control=control, order=tuple(header["order"]),
        appearance=tuple(header["appearance"]), scale=Scale(kind=str(header["scale"])), dtype=dtype,
        sparse=bool(header["sparse"]), sums=sums, spread_k=arrays.get("spread_k"),
        copied_share=float(header["copied_share"]),
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
        effects = DeTable(
            names=side.names, mean_pg=target, control_mean_g=base, log2fc_pg=log2fc, percent_pg=nothing,
            ratio_pg=ratio, u_pg=nothing, p_pg=arrays.get("p_pg", nothing), fdr_pg=fdr, significant_pg=significant,
            keep_pg=keep,
        )  # fmt: skip
    ceiling = None
    if header["ceiling"] is not None:
        values = {k: float("nan") if v is None else float(v) for k, v in header["ceiling"].items()}
        ceiling = Ceiling(table=ScoreTable(names=[], columns={}), values=values, n_dropped=0)
    return Truth(
        context=str(header["context"]), reduced=side, effects=effects, opened=None, options=options,
        energy_p=arrays.get("energy_p"), ceiling=ceiling, base_means=header["baseline"], from_pack=True,
        notes=list(header["notes"]),
    )  # fmt: skip
