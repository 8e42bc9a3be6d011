"""How every command's help looks: which arguments may repeat, what a value is, which values are allowed."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

_METAVARS = {"int": "N", "integer": "N", "float": "X", "path": "PATH", "str": "NAME", "text": "NAME"}


class Command(TyperCommand):
    """A command whose usage line and options read alike, whatever the version of typer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for p in self.params:
            if p.param_type_name == "option" and p.metavar is None and not getattr(p, "is_flag", False):
                p.metavar = _METAVARS.get(p.type.name.removesuffix(" range"))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return ``[OPTIONS] FILE... [STORE]...``."""
        out = ["[OPTIONS]"]
        for p in self.get_params(ctx):
            if p.param_type_name == "argument":
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
            if p.param_type_name == "argument":
                name = p.metavar or (p.name or "").upper()
                arguments.append((name + ("..." if p.nargs == -1 else ""), record[1].replace("  [required]", "")))
            else:
                options.append((record[0], say_range(record[1])))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def say_range(text: str) -> str:
    """Say a range of the parser's in words."""
    text = re.sub(r"([\d.e-]+)<=x<=([\d.e-]+)", r"\1 to \2", text)
    text = text.replace("is not in the range x>=", "is not x>=")
    return re.sub(r"x>=([\d.e-]+)", r"at least \1", text)
