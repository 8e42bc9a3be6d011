"""``vcelltools``: the command line. A command parses, calls one pipeline and prints; errors become exit codes here."""

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
from typing import Annotated, NoReturn

import typer

from vcelltools import __version__
from vcelltools.cli.help import Command, say_range
from vcelltools.errors import VcellError

_LEAVE_IN_ORDER = {"jax", "distributed", "multiprocessing.process"}
_TYPER_INTERRUPTED = 130  # what typer makes of Ctrl-C before it reaches us

HELP = """From raw single-cell perturbation atlases to a scored prediction.

The road: inspect → hvg → basis → build-store → train → predict → score.
Every command explains itself: vcelltools COMMAND --help.
"""

app = typer.Typer(
    name="vcelltools",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would double the start-up
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"vcelltools {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# command -> (module of vcelltools.cli, function, one line); in the order of the road
COMMANDS = {
    "demo": ("demo", "demo", "The whole road on simulated data, in minutes"),
    "doctor": ("doctor", "doctor", "What this machine has, and what it lacks"),
    "init": ("init", "init", "Write vcelltools.toml from the files of a folder"),
    "inspect": ("inspect", "inspect", "What is in a file"),
    "hvg": ("hvg", "hvg", "Highly variable genes, in one pass"),
    "normalize": ("normalize", "normalize", "CP10K and log1p, to a new h5ad"),
    "convert": ("convert", "convert", "Any readable file to an h5ad of any layout"),
    "sample": ("convert", "sample", "A random or stratified sample of the cells"),
    "simulate": ("simulate", "simulate", "A Perturb-seq atlas with known effects"),
    "basis": ("basis", "basis", "One gene list over all data sets"),
    "build-store": ("build_store", "build_store", "Compact, checked stores for training"),
    "verify": ("verify", "verify", "Check every byte of a store"),
    "train": ("train", "train", "Train a model, beside its baselines"),
    "predict": ("predict", "predict", "A trained run's prediction, as an h5ad"),
    "de": ("de", "de", "Every perturbation against the controls"),
    "baseline": ("baseline", "baseline", "A baseline's prediction"),
    "score": ("score", "score", "Score a prediction against the truth"),
    "prep": ("prep", "prep", "Pack a prediction into a .vcc"),
    "lint": ("lint", "lint", "Check a .vcc"),
}


def _add_commands(name: str | None) -> None:
    """Add the one command that was asked for, or all where none of them was: building all takes 80 ms."""
    for command in [name] if name in COMMANDS else list(COMMANDS):
        module, function, short = COMMANDS[str(command)]
        found = getattr(importlib.import_module(f"vcelltools.cli.{module}"), function)
        app.command(command, short_help=short, cls=Command)(found)


def _report(error: VcellError) -> int:
    """Say the error in one line (as JSON on stdout with ``--json``); return the exit code."""
    if "--json" in sys.argv:
        body = {
            "kind": error.kind,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        sys.stdout.write(json.dumps({"error": body}) + "\n")
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


class _Interrupted(SystemExit):
    """Ctrl-C in the middle of the work, which threads may still be at."""


def _report_interrupt() -> NoReturn:
    from vcelltools.errors import InterruptedRun

    raise _Interrupted(_report(InterruptedRun("interrupted", hint="run the same command again")))


def _came_of_interrupt(e: BaseException | None) -> bool:
    """Tell whether Ctrl-C stands at the root: a library that is being loaded makes an ImportError of it (jaxlib)."""
    while e is not None:
        if isinstance(e, KeyboardInterrupt):
            return True
        e = e.__cause__ or e.__context__
    return False


def main() -> None:
    """Run the command line and exit with the codes of :mod:`vcelltools.errors`."""
    try:
        _add_commands(sys.argv[1] if len(sys.argv) > 1 else None)
        code = app(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            _report_interrupt()
    except VcellError as e:
        code = _report(e)
    except KeyboardInterrupt:
        _report_interrupt()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our stdout has gone; nothing to say
        code = 0
    except Exception as e:
        if _came_of_interrupt(e):
            _report_interrupt()
        code = _handle_refusal(e) if isinstance(e, OSError) else _handle_usage(e)
    sys.exit(code if isinstance(code, int) else 0)


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Let Ctrl-C come once more where it met a finalizer or a C library's callback, which cannot raise it."""
    if unraisable.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident
        timer = threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def run() -> NoReturn:
    """Run the command line as a process of its own, and end it without taking it apart.

    Unloading numba's compiler alone costs 0.15 s. Where other threads run, or a library is loaded that must say
    goodbye to devices or workers, the process ends as usual; after Ctrl-C it never does, because taking libraries apart
    under threads that are still inside them (XLA compiling) ends in a segmentation fault.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs stops its workers, and says 5
    sys.unraisablehook = _raise_again
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files may be no text
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # a BLAS thread without work spins for 0.1 s beside ours
    gc.set_threshold(100_000, 20, 20)  # imports make much and leave no garbage: looking for it takes 40 ms
    try:
        main()
        code = 0
    except _Interrupted as e:
        _leave_at_once(e.code)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done and said: nothing is left to interrupt
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
    """End the process with its children, without taking anything apart."""
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
    """Say that the system refuses a file or its space; raise anything else again, as the bug it is."""
    from vcelltools.errors import EnvironmentFault, UsageError
    from vcelltools.io.atomic import FULL, REFUSED

    if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return _report(UsageError(f"{e.filename}: {str(e.strerror).lower()}", hint="choose another name"))
    full = e.errno in FULL
    if not full and e.errno not in REFUSED:
        raise e
    hint = "free some space" if full else "check the mode and owner of the file and its folders"
    what = f"{e.filename}: " if e.filename is not None else ""
    return _report(EnvironmentFault(f"{what}{(e.strerror or str(e)).lower()}", hint=hint))


def _handle_usage(e: Exception) -> int:
    """Say a usage error of the parser as every other error; raise anything else again, as the bug it is."""
    if type(e).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{e.format_message()}\n")  # type: ignore[attr-defined]
        return 2
    if hasattr(e, "exit_code") and hasattr(e, "format_message"):
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
