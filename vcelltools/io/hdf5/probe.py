"""Read the metadata of a file in a child process first, because HDF5 can crash or loop on a damaged file.

h5py holds the interpreter lock while HDF5 works, so this process could not time out. A forked child costs a
few milliseconds and has a limit on processor time; if it crashes, this process survives.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import h5py

from vcelltools.errors import DataError
from vcelltools.io.hdf5.text import check_text

CPU_SECONDS = 20
MEMORY_BYTES = 16 << 30
_SMALL_FILE = 16 << 20  # for files up to this size, text is read too; for larger ones, only the structure
_STRIDE = 32  # a page of 4 kB holds more names than this
_MAX_NODES = 20_000
_WALK_SECONDS = 4.0  # processor seconds, after which enough has been read
_MAX_CHUNKS = 10_000
_Key = tuple[str, int, int]
_verdicts: dict[_Key, str | None] = {}  # verdicts on files seen before; None is good
_started: dict[_Key, int] = {}  # the children that are still running


def start_probe(path: Path) -> None:
    """Start to probe an HDF5 file while this process imports the rest; other paths are ignored.

    :func:`probe_h5` later collects the verdict.
    """
    try:
        if path.is_file() and h5py.is_hdf5(path) and _can_fork() and (key := _get_key(path)) not in _verdicts:
            _started.setdefault(key, _fork(path))
    except OSError:
        return  # opening the file raises the same error and reports it


def probe_h5(path: Path) -> None:
    """Read the groups, attributes and (in small files) texts of a file in a child, once per file, for some seconds.

    If forking is unsafe (because other threads run, as in a notebook), a new interpreter is started, which takes some
    tenths of a second more.

    Raises
    ------
    DataError
        If a signal killed the child: a crash inside HDF5, or ``CPU_SECONDS`` without reaching the next object.
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
    """Start the child that reads the metadata, and return its process id."""
    deep = path.stat().st_size <= _SMALL_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking with native threads, which the child does not use
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
        pass  # opening the file raises the same error and reports it
    finally:
        os._exit(0)


def _renew() -> None:
    """Reset the limit of ``CPU_SECONDS`` for the next calls into HDF5, because a large file is not an endless loop."""
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft - used <= CPU_SECONDS and (hard == resource.RLIM_INFINITY or hard > soft):
        wanted = used + CPU_SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _look_from_outside(path: Path) -> str | None:
    """Probe in a new interpreter, and return the verdict."""
    deep = path.stat().st_size <= _SMALL_FILE
    code = "import sys; from pathlib import Path; from vcelltools.io.hdf5 import probe; "
    code += f"probe.CPU_SECONDS = {CPU_SECONDS}; probe._look_and_exit(Path(sys.argv[1]), deep={deep})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run([sys.executable, "-c", code, path], env=env, capture_output=True, check=False)
    except OSError:  # a program that embeds Python has no interpreter to start
        return None
    return _get_verdict(-done.returncode if done.returncode < 0 else 0)


def _get_verdict(status: int) -> str | None:
    """Return the verdict from the exit status of a child, or None if the file is good."""
    if not os.WIFSIGNALED(status):
        return None
    number = os.WTERMSIG(status)
    return "does not finish" if number == signal.SIGXCPU else f"crashes ({signal.Signals(number).name})"


def _limit() -> None:
    import faulthandler

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
    began = time.process_time()
    while todo and len(met) < _MAX_NODES and time.process_time() - began < _WALK_SECONDS:
        node = todo.pop()
        _renew()
        where = _try(lambda node=node: h5py.h5o.get_info(node.id).addr)
        if where in met:
            continue
        met.add(where)
        for name in _try(lambda node=node: list(node.attrs)) or []:
            _try(lambda node=node, name=name: node.attrs[name])
        if isinstance(node, h5py.Dataset):
            _try(lambda node=node: _look(file, node, deep=deep))
            continue
        for name in (_try(lambda node=node: list(node)) or [])[:_MAX_NODES]:
            if isinstance(_try(lambda node=node, name=name: node.get(name, getlink=True)), h5py.HardLink):
                child = _try(lambda node=node, name=name: node[name])
                if isinstance(child, h5py.Group | h5py.Dataset):
                    todo.append(child)


def _try(read):
    """Return the result of ``read``, or None after an exception, which is not a crash."""
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
        check_text(file, dset)
        if dset.ndim == 1:
            dset[:: 1 if dset.size < _STRIDE**2 else _STRIDE]  # touch every page of the heap that holds the texts
