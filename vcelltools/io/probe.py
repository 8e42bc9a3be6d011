"""A look at a file's metadata in a child process, because HDF5 itself can crash or loop on a damaged one.

h5py holds the interpreter lock while HDF5 works, so nothing in this process could answer. A forked child costs a
few milliseconds; it may spend a bounded time of the processor, and whatever becomes of it, this process lives.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py

from vcelltools.errors import DataError

CPU_SECONDS = 5
MEMORY_BYTES = 16 << 30
_SMALL_FILE = 16 << 20  # their text is read too; of larger files the structure alone
_STRIDE = 32  # a page of 4 kB holds more names than this
_MAX_NODES = 20_000
_MAX_CHUNKS = 10_000
_Key = tuple[str, int, int]
_verdicts: dict[_Key, str | None] = {}  # of files met already; None is good
_started: dict[_Key, int] = {}  # the children that are still looking


def start_probe(path: Path) -> None:
    """Start the look at an HDF5 file, so that this process can import the rest meanwhile; any other path is left.

    :func:`probe_h5` later takes the verdict.
    """
    try:
        if path.is_file() and h5py.is_hdf5(path) and _can_fork() and (key := _get_key(path)) not in _verdicts:
            _started.setdefault(key, _fork(path))
    except OSError:
        return  # whoever opens the file meets the same error and tells of it


def probe_h5(path: Path) -> None:
    """Walk the file's groups, attributes and (of small files) texts in a child; each file once.

    Where forking is unsafe (other threads run, as in a notebook) a new interpreter looks, which takes some tenths of
    a second more.

    Raises
    ------
    DataError
        When the child died of a signal: a crash inside HDF5, or more than ``CPU_SECONDS`` of looping.
    """
    key = _get_key(path)
    if key not in _verdicts:
        pid = _started.pop(key, None)
        if pid is None and _can_fork():
            pid = _fork(path)
        _verdicts[key] = _look_from_outside(path) if pid is None else _get_verdict(os.waitpid(pid, 0)[1])
    if (verdict := _verdicts[key]) is not None:
        raise DataError(
            f"{path}: the file is damaged: the HDF5 library {verdict} on its metadata", hint="copy or download it again"
        )


def _get_key(path: Path) -> _Key:
    stat = path.stat()
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


def _can_fork() -> bool:
    return hasattr(os, "fork") and threading.active_count() == 1


def _fork(path: Path) -> int:
    """Start the child that reads the metadata; return its process id."""
    deep = path.stat().st_size <= _SMALL_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with native threads: the child uses none
        pid = os.fork()
    if pid:
        return pid
    _look_and_exit(path, deep=deep)
    return 0  # never reached


def _look_and_exit(path: Path, *, deep: bool) -> None:
    try:
        _limit()
        with h5py.File(path, "r", locking="best-effort") as file:
            _walk(file, deep=deep)
    except BaseException:
        pass  # whoever opens the file meets the same error and tells of it
    finally:
        os._exit(0)


def _look_from_outside(path: Path) -> str | None:
    """Look in a new interpreter; return what became of it."""
    deep = path.stat().st_size <= _SMALL_FILE
    code = "import sys; from pathlib import Path; from vcelltools.io import probe; "
    code += f"probe.CPU_SECONDS = {CPU_SECONDS}; probe._look_and_exit(Path(sys.argv[1]), deep={deep})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, check=False)
    except OSError:  # no interpreter to start: a program that embeds Python
        return None
    return _get_verdict(-done.returncode if done.returncode < 0 else 0)


def _get_verdict(status: int) -> str | None:
    """Return what a child's exit status tells of it, or None where all is well."""
    if not os.WIFSIGNALED(status):
        return None
    number = os.WTERMSIG(status)
    return "does not come to an end" if number == signal.SIGXCPU else f"crashes ({signal.Signals(number).name})"


def _limit() -> None:
    import faulthandler
    import resource

    faulthandler.disable()
    for s in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGXCPU):
        signal.signal(s, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    for kind, wanted in ((resource.RLIMIT_CPU, used + CPU_SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _walk(file: h5py.File, *, deep: bool) -> None:
    todo: list[h5py.Group | h5py.Dataset] = [file["/"]]
    met: set[object] = set()
    while todo and len(met) < _MAX_NODES:
        node = todo.pop()
        where = _try(lambda node=node: h5py.h5o.get_info(node.id).addr)
        if where in met:
            continue
        met.add(where)
        for name in _try(lambda node=node: list(node.attrs)) or []:
            _try(lambda node=node, name=name: node.attrs[name])
        if isinstance(node, h5py.Dataset):
            _try(lambda node=node: _look(file, node, deep=deep))
            continue
        for name in _try(lambda node=node: list(node)) or []:
            if isinstance(_try(lambda node=node, name=name: node.get(name, getlink=True)), h5py.HardLink):
                child = _try(lambda node=node, name=name: node[name])
                if isinstance(child, h5py.Group | h5py.Dataset):
                    todo.append(child)


def _try(read):
    """Return what ``read`` returns, or None: an exception is no crash."""
    try:
        return read()
    except Exception:
        return None


def _look(file: h5py.File, dset: h5py.Dataset, *, deep: bool) -> None:
    if dset.is_virtual or dset.external or dset.shape is None:
        return
    if dset.chunks and dset.id.get_num_chunks() <= _MAX_CHUNKS:
        dset.id.chunk_iter(lambda info: None)
    if deep and dset.dtype == object and h5py.check_string_dtype(dset.dtype) is not None:
        from vcelltools.io.text import check_text

        check_text(file, dset)
        if dset.ndim == 1:
            dset[:: 1 if dset.size < _STRIDE**2 else _STRIDE]  # touches every page of the heap that holds the texts
