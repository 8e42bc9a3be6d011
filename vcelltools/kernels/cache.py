"""Cache compiled kernels on disk, in a folder that nobody else can write to, in files that are checked before use.

A cached kernel is a pickle with machine code, so loading it runs code. numba trusts the folder, and
fails if a file is truncated or the disk is full. Here, a file is used only if this user owns it, nobody else may
write to it, and its digest matches its content, the sources of all kernels and the versions of Python and numba.
Otherwise the kernel is compiled and, if possible, cached again.
"""

from __future__ import annotations

import grp
import hashlib
import logging
import os
import pwd
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.runtime import rtsys
from numba.core.serialize import dumps, loads

_HERE = Path(__file__).resolve().parent


@cache
def get_stamp() -> bytes:
    """Return the digest of everything that compiled kernels depend on: their sources, numba and Python.

    One digest for the whole folder lets kernels share helpers across files: a change to any file recompiles all of
    them.
    """
    h = hashlib.sha256(f"{numba.__version__} {sys.version}".encode())
    for path in sorted(_HERE.glob("*.py")):
        text = path.read_bytes()
        h.update(f"{path.name} {len(text)} ".encode() + text)
    return h.digest()


def _is_private_group(gid: int) -> bool:
    """Return whether a group is private: the primary group of the user, with the same name and no other members."""
    try:
        me, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return me.pw_gid == gid and group.gr_name == me.pw_name and set(group.gr_mem) <= {me.pw_name}


def _is_shared(st: os.stat_result) -> bool:
    """Return whether other users may write to a file or folder."""
    group = st.st_mode & stat.S_IWGRP and not _is_private_group(st.st_gid)
    return bool(group or st.st_mode & stat.S_IWOTH)


def find_flaw(folder: Path) -> str | None:
    """Return why other users could place files in ``folder``, or None if they cannot.

    The folder must belong to this user. Every folder above it must belong to this user or to root, and if others may
    write to one (such as ``/tmp``), its sticky bit must keep them from replacing files of other users.
    """
    me = os.geteuid()
    real = Path(os.path.realpath(folder))
    for path in (real, *real.parents):
        st = os.lstat(path)
        if st.st_uid != me and (path == real or st.st_uid != 0):
            return f"{path} belongs to another user"
        if _is_shared(st) and (path == real or not st.st_mode & stat.S_ISVTX):
            return f"other users may write to {path}"
    return None


def _list_candidates() -> Iterator[Path]:
    """Yield the candidate folders: from the environment, in the package, of the user, and in the temporary folder."""
    name = f"kernels_{hashlib.sha256(os.fsencode(_HERE)).hexdigest()[:16]}"
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(named) / name
    else:
        yield _HERE / "__pycache__"
    try:
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vcelltools" / "numba" / name
    except RuntimeError:  # the user has no home folder
        pass
    yield Path(tempfile.gettempdir()) / f"vcelltools-{os.geteuid()}" / name


def choose_folder() -> tuple[Path | None, str | None]:
    """Return the first private, writable folder, and why an earlier one was rejected.

    The folder is created if necessary; None if no folder can be trusted.
    """
    refused = None
    for folder in _list_candidates():
        try:
            os.makedirs(folder.parent, mode=0o700, exist_ok=True)
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                continue
            flaw = find_flaw(folder)
        except OSError:
            continue
        if flaw is None:
            return folder, refused
        refused = refused or flaw
    return None, refused


@cache
def get_folder() -> Path | None:
    """Return the folder of compiled kernels, or None if no folder can be trusted.

    The logger ``vcelltools`` names a rejected folder once per process, but not in workers.
    """
    folder, refused = choose_folder()
    multiprocessing = sys.modules.get("multiprocessing")
    if refused is not None and (multiprocessing is None or multiprocessing.parent_process() is None):
        kept = f"compiled kernels are cached in {folder}" if folder else "compiled kernels are not cached"
        logging.getLogger("vcelltools").warning("warning: %s: %s", refused, kept)
    return folder


class _Files:
    """The cache files of one function, one per signature and processor, each with a digest before its content."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem

    def _get_path(self, key: Any) -> str:
        name = hashlib.sha256(str(key[:2]).encode()).hexdigest()[:24]
        return str(self._folder / f"{self._stem}.{sys.implementation.cache_tag}-{name}.nbc")

    def load(self, key: Any) -> Any:
        """Return the data for ``key``, or None if it is missing, stale, damaged or not owned by this user."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            with open(self._get_path(key), "rb", opener=lambda path, _: os.open(path, flags)) as f:
                st = os.fstat(f.fileno())
                if not stat.S_ISREG(st.st_mode) or st.st_uid != os.geteuid() or _is_shared(st):
                    return None
                content = f.read()
        except OSError:
            return None
        digest, body = content[:32], content[32:]
        return loads(body) if digest == hashlib.sha256(get_stamp() + body).digest() else None

    def save(self, key: Any, data: Any) -> None:
        """Save ``data`` for ``key``; a full disk or a read-only folder is ignored and leaves no partial file."""
        body = dumps(data)
        path = self._get_path(key)
        tmp = f"{path}.{secrets.token_hex(4)}.tmp"
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            with open(fd, "wb") as f:
                f.write(hashlib.sha256(get_stamp() + body).digest() + body)
            os.replace(tmp, path)
        except OSError:
            os.unlink(tmp)
        except BaseException:
            os.unlink(tmp)
            raise

    def flush(self) -> None:
        """Remove the cache files of this function."""
        for path in self._folder.glob(f"{self._stem}.*.nbc"):
            path.unlink(missing_ok=True)


class _Locator:
    """The interface that numba requires of the location of a cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_cache_path(self) -> str:
        return str(self._folder)

    def ensure_cache_path(self) -> None:
        pass


class KernelCache(FunctionCache):
    """numba's cache of one function, stored in :func:`get_folder`.

    A cached kernel does not need the type rules and code generators of the compiler: numba
    sets up all of them (60 modules, entry points of other packages) before it looks into its cache, which takes
    0.2 s. Machine code only needs the runtime that allocates arrays, and the compiler is set up when it is used.
    """

    def __init__(self, f: Any, folder: Path) -> None:
        self._name, self._py_func = repr(f), f
        self._impl = CompileResultCacheImpl.__new__(CompileResultCacheImpl)
        self._impl._locator, self._impl._lineno = _Locator(folder), f.__code__.co_firstlineno
        self._cache_path = str(folder)
        self._cache_file = _Files(folder, f"{f.__module__.rpartition('.')[2]}.{f.__qualname__}")
        self.enable()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function of a signature, or None."""
        rtsys.initialize(target_context)
        return self._load_overload(sig, target_context)
