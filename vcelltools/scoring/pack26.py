"""A truth pack of the 2026 rules: what of the truth a scoring needs, so that each further prediction costs one read.

It holds the counts summed over groups, the DE table, both ends of the scale, and the control cells (the rank test is
against them). Arrays are packed with zstd, named and typed in a JSON header; nothing in it is executable. Scores from a
pack are those from the file, bit for bit: fold changes are kept in full where a metric reads their size.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.errors import DataError, UsageError
from vcelltools.io.atomic import atomic_file, to_plain
from vcelltools.scoring.genemajor import GeneMajor
from vcelltools.scoring.rules import RULES_2026
from vcelltools.scoring.sides26 import ALPHA, DeTable, Side, get_profiles

if TYPE_CHECKING:
    from vcelltools.scoring.vcc2026 import Truth

MAGIC = b"vctrut26"
MAX_BYTES = 16 << 30


def get_settings(
    *, pert_col: str, control: str, context_col: str, continuity: bool, target_gene_map: Mapping | None
) -> dict[str, Any]:
    """Return what a pack depends on."""
    text = json.dumps(sorted((target_gene_map or {}).items()), default=str).encode()
    return {
        "rules": RULES_2026.version,
        "pert_col": pert_col,
        "control": control,
        "context_col": context_col,
        "continuity": continuity,
        "target_gene_map": hashlib.sha256(text).hexdigest()[:16] if target_gene_map else None,
    }


def write_pack(path: str | os.PathLike, truths: list[Truth], settings: dict[str, Any], *, force: bool = False) -> Path:
    """Write the truths of all contexts."""
    import zstandard

    heads: list[Any] = []
    arrays: list[np.ndarray] = []
    for t in truths:
        named = _get_arrays(t)
        heads.append(
            to_plain(
                {
                    "context": t.context, "genes": list(t.genes), "labels": list(t.labels), "baseline": t.baseline,
                    "ceiling": t.ceiling, "problem": t.problem, "warnings": list(t.warnings), "library": t.library,
                    "dense": t.controls.dense, "arrays": [[k, a.dtype.name, list(a.shape)] for k, a in named.items()],
                }
            )
        )  # fmt: skip
        arrays += named.values()
    text = json.dumps({"settings": settings, "contexts": heads}).encode()
    size = 8 + len(text) + sum(a.nbytes for a in arrays)
    with atomic_file(path, force=force) as tmp, open(tmp, "wb") as f:
        f.write(MAGIC)
        with zstandard.ZstdCompressor(level=6).stream_writer(f, size=size, closefd=False) as out:
            out.write(struct.pack("<Q", len(text)))
            out.write(text)
            for a in arrays:
                out.write(np.ascontiguousarray(a).view(np.uint8).data if a.size else b"")
    return Path(path)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return whole numbers in the smallest unsigned type that holds them."""
    top = int(values.max()) if values.size else 0
    for kind in (np.uint8, np.uint16, np.uint32):
        if top <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.uint64)


def _get_arrays(t: Truth) -> dict[str, np.ndarray]:
    de = t.side.de
    significant = de.padj_ph < ALPHA
    return {
        "target_p": t.target_p,
        "size_k": t.side.size_k,
        "spread_k": t.side.spread_k,
        "sum_kg": _narrow(t.sum_kg),
        "genes": de.genes,
        "significant": np.packbits(significant.ravel()),
        "lfc_full": de.lfc_ph[significant],
        "lfc_ph": de.lfc_ph.astype(np.float32),
        "padj_ph": de.padj_ph.astype(np.float16),
        "indptr": t.controls.indptr,
        "cells": _narrow(t.controls.cells),
        "values": _narrow(t.controls.values),
    }


def read_pack(path: str | os.PathLike, settings: dict[str, Any]) -> list[Truth]:
    """Read a pack.

    Raises
    ------
    DataError
        When it is not a pack of the 2026 rules, or damaged.
    UsageError
        When it was made with other settings.
    """
    import zstandard

    p = Path(path)
    try:
        with open(p, "rb") as f:
            if f.read(len(MAGIC)) != MAGIC:
                raise DataError(
                    f"{p}: is not a truth pack of the 2026 rules", hint="--truth-pack with --truth writes one"
                )
            head = f.read(18)
            size = zstandard.frame_content_size(head)
            if not 8 < size < MAX_BYTES:
                raise ValueError(f"it declares {size:,} bytes")
            f.seek(len(MAGIC))
            with zstandard.ZstdDecompressor().stream_reader(f) as stream:
                return _read(stream, size, settings, p)
    except FileNotFoundError as e:
        raise DataError(f"{p}: no such file", hint="--truth-pack with --truth writes one") from e
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError, IndexError, OverflowError) as e:
        raise DataError(f"{p}: the truth pack is damaged: {e}", hint="delete it and write it again") from e


def _read(stream: Any, size: int, settings: dict[str, Any], path: Path) -> list[Truth]:
    left = size

    def take(n: int) -> bytes:
        nonlocal left
        if not 0 <= n <= left:
            raise ValueError(f"an array of {n:,} bytes where {left:,} are left")
        out = stream.read(n)
        if len(out) != n:
            raise ValueError("it ends too early")
        left -= n
        return out

    (n,) = struct.unpack("<Q", take(8))
    header = json.loads(take(n))
    for key, value in header["settings"].items():
        if settings.get(key) != value:
            raise UsageError(
                f"{path}: the truth pack was made with {key} = {value!r}, and {settings.get(key)!r} is asked for",
                hint="use the same settings, or write another pack",
            )
    out = []
    for head in header["contexts"]:
        arrays = {}
        for name, dtype, shape in head["arrays"]:
            kind = np.dtype(dtype)
            if kind.hasobject or any(not isinstance(k, int) or k < 0 for k in shape):
                raise ValueError(f"the array {name!r} has the type {dtype!r} and shape {shape!r}")
            count = int(np.prod(shape, dtype=object))
            arrays[name] = np.frombuffer(take(count * kind.itemsize), kind).reshape(shape)
        out.append(_make_truth(head, arrays))
    if left:
        raise ValueError(f"{left:,} bytes are left over")
    return out


def _make_truth(head: dict[str, Any], a: dict[str, np.ndarray]) -> Truth:
    from vcelltools.scoring.vcc2026 import Truth, get_name_ranks

    genes, labels = np.array(head["genes"], dtype=object), np.array(head["labels"], dtype=object)
    n_genes, k, h = len(genes), len(labels) + 1, len(a["genes"])
    shapes = {"sum_kg": (k, n_genes), "size_k": (k,), "spread_k": (k,), "target_p": (k - 1,), "lfc_ph": (k - 1, h),
              "padj_ph": (k - 1, h), "indptr": (n_genes + 1,)}  # fmt: skip
    for name, shape in shapes.items():
        if a[name].shape != shape:
            raise ValueError(f"the array {name!r} is {a[name].shape}, not {shape}")
    significant = np.unpackbits(a["significant"], count=(k - 1) * h).astype(bool).reshape(k - 1, h)
    lfc, padj = a["lfc_ph"].astype(np.float64), a["padj_ph"].astype(np.float64)
    lfc[significant] = a["lfc_full"]
    padj = np.where(significant, np.minimum(padj, np.nextafter(ALPHA, 0)), np.maximum(padj, ALPHA))
    sum_kg, indptr = a["sum_kg"].astype(np.float64), a["indptr"].astype(np.int64)
    n_cells = int(a["size_k"][0])
    cells, values = a["cells"].astype(np.int32), a["values"].astype(np.float32)
    in_order = indptr[0] == 0 and (np.diff(indptr) >= 0).all() and indptr[-1] == len(cells) == len(values)
    inside = not len(cells) or 0 <= int(cells.min()) <= int(cells.max()) < n_cells
    known = ((a["target_p"] >= -1) & (a["target_p"] < n_genes)).all() and (
        (a["genes"] >= 0) & (a["genes"] < n_genes)
    ).all()
    if not (in_order and inside and known):
        raise ValueError("positions point outside of its arrays")
    library = np.bincount(cells, weights=values, minlength=n_cells)
    de = DeTable(genes=a["genes"].astype(np.int64), lfc_ph=lfc, p_ph=padj, padj_ph=padj)
    side = Side(size_k=a["size_k"], profile_kg=get_profiles(sum_kg), spread_k=a["spread_k"], de=de)
    controls = GeneMajor(indptr=indptr, cells=cells, values=values, library=library, dense=bool(head["dense"]))
    return Truth(
        context=str(head["context"]),
        genes=genes,
        labels=labels,
        target_p=a["target_p"].astype(np.int64),
        name_rank_g=get_name_ranks(genes),
        side=side,
        controls=controls,
        library=float(head["library"]),
        sum_kg=sum_kg,
        baseline={str(m): _number(v) for m, v in head["baseline"].items()},
        ceiling={str(m): _number(v) for m, v in head["ceiling"].items()},
        problem=str(head["problem"]),
        warnings=tuple(map(str, head["warnings"])),
    )


def _number(v: float | None) -> float:
    return float("nan") if v is None else float(v)
