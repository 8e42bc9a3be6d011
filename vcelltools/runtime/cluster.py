"""Connect to a Dask cluster, divide work into parts, and gather the results as they arrive.

The result of a part must depend only on the part, so that a part that is lost with its worker can be computed again
elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vcelltools.errors import EnvironmentFault, InterruptedRun
from vcelltools.runtime.progress import Progress
from vcelltools.runtime.threads import get_threads

if TYPE_CHECKING:
    from distributed import Client

PART_CELLS = 1 << 16
_RETRIES = 10  # number of workers that may be lost over one part
_CONNECT_SECONDS = 10.0  # timeout for a scheduler to answer, and for a lost one to return
_LOST_SECONDS = 60.0  # timeout without any worker, or without an answer of the scheduler, while parts are waiting
_RUN_AGAIN = "start it and run the command again (build-store keeps finished parts)"
_LOOK_SECONDS = 2.0  # interval between checks of the scheduler while no part ends


@contextmanager
def open_cluster(address: str, *, workers: int | None = None) -> Iterator[Client]:
    """Connect to a scheduler (``tcp://host:port``), or start one on this machine for ``local``.

    A local cluster listens only on the loopback interface and has no dashboard.

    Raises
    ------
    EnvironmentFault
        If dask.distributed is not installed, if no Dask scheduler answers at the address within 10 s, or if
        the scheduler is lost while the block runs.
    """
    try:
        import dask
        from distributed import LocalCluster
    except ImportError as e:
        raise EnvironmentFault("a cluster needs dask.distributed", hint="pip install 'vcelltools[dask]'") from e
    with dask.config.set({"distributed.scheduler.allowed-failures": _RETRIES}), _quiet_logs():
        if address == "local":
            loopback = LocalCluster(
                n_workers=workers or get_threads(None),
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                silence_logs=logging.CRITICAL,  # on a busy machine, workers log that they were slow
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            )
            with loopback as cluster, _connect(cluster.scheduler_address) as client, _watch(client):
                yield client
            return
        with _connect(address) as client, _watch(client):
            yield client


@contextmanager
def connect(dask: str | Client | None) -> Iterator[Client | None]:
    """Yield a client of the requested cluster: of :func:`open_cluster` for an address or ``local``; None for None."""
    if not isinstance(dask, str):
        yield dask
        return
    with open_cluster(dask) as client:
        yield client


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Hide the tracebacks that Dask logs about a lost connection: the error reports it in one line."""
    loggers = [logging.getLogger(n) for n in list(logging.root.manager.loggerDict) if n.startswith("distributed")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


def _connect(address: str) -> Client:
    """Return a client of the scheduler at ``address``.

    The client connects in a separate thread, because something else may listen there and never answer, or answer
    anything.
    """
    from distributed import Client

    class ClosedByHand(Client):
        """A client that no finalizer closes.

        Closing takes a lock of the class. The garbage collector may run while that lock is held, and Dask would
        then wait for itself forever. So a client that did not connect is closed at once.
        """

        def __init__(self) -> None:
            try:
                super().__init__(address, timeout=_CONNECT_SECONDS)
            except BaseException:
                with suppress(Exception):  # the first error says what is wrong
                    self.close()
                    self._loop_runner.stop()  # Dask leaves the thread of a client that failed
                raise

        def __del__(self) -> None:
            pass

    done: list[Any] = []
    lock = threading.Lock()

    def connect() -> None:
        try:
            client: Any = ClosedByHand()
        except BaseException as e:
            client = e
        with lock:
            if not done:
                done.append(client)
                return
        if isinstance(client, Client):  # it came too late
            client.close()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS + 2)
    with lock:
        if not done:
            done.append(TimeoutError(f"no answer within {_CONNECT_SECONDS:.0f} s"))
    found = done[0]
    if isinstance(found, BaseException):
        why = "another service listens there, or it is not an address such as tcp://HOST:8786"
        if isinstance(found, OSError):  # a TimeoutError is one
            why = next(iter(str(found).splitlines()), "") or type(found).__name__
        raise EnvironmentFault(f"no Dask scheduler answers at {address}: {why}", hint="dask scheduler") from found
    return found


@contextmanager
def _watch(client: Client) -> Iterator[None]:
    """Raise one clear error if the scheduler is lost, however the client notices."""
    from concurrent.futures import CancelledError

    address = client.scheduler.address if client.scheduler is not None else "its address"
    try:
        yield
    except (OSError, CancelledError, RuntimeError) as e:
        if client.status == "running" and not isinstance(e, CancelledError):
            raise
        raise EnvironmentFault(f"the Dask scheduler at {address} was lost", hint=_RUN_AGAIN) from e


def gather(client: Client, futures: list[Any], keys: list[Any], progress: Progress, sizes: list[int]) -> Iterator[Any]:
    """Yield (key, result) of the parts as they finish.

    Raises
    ------
    EnvironmentFault
        If there is no worker, or no answer of the scheduler, for 60 s.
    InterruptedRun
        If workers are lost repeatedly over one part.
    """
    from distributed import KilledWorker, as_completed

    at = {f.key: i for i, f in enumerate(futures)}
    ended = as_completed(futures)
    while not ended.is_empty():
        _wait(client, ended, progress)
        future = next(ended)
        i = at[future.key]
        try:
            result = future.result()
        except KilledWorker as e:
            raise InterruptedRun(
                f"workers died over part {keys[i]} (out of memory?): {e}",
                hint="run the same command again (build-store keeps finished parts)",
            ) from e
        progress.advance(sizes[i])
        yield keys[i], result
        future.release()


def _wait(client: Client, ended: Any, progress: Progress) -> None:
    """Wait until a part finishes, and check from time to time that there still are workers."""
    looked = had_workers = time.monotonic()
    said = False
    while not ended.has_ready():
        with ended.thread_condition:
            ended.thread_condition.wait(timeout=0.1)
        if time.monotonic() - looked < _LOOK_SECONDS:
            continue
        lost = f"the Dask scheduler has had no worker for {_LOST_SECONDS:.0f} s"
        try:
            if client.sync(client.scheduler.ncores, callback_timeout=_LOST_SECONDS):  # type: ignore[union-attr]
                had_workers = time.monotonic()
            elif not said:
                progress.note(f"the Dask scheduler has no worker; waiting {_LOST_SECONDS:.0f} s for one")
                said = True
        except TimeoutError:
            lost = f"the Dask scheduler has not answered for {_LOST_SECONDS:.0f} s"
        looked = time.monotonic()
        if looked - had_workers > _LOST_SECONDS and not ended.has_ready():
            raise EnvironmentFault(lost, hint=_RUN_AGAIN)


def cut(start: int, stop: int, step: int, done: list[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Divide ``start:stop`` into parts of ``step``, without the ranges that are done."""
    out, at = [], start
    for a, b in [*sorted(done or []), (stop, stop)]:
        out += [(i, min(i + step, a)) for i in range(at, a, step)]
        at = max(at, b)
    return out
