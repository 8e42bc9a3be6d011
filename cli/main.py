"""``vcelltools``: the command line. A command parses, calls one pipeline and prints; errors become exit codes here."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from vcelltools import __version__
from vcelltools.cli import (
    baseline,
    basis,
    build_store,
    convert,
    de,
    demo,
    doctor,
    hvg,
    init,
    inspect,
    lint,
    normalize,
    predict,
    prep,
    score,
    simulate,
    train,
    verify,
)
from vcelltools.errors import VcellError

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


# in the order of the road
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("init")(init.init)
app.command("inspect")(inspect.inspect)
app.command("hvg")(hvg.hvg)
app.command("normalize")(normalize.normalize)
app.command("convert")(convert.convert)
app.command("sample")(convert.sample)
app.command("simulate")(simulate.simulate)
app.command("basis")(basis.basis)
app.command("build-store")(build_store.build_store)
app.command("verify")(verify.verify)
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("de")(de.de)
app.command("baseline")(baseline.baseline)
app.command("score")(score.score)
app.command("prep")(prep.prep)
app.command("lint")(lint.lint)


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


def _report_interrupt() -> int:
    from vcelltools.errors import InterruptedRun

    return _report(InterruptedRun("interrupted", hint="run the same command again"))


def main() -> None:
    """Run the command line and exit with the codes of :mod:`vcelltools.errors`."""
    try:
        code = app(standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            code = _report_interrupt()
    except VcellError as e:
        code = _report(e)
    except KeyboardInterrupt:
        code = _report_interrupt()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our stdout has gone; nothing to say
        code = 0
    except Exception as e:
        code = _handle_usage(e)
    sys.exit(code if isinstance(code, int) else 0)


def _handle_usage(e: Exception) -> int:
    """Show a usage error of the parser and return 2; raise anything else again, as the bug it is."""
    if hasattr(e, "exit_code") and hasattr(e, "show"):
        if "--json" in sys.argv:
            body = {"kind": "usage", "message": e.format_message(), "hint": None, "exit_code": 2}  # type: ignore[attr-defined]
            sys.stdout.write(json.dumps({"error": body}) + "\n")
        e.show()
        return 2
    if type(e).__name__ == "Abort":
        return _report_interrupt()
    raise e


if __name__ == "__main__":
    main()
