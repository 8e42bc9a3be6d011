"""The contract of the kernels that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vcelltools.kernels.faults import Fault

KERNELS = Path(__file__).resolve().parents[2] / "vcelltools" / "kernels"
FILES = sorted(KERNELS.glob("*.py"))
LOADERS = {"_jit.py", "_lean.py", "cache.py"}
MAX_LINES = 150
MATRIX = ("indptr", "indices", "data")


def list_kernels():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("kernel" in ast.unparse(d) for d in node.decorator_list):
                yield pytest.param(path, node, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_kernels_know_arrays_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            if top == "vcelltools":
                assert name.startswith(("vcelltools.kernels", "vcelltools.errors")), f"{path.name} imports {name}"
            elif top == "numba":
                assert path.name in LOADERS, "_jit.py alone compiles, cache.py keeps, _lean.py loads"


@pytest.mark.parametrize(("path", "node"), list(list_kernels()))
def test_a_kernel_is_short_documented_and_takes_a_matrix_in_order(path, node):
    assert node.end_lineno - node.lineno < MAX_LINES, f"{node.name} has more than {MAX_LINES} lines"
    assert node.name.startswith("_") or ast.get_docstring(node), f"{node.name} says what it does"
    args = [a.arg for a in node.args.args]
    at = [args.index(n) for n in MATRIX if n in args]
    assert at == sorted(at) and (not at or at == list(range(at[0], at[0] + len(at)))), f"{node.name}: {MATRIX} first"
    body = [n for n in ast.walk(node) if isinstance(n, ast.Raise | ast.Try | ast.Assert)]
    assert not body, f"{node.name} raises: a violation is a fault that is returned"


def test_no_kernel_names_a_fault_by_its_number():
    """A status is returned or written by its name: no file but faults.py gives one a value."""
    names = {f.name for f in Fault}
    for path in FILES:
        if path.name == "faults.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign):
                targets = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                assert not targets & (names - {"FULL"}), f"{path.name}: {targets & names}"
                written = [ast.unparse(t) for t in node.targets]
                if any(w.startswith(("state[FAULT]", "state[0]", "status[0]")) for w in written):
                    assert not isinstance(node.value, ast.Constant), f"{path.name}: {ast.unparse(node)}"
