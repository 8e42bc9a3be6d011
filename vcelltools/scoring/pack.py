"""A truth pack: what of the truth a scoring needs, in one small file, so that a leaderboard reads each prediction once.

An uncompressed zip of numpy arrays is not what this is: arrays are packed with zstd, named and typed in a JSON
header, and read back with every length checked. Nothing in it is executable.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.atomic import atomic_file
from vcelltools.kernels.ranksum import RankSums
from vcelltools.scoring.effects import Effects
from vcelltools.scoring.sides import Side

if TYPE_CHECKING:
    from vcelltools.scoring.evaluate import Options, Truth

MAGIC = b"vctruth1"
MAX_BYTES = 1 << 31
_KEYS = ("profile", "compat", "pert_col", "control", "epsilon", "cpm_filter", "allow_discrete", "to_cp10k")


def _settings(options: Options) -> dict[str, Any]:
    return {k: getattr(options, k) for k in _KEYS}


def write_pack(path: str | os.PathLike, truth: Truth, options: Options, *, force: bool = False) -> Path:
    """Write a reduced truth.

    Pseudobulks keep their precision; log2 fold changes are kept exactly (float32) for significant genes and follow
    from the pseudobulks for the others; adjusted p-values are kept in half precision, for drawing.
    """
    import zstandard

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
        arrays["fdr_pg"] = effects.fdr_pg.astype(np.float16)
        if options.profile == "extended":  # its weights follow from p
            arrays["p_pg"] = effects.p_pg
        if effects.keep_pg is not None:
            arrays["keep"] = np.packbits(effects.keep_pg.ravel())
    if truth.energy_p is not None:
        arrays["energy_p"] = truth.energy_p
    header = {
        "settings": _settings(options),
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
        "arrays": [[k, a.dtype.name, list(a.shape)] for k, a in arrays.items()],
    }
    text = json.dumps(header).encode()
    body = zstandard.ZstdCompressor(level=10).compress(
        struct.pack("<Q", len(text)) + text + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
    )
    with atomic_file(path, force=force) as tmp:
        tmp.write_bytes(MAGIC + body)
    return Path(path)


def read_pack(path: str | os.PathLike, options: Options) -> Truth:
    """Read a truth pack made with the same settings.

    Raises
    ------
    DataError
        When the file is not a truth pack, or damaged.
    UsageError
        When it was made with other settings.
    """
    import zstandard

    p = Path(path)
    data = p.read_bytes()
    if not data.startswith(MAGIC):
        raise DataError(f"{p}: is not a truth pack", hint="--truth-pack writes one where --truth is given")
    try:
        size = zstandard.frame_content_size(data[len(MAGIC) :])
        if not 0 < size < MAX_BYTES:
            raise ValueError(f"it declares {size:,} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data[len(MAGIC) :], max_output_size=size)
        (n,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + n])
        arrays, at = {}, 8 + n
        for name, dtype, shape in header["arrays"]:
            kind = np.dtype(dtype)
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(raw, kind, count, at).reshape(shape).copy()
            at += count * kind.itemsize
        if at != len(raw):
            raise ValueError(f"{len(raw) - at:,} bytes are left over")
        return _make_truth(header, arrays, options, p)
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError, IndexError) as e:
        raise DataError(f"{p}: the truth pack is damaged: {e}", hint="delete it and write it again") from e


def _make_truth(header: dict[str, Any], arrays: dict[str, np.ndarray], options: Options, path: Path) -> Truth:
    from vcelltools.scoring.evaluate import Truth
    from vcelltools.scoring.result import Ceiling, ScoreTable

    wanted = _settings(options)
    for key, value in header["settings"].items():
        if wanted[key] != value:
            raise UsageError(
                f"{path}: the truth pack was made with {key} = {value!r}, and {wanted[key]!r} is asked for",
                hint="use the same settings, or write another pack",
            )
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
        fdr = arrays["fdr_pg"].astype(np.float64)
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
