"""What the kill walks share: a call in a child process, killed with SIGKILL at a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


class Killer:
    """Counts the steps; kills the process at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, name: str) -> None:
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def watch(self, *names: str) -> None:
        """Count every call of functions of ``os`` as a step, before it is made."""
        for name in names:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self(name)
            return call(*args, **kwargs)

        return wrapped


def run_killed(call: Callable[[Killer], object], kill_at: int) -> int:
    """Make the call in a child, with the killer of a step; return the signal that ended the child, or 0.

    The process must have no threads, because it forks. SystemExit is raised if the call fails.
    """
    pid = os.fork()
    if pid == 0:
        try:
            call(Killer(kill_at))
        except BaseException as e:
            sys.stderr.write(f"{type(e).__name__}: {e}\n")
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run failed after a kill at step {kill_at}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
