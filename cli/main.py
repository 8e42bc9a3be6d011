"""``vcelltools``, the command line: start commands and turn errors into exit codes."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from vcelltools.cli import streams
from vcelltools.errors import VcellError
from vcelltools.names import show, show_lines
from vcelltools.version import __version__

if TYPE_CHECKING:
    import typer

_LEAVE_IN_ORDER = {"jax", "distributed", "multiprocessing.process"}
_PATIENCE_SECONDS = 5.0
_TYPER_INTERRUPTED = 130  # the code that typer returns when it catches Ctrl-C itself

HELP = """From raw single-cell perturbation atlases to a scored prediction.

The workflow: inspect → hvg → basis → build-store → train → predict → score.
For the help of a command: vcelltools COMMAND --help.
"""


def make_app(name: str | None = None) -> typer.Typer:
    """Return the command line with what the first word needs, or with everything: building all takes 80 ms."""
    import typer

    from vcelltools.cli.help import Command

    def print_version(value: bool) -> None:
        if value:
            sys.stdout.write(f"vcelltools {__version__}\n")
            raise typer.Exit

    shown = typer.Option(False, "--version", callback=print_version, is_eager=True, help="Print the version and exit.")

    def root(version: bool = shown) -> None:
        pass

    app = typer.Typer(
        name="vcelltools",
        help=HELP,
        no_args_is_help=True,
        rich_markup_mode=None,  # plain help: rich would double the start-up
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(root)
    alone = name in (*COMMANDS, *GROUPS, "--version")
    for command in (c for c in COMMANDS if c == name or not alone):
        module, function, short = COMMANDS[command]
        found = getattr(importlib.import_module(f"vcelltools.cli.{module}"), function)
        app.command(command, short_help=short, cls=Command)(found)
    for group in (g for g in GROUPS if g == name or not alone):
        module, short = GROUPS[group]
        found = importlib.import_module(f"vcelltools.cli.{module}").app
        app.add_typer(found, name=group, short_help=short, help=f"{short}.")
    return app


# command -> (module of vcelltools.cli, function, one line); in the order of the workflow
COMMANDS = {
    "demo": ("demo", "demo", "Run the whole workflow on simulated data"),
    "doctor": ("doctor", "doctor", "Check this machine"),
    "init": ("init", "init", "Write vcelltools.toml from the files of a folder"),
    "inspect": ("inspect", "inspect", "Describe a file"),
    "hvg": ("hvg", "hvg", "Select highly variable genes, in one pass"),
    "qc": ("qc", "qc", "Measure and flag the quality of cells"),
    "guides": ("guides", "guides", "Assign guides to cells, and cells to targets"),
    "responders": ("responders", "responders", "Measure which perturbations and cells responded"),
    "normalize": ("normalize", "normalize", "Normalize to log1p CP10K and write an h5ad"),
    "convert": ("convert", "convert", "Convert a file to an h5ad in any layout"),
    "sample": ("convert", "sample", "Sample cells at random or by group"),
    "simulate": ("simulate", "simulate", "Simulate a Perturb-seq atlas"),
    "basis": ("basis", "basis", "Choose one gene list for all data sets"),
    "build-store": ("build_store", "build_store", "Build compact stores for training"),
    "verify": ("verify", "verify", "Check every byte of a store"),
    "features": ("features", "features", "Compute features of perturbations"),
    "train": ("train", "train", "Train a model and compare it with baselines"),
    "predict": ("predict", "predict", "Predict cells with a trained run"),
    "evaluate": ("evaluate", "evaluate", "Score models on splits, with paired intervals"),
    "de": ("de", "de", "Test every perturbation against the controls"),
    "pseudobulk": ("pseudobulk", "pseudobulk", "Sum the counts of every combination of labels"),
    "baseline": ("baseline", "baseline", "Write the prediction of a baseline"),
    "score": ("score", "score", "Score a prediction against the truth"),
    "prep": ("prep", "prep", "Pack a prediction into a .vcc submission"),
    "lint": ("lint", "lint", "Check a .vcc submission"),
}


# command with subcommands -> (module of vcelltools.cli, one line)
GROUPS = {
    "atlas": ("atlas", "List, fetch and merge public atlases"),
    "spatial": ("spatial", "Fit gene regulation across a tissue and simulate knockouts"),
}


def _report(error: VcellError) -> int:
    """Print the error in one line (as JSON on stdout with ``--json``) and return the exit code."""
    if "--json" in sys.argv:
        body = {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        sys.stdout.write(json.dumps({"error": body}) + "\n")
    sys.stderr.write(f"error: {show(error)}\n")
    return error.exit_code


class _Interrupted(SystemExit):
    """Raised after Ctrl-C, while threads may still be working."""


def _report_interrupt() -> NoReturn:
    from vcelltools.errors import InterruptedRun

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)  # the process is ending
    raise _Interrupted(_report(InterruptedRun("interrupted", hint="run the same command again")))


def _came_of_interrupt(e: BaseException | None) -> bool:
    """Return whether Ctrl-C is the root cause: importing jaxlib turns it into an ImportError."""
    while e is not None:
        if isinstance(e, KeyboardInterrupt):
            return True
        e = e.__cause__ or e.__context__
    return False


def main() -> None:
    """Run the command line and exit with the codes of :mod:`vcelltools.errors`."""
    try:
        code = make_app(sys.argv[1] if len(sys.argv) > 1 else None)(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            _report_interrupt()
    except VcellError as e:
        code = _report(e)
    except KeyboardInterrupt:
        _report_interrupt()
    except MemoryError as e:
        code = _report_memory(e)
    except Exception as e:
        if _came_of_interrupt(e):
            _report_interrupt()
        code = _handle_refusal(e) if isinstance(e, OSError) else _handle_usage(e)
    sys.exit(code if isinstance(code, int) else 0)


def _report_memory(e: MemoryError) -> int:
    """Report that memory ran out; NumPy's message says how much it asked for."""
    from vcelltools.errors import EnvironmentFault

    said = f": {e}" if str(e) else ""
    return _report(EnvironmentFault(f"not enough memory{said}", hint="close other programs, or use a larger machine"))


class _Interrupt:
    """Raise KeyboardInterrupt, but not again while the first one is being handled."""

    last: float | None = None

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.last is None or now - self.last > _PATIENCE_SECONDS:
            self.last = now
            raise KeyboardInterrupt


_interrupt = _Interrupt()


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again if it arrived in a finalizer or a callback of a C library, where it cannot be raised."""
    if unraisable.exc_type is KeyboardInterrupt:
        _interrupt.last = None
        main_thread = threading.main_thread().ident
        number = signal.SIGINT if callable(signal.getsignal(signal.SIGINT)) else signal.SIGTERM  # SIGINT may be ignored
        timer = threading.Timer(0.05, signal.pthread_kill, (main_thread, number))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def _report_bug(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """Print a traceback with control characters escaped, because a message may hold a name from a file."""
    import traceback

    sys.stderr.write(show_lines("".join(traceback.format_exception(kind, error, tb))))


def run() -> NoReturn:
    """Run the command line as the main program, and exit without the interpreter's teardown.

    Unloading numba's compiler alone costs 0.15 s. If other threads run, or a loaded library must release
    devices or workers, the process exits normally. After Ctrl-C it never does, because tearing down libraries
    while threads are still inside them (XLA compiling) ends in a segmentation fault.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)  # same as Ctrl-C: stop the workers and exit with 5
    sys.unraisablehook = _raise_again
    streams.open_all()
    sys.excepthook = _report_bug
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # file names may not be valid text
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # an idle BLAS thread spins for 0.1 s and competes with ours
    gc.set_threshold(250_000, 20, 20)  # imports create many objects and no garbage, and collecting takes 40 ms
    try:
        main()
        code = 0
    except _Interrupted as e:
        _leave_at_once(e.code)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done and reported, so there is nothing left to interrupt
    if threading.active_count() > 1 or not sys.modules.keys().isdisjoint(_LEAVE_IN_ORDER):
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)
    atexit._run_exitfuncs()
    os._exit(code)


def _leave_at_once(code: int) -> NoReturn:
    """Terminate the children and exit without any teardown."""
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.terminate()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _handle_refusal(e: OSError) -> int:
    """Report that the system denies a file or disk space; raise any other error again, as a bug."""
    from vcelltools.errors import EnvironmentFault, UsageError
    from vcelltools.io.write.atomic import FULL, REFUSED

    if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return _report(UsageError(f"{e.filename}: {str(e.strerror).lower()}", hint="choose another name"))
    full = e.errno in FULL
    if not full and e.errno not in REFUSED:
        raise e
    hint = "free some space" if full else "check the mode and owner of the file and its folders"
    what = f"{e.filename}: " if e.filename is not None else ""
    return _report(EnvironmentFault(f"{what}{(e.strerror or str(e)).lower()}", hint=hint))


def _handle_usage(e: Exception) -> int:
    """Report a usage error of the parser like every other error; raise any other exception again, as a bug."""
    if type(e).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{e.format_message()}\n")  # type: ignore[attr-defined]
        return 2
    if hasattr(e, "exit_code") and hasattr(e, "format_message"):
        from vcelltools.cli.help import say_range
        from vcelltools.errors import UsageError

        context = getattr(e, "ctx", None)
        path = context.command_path if context is not None else "vcelltools"
        message = say_range(e.format_message().rstrip(".")).replace(" (Possible options: ", "; possible: ").rstrip(")")
        return _report(UsageError(message, hint=f"{path} --help"))
    if type(e).__name__ == "Abort":
        return _report_interrupt()
    raise e


if __name__ == "__main__":
    run()
