"""Write ``docs/api.md`` from the public docstrings and ``docs/atlases.md`` from the presets.

``python docs/make_api.py`` writes the pages; with ``--check`` it only compares them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cached_property
from pathlib import Path

# the types that the functions of `vcelltools` take and return
MORE = (
    "vcelltools.io.open_dataset",
    "vcelltools.selection.hvg.compute_hvg",
    "vcelltools.selection.hvg.HvgResult",
    "vcelltools.stores.store.Store",
    "vcelltools.sampling.splits.Split",
    "vcelltools.training.train.train",
    "vcelltools.scoring.result.Result",
    "vcelltools.config.DatasetConfig",
    "vcelltools.config.BasisConfig",
    "vcelltools.training.settings.TrainSettings",
    "vcelltools.errors",
)
HEAD = """# API

Generated from the docstrings by `docs/make_api.py`; a test checks that it is current.

```python
import vcelltools as vc
```
"""


def find(path: str) -> object:
    """Return the object of a dotted path, which may be a module."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def get_signature(obj: object) -> str:
    """Return a signature on lines of at most 100 characters."""
    text = str(inspect.signature(obj))  # type: ignore[arg-type]
    text = re.sub(r"<[\w.]*Silent object at 0x[0-9a-f]+>", "SILENT", text)
    text = re.sub(r"PosixPath\('([^']*)'\)", r'Path("\1")', text)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text).replace("'", '"')  # an annotation, then a default
    if len(text) <= 80:
        return text
    inner, _, back = text.rpartition(")")
    depth, parts, last = 0, [], 0
    body = inner[1:]
    for i, c in enumerate(body):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(body[last:i].strip())
            last = i + 1
    parts.append(body[last:].strip())
    return "(\n" + "".join(f"    {p},\n" for p in parts if p) + ")" + back


def describe(name: str, obj: object) -> str:
    """Return the section of one object, followed by its methods and properties."""
    doc = inspect.getdoc(obj) or ""
    if inspect.ismodule(obj):
        return f"## {name}\n\n```text\n{doc}\n```\n"
    lines = [f"## {name}\n"]
    if inspect.isfunction(obj):
        lines.append(f"```python\n{name.rpartition('.')[2]}{get_signature(obj)}\n```\n")
    lines.append(f"```text\n{doc}\n```\n")
    if inspect.isclass(obj):
        for key, member in vars(obj).items():
            public = inspect.isfunction(member) or isinstance(member, property | cached_property)
            if key.startswith("_") or not public:
                continue
            said = inspect.getdoc(member) or ""
            call = get_signature(member) if inspect.isfunction(member) else ""
            short = call if "\n" not in call else "(…)"
            lines.append(f"- `.{key}{short}`: {said.splitlines()[0] if said else ''}")
        lines.append("")
    return "\n".join(lines)


def make_api() -> str:
    """Return ``api.md``."""
    import vcelltools

    parts = [HEAD]
    for name, module in vcelltools._PUBLIC.items():
        parts.append(describe(f"vc.{name}", getattr(importlib.import_module(module), name)))
    parts += [describe(path, find(path)) for path in MORE]
    return "\n".join(parts).rstrip() + "\n"


ATLASES = """# Public atlases

Generated from `vcelltools/presets.py` by `docs/make_api.py`. A preset supplies the column names of an atlas; a
data set in `vcelltools.toml` then needs a name, a path and the preset, and every key can be overridden:

```toml
[[datasets]]
name = "k562"
path = "K562_essential_raw_singlecell_01.h5ad"
preset = "replogle-k562-essential"
min_cells = 30
```

The names are those of the published files, according to public pages and code; each entry says what it was
checked against. The files themselves were not opened, so run `--plan` first: it shows what the names match in your file
(cells, groups, controls, genes) before anything is built. A missing label or column is an error that lists
those that exist.
"""


def make_atlases() -> str:
    """Return ``atlases.md``."""
    from vcelltools.presets import PRESETS

    parts = [ATLASES]
    for name, preset in PRESETS.items():
        file = get_file(name, preset.source)
        lines = [f"## {name}\n", f"{preset.title}. {preset.source}.\n", "| key | value |", "|---|---|"]
        lines += [f"| `{k}` | {show(v)} |" for k, v in preset.values.items()]
        if preset.notes:
            lines.append(f"\nNote: {preset.notes}.")
        lines.append(f"\nChecked against: {preset.checked}.")
        lines.append(f"\n```console\n$ vcelltools build-store {file} --preset {name} --basis basis.txt --plan\n```\n")
        parts.append("\n".join(lines))
    return "\n".join(parts).rstrip() + "\n"


def get_file(name: str, source: str) -> str:
    """Return the published name of the file, or the name of the preset."""
    found = re.search(r"[\w.-]+\.h5(ad|mu)", source)
    return found.group(0) if found else f"{name}.h5ad"


def show(value: object) -> str:
    """Return a preset's value as Markdown."""
    if isinstance(value, list):
        return ", ".join(f"`{v}`" for v in value)
    if hasattr(value, "__struct_fields__"):
        return ", ".join(f"{k} `{getattr(value, k)}`" for k in value.__struct_fields__).replace("`|`", "`\\|`")
    return f"`{value}`"


PAGES = {"api.md": make_api, "atlases.md": make_atlases}


def main() -> int:
    """Write the pages, or check them."""
    old = []
    for name, make in PAGES.items():
        path, text = Path(__file__).with_name(name), make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    said = "old: " if "--check" in sys.argv else "wrote "
    sys.stdout.write(f"{said}{', '.join(old)}\n" if old else "up to date\n")
    return 1 if old and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
