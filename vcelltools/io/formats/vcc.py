"""Read and write the tar of a ``.vcc`` member by member; it is read as a stream of headers and never extracted.

A tar consists of 512-byte headers and padded bodies. Only regular files with plain names are accepted; links, folders,
devices, long-name extensions, absolute or parent paths, duplicate names and truncated files are rejected before a body
is read. An archive ends with two empty blocks; an archive without them is truncated, and nothing but padding may follow
them.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.textfile import say_missing
from vcelltools.io.write.atomic import atomic_file, check_space

BLOCK = 512
_RECORD = 10_240
_MAX_MEMBERS = 16
_MAX_PAX = 64 << 10
_MAX_PADDING = 64 << 20
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PIECE = 1 << 20
_PACKED_PIECE = 4 << 10  # limits the output of one step, because a block of four bytes may unpack to 128 KiB
_CHECK_EVERY = 256 << 20
_KEEP_FREE = 1 << 30
MAX_RATIO = 20_000
"""Maximum compression ratio: identical cells come close to it, and a decompression bomb exceeds it."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file inside the tar: its name, the position of its body, and the content of its header."""

    name: str
    offset: int
    size: int
    mode: int
    magic: bytes


def read_members(path: str | os.PathLike) -> list[Member]:
    """Return the files of a tar in order, reading only the headers.

    Raises
    ------
    DataError
        If a member is not a complete, regular file with a plain and unique name.
    """
    p = Path(path)
    if not p.exists():
        raise say_missing(p)
    if not p.is_file():
        raise DataError(f"{p} is not a regular file")
    length = p.stat().st_size
    out: list[Member] = []
    size_override: int | None = None
    with open(p, "rb") as f:
        _refuse_packed(p, f.read(6))
        at = 0
        while True:
            f.seek(at)
            head = f.read(BLOCK)
            if head in (b"", bytes(BLOCK)):
                break
            if len(head) < BLOCK:
                raise DataError(
                    f"{p}: the file is truncated in the header at byte {at:,}", hint="copy or upload it again"
                )
            member, kind = _parse(p, head, at)
            if kind == "x" and member.size <= _MAX_PAX:  # the size of a large file, as written by Python
                size_override = _read_pax(p, f.read(member.size))
                at += BLOCK + -(-member.size // BLOCK) * BLOCK
                continue
            if kind not in ("0", "\0"):
                what = {"1": "a hard link", "2": "a symbolic link", "5": "a folder", "L": "a long name"}
                raise DataError(
                    f"{p}: member {member.name!r} is {what.get(kind, f'of type {kind!r}')}, not a regular file; this "
                    "is not allowed"
                )
            if size_override is not None:
                member = Member(**{**member.__dict__, "size": size_override})
                size_override = None
            _check_name(p, member.name, [m.name for m in out])
            at = member.offset + -(-member.size // BLOCK) * BLOCK
            if member.offset + member.size > length:
                raise DataError(
                    f"{p}: member {member.name!r} says {member.size:,} bytes, "
                    f"the file ends after {max(length - member.offset, 0):,} of them",
                    hint="copy or upload it again",
                )
            out.append(member)
            if len(out) > _MAX_MEMBERS:
                raise DataError(f"{p}: the archive has more than {_MAX_MEMBERS} members")
        if not out:
            raise DataError(f"{p} holds no files; it is not a .vcc", hint="make one with vcelltools prep")
        _check_end(p, f, at, length)
    return out


def _refuse_packed(path: Path, start: bytes) -> None:
    for mark, name in _PACKED.items():
        if start.startswith(mark):
            raise DataError(
                f"{path} is compressed with {name}, but a .vcc is a plain tar", hint=f"decompress it with {name} -d"
            )
    if start.startswith(b"PK"):
        raise DataError(f"{path} is a zip archive, but a .vcc is a plain tar", hint="make one with vcelltools prep")
    if start.startswith(b"\x89HDF"):
        raise DataError(f"{path} is an HDF5 file, but a .vcc is a tar of one", hint="pack it with vcelltools prep")


def _check_end(path: Path, file: BinaryIO, at: int, length: int) -> None:
    """Check for two empty blocks at ``at``, followed only by zeros."""
    hint = "copy or upload it again"
    file.seek(at)
    if length % BLOCK or file.read(2 * BLOCK) != bytes(2 * BLOCK):
        raise DataError(f"{path}: the file is truncated: the two empty blocks at its end are missing", hint=hint)
    if length - at > _MAX_PADDING:
        raise DataError(
            f"{path}: {length - at:,} bytes that do not belong to the archive follow its last member", hint=hint
        )
    while piece := file.read(_PIECE):
        if piece.count(0) != len(piece):
            raise DataError(f"{path}: there is data after the archive's end", hint=hint)


def _parse(path: Path, head: bytes, at: int) -> tuple[Member, str]:
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
    except (tarfile.TarError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not a tar: the header at byte {at:,} is damaged ({e})") from e
    if info.size < 0:
        raise DataError(f"{path}: the header at byte {at:,} has a negative size")
    kind = info.type.decode("latin1")
    return Member(name=info.name, offset=at + BLOCK, size=info.size, mode=info.mode, magic=head[257:265]), kind


def _read_pax(path: Path, body: bytes) -> int | None:
    """Return the size that a pax header gives the next member; a header that renames or links it is rejected."""
    size = None
    for line in body.split(b"\n"):
        _, _, pair = line.partition(b" ")
        key, _, value = pair.partition(b"=")
        if key in (b"path", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise DataError(f"{path}: an extended header changes the {key.decode()} of a member; this is not allowed")
        if key == b"size" and value.isdigit() and len(value) < 16:
            size = int(value)
    return size


def _check_name(path: Path, name: str, before: list[str]) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "/" in name or "\0" in name:
        raise DataError(f"{path}: member {name[:80]!r} is not a plain file name; this is not allowed")
    if name in before:
        raise DataError(f"{path}: two members are named {name!r}; this is not allowed")


def read_bytes(path: str | os.PathLike, member: Member, *, limit: int) -> bytes:
    """Return the bytes of a small member; more than ``limit`` bytes are an error."""
    if member.size > limit:
        raise DataError(f"{path}: {member.name} has {member.size:,} bytes, but may have at most {limit:,}")
    with open(path, "rb") as f:
        f.seek(member.offset)
        return f.read(member.size)


class _Window:
    """The bytes of one member as a file."""

    def __init__(self, file: BinaryIO, member: Member) -> None:
        self._file, self._left = file, member.size
        self.read_bytes = 0
        file.seek(member.offset)

    def read(self, n: int = -1) -> bytes:
        n = self._left if n < 0 else min(n, self._left)
        out = self._file.read(n)
        self._left -= len(out)
        self.read_bytes += len(out)
        return out


def unpack(path: str | os.PathLike, member: Member, out_fpath: Path, *, max_bytes: int) -> int:
    """Unpack a zstd member into a file; return the bytes written.

    Raises
    ------
    DataError
        If it is damaged, unpacks to more than ``max_bytes``, or expands by more than :data:`MAX_RATIO`.
    EnvironmentFault
        If the disk does not have enough space.
    """
    import zstandard

    written, checked = 0, 0
    end: int | None = None
    where = f"{path}: {member.name}"
    try:
        with open(path, "rb") as f, open(out_fpath, "wb") as out:
            window = _Window(f, member)
            for piece in _decompress(window, where):
                if end is None:
                    end = _get_hdf5_end(piece)
                    if end is None:
                        raise DataError(f"{where} does not hold an HDF5 file", hint="pack an h5ad with vcelltools prep")
                written += len(piece)
                if written > end:
                    raise DataError(f"{where} unpacks to more than {end:,} bytes, the size that its HDF5 file states")
                if written - checked > _CHECK_EVERY:
                    check_space(
                        out_fpath.parent, _KEEP_FREE, hint="free some space, or choose another folder with TMPDIR"
                    )
                    checked = written
                if written > max_bytes:
                    raise DataError(f"{where} unpacks to more than {max_bytes / 1e9:.1f} GB, the limit")
                if written > MAX_RATIO * max(window.read_bytes, 1) + (64 << 20):
                    raise DataError(f"{where} unpacks to over {MAX_RATIO:,} times its size, like a decompression bomb")
                out.write(piece)
            if end is None:
                raise DataError(f"{where} is empty")
    except zstandard.ZstdError as e:
        raise DataError(f"{where} is not complete zstd data: {e}", hint="pack it again with vcelltools prep") from e
    except OSError as e:
        raise EnvironmentFault(f"{out_fpath.parent}: no space to unpack {member.name}: {e.strerror}") from e
    return written


def _decompress(window: _Window, where: str) -> Iterator[bytes]:
    """Yield the decompressed data of the zstd frames of a member; every frame must be complete, with its checksum.

    The stream readers of the library treat the end of the file as the end of a frame; only this object distinguishes
    them.
    """
    import zstandard

    packer = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame, rest, held = packer.decompressobj(), b"", bytearray()
    begun = False  # whether the frame has received any bytes
    while raw := rest or window.read(_PACKED_PIECE):
        held += frame.decompress(raw)
        begun = True
        if len(held) >= _PIECE:
            yield bytes(held)
            held.clear()
        rest = frame.unused_data
        if frame.eof:
            frame, begun = packer.decompressobj(), False
    if held:
        yield bytes(held)
    if begun:
        raise DataError(f"{where} is truncated: its last zstd frame has no end", hint="copy or upload it again")


def _get_hdf5_end(head: bytes) -> int | None:
    """Return the end of an HDF5 file according to the superblock at its start; None for other data."""
    if len(head) < 96 or head[:8] != b"\x89HDF\r\n\x1a\n":
        return None
    version = head[8]
    at, width = {0: (24, head[13]), 1: (28, head[13])}.get(version, (12, head[9]))
    at += 2 * width  # after the base address and another address
    return int.from_bytes(head[at : at + width], "little") if width in (2, 4, 8) else None


def write_vcc(
    path: str | os.PathLike,
    parts: Sequence[tuple[str, bytes | Path]],
    *,
    level: int,
    gnu: bool,
    force: bool,
    verify: Callable[[Path], Any] | None = None,
    threads: int = 1,
) -> int:
    """Write a tar, compressing parts given as paths with zstd; return the size of the tar.

    Parameters
    ----------
    gnu
        Whether to write the GNU magic (2025) instead of the POSIX one (2026). Owner and time are zero in both.
    """
    import zstandard

    with atomic_file(path, force=force, verify=verify) as tmp, open(tmp, "wb") as out:
        for name, body in parts:
            at = out.tell()
            out.write(bytes(BLOCK))
            if isinstance(body, bytes):
                out.write(body)
            else:
                check_space(tmp.parent, body.stat().st_size // 20)
                packer = zstandard.ZstdCompressor(level=level, threads=threads, write_checksum=True)
                with open(body, "rb") as src:
                    packer.copy_stream(src, out, size=body.stat().st_size)
            end = out.tell()
            out.write(bytes(-end % BLOCK))
            after = out.tell()
            out.seek(at)
            out.write(_make_header(name, end - at - BLOCK, gnu=gnu))
            out.seek(after)
        out.write(bytes(2 * BLOCK))
        out.write(bytes(-out.tell() % _RECORD))
        return out.tell()


def _make_header(name: str, size: int, *, gnu: bool) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    info.uid = info.gid = 0
    big = size >= 8 << 30  # too large for the octal field: use the binary GNU form, which every reader supports
    return info.tobuf(tarfile.GNU_FORMAT if gnu or big else tarfile.USTAR_FORMAT)
