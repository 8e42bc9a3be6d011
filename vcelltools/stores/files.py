"""Write the files of a store: the journal, arrays, tables, hashes of rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vcelltools.io.write.atomic import dump_json, fsync_path, step
from vcelltools.stores.format import UNIT_ROWS, hash_units

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


_RANGE = 1 << 20


class Journal:
    """Lines of JSON, each with its own hash; an incomplete last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines."""
        from xxhash import xxh3_64_hexdigest

        lines: list[dict[str, Any]] = []
        with suppress(FileNotFoundError):
            for raw in self.path.read_bytes().split(b"\n"):
                digest, _, text = raw.partition(b" ")
                if not text or digest.decode("ascii", "replace") != xxh3_64_hexdigest(text):
                    break
                lines.append(json.loads(text))
        return lines

    def rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Keep only these lines, so that new ones follow a complete one."""
        tmp = self.path.with_suffix(".tmp")
        tmp.write_bytes(b"".join(self._encode(x) for x in lines))
        fsync_path(tmp)
        os.replace(tmp, self.path)
        fsync_path(self.path.parent)

    def append(self, *lines: dict[str, Any]) -> None:
        """Append lines and flush them to the disk."""
        step("journal")
        with open(self.path, "ab") as f:
            f.write(b"".join(self._encode(x) for x in lines))
            f.flush()
            os.fsync(f.fileno())
        step("journalled")

    @staticmethod
    def _encode(line: dict[str, Any]) -> bytes:
        from xxhash import xxh3_64_hexdigest

        text = dump_json(line).encode()
        return xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


class UnitHasher:
    """Hashes a stream of ``n`` rows in units of 16 rows."""

    def __init__(self, n: int) -> None:
        self._rest: np.ndarray | None = None
        self._hashes = np.empty(-(-n // UNIT_ROWS), np.uint64)
        self._done = 0

    def update(self, rows: np.ndarray) -> None:
        """Add the next rows."""
        if self._rest is not None and len(self._rest):
            first = rows[: UNIT_ROWS - len(self._rest)]
            self._rest, rows = np.concatenate([self._rest, first]), rows[len(first) :]
            if len(self._rest) < UNIT_ROWS:
                return
            self._add(self._rest)
        whole = len(rows) // UNIT_ROWS * UNIT_ROWS
        self._add(rows[:whole])
        self._rest = rows[whole:].copy()

    def _add(self, rows: np.ndarray) -> None:
        found = hash_units(rows)
        self._hashes[self._done : self._done + len(found)] = found
        self._done += len(found)

    def finish(self) -> np.ndarray:
        """Return all hashes."""
        if self._rest is not None and len(self._rest):
            self._add(self._rest)
        return self._hashes


def write_all(file: Any, data: bytes) -> None:
    """Write every byte to an unbuffered file."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an .npy file and flush it."""
    with open(path, "wb") as f:
        np.save(f, values, allow_pickle=False)
        f.flush()
        os.fsync(f.fileno())
    step(path.name)


def to_arrow(frame: pd.DataFrame) -> pa.Table:
    """Return a DataFrame as an arrow table, without its index."""
    import pyarrow as pa

    return pa.Table.from_pandas(frame, preserve_index=False)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table as parquet with page checksums, and flush it."""
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=1 << 17)
    fsync_path(path)


def hash_parts(parts: Iterable[np.ndarray]) -> str:
    """Return the sha256 of the concatenated bytes of some arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def hash_array(values: np.ndarray) -> str:
    """Return the sha256 of an array's bytes, in hexadecimal."""
    return hash_parts([values])


def to_smallest(values: np.ndarray) -> np.ndarray:
    """Return non-negative int64 as uint32 if they fit; only a range of a memory map is resident at a time."""
    out = np.empty(len(values), np.uint32)
    for a in range(0, len(values), _RANGE):
        part = values[a : a + _RANGE]
        if int(part.max(initial=0)) > np.iinfo(np.uint32).max:
            return np.array(values)
        out[a : a + _RANGE] = part
        trim(values)
    return out


def trim(table: np.ndarray) -> None:
    """Release the resident pages of a memory-mapped array to the page cache."""
    base = getattr(table, "_mmap", None)
    if base is not None and hasattr(base, "madvise"):
        import mmap

        base.madvise(mmap.MADV_DONTNEED)


def merge_over(parts: list[np.ndarray]) -> np.ndarray:
    """Return the sorted (row, position, count) list, with duplicate entries summed."""
    if not parts:
        return np.empty((0, 3), np.int64)
    over = np.concatenate(parts)
    over = over[np.lexsort((over[:, 1], over[:, 0]))]
    first = np.ones(len(over), bool)
    first[1:] = (over[1:, :2] != over[:-1, :2]).any(axis=1)
    out = over[first].copy()
    out[:, 2] = np.add.reduceat(over[:, 2], np.flatnonzero(first))
    return out
