"""Starts commands as forks of a process that has imported the libraries: most of the time of a short command.

``python tests/starter.py SOCKET`` listens. It imports nothing of the project and runs no command itself, so every
command begins as it does from a shell, apart from the libraries in its memory and the seed of its hashes.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import sys
import warnings
from contextlib import suppress

LIBRARIES = ("numpy", "h5py", "scipy.sparse", "pandas", "pyarrow.parquet", "numba", "yaml", "typer", "rich.progress")


def serve(path: str) -> dict:
    """Listen for ever; return the request in the process that is to run it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    while True:
        peer, _ = listener.accept()
        if os.fork():
            peer.close()
            _reap()
            continue
        with peer.makefile("rb") as lines:
            line = lines.readline()
        if not line:  # the tests are over
            os._exit(0)
        child = os.fork()
        if child:
            peer.sendall(f"{child}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            peer.sendall(f"{status}\n".encode())
            os._exit(0)
        peer.close()
        listener.close()
        return json.loads(line)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    del sys.path[0]  # this folder
    warnings.simplefilter("ignore")
    for name in LIBRARIES:
        importlib.import_module(name)
    request = serve(sys.argv[1])
    warnings.resetwarnings()
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])  # as python -m does
    os.environ.clear()
    os.environ.update(request["env"])
    for fd, where in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[where], os.O_WRONLY | os.O_CREAT), fd)
    sys.argv[1:] = request["args"]
    runpy.run_module("vcelltools.cli.main", run_name="__main__", alter_sys=True)
