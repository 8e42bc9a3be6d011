"""The files of a store: names, frames of exact counts, checksums, the manifest.

::

    manifest.json    written last; a folder without it is not a store
    genes.parquet    the basis: label, Ensembl id, symbol, source columns, present
    measured.parquet the genes behind the columns of sums.npy
    cells.parquet    obs in store order, with the original row
    runs.parquet     (cell line, perturbation, context) -> start, length, is_control, sums_row
    X.f16            (n, stride) little-endian float16 CP10K+log1p; stride a multiple of 128
    X.xxh3.npy       xxh3-64 of every unit of 16 rows of X.f16
    counts.u8z       zstd frames (with checksums) of up to 16 rows; a frame never crosses a run
    frames.npy       (2, frames + 1): first row and byte offset of each frame
    libsize.npy      (n,) int64 library sizes
    sums.npy         (groups, measured) float64 sums of CP10K+log1p

A frame unpacks to: the number of non-zeros and of escapes (uint32 each); one bit for every (gene, row) that is not
zero; a byte for every non-zero, 255 standing for an escape; the escapes' counts (uint32). Bits, bytes and escapes run
gene by gene. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.atomic import dump_json
from vcelltools.kernels.store import WORK_ESCAPE, pack_frames, unpack_frame

SCHEMA = 1
UNIT_ROWS = 16  # rows of a checksum unit, and the most rows of a frame
STRIDE = 128
ZSTD_LEVEL = 1
CODING = 2  # how frames are compressed; any zstd reader reads all of them
MANIFEST = "manifest.json"
PARTS = (
    "genes.parquet",
    "measured.parquet",
    "cells.parquet",
    "runs.parquet",
    "X.xxh3.npy",
    "counts.u8z",
    "frames.npy",
    "libsize.npy",
    "sums.npy",
)


def get_stride(n_genes: int) -> int:
    """Return the row stride of X.f16 in values: the next multiple of 128 (2,048 for 2,000)."""
    return -(-n_genes // STRIDE) * STRIDE


def get_frame_starts(run_lengths: np.ndarray) -> np.ndarray:
    """Return (frames + 1,) int64 first rows of the frames: up to 16 rows each, none across two runs."""
    lengths = np.asarray(run_lengths, np.int64)
    per_run = -(-lengths // UNIT_ROWS)
    first = np.repeat(np.cumsum(lengths) - lengths, per_run)
    nth = np.arange(int(per_run.sum())) - np.repeat(np.cumsum(per_run) - per_run, per_run)
    return np.append(first + nth * UNIT_ROWS, lengths.sum()).astype(np.int64)


def make_compressor():
    """Return the zstd compressor of frames: one thread, with content checksum and size.

    Counts repeat by chance alone: short matches cost more than they save, and looking for them costs time.
    """
    import zstandard

    params = zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, min_match=7, hash_log=6, write_checksum=True, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=params)


def _compress(compressor: Any, payload: memoryview, cut: int) -> bytes:
    """Return a frame of two blocks, each with its own table of symbols: bits and bytes have nothing in common."""
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
        Where the frame is damaged: its checksum fails, or it does not hold what it must.
    """
    import zstandard

    most = 16 + 6 * counts.size
    try:
        params = zstandard.get_frame_parameters(raw)
        if not params.has_checksum or not 8 <= params.content_size <= most:
            raise DataError(f"{where}: damaged (its header is not that of a frame of {len(counts)} rows)")
        data = zstandard.ZstdDecompressor().decompress(raw)
    except zstandard.ZstdError as e:
        raise DataError(f"{where}: damaged ({e})", hint="build the store again") from e
    if not unpack_frame(np.frombuffer(data, np.uint8), counts):
        raise DataError(f"{where}: damaged (it does not hold {counts.shape[0]} rows of {counts.shape[1]} genes)")


def fill_work(work: np.ndarray, counts: np.ndarray, first: int) -> np.ndarray:
    """Write counts into work rows; return (row, position, count) of those >= 65,535, rows counted from ``first``."""
    work[:, : counts.shape[1]] = np.minimum(counts, WORK_ESCAPE)
    if not (counts >= WORK_ESCAPE).any():
        return np.empty((0, 3), np.int64)
    rows, cols = np.nonzero(counts >= WORK_ESCAPE)
    return np.column_stack([first + rows, cols, counts[rows, cols].astype(np.int64)])


def hash_units(rows: np.ndarray) -> np.ndarray:
    """Return the xxh3-64 of every unit of 16 rows of a C-contiguous block that starts at a unit."""
    import xxhash

    return np.array(
        [xxhash.xxh3_64_intdigest(rows[a : a + UNIT_ROWS].data) for a in range(0, len(rows), UNIT_ROWS)], np.uint64
    )


def hash_file(path: Path, over: threading.Event | None = None) -> str:
    """Return the sha256 of a file, in hexadecimal; of its beginning where ``over`` is set meanwhile."""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while (n := f.readinto(piece)) and not (over is not None and over.is_set()):
            digest.update(memoryview(piece)[:n])
    return digest.hexdigest()


def make_manifest(body: dict[str, Any]) -> str:
    """Return the text of a manifest: ``body`` and the sha256 of its canonical form."""
    digest = hashlib.sha256(dump_json(body).encode()).hexdigest()
    return dump_json({**body, "sha256": digest}, indent=1) + "\n"


_BUILD = "a store is a folder that vcelltools build-store wrote"


def read_manifest(dpath: str | os.PathLike) -> dict[str, Any]:
    """Return the manifest of a store after checking its own hash.

    Raises
    ------
    DataError
        Where the folder is no store, or the manifest is damaged or of another schema.
    """
    d = Path(dpath)
    path = d / MANIFEST
    if not d.is_dir():
        raise DataError(f"{d}: {'a file, not a store' if d.exists() else 'no such store'}", hint=_BUILD)
    if not path.exists():
        raise DataError(f"{d}: not a store (it has no {MANIFEST})", hint="build-store did not finish; run it again")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        same = digest == hashlib.sha256(dump_json(body).encode()).hexdigest()
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DataError(f"{path}: damaged ({e})", hint="build the store again") from e
    if not same:
        raise DataError(f"{path}: damaged (its hash does not fit)", hint="build the store again")
    if body.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {body.get('schema')}; this version reads {SCHEMA}", hint="build it again")
    return {**body, "sha256": digest}
