"""Write files atomically: a temporary file beside the target, fsync, rename.

An existing target stays until the new file is complete. A lock beside the target keeps a second writer
out, with an error.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vcelltools.errors import EnvironmentFault, UsageError, VcellError, spell
from vcelltools.names import escape_json

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SPACE_MARGIN = 16 << 20
_SAY_FULL = (
    "No space left",
    "File too large",
    r"\d+ requested and \d+ written",
)  # messages of HDF5 and NumPy, which do not set errno
_ATTEMPTS = 100
_ELSEWHERE = "write to another folder"


def check_output(
    path: str | os.PathLike,
    *,
    force: bool,
    need_bytes: int = 0,
    folder: bool = False,
) -> Path:
    """Check, before any work, that ``path`` (a file, or a ``folder``) can be written; return it.

    Raises
    ------
    UsageError
        If it exists and ``force`` is off, or if it is a folder and a file is to be written, or vice versa.
    EnvironmentFault
        If the folder is read-only or the disk has less than ``need_bytes`` free.
    """
    p = Path(path)
    check_kind(p, folder=folder)
    if os.path.lexists(p) and not force:  # also for a dangling link
        raise UsageError(f"{p} exists", hint=f"{spell('force', True)} overwrites it")
    there = p.parent  # or the closest existing folder, in which the writer makes the others
    while not os.path.lexists(there) and there.parent != there:
        there = there.parent
    if not there.is_dir():
        raise EnvironmentFault(f"{p}: the folder {there} cannot be made, because a file has that name", hint=_ELSEWHERE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{p}: the folder {there} is read-only", hint=_ELSEWHERE)
    check_space(there, need_bytes)
    return p


def put_beside(path: str | os.PathLike, suffix: str) -> Path:
    """Return the path of a second output beside the file ``path``, with another suffix.

    Raises
    ------
    UsageError
        If ``path`` is a folder, which may have no name to change (``.``).
    """
    return check_kind(path, folder=False).with_suffix(suffix)


def check_kind(path: str | os.PathLike, *, folder: bool) -> Path:
    """Return ``path``; raise a :class:`UsageError` if it is a folder and a file is to be written, or vice versa."""
    p = Path(path)
    if p.exists() and p.is_dir() != folder:
        is_, wanted = ("a folder", "a file") if p.is_dir() else ("a file", "a folder")
        raise UsageError(f"{p} is {is_}, but the output is {wanted}", hint="choose another name")
    if p.exists() and not p.is_dir() and not p.is_file():  # a rename would replace /dev/null with a file
        raise UsageError(f"{p} is a device or a pipe, but the output is a file", hint="choose another name")
    return p


def check_space(
    folder: str | os.PathLike, need_bytes: int, *, hint: str = "free some space, or write to another disk"
) -> None:
    """Raise an :class:`EnvironmentFault` if the disk has less than ``need_bytes`` (plus a small margin) free."""
    if need_bytes > 0:
        free = shutil.disk_usage(folder).free
        if free < need_bytes + _SPACE_MARGIN:
            raise EnvironmentFault(
                f"{folder}: {say_bytes(need_bytes + _SPACE_MARGIN)} are needed, but {say_bytes(free)} are free",
                hint=hint,
            )


def say_bytes(n: float) -> str:
    """Return a size in a readable unit."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def fsync_path(path: str | os.PathLike) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF):  # some file systems do not support it for folders
            raise
    finally:
        os.close(fd)


@contextmanager
def locked(path: str | os.PathLike | None, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the write lock of a file or folder; a second writer gets an :class:`EnvironmentFault`.

    The error is raised at once, or after ``wait_seconds``.

    A command takes the lock of its output folder before the work begins and holds it until the end. Folders that
    ``path`` needs are created, and removed again if they stay empty. With None, nothing is locked.
    """
    if path is None:
        yield
        return
    p = Path(path)
    if p.name in ("", ".."):  # for a folder such as ".", the lock is beside it
        p = p.resolve()
    lock = p.with_name(f".{p.name}.lock")
    missing = [d for d in p.parents if not d.exists()]
    until = time.monotonic() + wait_seconds
    for attempt in count():
        p.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError as e:  # another writer removed the folder that it had created
            if attempt < _ATTEMPTS:
                continue
            raise EnvironmentFault(
                f"{p}: its folder was removed", hint=_ELSEWHERE
            ) from e  # also for a working directory
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise EnvironmentFault(f"{p} is being written by another process", hint="wait until it ends") from e
        try:
            if os.fstat(fd).st_ino == os.stat(lock).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)  # the holder removed the file between our open and our lock, so use the new one
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)
        _drop_empty(missing)


@contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
    """Create the folders that ``path`` needs, and remove them afterwards if they stay empty."""
    missing = [d for d in Path(path).parents if not d.exists()]
    with translate_os_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _drop_empty(missing)


def _drop_empty(folders: list[Path]) -> None:
    """Remove the folders, innermost first, up to one that is not empty."""
    try:
        for d in folders:
            d.rmdir()
    except OSError:
        pass


@contextmanager
def translate_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Convert a full disk or a denied permission to an :class:`EnvironmentFault` that names the path."""
    try:
        yield
    except OSError as e:
        text = str(e)
        if e.errno in FULL or any(re.search(p, text) for p in _SAY_FULL):
            raise EnvironmentFault(f"{path}: the disk is full", hint="free some space, or write to another disk") from e
        if e.errno in REFUSED:
            raise EnvironmentFault(f"{path}: {(e.strerror or text).lower()}", hint=_ELSEWHERE) from e
        raise


def _drop_stale(target: Path) -> None:
    """Remove temporary files of killed writers of ``target``; the caller holds the lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(target.parent):
        if pattern.fullmatch(name):
            path = target.with_name(name)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_left(name: str) -> bool:
    """Whether a file or folder of this name is a lock, or what a killed writer left; it belongs to no one."""
    return re.fullmatch(r"\..+\.(lock|\d+\.[0-9a-f]{8}\.tmp)", name) is not None


def _get_temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _move(tmp: Path, target: Path, *, force: bool) -> None:
    if force:
        os.replace(tmp, target)
        return
    try:
        os.link(tmp, target)  # unlike rename, this fails if the target appeared meanwhile
    except FileExistsError as e:
        raise UsageError(f"{target} exists", hint=f"{spell('force', True)} overwrites it") from e
    except OSError:
        os.replace(tmp, target)  # a file system without hard links
    else:
        tmp.unlink()


@contextmanager
def atomic_file(
    path: str | os.PathLike, *, force: bool = False, verify: Callable[[Path], Any] | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync, ``verify(tmp)`` and rename it into place.

    On any exception, the temporary file is removed and an existing target stays.
    """
    p = check_output(path, force=force)
    with translate_os_errors(p), locked(p):
        _drop_stale(p)
        tmp = _get_temporary(p)
        try:
            yield tmp
            fsync_path(tmp)
            if verify is not None:
                verify(tmp)
            _move(tmp, p, force=force)
            fsync_path(p.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextmanager
def staged(
    paths: Sequence[Path],
    *,
    force: bool = False,
    over: Sequence[Path] = (),
    stale: Sequence[Path] = (),
    wait_seconds: float = 0.0,
) -> Iterator[Path]:
    """Yield a temporary folder; files written there with the names of ``paths`` are moved to them at the end.

    On any exception, none of them appears, and existing files stay.

    Parameters
    ----------
    paths
        Files in one folder, moved in this order; the lock is that of the first.
    force, over
        ``force``: overwrite all existing files. ``over``: files to overwrite in any case.
    stale
        With ``force``, files that are removed at the end unless they are among ``paths``: left over from an earlier
        run, they would seem to belong to this one.
    wait_seconds
        Seconds to wait for another writer of the first file.
    """
    forced = {p: force or p in over for p in paths}
    if len(forced) < len(paths):
        raise UsageError(f"two outputs have the name {paths[0]}", hint=f"choose another {spell('out')}")
    for p in paths:
        check_output(p, force=forced[p])
    first = paths[0]
    with translate_os_errors(first), locked(first, wait_seconds=wait_seconds):
        _drop_stale(first)
        tmp = _get_temporary(first)
        try:
            tmp.mkdir()
            yield tmp
            for p in paths:
                check_output(p, force=forced[p])
            for p in paths:
                _move(tmp / p.name, p, force=forced[p])
            for p in stale:
                if force and p not in forced:
                    p.unlink(missing_ok=True)
            fsync_path(first.parent)
        except VcellError as e:
            _say_place(e, tmp, first.parent)
            raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def staged_folder(path: str | os.PathLike, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` at the end.

    An existing folder must be empty; with ``force``, it is removed with its content. The caller holds the lock of
    ``path`` if there may be two writers.
    """
    p = Path(path)
    with translate_os_errors(p), room_for(p):
        _drop_stale(p)
        tmp = _get_temporary(p)
        try:
            tmp.mkdir()
            yield tmp
            fsync_path(tmp)
            if force:
                replace_folder(tmp, p)
            else:
                os.rename(tmp, p)  # fails for a folder that is not empty
                fsync_path(p.parent)
        except VcellError as e:
            _say_place(e, tmp, p)
            raise
        except OSError as e:
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UsageError(f"{p} exists", hint="choose another folder") from e
            raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _say_place(e: VcellError, tmp: Path, place: Path) -> None:
    """Replace the temporary folder with the final one in the errors of a writer."""
    e.message = e.message.replace(f"{tmp}{os.sep}", str(place / "x")[:-1])
    e.args = (e.message,)


def write_text(path: str | os.PathLike, text: str, *, force: bool = False) -> Path:
    """Write a text file atomically; return its path."""
    with atomic_file(path, force=force) as tmp:
        tmp.write_text(
            text, encoding="utf-8", errors="backslashreplace"
        )  # the escape of a lone surrogate, which is also valid in JSON
    return Path(path)


def write_json(path: str | os.PathLike, obj: Any, *, force: bool = False, indent: int | None = 1) -> Path:
    """Write a JSON file atomically (NaN and infinities become null); return its path."""
    return write_text(path, dump_json(obj, indent=indent) + "\n", force=force)


def dump_json(obj: Any, *, indent: int | None = None) -> str:
    """Return strict JSON; numpy values become plain ones, NaN and infinities null."""
    return escape_json(json.dumps(to_plain(obj), indent=indent, allow_nan=False, ensure_ascii=False))


def to_plain(obj: Any) -> Any:
    """Return ``obj`` converted to dict, list, str, int, float, bool and None."""
    if obj is None or isinstance(obj, str | bool | int):
        return obj
    if isinstance(obj, float):
        return obj if obj == obj and obj not in (float("inf"), float("-inf")) else None
    if isinstance(obj, dict):
        return {str(k): to_plain(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [to_plain(v) for v in obj]
    kind = getattr(getattr(obj, "dtype", None), "kind", "")
    if kind and kind in "iubU":
        return obj.tolist()
    if kind == "f" and getattr(obj, "ndim", 0) == 1:  # for long columns, do not inspect each value
        from numpy import flatnonzero, isfinite

        values = obj.tolist()
        for i in flatnonzero(~isfinite(obj)).tolist():
            values[i] = None
        return values
    if hasattr(obj, "tolist"):
        return to_plain(obj.tolist())
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "to_json"):
        return obj.to_json()
    raise TypeError(f"{type(obj).__name__} has no JSON form")


# Called with a name at every point where a crash would leave incomplete work; tests inject crashes there.
on_step: Callable[[str], None] | None = None


def step(name: str) -> None:
    """Mark a point of a longer write at which the process may die."""
    if on_step is not None:
        on_step(name)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``; an existing folder is swapped out in one step and then removed.

    If the system cannot swap two names, the old folder is moved away first; it is never deleted before the new
    one is in place.
    """
    fsync_path(new)
    if not target.exists():
        os.rename(new, target)
        fsync_path(target.parent)
        return
    step("swap")
    if _exchange(new, target):
        old = new
    else:
        old = target.with_name(f".{target.name}.{os.urandom(4).hex()}.old")
        os.rename(target, old)
        os.rename(new, target)
    fsync_path(target.parent)
    step("swapped")
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names with Linux's renameat2; return False if it is not available."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(os.path.abspath(a)), at_cwd, os.fsencode(os.path.abspath(b)), exchange) == 0
