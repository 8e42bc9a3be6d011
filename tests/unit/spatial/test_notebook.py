"""The notebook is its script after a run: no error, current text in every code cell, and small outputs."""

from __future__ import annotations

import json

from docs.make_notebook import read_cells, run_cell
from tests.conftest import ROOT


def test_the_notebook_is_its_script():
    cells = json.loads((ROOT / "docs" / "spatial_tissue.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [(c["cell_type"], c["source"]) for c in cells] == read_cells(ROOT / "docs" / "spatial_tissue.py"), (
        "run docs/make_notebook.py docs/spatial_tissue.py again"
    )
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    assert len(json.dumps(outputs)) < 400_000 and not any(o["output_type"] == "error" for o in outputs)


def test_a_cell_gives_what_it_prints_and_its_last_value():
    space: dict = {}
    assert run_cell("a = 2\nprint('x')\na + 1", space) == [
        {"output_type": "stream", "name": "stdout", "text": "x\n"},
        {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {"text/plain": "3"}},
    ]
    assert run_cell("b = a", space) == [] and space["b"] == 2
