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
app.command("demo", short_help="The whole road on simulated data, in minutes")(demo.demo)
app.command("doctor", short_help="What this machine has, and what it lacks")(doctor.doctor)
app.command("init", short_help="Write vcelltools.toml from the files of a folder")(init.init)
app.command("inspect", short_help="What is in a file")(inspect.inspect)
app.command("hvg", short_help="Highly variable genes, in one pass")(hvg.hvg)
app.command("normalize", short_help="CP10K and log1p, to a new h5ad")(normalize.normalize)
app.command("convert", short_help="Any readable file to an h5ad of any layout")(convert.convert)
app.command("sample", short_help="A random or stratified sample of the cells")(convert.sample)
app.command("simulate", short_help="A Perturb-seq atlas with known effects")(simulate.simulate)
app.command("basis", short_help="One gene list over all data sets")(basis.basis)
app.command("build-store", short_help="Compact, checked stores for training")(build_store.build_store)
app.command("verify", short_help="Check every byte of a store")(verify.verify)
app.command("train", short_help="Train a model, beside its baselines")(train.train)
app.command("predict", short_help="A trained run's prediction, as an h5ad")(predict.predict)
app.command("de", short_help="Every perturbation against the controls")(de.de)
app.command("baseline", short_help="A baseline's prediction")(baseline.baseline)
app.command("score", short_help="Score a prediction against the truth")(score.score)
app.command("prep", short_help="Pack a prediction into a .vcc")(prep.prep)
app.command("lint", short_help="Check a .vcc")(lint.lint)


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
    """Say a usage error of the parser as every other error; raise anything else again, as the bug it is."""
    if type(e).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{e.format_message()}\n")  # type: ignore[attr-defined]
        return 2
    if hasattr(e, "exit_code") and hasattr(e, "format_message"):
        from vcelltools.errors import UsageError

        context = getattr(e, "ctx", None)
        path = context.command_path if context is not None else "vcelltools"
        return _report(UsageError(e.format_message().rstrip("."), hint=f"{path} --help"))
    if type(e).__name__ == "Abort":
        return _report_interrupt()
    raise e


if __name__ == "__main__":
    main()
