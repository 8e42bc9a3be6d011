"""Run a script with ``# %%`` cells, and write it as a notebook with its outputs.

``python docs/make_notebook.py docs/spatial_tissue.py`` writes ``docs/spatial_tissue.ipynb``. The script runs in a
temporary folder; the variable ``VCELLTOOLS_TEST_DATA`` names the folder of the public data.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTH = 60  # dots per inch of the figures


def read_cells(script: Path) -> list[tuple[str, str]]:
    """Return (``markdown`` or ``code``, text) of every cell."""
    cells = []
    for part in script.read_text(encoding="utf-8").split("# %%")[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        lines = [line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line for line in body.splitlines()]
        cells.append((kind, "\n".join(lines).strip("\n")))
    return cells


def run_cell(text: str, space: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; return what it prints, its last value and its figures, as a notebook keeps them."""
    import matplotlib.pyplot as plt

    tree = ast.parse(text)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
    out: list[dict[str, Any]] = []
    if printed.getvalue():
        out.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        shown = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            shown["text/html"] = value._repr_html_()
        out.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": shown})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=WIDTH, metadata={"Software": None})
        png = base64.b64encode(picture.getvalue()).decode()
        out.append({"output_type": "display_data", "metadata": {}, "data": {"image/png": png}})
    plt.close("all")
    return out


def main() -> None:
    """Run the script that is named, and write the notebook beside it."""
    script = Path(sys.argv[1]).resolve()
    import matplotlib

    matplotlib.use("Agg")
    cells: list[dict[str, Any]] = []
    space: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for i, (kind, text) in enumerate(read_cells(script)):
            cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": text}
            if kind == "code":
                cell |= {"execution_count": None, "outputs": run_cell(text, space)}
            cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    body = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    script.with_suffix(".ipynb").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
