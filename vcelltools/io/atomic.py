"""Writing so that nothing is ever half there: a temporary file beside the target, fsync, rename.

What stood at the target stays until the new file is complete. A lock beside the target keeps a second writer
out and tells it so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from vcelltools.errors import EnvironmentFault, UsageError, VcellError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_SPACE_MARGIN = 16 << 20
_SAY_FULL = ("No space left", "File too large", r"\d+ requested and \d+ written")  # HDF5 and NumPy, without errno
_ATTEMPTS = 100
_ELSEWHERE = "write to another folder"


def check_output(
    path: str | os.PathLike,
    *,
    force: bool,
    need_bytes: int = 0,
    sources: Iterable[object] = (),
    folder: bool = False,
) -> Path:
    """Check, before any work is done, that ``path`` can be written, a file or a ``folder``; return it.

    Raises
    ------
    UsageError
        When it exists and ``force`` is off; when it is one of the ``sources`` (what is not a path does not count);
        when it is a folder and a file is to be written, or the other way round.
    EnvironmentFault
        When the folder is read-only or the disk has less than ``need_bytes`` free.
    """
    p = Path(path)
    for source in sources:
        if isinstance(source, str | os.PathLike) and p.exists() and os.path.exists(source) and p.samefile(source):
            raise UsageError(f"{p} is the input itself", hint="choose another --out")
    check_kind(p, folder=folder)
    if p.exists() and not force:
        raise UsageError(f"{p} exists", hint="--force overwrites it")
    there = p.parent  # or the folder in which it will be made, by the one who writes
    while not os.path.lexists(there) and there.parent != there:
        there = there.parent
    if not there.is_dir():
        raise EnvironmentFault(f"{p}: cannot make the folder {there}: a file has that name", hint=_ELSEWHERE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{p}: the folder {there} is read-only", hint=_ELSEWHERE)
    check_space(there, need_bytes)
    return p


def check_kind(path: str | os.PathLike, *, folder: bool) -> Path:
    """Return ``path``; a :class:`UsageError` where a folder stands and a file is to be written, or the reverse."""
    p = Path(path)
    if p.exists() and p.is_dir() != folder:
        is_, wanted = ("a folder", "a file") if p.is_dir() else ("a file", "a folder")
        raise UsageError(f"{p} is {is_}, and {wanted} is to be written", hint="choose another name")
    if p.exists() and not p.is_dir() and not p.is_file():  # a rename would put a file in the place of /dev/null
        raise UsageError(f"{p} is a device or a pipe, and a file is to be written", hint="choose another name")
    return p


def check_space(
    folder: str | os.PathLike, need_bytes: int, *, hint: str = "free some space, or write to another disk"
) -> None:
    """Raise an :class:`EnvironmentFault` where the disk lacks ``need_bytes`` (plus a small margin)."""
    if need_bytes > 0:
        free = shutil.disk_usage(folder).free
        if free < need_bytes + _SPACE_MARGIN:
            raise EnvironmentFault(
                f"{folder}: {say_bytes(need_bytes + _SPACE_MARGIN)} are needed and {say_bytes(free)} are free",
                hint=hint,
            )


def say_bytes(n: float) -> str:
    """Return a size as people read it."""
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def fsync_path(path: str | os.PathLike) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF):  # some file systems refuse it for folders
            raise
    finally:
        os.close(fd)


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold the writer's lock of ``path``; a second writer gets an :class:`EnvironmentFault` at once.

    Folders that ``path`` needs are made, and go again where nothing came to lie in them.
    """
    p = Path(path)
    lock = p.with_name(f".{p.name}.lock")
    missing = [d for d in p.parents if not d.exists()]
    for attempt in count():
        p.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError as e:  # another writer took away the folder that it had made
            if attempt < _ATTEMPTS:
                continue
            raise EnvironmentFault(f"{p}: its folder goes away", hint=_ELSEWHERE) from e  # a working directory too
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise EnvironmentFault(f"{p} is being written by another process", hint="wait for it to end") from e
        try:
            if os.fstat(fd).st_ino == os.stat(lock).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)  # the holder removed the file between our open and our lock: take the new one
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)
        _drop_empty(missing)


@contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
    """Make the folders that ``path`` needs, for work beside it; they go where nothing came to lie in them."""
    missing = [d for d in Path(path).parents if not d.exists()]
    with translate_os_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        _drop_empty(missing)


def _drop_empty(folders: list[Path]) -> None:
    """Remove the folders, the innermost first, up to one that holds something."""
    try:
        for d in folders:
            d.rmdir()
    except OSError:
        pass


@contextmanager
def translate_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk or a refused permission into an :class:`EnvironmentFault` that names the path."""
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
    """Remove temporary files of writers of ``target`` that were killed; the caller holds the lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.tmp")
    for name in os.listdir(target.parent):
        if pattern.fullmatch(name):
            path = target.with_name(name)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _get_temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _move(tmp: Path, target: Path, *, force: bool) -> None:
    if force:
        os.replace(tmp, target)
        return
    try:
        os.link(tmp, target)  # unlike rename, refuses a target that appeared meanwhile
    except FileExistsError as e:
        raise UsageError(f"{target} exists", hint="--force overwrites it") from e
    except OSError:
        os.replace(tmp, target)  # a file system without hard links
    else:
        tmp.unlink()


@contextmanager
def atomic_file(
    path: str | os.PathLike, *, force: bool = False, verify: Callable[[Path], Any] | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync, ``verify(tmp)`` and rename it into place.

    On any exception the temporary file goes and what stood at ``path`` stays.
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
    paths: Sequence[Path], *, force: bool = False, over: Sequence[Path] = (), stale: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield a temporary folder; files written there under the names of ``paths`` move to them together, at the end.

    On any exception none of them appears, and what stood there stays.

    Parameters
    ----------
    paths
        Files of one folder, moved in this order; the lock is that of the first.
    force, over
        Overwrite all that is there; overwrite these in any case.
    stale
        With ``force``, those of these that are not among ``paths`` go at the end: left from an earlier run, they would
        pass for files of this one.
    """
    forced = {p: force or p in over for p in paths}
    if len(forced) < len(paths):
        raise UsageError(f"{paths[0]} is the name of two files that are to be written", hint="choose another --out")
    for p in paths:
        check_output(p, force=forced[p])
    first = paths[0]
    with translate_os_errors(first), locked(first):
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
        except VcellError as e:  # a writer knows the temporary file alone
            inside, there = str(tmp / "x")[:-1], str(first.with_name("x"))[:-1]
            raise type(e)(e.message.replace(inside, there), hint=e.hint) from e
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str, *, force: bool = False) -> Path:
    """Write a text file atomically; return its path."""
    with atomic_file(path, force=force) as tmp:
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace")  # in JSON too the escape of a lone surrogate
    return Path(path)


def write_json(path: str | os.PathLike, obj: Any, *, force: bool = False, indent: int | None = 1) -> Path:
    """Write a JSON file atomically (NaN and infinities become null); return its path."""
    return write_text(path, dump_json(obj, indent=indent) + "\n", force=force)


def dump_json(obj: Any, *, indent: int | None = None) -> str:
    """Return strict JSON; numpy values become plain ones, NaN and infinities null."""
    return json.dumps(to_plain(obj), indent=indent, allow_nan=False, ensure_ascii=False)


def to_plain(obj: Any) -> Any:
    """Return ``obj`` built of dict, list, str, int, float, bool and None alone."""
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
    if kind == "f" and getattr(obj, "ndim", 0) == 1:  # long columns: no look at each value
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


# Called with a name at every point where a crash would leave something half done; tests put a crash there.
on_step: Callable[[str], None] | None = None


def step(name: str) -> None:
    """Mark a point of a longer write at which the process may die."""
    if on_step is not None:
        on_step(name)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``; a folder there is swapped out in one step and then removed.

    Where the system cannot swap two names, the old folder is moved away first; it is never deleted before the new
    one stands in its place.
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
    """Swap two names with Linux's renameat2; False where that is not to be had."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(os.path.abspath(a)), at_cwd, os.fsencode(os.path.abspath(b)), exchange) == 0
