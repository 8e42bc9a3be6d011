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

A frame unpacks to ``rows × genes`` bytes, 255 standing for an escape, then the escapes: pairs of uint32
(position in the frame, count), in order. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.atomic import dump_json
from vcelltools.kernels.store import BYTE_ESCAPE, bytes_to_csr

SCHEMA = 1
UNIT_ROWS = 16  # rows of a checksum unit, and the most rows of a frame
STRIDE = 128
ZSTD_LEVEL = 3
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
    """Return the zstd compressor of frames: one thread, with content checksum and size."""
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True)


def encode_frame(compressor, packed: np.ndarray, escapes: np.ndarray) -> bytes:
    """Compress the (r, G) uint8 rows of one frame; ``escapes`` is (e, 2) uint32 (position, count)."""
    return compressor.compress(packed.tobytes() + escapes.astype("<u4").tobytes())


def decode_frame(raw: bytes, n_rows: int, n_genes: int, *, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ((r, G) uint8, (e, 2) uint32 escapes) of one frame.

    Raises
    ------
    DataError
        Where the frame is damaged: its checksum fails, or it does not hold what it must.
    """
    import zstandard

    size = n_rows * n_genes
    try:
        params = zstandard.get_frame_parameters(raw)
        if not params.has_checksum or not size <= params.content_size <= 9 * size:
            raise DataError(f"{where}: damaged (its header is not that of a frame of {n_rows} rows)")
        data = zstandard.ZstdDecompressor().decompress(raw)
    except zstandard.ZstdError as e:
        raise DataError(f"{where}: damaged ({e})", hint="build the store again") from e
    packed = np.frombuffer(data, np.uint8, size).reshape(n_rows, n_genes)
    tail = len(data) - size
    if tail % 8:
        raise DataError(f"{where}: damaged (its escapes are cut short)")
    escapes = np.frombuffer(data, "<u4", tail // 4, offset=size).reshape(-1, 2)
    where_escaped = np.flatnonzero(packed.reshape(-1) == BYTE_ESCAPE)
    if not np.array_equal(where_escaped, escapes[:, 0]):
        raise DataError(f"{where}: damaged (its escapes do not fit its rows)")
    return packed, escapes


def to_csr(packed: np.ndarray, escapes: np.ndarray):
    """Return packed rows as a scipy CSR matrix, int32 (int64 where a count needs it)."""
    from scipy import sparse

    n_rows, n_genes = packed.shape
    pairs = np.zeros((len(escapes), 3), np.int64)
    if len(escapes):
        pairs[:, 0], pairs[:, 1] = np.divmod(escapes[:, 0].astype(np.int64), n_genes)
        pairs[:, 2] = escapes[:, 1]
    wide = len(pairs) and int(pairs[:, 2].max()) > np.iinfo(np.int32).max
    indptr = np.zeros(n_rows + 1, np.int64)
    packed = np.ascontiguousarray(packed)
    nnz = bytes_to_csr(packed, pairs, n_genes, indptr, np.empty(0, np.int32), np.empty(0, np.int64))
    indices, data = np.empty(nnz, np.int32), np.empty(nnz, np.int64)
    if nnz:
        bytes_to_csr(packed, pairs, n_genes, indptr, indices, data)
    return sparse.csr_matrix((data if wide else data.astype(np.int32), indices, indptr), shape=(n_rows, n_genes))


def hash_units(rows: np.ndarray) -> np.ndarray:
    """Return the xxh3-64 of every unit of 16 rows of a C-contiguous block that starts at a unit."""
    import xxhash

    return np.array(
        [xxhash.xxh3_64_intdigest(rows[a : a + UNIT_ROWS]) for a in range(0, len(rows), UNIT_ROWS)], np.uint64
    )


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_manifest(body: dict[str, Any]) -> str:
    """Return the text of a manifest: ``body`` and the sha256 of its canonical form."""
    digest = hashlib.sha256(dump_json(body).encode()).hexdigest()
    return dump_json({**body, "sha256": digest}, indent=1) + "\n"


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
        raise DataError(f"{d}: no such store")
    if not path.exists():
        raise DataError(f"{d}: not a store (it has no {MANIFEST})", hint="build-store did not finish; run it again")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("sha256")
        same = digest == hashlib.sha256(dump_json(body).encode()).hexdigest()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DataError(f"{path}: damaged ({e})", hint="build the store again") from e
    if not same:
        raise DataError(f"{path}: damaged (its hash does not fit)", hint="build the store again")
    if body.get("schema") != SCHEMA:
        raise DataError(f"{path}: schema {body.get('schema')}; this version reads {SCHEMA}", hint="build it again")
    return {**body, "sha256": digest}
