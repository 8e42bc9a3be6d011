"""The file format of a store: names, frames of exact counts, checksums, the manifest.

::

    manifest.json    written last; a folder without it is not a store
    genes.parquet    the basis: label, Ensembl id, symbol, source columns, present
    measured.parquet the genes behind the columns of sums.npy
    cells.parquet    obs in store order
    source_row.npy   (n,) int32: the row of each cell in the source
    runs.parquet     (cell line, perturbation, context) -> start, length, is_control, sums_row
    X.f16            (n, stride) little-endian float16 CP10K+log1p; stride a multiple of 128
    X.xxh3.npy       xxh3-64 of every unit of 16 rows of X.f16
    counts.u8z       zstd frames (with checksums) of up to 16 rows; a frame never crosses a run
    frames.npy       (2, frames + 1): first row and byte offset of each frame
    libsize.npy      (n,) int64 library sizes
    sums.npy         (groups, measured) float64 sums of CP10K+log1p

A frame unpacks to the numbers of non-zeros and of escapes (uint32 each); one bit for every (gene, row) that is not
zero; a byte for every non-zero, where 255 is an escape; and the counts of the escapes (uint32). Bits, bytes and escapes
are in gene order. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from vcelltools.errors import DataError
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import dump_json
from vcelltools.kernels.store import WORK_ESCAPE, pack_frames, unpack_frame

SCHEMA = 1
UNIT_ROWS = 16  # rows per checksum unit, and maximum rows per frame
STRIDE = 128
ZSTD_LEVEL = 1
CODING = 2  # compression of frames, which any zstd reader can read
MANIFEST = "manifest.json"
Count = Annotated[int, Meta(ge=0)]
PARTS = (
    "genes.parquet",
    "measured.parquet",
    "cells.parquet",
    "source_row.npy",
    "runs.parquet",
    "X.xxh3.npy",
    "counts.u8z",
    "frames.npy",
    "libsize.npy",
    "sums.npy",
)


def is_store(dpath: Path) -> bool:
    """Whether a folder has the manifest of a store and holds only files of a store."""
    names = set(os.listdir(dpath))
    if MANIFEST not in names or not names <= {MANIFEST, "X.f16", *PARTS}:
        return False
    return "X.f16" in names or _names_parts(dpath / MANIFEST)


def is_unfinished(dpath: Path) -> bool:
    """Whether a store is being built in a folder."""
    return (dpath / "X.f16").exists() or (dpath / "journal").exists()


def _names_parts(manifest: Path) -> bool:
    try:
        return "X.f16" in parse_json(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def get_stride(n_genes: int) -> int:
    """Return the row stride of X.f16 in values: the next multiple of 128 (2,048 for 2,000)."""
    return -(-n_genes // STRIDE) * STRIDE


def get_frame_starts(run_lengths: np.ndarray) -> np.ndarray:
    """Return (frames + 1,) int64 first rows of the frames, of up to 16 rows each; no frame crosses a run."""
    lengths = np.asarray(run_lengths, np.int64)
    per_run = -(-lengths // UNIT_ROWS)
    first = np.repeat(np.cumsum(lengths) - lengths, per_run)
    nth = np.arange(int(per_run.sum())) - np.repeat(np.cumsum(per_run) - per_run, per_run)
    return np.append(first + nth * UNIT_ROWS, lengths.sum()).astype(np.int64)


def make_compressor():
    """Return the zstd compressor of frames, with one thread, content checksum and size.

    Counts only repeat by chance: short matches cost more bytes than they save, and searching for them costs time.
    """
    import zstandard

    params = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, min_match=7, hash_log=6, write_checksum=True, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=params)


def _compress(compressor: Any, payload: memoryview, cut: int) -> bytes:
    """Return a frame of two blocks with separate symbol tables, because bits and bytes have different statistics."""
    import zstandard

    out = compressor.compressobj(size=len(payload))
    parts = [
        out.compress(payload[:cut]),
        out.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        out.compress(payload[cut:]),
        out.flush(),
    ]
    return b"".join(parts)


def encode_frames(packed: np.ndarray, escapes: np.ndarray, starts: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return (compressed frames, bytes of each) of packed rows; see ``kernels.store.pack_frames``."""
    _n_rows, n_genes = packed.shape
    n_frames = len(starts) - 1
    room = packed.size + packed.size // 8 + 4 * len(escapes) + 16 * n_frames
    out, sizes = np.empty(room, np.uint8), np.empty(n_frames, np.int64)
    pack_frames(packed, escapes, starts, n_genes, out, sizes)
    compressor = make_compressor()
    ends, cuts = np.cumsum(sizes), 8 + (np.diff(starts) * n_genes + 7) // 8
    view = out.data
    frames = [
        _compress(compressor, view[b - n : b], c)
        for b, n, c in zip(ends.tolist(), sizes.tolist(), cuts.tolist(), strict=True)
    ]
    return b"".join(frames), np.array([len(f) for f in frames], np.int64)


def decode_frame(raw: bytes, counts: np.ndarray, *, where: str) -> None:
    """Unpack one frame into (r, G) uint32 ``counts``.

    Raises
    ------
    DataError
        If the frame is damaged: its checksum does not match, or its content is invalid.
    """
    import zstandard

    most = 16 + 6 * counts.size
    try:
        params = zstandard.get_frame_parameters(raw)
        if not params.has_checksum or not 8 <= params.content_size <= most:
            raise DataError(f"{where}: the frame is damaged (its header is not that of a frame of {len(counts)} rows)")
        data = zstandard.ZstdDecompressor().decompress(raw)
    except zstandard.ZstdError as e:
        raise DataError(f"{where}: damaged ({e})", hint="build the store again") from e
    if not unpack_frame(np.frombuffer(data, np.uint8), counts):
        raise DataError(
            f"{where}: the frame is damaged (it does not hold {counts.shape[0]} rows of {counts.shape[1]} genes)"
        )


def fill_work(work: np.ndarray, counts: np.ndarray, first: int) -> np.ndarray:
    """Write counts to work rows; return (row, position, count) of counts >= 65,535, rows numbered from ``first``."""
    work[:, : counts.shape[1]] = np.minimum(counts, WORK_ESCAPE)
    if not (counts >= WORK_ESCAPE).any():
        return np.empty((0, 3), np.int64)
    rows, cols = np.nonzero(counts >= WORK_ESCAPE)
    return np.column_stack([first + rows, cols, counts[rows, cols].astype(np.int64)])


def hash_units(rows: np.ndarray) -> np.ndarray:
    """Return the xxh3-64 of every unit of 16 rows of a C-contiguous block that starts at a unit boundary."""
    import xxhash

    return np.array(
        [xxhash.xxh3_64_intdigest(rows[a : a + UNIT_ROWS].data) for a in range(0, len(rows), UNIT_ROWS)], np.uint64
    )


def hash_file(path: Path, over: threading.Event | None = None) -> str:
    """Return the sha256 of a file, in hexadecimal, or of its beginning if ``over`` is set meanwhile."""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while (n := f.readinto(piece)) and not (over is not None and over.is_set()):
            digest.update(memoryview(piece)[:n])
    return digest.hexdigest()


def make_manifest(body: dict[str, Any]) -> str:
    """Return the text of a manifest: ``body`` and the sha256 of its canonical form."""
    digest = hashlib.sha256(dump_json(body).encode()).hexdigest()
    return dump_json({**body, "sha256": digest}, indent=1) + "\n"


class _Part(msgspec.Struct):
    bytes: Count
    sha256: str | None = None


class _Manifest(msgspec.Struct):
    """The types in a manifest; fields that readers do not need are ignored."""

    name: str
    plan: str
    n_cells: Count
    n_genes: Count
    stride: Count
    target_sum: Annotated[float, Meta(gt=0)]
    arithmetic: Literal["float32", "float64"]
    basis: dict[str, str | int]
    source: dict[str, str | int | None]
    labels: dict[str, Any]
    genes: dict[str, Any]
    duplicate_entries: Count
    files: dict[str, _Part]


def _check_types(body: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if the fields of a manifest are invalid."""
    manifest = msgspec.convert(body, _Manifest)
    for name, part in manifest.files.items():
        if name not in (*PARTS, "X.f16") or (part.sha256 is None) != (name == "X.f16"):
            raise ValueError(f"files: {name!r} is not part of a store, or has no hash")
    missing = {*PARTS, "X.f16"} - {"source_row.npy", *manifest.files}  # version 0.1 kept the rows in cells.parquet
    if missing or not isinstance(manifest.labels.get("control"), str):
        raise ValueError(f"{', '.join(sorted(missing)) or 'labels.control'}: missing")


_BUILD = "a store is a folder written by vcelltools build-store"


def read_manifest(dpath: str | os.PathLike) -> dict[str, Any]:
    """Return the manifest of a store after checking its own hash.

    Raises
    ------
    DataError
        If the folder is not a store, or the manifest is damaged or has another schema.
    """
    d = Path(dpath)
    path = d / MANIFEST
    if not d.is_dir():
        raise DataError(f"{d}: {'this is a file, not a store' if d.exists() else 'no such store'}", hint=_BUILD)
    if not path.exists():
        raise DataError(f"{d} is not a store (it has no {MANIFEST})", hint="build-store did not finish; run it again")
    try:
        body = parse_json(path.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        same = digest == hashlib.sha256(dump_json(body).encode()).hexdigest()
        if same and body.get("schema") == SCHEMA:
            _check_types(body)
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise DataError(f"{path}: damaged ({e})", hint="build the store again") from e
    if not same:
        raise DataError(f"{path}: the file is damaged (its hash does not match)", hint="build the store again")
    if body.get("schema") != SCHEMA:
        raise DataError(
            f"{path}: the store has schema {body.get('schema')}, but this version reads {SCHEMA}",
            hint="build the store again",
        )
    return {**body, "sha256": digest}
