"""The tar around a ``.vcc``: written member by member, read as a stream of headers, never extracted.

Tar is 512-byte headers and padded bodies. Only plain files with plain names are accepted; links, folders, devices,
long-name extensions, absolute or climbing paths, duplicate names and cut files are refused before a body is read. An
archive ends with two empty blocks; one without them was cut, and what follows them, but for padding, does not belong.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vcelltools.errors import DataError, EnvironmentFault
from vcelltools.io.atomic import atomic_file, check_space
from vcelltools.textfile import say_missing

BLOCK = 512
_RECORD = 10_240
_MAX_MEMBERS = 16
_MAX_PAX = 64 << 10
_MAX_PADDING = 64 << 20
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PIECE = 1 << 20
_CHECK_EVERY = 256 << 20
_KEEP_FREE = 1 << 30
MAX_RATIO = 20_000
"""Most bytes a compressed byte may unpack to; identical cells come near it, a bomb goes beyond."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file inside the tar: its name, where its body lies, and what its header says."""

    name: str
    offset: int
    size: int
    mode: int
    magic: bytes


def read_members(path: str | os.PathLike) -> list[Member]:
    """Return the files of a tar in order, from the headers alone.

    Raises
    ------
    DataError
        For anything but plain, plainly named, distinct files that lie whole inside the archive.
    """
    p = Path(path)
    if not p.exists():
        raise say_missing(p)
    if not p.is_file():
        raise DataError(f"{p}: is not a regular file")
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
                raise DataError(f"{p}: cut short in the header at byte {at:,}", hint="copy or upload it again")
            member, kind = _parse(p, head, at)
            if kind == "x" and member.size <= _MAX_PAX:  # a big file's size, as Python writes it
                size_override = _read_pax(p, f.read(member.size))
                at += BLOCK + -(-member.size // BLOCK) * BLOCK
                continue
            if kind not in ("0", "\0"):
                what = {"1": "a hard link", "2": "a symbolic link", "5": "a folder", "L": "a long name"}
                raise DataError(
                    f"{p}: member {member.name!r} is {what.get(kind, f'of type {kind!r}')}, not a plain file; refused"
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
                raise DataError(f"{p}: more than {_MAX_MEMBERS} members; refused")
        if not out:
            raise DataError(f"{p}: holds no files; it is not a .vcc", hint="vcelltools prep writes one")
        _check_end(p, f, at, length)
    return out


def _refuse_packed(path: Path, start: bytes) -> None:
    for mark, name in _PACKED.items():
        if start.startswith(mark):
            raise DataError(f"{path}: is packed with {name}; a .vcc is a plain tar", hint=f"unpack it: {name} -d")
    if start.startswith(b"PK"):
        raise DataError(f"{path}: is a zip archive; a .vcc is a plain tar", hint="vcelltools prep writes one")
    if start.startswith(b"\x89HDF"):
        raise DataError(f"{path}: is an HDF5 file; a .vcc is a tar around it", hint="vcelltools prep packs it")


def _check_end(path: Path, file: BinaryIO, at: int, length: int) -> None:
    """Check the two empty blocks at ``at``, and that nothing but zeros follows."""
    hint = "copy or upload it again"
    file.seek(at)
    if length % BLOCK or file.read(2 * BLOCK) != bytes(2 * BLOCK):
        raise DataError(f"{path}: cut short: the two empty blocks at its end are missing", hint=hint)
    if length - at > _MAX_PADDING:
        raise DataError(f"{path}: {length - at:,} bytes follow its last member; they do not belong there", hint=hint)
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
    """Return the size that a pax header gives the next member; one that renames or links it is refused."""
    size = None
    for line in body.split(b"\n"):
        _, _, pair = line.partition(b" ")
        key, _, value = pair.partition(b"=")
        if key in (b"path", b"linkpath") or key.startswith(b"GNU.sparse"):
            raise DataError(f"{path}: an extended header changes a member's {key.decode()}; refused")
        if key == b"size" and value.isdigit() and len(value) < 16:
            size = int(value)
    return size


def _check_name(path: Path, name: str, before: list[str]) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "/" in name or "\0" in name:
        raise DataError(f"{path}: member {name[:80]!r} is not a plain file name; refused")
    if name in before:
        raise DataError(f"{path}: two members are called {name!r}; refused")


def read_bytes(path: str | os.PathLike, member: Member, *, limit: int) -> bytes:
    """Return a small member's bytes; one above ``limit`` is an error."""
    if member.size > limit:
        raise DataError(f"{path}: {member.name} has {member.size:,} bytes; at most {limit:,} expected")
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
        When it is damaged, unpacks to more than ``max_bytes``, or by more than :data:`MAX_RATIO`.
    EnvironmentFault
        When the disk has no room, or would be left with hardly any.
    """
    import zstandard

    written, checked = 0, 0
    end: int | None = None
    where = f"{path}: {member.name}"
    try:
        with open(path, "rb") as f, open(out_fpath, "wb") as out:
            window = _Window(f, member)
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(
                window,  # type: ignore[arg-type]
                read_across_frames=True,
            )
            while piece := reader.read(_PIECE):
                if end is None:
                    end = _get_hdf5_end(piece)
                    if end is None:
                        raise DataError(f"{where} does not hold an HDF5 file", hint="pack an h5ad: vcelltools prep")
                written += len(piece)
                if written > end:
                    raise DataError(f"{where} unpacks to more than the {end:,} bytes that its HDF5 file says it has")
                if written - checked > _CHECK_EVERY:
                    check_space(
                        out_fpath.parent, _KEEP_FREE, hint="free some space, or choose another folder by TMPDIR"
                    )
                    checked = written
                if written > max_bytes:
                    raise DataError(f"{where} unpacks to more than {max_bytes / 1e9:.1f} GB; refused")
                if written > MAX_RATIO * max(window.read_bytes, 1) + (64 << 20):
                    raise DataError(f"{where} unpacks to over {MAX_RATIO:,} times its size; refused as a bomb")
                out.write(piece)
            if end is None:
                raise DataError(f"{where} is empty")
            if window.read():
                raise DataError(f"{where} has data after its end")
    except zstandard.ZstdError as e:
        raise DataError(f"{where} is not whole zstd data: {e}", hint="pack it again: vcelltools prep") from e
    except OSError as e:
        raise EnvironmentFault(f"{out_fpath.parent}: no room to unpack {member.name}: {e.strerror}") from e
    return written


def _get_hdf5_end(head: bytes) -> int | None:
    """Return where an HDF5 file says that it ends, from the superblock at its start; None for any other bytes."""
    if len(head) < 96 or head[:8] != b"\x89HDF\r\n\x1a\n":
        return None
    version = head[8]
    at, width = {0: (24, head[13]), 1: (28, head[13])}.get(version, (12, head[9]))
    at += 2 * width  # after the base address and one more
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
    """Write a tar; a part given as a path is compressed with zstd on the way in. Return the tar's size.

    Parameters
    ----------
    gnu
        The GNU magic (2025) instead of the POSIX one (2026). Owner and time are zero in both.
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
    big = size >= 8 << 30  # beyond the octal field: the GNU form says it in binary, and every reader knows it
    return info.tobuf(tarfile.GNU_FORMAT if gnu or big else tarfile.USTAR_FORMAT)
