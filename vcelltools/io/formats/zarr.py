"""Read zarr stores (formats 2 and 3, sharded or not) with the same functions as HDF5 files.

zarr itself reads and decompresses. This module adds the checks that zarr lacks: an absent chunk reads as
zeros, a codec may execute code (``pickle``), and a symbolic link may lead out of the store.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vcelltools.errors import DataError, EnvironmentFault, VcellError
from vcelltools.io.hdf5.arrays import ArrayBase, Buffer
from vcelltools.io.hdf5.limits import STREAM_BYTES, STREAM_RATIO, check_ratio

MARKERS = (".zgroup", "zarr.json", ".zmetadata")
_META_FILES = {".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json"}
_CODECS = {
    "bytes", "vlen-utf8", "vlen-bytes", "vlen-array", "blosc", "zstd", "gzip", "zlib", "lz4", "bz2", "lzma",
    "crc32c", "crc32", "adler32", "fletcher32", "shuffle", "delta", "transpose", "sharding_indexed", "astype",
    "packbits",
}  # fmt: skip
_ABSENT = np.uint64(0xFFFFFFFFFFFFFFFF)


@contextmanager
def reading_zarr(path: str, key: str) -> Iterator[None]:
    """Convert the exceptions of zarr and its codecs, which have no common base, to a :class:`DataError`."""
    try:
        yield
    except VcellError:
        raise
    except PermissionError as e:
        raise EnvironmentFault(f"{path}: permission denied", hint="check the mode and owner of the folder") from e
    except Exception as e:
        raise DataError(f"{path}: cannot read {key}: {' '.join(str(e).split()) or type(e).__name__}") from e


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a zarr store."""
    return any((path / m).is_file() for m in MARKERS)


class ZarrFile:
    """An open zarr store, with the interface that :mod:`vcelltools.io.hdf5.safe` expects of a file."""

    def __init__(self, path: Path) -> None:
        try:
            import zarr
        except ImportError as e:
            raise EnvironmentFault(f"{path}: zarr stores need the zarr package", hint="pip install zarr") from e
        self.filename = str(path)
        self._root_dpath = Path(os.path.realpath(path))
        self._checked: dict[str, int] = {}
        with reading_zarr(str(path), "/"):
            # consolidated metadata may differ from the content, so read the store itself
            self._root = zarr.open_group(str(path), mode="r", use_consolidated=False)

    def close(self) -> None:
        """Do nothing, because no file is held open."""

    def get_node(self, key: str) -> Any:
        """Return the group or array at ``key``, or None; links out of the store are an error."""
        parts = [p for p in key.split("/") if p]
        if any(p in (".", "..") for p in parts):
            raise DataError(f"{self.filename}: {key} is not a key")
        where = self._root_dpath.joinpath(*parts)
        if not where.is_dir():
            return None
        if Path(os.path.realpath(where)) != where:
            raise DataError(f"{self.filename}: {key} is a symbolic link, which is not followed")
        if not any((where / m).is_file() for m in (".zgroup", ".zarray", "zarr.json")):
            return None
        with reading_zarr(self.filename, key):
            node = self._root["/".join(parts)] if parts else self._root
        if not hasattr(node, "keys"):
            _check_codecs(self.filename, key, node)
        return node

    def read_small(self, node: Any, *, length: int | None, ratio: int, rows: slice | None = None) -> np.ndarray:
        """Read an array (or some rows of it) after checking its chunks and its declared size."""
        stored = check_chunks(self, node)
        declared = math.prod(node.shape) * (node.dtype.itemsize if node.dtype.kind in "iufbSU" else 1)
        if stored or length is None:  # a column of zeros may be stored without any chunk
            check_ratio(f"{self.filename}: {node.name}", declared, stored, ratio=ratio)
        with reading_zarr(self.filename, node.name):
            values = np.asarray(node[... if rows is None else rows])
        if values.dtype.kind == "T":
            return values.astype(object)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def get_dpath(self, node: Any) -> Path:
        """Return the folder of an array."""
        return self._root_dpath / str(node.path)


def _get_codecs(node: Any) -> list[tuple[str, Any]]:
    """Return (name, codec as a dict) of every codec of an array, nested ones too."""
    meta = node.metadata.to_dict()
    if meta.get("zarr_format") == 2:
        codecs = [*(meta.get("filters") or []), *([meta["compressor"]] if meta.get("compressor") else [])]
        out = []
        for c in codecs:
            config = c if isinstance(c, dict) else c.get_config()
            out.append((str(config.get("id")), config))
        return out
    out = []
    todo = list(meta.get("codecs") or [])
    while todo:
        c = todo.pop(0)
        config = c.get("configuration") or {}
        out.append((str(c.get("name")).removeprefix("numcodecs."), config))
        todo += [*(config.get("codecs") or []), *(config.get("index_codecs") or [])]
    return out


def _check_codecs(path: str, key: str, node: Any) -> None:
    for name, _ in _get_codecs(node):
        if name not in _CODECS:
            raise DataError(
                f"{path}: {key} is stored with the codec {name!r}, which is not supported (it may run code or lose "
                "digits)",
                hint="write the store again with a standard compressor",
            )


def get_codec_labels(node: Any) -> tuple[str, ...]:
    """Return the names of the compressors of an array."""
    plain = {"bytes", "crc32c", "vlen-utf8", "vlen-bytes", "transpose"}
    return tuple(dict.fromkeys(name for name, _ in _get_codecs(node) if name not in plain))


def check_chunks(file: ZarrFile, node: Any) -> int:
    """Return the stored bytes of an array after checking its chunks.

    zarr 3 omits chunks that hold only the fill value, so an absent chunk is not damage. The
    ``data``, ``indices`` and ``indptr`` of a sparse matrix are always written completely, so an absent chunk is lost.

    Raises
    ------
    DataError
        If a chunk is lost, truncated or a symbolic link.
    """
    known = file._checked.get(node.path)
    if known is not None:
        return known
    folder = file.get_dpath(node)
    sizes: dict[str, int] = {}
    for at, _, names in os.walk(folder):
        for name in names:
            if name in _META_FILES:
                continue
            fpath = Path(at, name)
            if fpath.is_symlink():
                raise DataError(f"{file.filename}: {fpath} is a symbolic link, which is not followed")
            sizes[fpath.relative_to(folder).as_posix()] = fpath.stat().st_size
    shards = getattr(node, "shards", None)
    if min([*(shards or node.chunks), 1]) < 1:
        raise DataError(f"{file.filename}: {node.name} has empty chunks; its metadata is damaged")
    grid = [-(-n // c) for n, c in zip(node.shape, shards or node.chunks, strict=True)]
    expected, whole = math.prod(grid), _is_sparse_part(file, node)
    if whole:
        _check_number(
            file, node, expected - len(sizes), expected
        )  # check before listing them, because there may be billions
    if expected <= 2 * len(sizes) + 1024:
        positions = [(pos, node.metadata.encode_chunk_key(pos)) for pos in np.ndindex(*grid)]
        there = [(pos, key) for pos, key in positions if key in sizes]
        absent = expected - len(there)
        if shards is not None:
            absent += _check_shards(file, node, folder, there)
        elif "blosc" in get_codec_labels(node):
            for _, key in there:
                with (folder / key).open("rb") as f:
                    _check_blosc(f"{file.filename}: {node.name}: chunk {key}", f.read(16), sizes[key])
        if whole:
            _check_number(file, node, absent, expected)
    elif "blosc" in get_codec_labels(node) or shards is not None:
        raise DataError(
            f"{file.filename}: {node.name}: {expected - len(sizes):,} of {expected:,} chunks are absent, which is "
            "too many to "
            "check the others",
            hint="copy the store again",
        )
    stored = sum(sizes.values())
    file._checked[node.path] = stored
    return stored


def _check_number(file: ZarrFile, node: Any, absent: int, expected: int) -> None:
    if absent > 0:
        raise DataError(
            f"{file.filename}: {absent:,} chunks of {node.name} are absent (of {expected:,} files); "
            "they would be read as zeros",
            hint="copy the store again; to write all chunks, use zarr.config.set({'array.write_empty_chunks': True})",
        )


def _is_sparse_part(file: ZarrFile, node: Any) -> bool:
    parent, _, name = str(node.path).rpartition("/")
    if name not in ("data", "indices", "indptr"):
        return False
    return str(file.get_node(parent).attrs.get("encoding-type", "")).startswith(("csr", "csc"))


def _check_blosc(where: str, head: bytes, size: int) -> None:
    """Compare the length in the header of a Blosc frame (bytes 12 to 16) with the actual length.

    The codec trusts the header and would read beyond the end of a truncated frame.
    """
    says = int.from_bytes(head[12:16], "little") if len(head) == 16 else -1
    if says != size:
        raise DataError(
            f"{where} is damaged: it has {size:,} bytes, but its header states {max(says, 0):,}",
            hint="copy the store again",
        )


def _check_shards(file: ZarrFile, node: Any, folder: Path, shards: list[tuple[tuple[int, ...], str]]) -> int:
    """Count the chunks within the array that the shard indexes mark as absent, and check the others."""
    config = next((c for name, c in _get_codecs(node) if name == "sharding_indexed"), None)
    if config is None:
        return 0
    names = [c.get("name") for c in config.get("index_codecs") or []]
    if not set(names) <= {"bytes", "crc32c"}:
        raise DataError(f"{file.filename}: {node.name} has an unknown kind of shard index ({names})")
    per_shard = [s // c for s, c in zip(node.shards, node.chunks, strict=True)]
    n_inner = math.prod(per_shard)
    size = 16 * n_inner + (4 if "crc32c" in names else 0)
    at_end = str(config.get("index_location", "end")).rsplit(".", maxsplit=1)[-1] == "end"
    blosc = "blosc" in get_codec_labels(node)
    absent = 0
    for pos, key in shards:
        where = f"{file.filename}: {node.name}: shard {key}"
        with (folder / key).open("rb") as f:
            total = os.fstat(f.fileno()).st_size
            if total < size:
                raise DataError(f"{where} is truncated ({total:,} bytes)", hint="copy the store again")
            f.seek(total - size if at_end else 0)
            index = np.frombuffer(f.read(16 * n_inner), "<u8").reshape(*per_shard, 2)
            inside = tuple(
                slice(0, -(-min(n - p * s, s) // c))
                for n, p, s, c in zip(node.shape, pos, node.shards, node.chunks, strict=True)
            )
            found = index[inside].reshape(-1, 2)
            there = found[:, 0] != _ABSENT
            absent += int(np.count_nonzero(~there))
            for offset, length in found[there].tolist() if blosc else ():
                if offset + length > total:
                    raise DataError(f"{where} is damaged: its index points past its end", hint="copy the store again")
                f.seek(offset)
                _check_blosc(where, f.read(16), length)
    return absent


class ZarrArray(ArrayBase):
    """A one-dimensional zarr array."""

    def __init__(self, file: ZarrFile, node: Any) -> None:
        self.path, self.name = file.filename, node.name
        if node.ndim != 1:
            raise DataError(f"{self.path}: {self.name} has {node.ndim} dimensions instead of 1")
        self._node = node
        self.length = int(node.shape[0])
        self.dtype = np.dtype(node.dtype)
        self.filters = get_codec_labels(node)
        self.chunk_len: int | None = int((getattr(node, "shards", None) or node.chunks)[0])
        self.stored_bytes = check_chunks(file, node)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write elements ``start:stop`` into ``out``, in its dtype; thread-safe."""
        with reading_zarr(self.path, self.name):
            out[...] = self._node[start:stop]


class ZarrDense:
    """A two-dimensional zarr array, read in blocks."""

    cold = False

    def __init__(self, file: ZarrFile, node: Any) -> None:
        self.path, self.name = file.filename, node.name
        self._node = node
        self.shape = (int(node.shape[0]), int(node.shape[1]))
        self.dtype = np.dtype(node.dtype)
        self.filters = get_codec_labels(node)
        self.chunks: tuple[int, ...] | None = tuple(int(c) for c in (getattr(node, "shards", None) or node.chunks))
        self.stored_bytes = check_chunks(file, node)
        declared = math.prod(self.shape) * self.dtype.itemsize
        check_ratio(f"{self.path}: {self.name}", declared, self.stored_bytes, free=STREAM_BYTES, ratio=STREAM_RATIO)

    def read(self, r0: int, r1: int, c0: int, c1: int, dtype: np.dtype, buffer: Buffer | None) -> np.ndarray:
        """Return the block ``[r0:r1, c0:c1]`` as C-contiguous ``dtype``; thread-safe."""
        out = (buffer or Buffer()).take((r1 - r0) * (c1 - c0), dtype).reshape(r1 - r0, c1 - c0)
        if out.size:
            with reading_zarr(self.path, self.name):
                out[...] = self._node[r0:r1, c0:c1]
        return out
