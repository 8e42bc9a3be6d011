"""Format the help of every command: repeatable arguments, kinds of value, allowed values."""

from __future__ import annotations

import re
import time
from typing import Any

from typer.core import TyperArgument, TyperCommand

from vcelltools.errors import check_number, speak_flags

# the kind of a value, as different versions of typer write it -> one letter or word
_KINDS = {"int": "N", "integer": "N", "float": "X", "path": "PATH", "str": "NAME", "text": "NAME"}
_KIND = re.compile(
    r"(?<= )(?:<(?:list\[)?(int|float|path|str)(?: range|\])?>|(INTEGER|FLOAT|PATH|TEXT)(?: RANGE)?)$", re.IGNORECASE
)


class Command(TyperCommand):
    """A command whose help looks the same with every version of typer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for p in self.params:
            if hasattr(p.type, "readable"):
                p.type.readable = False  # the reader reports an unreadable file, with the right exit code

    def invoke(self, ctx: Any) -> Any:
        """Run the command; messages of the library name the option in place of the argument."""
        options = [p for p in self.params if p.name and p.opts[0].startswith("-")]
        speak_flags({p.name: next((o for o in p.opts if o.startswith("--")), p.opts[0]) for p in options})
        for p in self.params:
            values = ctx.params.get(p.name)
            for value in values if isinstance(values, list | tuple) else [values]:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    check_number(str(p.name), value)
        began = time.monotonic()
        try:
            result = super().invoke(ctx)
        except EOFError as e:  # typer would take it for the end of the user's input and report "interrupted"
            raise RuntimeError("a file or a pipe ended too early") from e
        if ctx.params.get("verbose") and not ctx.params.get("quiet"):
            say_cost(time.monotonic() - began)
        return result

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return ``[OPTIONS] FILE... [STORE]...``."""
        out = ["[OPTIONS]"]
        for p in self.get_params(ctx):
            if isinstance(p, TyperArgument):
                name = p.metavar or (p.name or "").upper()
                out.append((name if p.required else f"[{name}]") + ("..." if p.nargs == -1 else ""))
        return out

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options, with ranges in words."""
        arguments, options = [], []
        for p in self.get_params(ctx):
            record = p.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(p, TyperArgument):
                name = p.metavar or (p.name or "").upper()
                arguments.append((name + ("..." if p.nargs == -1 else ""), record[1].replace("  [required]", "")))
            else:
                options.append((_KIND.sub(_say_kind, record[0]), say_range(record[1])))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def say_cost(seconds: float) -> None:
    """Print the time and memory of a command on stderr, for ``--verbose``."""
    import sys

    from vcelltools.runtime.memory import peak_memory
    from vcelltools.version import __version__

    sys.stderr.write(f"vcelltools {__version__}: {seconds:.2f} s, peak memory {peak_memory() / 1e9:.2f} GB\n")


def _say_kind(found: re.Match[str]) -> str:
    return _KINDS[(found.group(1) or found.group(2)).lower()]


def say_range(text: str) -> str:
    """Rewrite the parser's notation for a range in words."""
    text = re.sub(r"([\d.e-]+)<=x<=([\d.e-]+)", r"\1 to \2", text)
    text = text.replace("is not in the range x>=", "is not x>=")
    text = text.replace("Input should be greater than or equal to", "it is not at least")
    return re.sub(r"x>=([\d.e-]+)", r"at least \1", text)
