"""Arrays that grow on disk: values are appended in pieces and written in whole HDF5 chunks.

h5py compresses in one thread inside its global lock. Here, whole chunks are compressed in worker threads with
libdeflate (or zstd, or LZF) and stored with ``write_direct_chunk``; only the calling thread uses HDF5.
The hash of every chunk is kept, so that the closed file can be read back and compared.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from vcelltools.errors import DataError, EnvironmentFault, UsageError

COMPRESSIONS = ("none", "gzip", "lzf", "zstd")
_AHEAD = (
    24  # chunks compressed ahead; independent of the threads, because it determines the positions of chunks in the file
)
_SPACE_MARGIN = 8 << 20
_CHECK_EVERY = 32 << 20


class Codec:
    """The compression of chunks, and the threads that compress.

    Parameters
    ----------
    compression
        None or ``"none"``, ``"gzip"``, ``"lzf"`` or ``"zstd"`` (needs hdf5plugin to read).
    level
        gzip 0–12 (default 4), zstd 1–22 (default 3).
    threads
        Number of worker threads.
    """

    def __init__(self, compression: str | None, level: int | None, threads: int) -> None:
        self.name = compression or "none"
        if self.name not in COMPRESSIONS:
            raise UsageError(f"compression {compression!r} is not known", hint=f"one of: {', '.join(COMPRESSIONS)}")
        top = {"gzip": 12, "zstd": 22}.get(self.name)
        if level is not None and (top is None or not 1 <= level <= top):
            what = "no compression" if self.name == "none" else self.name
            raise UsageError(
                f"compression level {level} is not valid for {what}", hint="gzip takes 1 to 12, zstd 1 to 22"
            )
        self.options: dict[str, Any] = {}
        pack: Callable[[np.ndarray], bytes] | None = None
        if self.name == "gzip":
            import deflate

            strength = 4 if level is None else level
            self.options = {"compression": "gzip", "compression_opts": min(strength, 9)}
            pack = lambda a: bytes(deflate.zlib_compress(a.view(np.uint8), strength))  # noqa: E731
        elif self.name == "zstd":
            pack = self._open_zstd(3 if level is None else level)
        elif self.name == "lzf":
            self.options = {"compression": "lzf"}
            pack = _pack_lzf
        self.pack = pack
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def _open_zstd(self, level: int) -> Callable[[np.ndarray], bytes]:
        try:
            import hdf5plugin
        except ImportError as e:
            raise EnvironmentFault(
                "zstd needs the HDF5 filters of hdf5plugin, which is not installed", hint="pip install hdf5plugin"
            ) from e
        import zstandard

        self.options = dict(hdf5plugin.Zstd(clevel=level))
        return lambda a: zstandard.ZstdCompressor(level=level).compress(memoryview(a.view(np.uint8)))  # type: ignore[arg-type]

    def submit(self, chunk: np.ndarray) -> Future:
        """Compress a chunk in a worker."""
        assert self.pack is not None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pack")
        return self._pool.submit(self.pack, chunk)

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


class Space:
    """Checks free space while a file grows, so that the disk is never full in the middle of an HDF5 structure."""

    def __init__(self, tmp: Path, target: Path) -> None:
        self._tmp, self._target = tmp, target
        self._since = _CHECK_EVERY
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]

    def spend(self, n_bytes: int) -> None:
        """Reserve ``n_bytes`` before they are written; raise if they do not fit."""
        self._since += n_bytes
        if self._since < _CHECK_EVERY:
            return
        self._since = 0
        self.check(_CHECK_EVERY + n_bytes)

    def start_writeback(self, offset: int, n_bytes: int) -> None:
        """Start to write a range of the file to the disk, without waiting, if the system can do that."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), open(self._tmp, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)  # dirty pages are kept

    def check(self, n_bytes: int) -> None:
        """Raise an :class:`EnvironmentFault` unless ``n_bytes`` and a margin are free."""
        stat = os.statvfs(self._tmp.parent)
        free = stat.f_bavail * stat.f_frsize
        if self._limit != resource.RLIM_INFINITY and self._tmp.exists():
            free = min(free, self._limit - self._tmp.stat().st_size)
        if free < min(n_bytes, _SPACE_MARGIN):
            raise EnvironmentFault(
                f"{self._target}: the disk is full ({max(free, 0) / 1e6:.0f} MB left)",
                hint="free some space, or write to another disk",
            )


class Sink:
    """A one-dimensional dataset that grows, or a two-dimensional one that grows by rows.

    Parameters
    ----------
    shape
        ``()`` for one dimension; ``(g,)`` for rows of g values.
    chunk
        Chunk shape: ``(length,)``, or ``(rows, columns)``.
    length
        The final length if known; with ``contiguous``, the dataset has no chunks.
    """

    def __init__(
        self,
        group: h5py.Group,
        name: str,
        *,
        dtype: np.dtype,
        codec: Codec,
        space: Space,
        chunk: tuple[int, ...],
        row: tuple[int, ...] = (),
        length: int | None = None,
        contiguous: bool = False,
    ) -> None:
        self.dtype, self.codec, self.space, self.row = dtype, codec, space, row
        self.contiguous = contiguous
        if contiguous:
            assert length is not None
            self.band = max(1, min(length, (1 << 20) // max(int(np.prod(row, dtype=np.int64)) * dtype.itemsize, 1)))
            self.dset = group.create_dataset(name, shape=(length, *row), dtype=dtype)
        else:
            self.band = chunk[0]
            self.dset = group.create_dataset(
                name, shape=(0, *row), maxshape=(None, *row), dtype=dtype, chunks=chunk, **codec.options
            )
        self.path = self.dset.name
        self.chunk = chunk
        self.n = 0  # rows received
        self._stored = 0  # rows passed to HDF5
        self._flushed = 0  # rows whose way to the disk has begun
        self._fill = np.empty((self.band, *row), dtype)
        self._filled = 0
        self._pending: deque[tuple[tuple[int, ...], Future, int]] = deque()
        self.hashes: list[int] = []  # hash of each band of rows, in order

    def write(self, values: np.ndarray) -> None:
        """Append (m, \\*row) values with the dtype of the sink; the caller may reuse the array at once."""
        self.n += len(values)
        at = 0
        while at < len(values):
            left = len(values) - at
            direct = self.codec.pack is None and not self._filled and left >= self.band
            if direct and values.flags.c_contiguous and values.dtype == self.dtype:
                self._emit(values[at : at + self.band])
                at += self.band
                continue
            m = min(left, self.band - self._filled)
            self._fill[self._filled : self._filled + m] = values[at : at + m]
            self._filled += m
            at += m
            if self._filled == self.band:
                self._emit(self._fill)
                if self.codec.pack is not None:  # the workers still read the old array
                    self._fill = np.empty((self.band, *self.row), self.dtype)
                self._filled = 0

    def finish(self) -> None:
        """Write the remaining values and wait for the workers."""
        if self._filled:
            m = self._filled
            self._fill[m:] = 0
            self._emit(self._fill, m)
            self._filled = 0
        while self._pending:
            self._store_next()
        self._fill = np.empty(0, self.dtype)

    def _emit(self, band: np.ndarray, m: int | None = None) -> None:
        m = len(band) if m is None else m
        start, self._stored = self._stored, self._stored + m
        self.hashes.append(_hash(band[:m]))
        if self.contiguous:
            self.space.spend(band[:m].nbytes)
            self.dset[start : start + m] = band[:m]
            self._start_writeback()
            return
        self.dset.resize(self._stored, axis=0)
        for offset, tile in self._cut(band, start):
            if self.codec.pack is None:
                self.space.spend(tile.nbytes)
                self.dset.id.write_direct_chunk(offset, tile)
            else:
                self._pending.append((offset, self.codec.submit(tile.reshape(-1)), tile.nbytes))
                if len(self._pending) > _AHEAD:
                    self._store_next()

    def _start_writeback(self) -> None:
        """Let the system write the last values to the disk meanwhile, so that the flush at the end has little to do."""
        size = self.dtype.itemsize * int(np.prod(self.row, dtype=np.int64))
        if (self._stored - self._flushed) * size >= _CHECK_EVERY:
            self.space.start_writeback(self.dset.id.get_offset() + self._flushed * size, _CHECK_EVERY)
            self._flushed += _CHECK_EVERY // size

    def _cut(self, band: np.ndarray, start: int):
        """Yield (offset, whole chunk) of a band; there is one if it is one-dimensional or as wide as the chunks."""
        if not self.row:
            yield (start,), band
            return
        w = self.chunk[1]
        for c in range(0, self.row[0], w):
            tile = np.ascontiguousarray(band[:, c : c + w])
            if tile.shape[1] < w:
                tile = np.concatenate([tile, np.zeros((len(tile), w - tile.shape[1]), self.dtype)], axis=1)
            yield (start, c), tile

    def _store_next(self) -> None:
        offset, future, n_bytes = self._pending.popleft()
        packed = future.result()
        self.space.spend(len(packed))
        skipped = self.codec.name == "lzf" and len(packed) == n_bytes
        self.dset.id.write_direct_chunk(offset, packed, filter_mask=int(skipped))

    def check(self, file: h5py.File, every: bool) -> None:
        """Read back the length of the closed dataset, and the hashes of a sample of (or all) bands.

        Raises
        ------
        DataError
            If the file differs from what was written.
        """
        dset = file[self.path]
        if dset.shape != (self.n, *self.row) or dset.dtype != self.dtype:
            raise DataError(f"{file.filename}: {self.path} holds {dset.shape} {dset.dtype} instead of {self.n:,} rows")
        n = len(self.hashes)
        picks = range(n) if every else sorted({int(i) for i in np.linspace(0, n - 1, 24)} if n else set())
        for k in picks:
            a, b = k * self.band, min((k + 1) * self.band, self.n)
            back = np.ascontiguousarray(dset[a:b])
            if _hash(back) != self.hashes[k]:
                raise DataError(f"{file.filename}: {self.path} rows {a:,} to {b:,} differ from what was written")


def _pack_lzf(values: np.ndarray) -> bytes:
    """Return ``values`` packed, or as they are where that is no shorter, as the filter of h5py does."""
    from vcelltools.kernels.lzf import lzf_pack

    raw = values.view(np.uint8)
    out = np.empty(max(len(raw) - 1, 0), np.uint8)
    n = lzf_pack(raw, out)
    return raw.tobytes() if n < 0 else out[:n].tobytes()


def _hash(values: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def cast_exact(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """Return ``values`` as ``dtype``; only conversions between floats may round.

    Raises
    ------
    DataError
        If a value does not fit; the message names the first one.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(invalid="ignore", over="ignore"):
        out = values.astype(dtype)
    if values.dtype.kind == "f" and dtype.kind == "f":
        if np.isinf(out).any() and not np.isinf(values).any():
            raise DataError(f"{what}: {values[np.isinf(out)][0]:g} does not fit {dtype}", hint="choose a wider dtype")
        return out
    wrong = out.astype(values.dtype) != values
    if values.dtype.kind in "iu" and dtype.kind in "iu":
        wrong |= (out < 0) != (values < 0)
    if wrong.any():
        value = values[wrong][0]
        hint = "choose a wider dtype" if float(value).is_integer() else "use float32 or float64 for fractions"
        raise DataError(f"{what}: the value {value} does not fit {dtype}", hint=hint)
    return out
