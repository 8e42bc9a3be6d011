"""A queue without a server: the process that creates the lock file of a task owns it; locks of dead owners expire."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vcelltools.errors import EnvironmentFault
from vcelltools.io.write.atomic import locked

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0  # an owner on another machine is dead after this time without a heartbeat


class Queue:
    """The tasks of one folder.

    Parameters
    ----------
    folder
        Folder of locks and results, which machines may share.
    names
        Names of the tasks.
    is_done
        Function that returns whether the result of a task exists.
    """

    def __init__(self, folder: Path, names: Sequence[str], is_done: Callable[[str], bool]) -> None:
        self._folder, self._names, self._ask = folder, list(names), is_done
        self._done: set[str] = set()  # a result is not asked for again: with thousands of tasks, that takes long
        self._first = 0  # all tasks before this one are done
        self._held: set[str] = set()
        self._stop = threading.Event()

    def _is_done(self, name: str) -> bool:
        if name not in self._done and self._ask(name):
            self._done.add(name)
        return name in self._done

    def _lock(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    def _try(self, name: str) -> bool:
        """Claim a task by creating its lock; return False if another process owns it or it is done."""
        if self._is_done(name):
            return False
        lock = self._lock(name)
        body = {"host": socket.gethostname(), "pid": os.getpid(), "start": _get_start(os.getpid()), "time": time.time()}
        try:
            fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return self._relieve(lock) and self._try(name)
        with os.fdopen(fd, "w") as f:
            f.write(json.dumps(body))
        self._held.add(name)
        if self._is_done(name):  # its last owner finished between the check and the claim
            self.release(name)
            return False
        return True

    def _relieve(self, lock: Path) -> bool:
        """Remove the lock of a dead owner; only one process at a time checks this."""
        if not _is_dead(lock):
            return False
        try:
            with locked(self._folder / "queue"):
                if not _is_dead(lock):
                    return False
                lock.unlink(missing_ok=True)
                return True
        except EnvironmentFault:  # another process is checking
            return False

    def claim(self, most: int) -> list[str]:
        """Claim and return up to ``most`` tasks, in order; none if no task is free."""
        out: list[str] = []
        while self._first < len(self._names) and self._names[self._first] in self._done:
            self._first += 1
        for name in self._names[self._first :]:
            if len(out) == most:
                break
            if self._try(name):
                out.append(name)
        return out

    def release(self, name: str) -> None:
        """Release a task, done or not."""
        self._held.discard(name)
        self._lock(name).unlink(missing_ok=True)

    def pending(self) -> list[str]:
        """Return the tasks without a result."""
        return [n for n in self._names if not self._is_done(n)]

    def wait(self) -> bool:
        """Wait until a task is free (return True) or all are done (return False)."""
        pause = 0.05
        while left := self.pending():
            if any(not self._lock(n).exists() or _is_dead(self._lock(n)) for n in left):
                return True
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        for n in self._names:  # an owner that was killed between its result and its release leaves a lock
            self._relieve(self._lock(n))
        return False

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Refresh the held locks, and release them at the end."""

        def beat() -> None:
            while not self._stop.wait(BEAT_SECONDS):
                for name in list(self._held):
                    try:
                        os.utime(self._lock(name))
                    except OSError:
                        pass

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            for name in list(self._held):
                self.release(name)


def _is_dead(lock: Path) -> bool:
    """Return whether the owner of a lock is dead: its process has ended, or its heartbeat on another machine."""
    try:
        text, age = lock.read_text(), time.time() - lock.stat().st_mtime
        body = json.loads(text)
        host, pid, start = str(body["host"]), int(body["pid"]), body.get("start")
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):  # the owner was killed while writing, or is still writing
        return age > BEAT_SECONDS
    if host == socket.gethostname():
        return not _is_running(pid) or (start is not None and _get_start(pid) != start)
    return age > DEAD_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _get_start(pid: int) -> str | None:
    """Return the start time of a process in kernel ticks, which distinguishes it from a later one with its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
