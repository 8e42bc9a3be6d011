"""The house rules that a machine can check: layers, start-up, and what the text may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "numba", "jax", "anndata", "h5py", "pandas", "scipy", "scanpy", "mudata", "zarr")

# room -> third-party packages that it must never import, in any function either
FORBIDDEN = {
    "errors": HEAVY,
    "kernels": ("h5py", "anndata", "pandas", "jax", "mudata", "zarr"),
    "model": ("h5py", "anndata", "numba", "mudata", "zarr", "pandas"),
    "io": ("jax", "typer", "numba"),
    "cli": ("h5py", "numba", "anndata", "zarr"),
}
OTHER_ROOMS = (
    "h5py",
    "typer",
    "zarr",
)  # for every room that is not listed: ``io`` alone opens files, ``cli`` alone parses

# room -> the rooms that it may import, lowest floors first
FLOORS = {
    "version": (),
    "errors": (),
    "names": (),
    "runtime": ("errors", "names",),
    "kernels": ("errors", "names",),
    "io": ("version", "errors", "names", "runtime", "kernels"),
    "config": ("errors", "names", "io"),
    "presets": ("errors", "config"),
    "genes": ("errors", "names", "runtime", "kernels", "io"),
    "selection": ("version", "errors", "names", "runtime", "kernels", "io", "config", "genes"),
    "files": ("errors", "names", "runtime", "kernels", "io", "config", "genes", "selection"),
    "simulation": ("errors", "names", "runtime", "kernels", "io"),
    "differential": ("errors", "names", "runtime", "kernels", "io", "genes"),
    "stores": (
        "version", "errors", "names", "runtime", "kernels", "io", "config", "genes", "selection", "presets", "files",
    ),
    "descriptors": ("errors", "names", "runtime", "kernels", "io", "config", "genes", "stores"),
    "model": ("errors",),
    "sampling": ("errors", "names", "runtime", "kernels", "io", "model", "stores"),
    "scoring": ("version", "errors", "names", "runtime", "kernels", "io", "genes", "differential"),
    "challenge": ("version", "errors", "names", "runtime", "io", "scoring"),
    "training": ("version", "errors", "names", "runtime", "io", "config", "descriptors", "model", "stores", "sampling"),
    "prediction": (
        "version", "errors", "names", "runtime", "kernels", "io", "config", "genes", "descriptors", "model", "stores",
        "sampling", "scoring", "challenge", "training",
    ),
    "evaluation": (
        "version", "errors", "names", "runtime", "io", "config", "genes", "model", "stores", "sampling", "differential",
        "training", "prediction",
    ),
    "atlas": (
        "version", "errors", "names", "runtime", "kernels", "io", "config", "genes", "selection", "files", "stores",
        "sampling",
    ),
    "spatial": ("version", "errors", "names", "runtime", "kernels", "io", "config", "genes", "simulation", "model"),
    "screens": ("errors", "names", "runtime", "kernels", "io", "genes", "selection", "files", "differential"),
    "pl": ("errors", "names", "files", "selection", "differential", "scoring"),
    "torch": ("errors", "selection", "sampling"),
    "project": (
        "version", "errors", "names", "runtime", "kernels", "io", "config", "genes", "presets", "files", "stores",
        "scoring",
    ),
}  # fmt: skip
MAX_SHARE = 0.15  # of the lines of vcelltools/, of any one room


def get_sources() -> list[Path]:
    return [p for d in ("vcelltools", "cli") for p in sorted((ROOT / d).rglob("*.py"))]


def get_module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("vcelltools", *parts) if parts[0] == "cli" else parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {get_module(p): p for p in get_sources()}


def get_room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "."


def walk_running(tree: ast.Module) -> Iterator[ast.AST]:
    """Walk the tree without what only a type checker runs."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
            continue
        yield node
        todo += list(ast.iter_child_nodes(node))


def get_imports(path: Path, *, types: bool = False) -> set[str]:
    """Return what a file imports when it runs, in functions too; a name of a package is its module where it is one.

    ``types`` adds what it imports for a type checker.
    """
    out = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if types else walk_running(tree):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                inner = f"{node.module}.{a.name}"
                out.add(inner if inner in MODULES else node.module)
    return out


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_from_the_floors_below_it(module):
    room = get_room(module)
    for name in get_imports(MODULES[module]):
        top = name.split(".")[0]
        if top != "vcelltools":
            assert top not in FORBIDDEN.get(room, OTHER_ROOMS), f"{module} imports {name}"
            continue
        other = get_room(name)
        if room in {"cli", ".", other}:
            continue
        assert other in FLOORS[room], f"{module} imports {name}: add a floor only if data flows that way"
        private = [p for p in name.split(".")[2:] if p.startswith("_")]
        assert not private, f"{module} imports {name}, which is private to its room"


def test_the_table_of_floors_has_every_room_and_goes_one_way():
    rooms = {get_room(m) for m in MODULES} - {".", "cli"}
    assert set(FLOORS) == rooms
    for room, below in FLOORS.items():
        assert all(room not in FLOORS[b] for b in below), room


def test_no_module_imports_itself_through_others():
    # for a type checker alone, too: who reads one file of a circle has to read them all
    edges = {m: {i for i in get_imports(p, types=True) if i in MODULES and i != m} for m, p in MODULES.items()}
    # the face of a room imports its files; a file does not import its own room's face
    faces = {m for m, p in MODULES.items() if p.name == "__init__.py"}
    edges = {m: {i for i in out if i not in faces} for m, out in edges.items() if m not in faces}
    order = TopologicalSorter(edges)
    try:
        order.prepare()
    except CycleError as e:
        pytest.fail("import circle: " + " -> ".join(e.args[1]))


def test_every_room_says_what_lives_there():
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text()))
            assert text and len(text.split()) >= 8, f"{module}: the room's docstring says what lives there"
            if module not in ("vcelltools", "vcelltools.cli"):  # a command there has its own file
                files = [f.stem for f in path.parent.glob("*.py") if not f.stem.startswith("_")]
                unnamed = [name for name in files if f"``{name}``" not in text]
                assert not unnamed, f"{module}: the room's docstring does not name {', '.join(unnamed)}"


def test_no_room_is_too_large():
    lines = Counter()
    for module, path in MODULES.items():
        if get_room(module) != "cli":
            lines[get_room(module)] += len(path.read_text().splitlines())
    room, most = lines.most_common(1)[0]
    assert most <= MAX_SHARE * lines.total(), f"{room}: {most} of {lines.total()} lines"


# outside kernels; a docstring does not count. Commands and the functions behind a public verb spell their options out
MAX_LINES, MAX_ARGUMENTS, MAX_KERNEL_LINES = 80, 12, 150
VERBS = {
    "hvg", "compute_hvg", "normalize", "convert", "sample", "inspect", "basis", "build_store", "score", "de", "energy",
    "simulate", "train", "predict", "baseline", "prep", "lint", "screen", "features", "pseudobulk",
    "evaluate", "responders",
}  # fmt: skip
SPELLED_OUT = {"vcelltools.sampling.sampler.Sampler", "vcelltools.io.write.h5ad.AnnDataPart"}  # constructors, likewise


def list_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{n.name}", n) for n in node.body if isinstance(n, ast.FunctionDef))
        else:
            yield from ((n.name, n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.FunctionDef))


def test_functions_stay_readable():
    for module, path in MODULES.items():
        for name, f in list_functions(ast.parse(path.read_text())):
            where = f"{module}.{name}"
            if get_room(module) == "cli" or f.name in VERBS or where.removesuffix(".__init__") in SPELLED_OUT:
                continue
            doc = f.body[0] if ast.get_docstring(f) is not None else None
            n_lines = f.end_lineno - f.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)
            n_arguments = len(f.args.posonlyargs + f.args.args + f.args.kwonlyargs)
            kernel = get_room(module) == "kernels"
            assert n_lines <= (MAX_KERNEL_LINES if kernel else MAX_LINES), f"{where} has {n_lines} lines"
            assert kernel or n_arguments <= MAX_ARGUMENTS, f"{where} has {n_arguments} arguments"


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


def test_nothing_lies_among_the_sources_that_does_not_belong_there():
    for folder in ("vcelltools", "cli", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.suffix in {".py", ".typed", ".j2"}, path.relative_to(ROOT)


def test_nothing_is_tracked_beside_the_folders_that_does_not_belong_there():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout: what is tracked is not known")
    top = [Path(name) for name in listed.stdout.splitlines() if "/" not in name]
    stray = [str(name) for name in top if name.suffix not in {"", ".md", ".toml", ".yml", ".yaml"}]
    assert top and not stray, stray


def test_no_merge_left_its_markers():
    """A merge that was not finished leaves lines of seven signs in any text."""
    marker = re.compile(rb"^(<{7}|={7}|>{7}|\|{7})( .*)?$", re.M)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout: what is tracked is not known")
    found = [n for n in listed.stdout.splitlines() if (ROOT / n).is_file() and marker.search((ROOT / n).read_bytes())]
    assert found == []


def test_every_room_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "vcelltools").rglob("__init__.py")}
    assert sorted(listed) == listed and set(listed) == found | {"vcelltools.cli"}
