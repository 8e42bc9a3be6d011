"""The file of a truth pack: a JSON header and named arrays, compressed with zstd; every length is checked.

The file states its length, and the zstd frame has a checksum, so truncated or altered files are detected.

Arrays with more than one byte per element are stored as byte planes (all first bytes, then all second ones, …), because
signs and exponents then compress well. Adjusted p-values, which are only kept for plots, take one byte. Nothing in the
file is executable.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vcelltools.errors import DataError, UsageError, spell
from vcelltools.io.fingerprint import find_difference
from vcelltools.io.opened import Dataset
from vcelltools.io.textfile import parse_json
from vcelltools.io.write.atomic import atomic_file

T = TypeVar("T")
MAX_BYTES = 16 << 30


def _hint() -> str:
    return f"write one with {spell('truth_pack')} and {spell('truth')}"


_P_STEPS = 14.6  # per square root of −log10 p: 253 is 1e-300
_P_MISSING = 255


def narrow(values: np.ndarray) -> np.ndarray:
    """Return whole numbers in the smallest unsigned type that holds them."""
    top = int(values.max()) if values.size else 0
    for kind in (np.uint8, np.uint16, np.uint32):
        if top <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.uint64)


def code_p(p: np.ndarray) -> np.ndarray:
    """Return adjusted p-values as bytes, accurate to a few per cent of their logarithm; NaN is kept."""
    size = -np.log10(np.clip(np.nan_to_num(p, nan=1.0), 1e-300, 1.0))
    return np.where(np.isnan(p), _P_MISSING, np.round(_P_STEPS * np.sqrt(size))).astype(np.uint8)


def decode_p(code: np.ndarray, significant: np.ndarray, alpha: float) -> np.ndarray:
    """Return the adjusted p-values of :func:`code_p`, on the right side of ``alpha``."""
    p = 10.0 ** -((code / _P_STEPS) ** 2)
    p = np.where(significant, np.minimum(p, np.nextafter(alpha, 0)), np.maximum(p, alpha))
    return np.where(code == _P_MISSING, np.nan, p)


def write_packfile(
    path: str | os.PathLike,
    magic: bytes,
    settings: dict[str, Any],
    parts: list[tuple[dict[str, Any], dict[str, np.ndarray]]],
    *,
    truth: dict[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write parts, each a header and named arrays; a reader must request the same ``settings``.

    ``truth`` identifies the truth (:func:`vcelltools.io.fingerprint.identify`).
    """
    import zstandard

    heads = [head | {"arrays": [[k, a.dtype.name, list(a.shape)] for k, a in arrays.items()]} for head, arrays in parts]
    text = json.dumps({"settings": settings, "truth": truth, "parts": heads}, default=lambda v: v.item()).encode()
    size = 8 + len(text) + sum(a.nbytes for _, arrays in parts for a in arrays.values())
    with atomic_file(path, force=force) as tmp, open(tmp, "wb") as f:
        f.write(magic + struct.pack("<Q", 0))
        with zstandard.ZstdCompressor(level=9, write_checksum=True).stream_writer(f, size=size, closefd=False) as out:
            out.write(struct.pack("<Q", len(text)))
            out.write(text)
            for _, arrays in parts:
                for a in arrays.values():
                    for plane in _get_planes(a):
                        out.write(plane)
        whole = f.tell()
        f.seek(len(magic))
        f.write(struct.pack("<Q", whole))
    return Path(path)


def _get_planes(a: np.ndarray) -> Iterator[Any]:
    raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(-1, a.dtype.itemsize)
    for k in range(a.dtype.itemsize if a.size else 0):
        yield np.ascontiguousarray(raw[:, k]).data


def read_packfile(
    path: str | os.PathLike,
    magic: bytes,
    settings: dict[str, Any],
    make: Callable[[dict[str, Any], dict[str, np.ndarray]], T],
    *,
    truth: Dataset | None = None,
) -> list[T]:
    """Return the result of ``make`` for each part; if ``truth`` is given, the pack must have been made from it.

    Raises
    ------
    DataError
        If the file is not such a pack, or is damaged; a ValueError, KeyError, TypeError or
        IndexError in ``make`` counts as damage.
    UsageError
        If it was made with other settings, or from another truth.
    """
    import zstandard

    p = Path(path)
    try:
        with open(p, "rb") as f:
            if f.read(len(magic)) != magic:
                raise DataError(f"{p} is not a truth pack of these rules and this version", hint=_hint())
            (whole,) = struct.unpack("<Q", f.read(8))
            if whole != (here := os.fstat(f.fileno()).st_size):
                raise ValueError(f"it has {here:,} of {whole:,} bytes")
            start = f.tell()
            frame = zstandard.get_frame_parameters(f.read(18))
            size = frame.content_size
            if not 8 < size < MAX_BYTES:
                raise ValueError(f"it declares {size:,} bytes")
            if not frame.has_checksum:
                raise ValueError("it has no checksum")
            f.seek(start)
            with zstandard.ZstdDecompressor().stream_reader(f, closefd=False) as stream:
                header, parts = _read(stream, size)
            _check_settings(p, header, settings)
            if truth is not None:
                _check_truth(p, header.get("truth"), truth)
            return [make(head, arrays) for head, arrays in parts]
    except FileNotFoundError as e:
        raise DataError(f"{p}: no such file", hint=_hint()) from e
    except (ValueError, KeyError, TypeError, struct.error, zstandard.ZstdError, IndexError, OverflowError) as e:
        raise DataError(f"{p}: the truth pack is damaged: {e}", hint="delete it and write it again") from e


def _check_settings(path: Path, header: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in header["settings"].items():
        if settings.get(key) != value:
            raise UsageError(
                f"{path}: the truth pack was made with {key} = {value!r}, but {settings.get(key)!r} is requested",
                hint="use the same settings, or write another pack",
            )


def _check_truth(path: Path, kept: dict[str, Any] | None, truth: Dataset) -> None:
    differs = "an earlier version did not store its fingerprint" if kept is None else find_difference(truth, kept)
    if differs is not None:
        raise UsageError(
            f"{path}: the truth pack was made from another truth than {truth.label}: {differs}",
            hint="remove one of the two, or delete the pack to write it again",
        )


def _read(stream: Any, size: int) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, np.ndarray]]]]:
    """Return the header, and the header and arrays of every part, after checking the checksum of the frame."""
    left = size

    def take(n: int) -> bytes:
        nonlocal left
        if not 0 <= n <= left:
            raise ValueError(f"an array has {n:,} bytes, but only {left:,} are left")
        out = stream.read(n)
        if len(out) != n:
            raise ValueError("it ends too early")
        left -= n
        return out

    (n,) = struct.unpack("<Q", take(8))
    header = parse_json(take(n))
    parts = []
    for head in header["parts"]:
        arrays = {}
        for name, dtype, shape in head["arrays"]:
            kind = np.dtype(dtype)
            if kind.hasobject or any(not isinstance(k, int) or k < 0 for k in shape):
                raise ValueError(f"the array {name!r} has the type {dtype!r} and shape {shape!r}")
            count = int(np.prod(shape, dtype=object))
            if count * kind.itemsize > left:
                raise ValueError(f"an array has {count * kind.itemsize:,} bytes, but only {left:,} are left")
            raw = np.empty((count, kind.itemsize), np.uint8)
            for k in range(kind.itemsize):
                raw[:, k] = np.frombuffer(take(count), np.uint8)
            arrays[name] = raw.reshape(-1).view(kind).reshape(shape)
        parts.append((head, arrays))
    if left or stream.read(1):  # the last read compares the checksum
        raise ValueError(f"{left:,} bytes are left over")
    return header, parts
