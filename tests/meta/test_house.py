"""The house rules that a machine can check: layers, start-up, and what the text may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "numba", "jax", "anndata", "h5py", "pandas", "scipy", "scanpy", "mudata", "zarr")

# package -> third-party packages it must never import, at any depth of its own files
FORBIDDEN = {
    "vcelltools/errors.py": (*HEAVY, "vcelltools"),
    "vcelltools/chunks.py": ("h5py", "anndata", "pandas", "numba", "jax"),
    "vcelltools/kernels": ("h5py", "anndata", "pandas", "jax", "mudata", "zarr"),
    "vcelltools/model": ("h5py", "anndata", "numba", "mudata", "zarr", "pandas"),
    "vcelltools/pipelines": ("h5py", "typer"),
    "vcelltools/scoring": ("h5py", "typer"),
    "vcelltools/io": ("jax", "typer", "numba"),
    "cli": ("h5py", "numba", "anndata", "zarr"),
}


def get_sources() -> list[Path]:
    return [p for d in ("vcelltools", "cli") for p in sorted((ROOT / d).rglob("*.py"))]


def get_imports(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
    return out


@pytest.mark.parametrize("path", get_sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers(path):
    name = str(path.relative_to(ROOT))
    imports = get_imports(path)
    for package, forbidden in FORBIDDEN.items():
        if name == package or name.startswith(package + "/"):
            for module in imports:
                assert module.split(".")[0] not in forbidden, f"{name} imports {module}"
    if not name.startswith("cli/"):
        assert not any(m.startswith("vcelltools.cli") for m in imports), f"{name} imports the command line"
    if name.startswith("vcelltools/kernels/"):
        inner = {m for m in imports if m.startswith("vcelltools")}
        assert inner <= {"vcelltools.kernels._jit", "vcelltools.errors"}, f"{name}: a kernel file is self-contained"
        loads = name.endswith(("_jit.py", "_lean.py"))
        assert loads or "numba" not in imports, f"{name}: _jit.py alone compiles, _lean.py alone loads numba"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['vcelltools', '--help']\n"
        "from vcelltools.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout, done.stdout[-400:]


def test_hvg_loads_no_jax_scanpy_anndata_pandas(tmp_path):
    from tests.make import as_layout, make_adata, make_counts

    make_adata(as_layout(make_counts(40, 30), "csr")).write_h5ad(tmp_path / "x.h5ad")
    code = (
        f"import sys; sys.argv = ['vcelltools', 'hvg', {str(tmp_path / 'x.h5ad')!r}, '--top', '5', "
        f"'--out', {str(tmp_path / 'h.txt')!r}]\n"
        "from vcelltools.cli.main import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', [m for m in ('jax', 'scanpy', 'anndata', 'pandas', 'statsmodels', 'pyarrow', 'matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "LOADED []" in done.stdout, done.stdout[-400:] + done.stderr[-400:]


def test_no_pickle_and_no_machine_paths():
    for path in get_sources():
        text = path.read_text()
        assert not re.search(r"^\s*(import|from) pickle", text, re.M), path
        assert "allow_pickle=True" not in text, path
        assert not re.search(r"/(root|home|work)/\w", text), path


def test_files_stay_readable():
    for path in get_sources():
        n = len(path.read_text().splitlines())
        assert n <= 600, f"{path.relative_to(ROOT)} has {n} lines"


def test_nothing_lies_among_the_sources_that_does_not_belong_there():
    for folder in ("vcelltools", "cli", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.suffix in {".py", ".typed", ".j2"}, path.relative_to(ROOT)
