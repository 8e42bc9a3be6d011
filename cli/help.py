"""How every command's help looks: which arguments may repeat, what a value is, which values are allowed."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperArgument, TyperCommand

# a value's kind, as the versions of typer write it -> one letter or word
_KINDS = {"int": "N", "integer": "N", "float": "X", "path": "PATH", "str": "NAME", "text": "NAME"}
_KIND = re.compile(
    r"(?<= )(?:<(?:list\[)?(int|float|path|str)(?: range|\])?>|(INTEGER|FLOAT|PATH|TEXT)(?: RANGE)?)$", re.IGNORECASE
)


class Command(TyperCommand):
    """A command whose usage line and options read alike, whatever the version of typer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for p in self.params:
            if hasattr(p.type, "readable"):
                p.type.readable = False  # who opens a file says that it may not, with the exit code for that

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return ``[OPTIONS] FILE... [STORE]...``."""
        out = ["[OPTIONS]"]
        for p in self.get_params(ctx):
            if isinstance(p, TyperArgument):
                name = p.metavar or (p.name or "").upper()
                out.append((name if p.required else f"[{name}]") + ("..." if p.nargs == -1 else ""))
        return out

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options; ranges in words."""
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


def _say_kind(found: re.Match[str]) -> str:
    return _KINDS[(found.group(1) or found.group(2)).lower()]


def say_range(text: str) -> str:
    """Say a range of the parser's in words."""
    text = re.sub(r"([\d.e-]+)<=x<=([\d.e-]+)", r"\1 to \2", text)
    text = text.replace("is not in the range x>=", "is not x>=")
    text = text.replace("Input should be greater than or equal to", "it is not at least")
    return re.sub(r"x>=([\d.e-]+)", r"at least \1", text)
