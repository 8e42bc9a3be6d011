"""Read one- and two-dimensional arrays at the speed of the disk.

h5py holds a global lock, so its reads do not benefit from threads. Here, chunk offsets are fetched once,
neighbouring chunks are coalesced, and ``os.pread`` plus the decompressor (both release the interpreter lock)
run in the calling thread. Everything else (other filters, unusual files) is read through h5py.
"""

from __future__ import annotations

import functools
import io
import math
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import h5py
import numpy as np

from vcelltools.errors import DataError
from vcelltools.io.hdf5.direct import FileBytes
from vcelltools.io.hdf5.limits import (
    FILTER_NAMES,
    SMALL_BYTES,
    STREAM_BYTES,
    STREAM_RATIO,
    check_filters,
    check_ratio,
    get_filters,
    reading,
)

# Chunks above this size are not decompressed at once, because memory would grow with the file.
MAX_CHUNK_BYTES = 1 << 30
_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF, _ZSTD = 1, 2, 3, 32000, 32015
RAW_FILTERS = {_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF, _ZSTD}
_CACHE_CHUNKS, _CACHE_BYTES = 8, 64 << 20

_LITTLE = sys.byteorder == "little"

Runs = Sequence[tuple[int, int]]


class Buffer:
    """A growing, reusable byte buffer; there is one per thread and array."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, n: int, dtype: np.dtype) -> np.ndarray:
        """Return an uninitialised (n,) array of ``dtype``, valid until the next call."""
        need = n * dtype.itemsize
        if self._bytes.nbytes < need:
            self._bytes = np.empty(need + (need >> 3), np.uint8)
        return self._bytes[:need].view(dtype)


class Array1D(Protocol):
    """The interface of ``indices`` and ``data`` of a sparse matrix."""

    length: int
    dtype: np.dtype
    stored_bytes: int
    filters: tuple[str, ...]
    chunk_len: int | None
    cold: bool  # whether reads wait for the disk

    def read(self, start: int, stop: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return elements ``start:stop`` as ``dtype``, valid until the buffer is used again; thread-safe."""
        ...

    def read_runs(self, runs: Runs, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the concatenated elements of several ranges; otherwise like :meth:`read`."""
        ...

    def map(self) -> np.ndarray | None:
        """Return all values without reading them if they are in memory or can be memory-mapped, otherwise None."""
        ...


class ArrayBase:
    """Base class that implements both read methods with :meth:`fill`."""

    cold = False

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:  # pragma: no cover  overridden
        """Write elements ``start:stop`` into ``out``, in its dtype."""
        raise NotImplementedError

    def read(self, start: int, stop: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return elements ``start:stop`` as ``dtype``, valid until the buffer is used again; thread-safe."""
        out = (buffer or Buffer()).take(stop - start, dtype)
        if len(out):
            self.fill(start, stop, out)
        return out

    def map(self) -> np.ndarray | None:
        """Return all values without reading them if they are in memory or can be memory-mapped, otherwise None."""
        return None

    def read_runs(self, runs: Runs, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the concatenated elements of several ranges; otherwise like :meth:`read`."""
        out = (buffer or Buffer()).take(sum(b - a for a, b in runs), dtype)
        at = 0
        for a, b in runs:
            if b > a:
                self.fill(a, b, out[at : at + b - a])
            at += b - a
        return out


class Array2D(Protocol):
    """The interface of the values of a dense matrix."""

    shape: tuple[int, int]
    dtype: np.dtype
    stored_bytes: int
    filters: tuple[str, ...]
    chunks: tuple[int, ...] | None
    cold: bool  # whether reads wait for the disk

    def read(self, r0: int, r1: int, c0: int, c1: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the block ``[r0:r1, c0:c1]`` as C-contiguous ``dtype``; thread-safe."""
        ...


def _as_chunk_array(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return contiguous, aligned, writeable ``values``; a kernel would be compiled again for anything else."""
    out = np.ascontiguousarray(values, dtype=dtype)
    return out if out.flags.writeable and out.flags.aligned else out.copy()


class MemoryArray(ArrayBase):
    """An array in memory; reads are views."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.length = len(values)
        self.dtype = values.dtype
        self.stored_bytes = values.nbytes
        self.filters: tuple[str, ...] = ()
        self.chunk_len: int | None = None

    def read(self, start: int, stop: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return a view if the dtype allows it."""
        return _as_chunk_array(self._values[start:stop], dtype)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write elements ``start:stop`` into ``out``, in its dtype."""
        out[...] = self._values[start:stop]


def get_filter_labels(dset: h5py.Dataset) -> tuple[str, ...]:
    """Return the filters of a dataset by name."""
    return tuple(FILTER_NAMES.get(f, f"filter {f}") for f in get_filters(dset))


class _Slot:
    __slots__ = ("lock", "values")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: np.ndarray | None = None


class _ChunkCache:
    """A cache of the few chunks that cross the borders of spans, decompressed once for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    def get(self, k: int, unpack: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return chunk ``k``; a second thread that requests it meanwhile waits for it."""
        with self._lock:
            slot = self._slots.get(k)
            if slot is None:
                slot = self._slots[k] = _Slot()
            self._slots.move_to_end(k)
        with slot.lock:
            if slot.values is None:
                slot.values = unpack(k)
                with self._lock:
                    limit = min(_CACHE_CHUNKS, max(1, _CACHE_BYTES // max(slot.values.nbytes, 1)))
                    while len(self._slots) > limit:
                        self._slots.popitem(last=False)
            return slot.values


class RawChunks:
    """The chunks of one HDF5 dataset: their positions, and how to decompress one.

    ``storage`` is the dtype on disk if it differs from ``dset.dtype``.
    """

    def __init__(
        self, file: h5py.File, dset: h5py.Dataset, source: FileBytes, *, storage: np.dtype | None = None
    ) -> None:
        self.path = file.filename
        self.name = dset.name
        self.source = source
        self.storage = storage or dset.dtype
        self.filters = get_filters(dset)
        self.chunk_shape = dset.chunks
        self.chunk_size = math.prod(dset.chunks)
        self.chunk_bytes = self.chunk_size * self.storage.itemsize
        self._cache = _ChunkCache()
        grid = [-(-n // c) for n, c in zip(dset.shape, dset.chunks, strict=True)]
        n_chunks = math.prod(grid)
        self.offsets = np.full(n_chunks, -1, np.int64)
        self.sizes = np.zeros(n_chunks, np.int64)
        self.masks = np.zeros(n_chunks, np.uint32)
        strides = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
        shape = dset.chunks

        def visit(info) -> None:
            k = sum(o // c * s for o, c, s in zip(info.chunk_offset, shape, strides, strict=True))
            if 0 <= k < n_chunks:
                self.offsets[k] = info.byte_offset
                self.sizes[k] = info.size
                self.masks[k] = info.filter_mask

        dset.id.chunk_iter(visit)
        end = source.size
        if n_chunks and int(self.offsets.min()) < 0:
            raise DataError(
                f"{self.path}: {int(np.count_nonzero(self.offsets < 0)):,} of {n_chunks:,} chunks of {self.name} "
                "are missing",
                hint="the file is incomplete; write it again",
            )
        if n_chunks and int(self.sizes.min()) == 0:
            raise DataError(f"{self.path}: {self.name} has empty chunks; the file is damaged")
        if n_chunks and int((self.offsets + self.sizes).max()) > end:
            raise DataError(f"{self.path}: {self.name} has chunks beyond the end of the file (truncated)")
        if n_chunks and self.chunk_bytes > SMALL_BYTES and self.filters:
            check_ratio(f"{self.path}: a chunk of {self.name}", self.chunk_bytes, int(self.sizes.min()))
        if not self.filters and n_chunks and (self.sizes != self.chunk_bytes).any():
            raise DataError(f"{self.path}: {self.name} has chunks of the wrong size; the file is damaged")

    def get_cached(self, k: int) -> np.ndarray:
        """Return chunk ``k`` like :meth:`unpack`, from the cache if a neighbouring span left it there."""
        return self._cache.get(k, self.unpack)

    def unpack(self, k: int) -> np.ndarray:
        """Return chunk ``k`` decompressed, as (chunk_size,) in the storage dtype."""
        mask = int(self.masks[k])
        data: bytes | bytearray | np.ndarray = self.source.read(int(self.offsets[k]), int(self.sizes[k]))
        try:
            for i in range(len(self.filters) - 1, -1, -1):
                if mask >> i & 1:
                    continue
                f = self.filters[i]
                if f == _DEFLATE:
                    data = inflate(data, self.chunk_bytes)
                elif f == _ZSTD:
                    data = _unzstd(data, self.chunk_bytes)
                elif f == _LZF:
                    data = _unlzf(data, self.chunk_bytes)
                elif f == _FLETCHER32:
                    data = _check_fletcher32(data)
                else:
                    data = _unshuffle(data, self.storage.itemsize)
        except DataError as e:
            raise DataError(f"{self.path}: chunk {k} of {self.name}: {e.message}", hint=e.hint) from e
        if len(data) != self.chunk_bytes:
            raise DataError(
                f"{self.path}: chunk {k} of {self.name} unpacks to {len(data):,} bytes, not {self.chunk_bytes:,}"
            )
        return np.frombuffer(data, self.storage)


def inflate(data: bytes | bytearray | np.ndarray, size: int) -> bytes | bytearray:
    """Decompress one zlib stream of known size with libdeflate, or with zlib if libdeflate is missing."""
    try:
        import deflate
    except ImportError:  # pragma: no cover  a platform without wheels
        return _inflate_zlib(data, size)
    try:
        return deflate.zlib_decompress(data, size)
    except (ValueError, RuntimeError, deflate.DeflateError) as e:
        raise DataError(f"damaged gzip data ({e or type(e).__name__})") from e


def _inflate_zlib(data: bytes | bytearray | np.ndarray, size: int) -> bytes:
    unzip = zlib.decompressobj()
    try:
        out = unzip.decompress(data, size)  # type: ignore[arg-type]
    except zlib.error as e:
        raise DataError(f"damaged gzip data ({e})") from e
    if unzip.unconsumed_tail:
        raise DataError("it unpacks to more than the size of its chunk")
    return out


def _check_fletcher32(data: bytes | bytearray | np.ndarray) -> np.ndarray:
    """Return the data without the checksum that follows it (Fletcher 1982, over big-endian 16-bit words).

    The filter of HDF5 reads past the end of a truncated chunk.
    """
    raw = np.frombuffer(data, np.uint8)
    if len(raw) < 4:
        raise DataError("it is too short to hold its checksum")
    body, stored = raw[:-4], int(raw[-4:].view("<u4")[0])
    words = np.append(body, np.zeros(len(body) % 2, np.uint8)).view(">u2").astype(np.uint64)
    first = second = 0
    for a in range(0, len(words), 1 << 20):  # the sums cannot overflow
        part = words[a : a + (1 << 20)]
        weights = np.arange(len(part), 0, -1, dtype=np.uint64)
        second += len(part) * first + int((part * weights).sum())
        first += int(part.sum())
    low, high = ((v - 1) % 0xFFFF + 1 if v else 0 for v in (first, second))  # in ones' complement, 65,535 is not 0
    if stored != high << 16 | low:
        raise DataError("its checksum does not match its data")
    return body


def _unlzf(data: bytes | bytearray | np.ndarray, size: int) -> np.ndarray:
    from vcelltools.kernels.lzf import lzf_unpack

    out = np.empty(size, np.uint8)
    n = lzf_unpack(np.frombuffer(data, np.uint8), out)
    if n != size:
        raise DataError("damaged lzf data")
    return out


def _unzstd(data: bytes | bytearray | np.ndarray, size: int) -> bytes:
    import zstandard

    try:
        return _zstd_context().decompress(data, max_output_size=size)
    except zstandard.ZstdError as e:
        raise DataError(f"damaged zstd data ({e})") from e


_LOCAL = threading.local()


def _zstd_context():
    import zstandard

    if not hasattr(_LOCAL, "zstd"):
        _LOCAL.zstd = zstandard.ZstdDecompressor()
    return _LOCAL.zstd


def _unshuffle(data: bytes | bytearray | np.ndarray, itemsize: int) -> np.ndarray:
    """Undo HDF5's byte shuffle, which stores the first bytes of all elements, then the second bytes, and so on."""
    raw = np.frombuffer(data, np.uint8)
    n = len(raw) // itemsize
    if itemsize == 1:
        return raw
    out = np.empty(len(raw), np.uint8)
    planes = raw[: n * itemsize].reshape(itemsize, n)
    if itemsize == 4 and _LITTLE:  # shifting words is twice as fast as scattering bytes
        low = np.left_shift(planes[1], 8, dtype=np.uint16)
        low |= planes[0]
        high = np.left_shift(planes[3], 8, dtype=np.uint16)
        high |= planes[2]
        words = out[: n * 4].view(np.uint32)
        np.left_shift(high, 16, dtype=np.uint32, out=words)
        words |= low
    else:
        bytes_of = out[: n * itemsize].reshape(n, itemsize)
        for i in range(itemsize):
            bytes_of[:, i] = planes[i]
    out[n * itemsize :] = raw[n * itemsize :]
    return out


@functools.cache
def _offsets_include_user_block() -> bool:
    """Return whether this version of HDF5 includes the user block (which every h5mu has) in chunk offsets."""
    values = np.arange(1, 65, dtype=np.int32)
    raw = io.BytesIO()
    with h5py.File(raw, "w", userblock_size=512) as file:
        parts = [file.create_dataset("chunked", data=values, chunks=(64,)), file.create_dataset("plain", data=values)]
        file.flush()
        offsets = [parts[0].id.get_chunk_info(0).byte_offset, parts[1].id.get_offset()]
    return all(raw.getvalue()[at : at + values.nbytes] == values.tobytes() for at in offsets)


def _can_read_raw(file: h5py.File, dset: h5py.Dataset) -> bool:
    plain = dset.dtype.kind in "iuf" and file.driver == "sec2"
    if file.userblock_size and not _offsets_include_user_block():
        return False
    return plain and set(get_filters(dset)) <= RAW_FILTERS


def _open_storage(file: h5py.File, dset: h5py.Dataset, source: FileBytes) -> tuple[RawChunks | None, int | None]:
    """Return (raw chunks, None), (None, offset of contiguous data), or neither if h5py has to read.

    Raises
    ------
    DataError
        If part of the data is missing, which HDF5 would read as zeros.
    """
    path, name = file.filename, dset.name
    if not dset.size:
        return None, None
    declared, stored = int(dset.size) * dset.dtype.itemsize, int(dset.id.get_storage_size())
    check_ratio(f"{path}: {name}", declared, stored, free=STREAM_BYTES, ratio=STREAM_RATIO)
    with reading(path, name):
        if dset.chunks:
            n_chunks = math.prod(-(-n // c) for n, c in zip(dset.shape, dset.chunks, strict=True))
            absent = n_chunks - dset.id.get_num_chunks()
            if absent > 0:
                raise DataError(
                    f"{path}: {absent:,} of {n_chunks:,} chunks of {name} are missing",
                    hint="the file is incomplete; write it again",
                )
            if dset.dtype.kind not in "iuf":
                return None, None
            chunks = RawChunks(file, dset, source)  # check the chunk index, because HDF5 crashes on a damaged one
            known = _can_read_raw(file, dset) and _chunks_lie_there(file, dset, chunks)
            return (chunks, None) if known else (None, None)
        if dset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT:
            return None, None
        offset = dset.id.get_offset()
        if offset is None:
            raise DataError(
                f"{path}: {name} was declared but never written", hint="the file is incomplete; write it again"
            )
        if offset + dset.size * dset.dtype.itemsize > source.size:
            raise DataError(f"{path}: {name} reaches beyond the end of the file (truncated)")
        known = _can_read_raw(file, dset) and _data_lies_there(file, dset, source, int(offset))
        return (None, int(offset)) if known else (None, None)


def _chunks_lie_there(file: h5py.File, dset: h5py.Dataset, chunks: RawChunks) -> bool:
    """Whether chunk offsets count from the start of the file, because h5mu files begin with a user block.

    HDF5 has not always added the size of that block; the first chunk shows it.
    """
    if not file.userblock_size or not len(chunks.offsets):
        return True
    raw = dset.id.read_direct_chunk((0,) * dset.ndim)[1]
    return chunks.source.read(int(chunks.offsets[0]), len(raw)).tobytes() == raw


def _data_lies_there(file: h5py.File, dset: h5py.Dataset, source: FileBytes, offset: int) -> bool:
    """Like :func:`_chunks_lie_there`, for contiguous data."""
    if not file.userblock_size:
        return True
    some = np.asarray(dset[0, :8] if dset.ndim == 2 else dset[:8])
    return source.read(offset, some.nbytes).tobytes() == some.tobytes()


class Hdf5Array(ArrayBase):
    """A one-dimensional HDF5 dataset."""

    def __init__(self, file: h5py.File, dset: h5py.Dataset, source: FileBytes) -> None:
        self._file, self._dset, self._bytes = file, dset, source
        self.cold = source.cold
        self.path, self.name = file.filename, dset.name
        if dset.ndim != 1:
            raise DataError(f"{self.path}: {self.name} has {dset.ndim} dimensions; 1 expected")
        self.length = int(dset.shape[0])
        self.dtype = dset.dtype
        self.filters = get_filter_labels(dset)
        self.chunk_len = dset.chunks[0] if dset.chunks else None
        self.stored_bytes = int(dset.id.get_storage_size())
        check_filters(self.path, dset)
        _check_chunk_bytes(self.path, dset)
        self._raw, self._offset = _open_storage(file, dset, source)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write elements ``start:stop`` into ``out``, in its dtype; thread-safe."""
        same = self.dtype == out.dtype  # native and of the requested width, so bytes can be read in place
        if self._offset is not None:
            at = self._offset + start * self.dtype.itemsize
            if same:
                self._bytes.read_into(out, at)
            else:
                _read_converted(self._bytes, out, at, self.dtype)
        elif self._raw is not None:
            self._read_chunks(self._raw, start, stop, out, same)
        else:
            with reading(self.path, self.name):
                out[...] = self._dset[start:stop]

    def map(self) -> np.ndarray | None:
        """Return the values as a memory map if the file holds them contiguous and unchanged, otherwise None."""
        at = self._offset
        if at is None and self._raw is not None and not self._raw.filters and len(self._raw.offsets):
            steps = np.diff(self._raw.offsets)
            at = int(self._raw.offsets[0]) if (steps == self._raw.chunk_bytes).all() else None
        if at is None or not self.length or not self.dtype.isnative:
            return None
        if at + self.length * self.dtype.itemsize > self._bytes.size:
            raise DataError(f"{self.path}: {self.name} goes beyond the end of the file (truncated)")
        return np.memmap(self.path, self.dtype, "r", offset=at, shape=(self.length,))

    def _read_chunks(self, raw: RawChunks, start: int, stop: int, out: np.ndarray, same: bool) -> None:
        size = raw.chunk_size
        item = self.dtype.itemsize
        first, last = start // size, (stop - 1) // size
        if raw.filters:
            for k in range(first, last + 1):
                a, b = max(start, k * size), min(stop, (k + 1) * size)
                whole = a == k * size and b == min((k + 1) * size, self.length)
                values = raw.unpack(k) if whole else raw.get_cached(k)
                out[a - start : b - start] = values[a - k * size : b - k * size]
            return
        # without filters, adjacent chunks are read at once
        k = first
        while k <= last:
            j = k
            while j < last and raw.offsets[j + 1] == raw.offsets[j] + size * item:
                j += 1
            a, b = max(start, k * size), min(stop, (j + 1) * size)
            at = int(raw.offsets[k]) + (a - k * size) * item
            part = out[a - start : b - start]
            if same:
                self._bytes.read_into(part, at)
            else:
                _read_converted(self._bytes, part, at, self.dtype)
            k = j + 1


def _read_converted(source: FileBytes, out: np.ndarray, offset: int, storage: np.dtype) -> None:
    """Read and widen (or byte-swap) in pieces that fit into the cache."""
    piece = 1 << 18
    tmp = np.empty(min(piece, len(out)), storage)
    for a in range(0, len(out), piece):
        b = min(a + piece, len(out))
        source.read_into(tmp[: b - a], offset + a * storage.itemsize)
        out[a:b] = tmp[: b - a]


def _check_chunk_bytes(path: str, dset: h5py.Dataset) -> None:
    if dset.chunks and math.prod(dset.chunks) * dset.dtype.itemsize > MAX_CHUNK_BYTES:
        raise DataError(
            f"{path}: {dset.name} is stored in chunks of {dset.chunks}, which are too large to unpack in bounded "
            "memory",
            hint="rewrite it with smaller chunks: h5repack -l CHUNK=1048576",
        )


class Hdf5Dense:
    """A two-dimensional HDF5 dataset, read in blocks."""

    def __init__(self, file: h5py.File, dset: h5py.Dataset, source: FileBytes) -> None:
        self._dset, self._bytes = dset, source
        self.cold = source.cold
        self.path, self.name = file.filename, dset.name
        self.shape = (int(dset.shape[0]), int(dset.shape[1]))
        self.dtype = dset.dtype
        self.filters = get_filter_labels(dset)
        self.chunks: tuple[int, ...] | None = dset.chunks
        self.stored_bytes = int(dset.id.get_storage_size())
        check_filters(self.path, dset)
        _check_chunk_bytes(self.path, dset)
        self._raw, self._offset = _open_storage(file, dset, source)

    def read(self, r0: int, r1: int, c0: int, c1: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the block ``[r0:r1, c0:c1]`` as C-contiguous ``dtype``; thread-safe."""
        out = (buffer or Buffer()).take((r1 - r0) * (c1 - c0), dtype).reshape(r1 - r0, c1 - c0)
        if out.size == 0:
            return out
        item = self.dtype.itemsize
        if self._offset is not None:
            if (c0, c1) == (0, self.shape[1]):
                at = self._offset + r0 * self.shape[1] * item
                if self.dtype == dtype:
                    self._bytes.read_into(out, at)
                else:
                    _read_converted(self._bytes, out.reshape(-1), at, self.dtype)
            else:
                for i in range(r1 - r0):
                    at = self._offset + ((r0 + i) * self.shape[1] + c0) * item
                    _read_converted(self._bytes, out[i], at, self.dtype)
        elif self._raw is not None:
            h, w = self._raw.chunk_shape
            per_band = -(-self.shape[1] // w)
            for bi in range(r0 // h, (r1 - 1) // h + 1):
                for bj in range(c0 // w, (c1 - 1) // w + 1):
                    a0, a1 = max(r0, bi * h), min(r1, (bi + 1) * h)
                    b0, b1 = max(c0, bj * w), min(c1, (bj + 1) * w)
                    ends = min((bi + 1) * h, self.shape[0]), min((bj + 1) * w, self.shape[1])
                    whole = (a0, b0) == (bi * h, bj * w) and (a1, b1) == ends
                    get = self._raw.unpack if whole else self._raw.get_cached
                    block = get(bi * per_band + bj).reshape(h, w)
                    out[a0 - r0 : a1 - r0, b0 - c0 : b1 - c0] = block[
                        a0 - bi * h : a1 - bi * h, b0 - bj * w : b1 - bj * w
                    ]
        else:
            with reading(self.path, self.name):
                out[...] = self._dset[r0:r1, c0:c1]
        return out


class MemoryDense:
    """A dense matrix in memory."""

    cold = False

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.shape = (int(values.shape[0]), int(values.shape[1]))
        self.dtype = values.dtype
        self.filters: tuple[str, ...] = ()
        self.chunks: tuple[int, ...] | None = None
        self.stored_bytes = values.nbytes

    def read(self, r0: int, r1: int, c0: int, c1: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the block, as a view if possible."""
        return _as_chunk_array(self._values[r0:r1, c0:c1], dtype)
