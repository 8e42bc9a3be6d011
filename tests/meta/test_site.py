"""The documentation builds as a site without a warning; the Dockerfile and the conda recipe match the project."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from docs.make_notebook import read_cells
from tests.conftest import ROOT
from vcelltools.cli.main import COMMANDS


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not here (pip install -e '.[docs]')")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "site").glob("*/index.html"))) >= 14
    for page in (ROOT / "docs").glob("*.md"):  # a block whose first line is not understood becomes a paragraph
        name = "" if page.stem == "index" else page.stem
        built = (tmp_path / "site" / name / "index.html").read_text()
        blocks = len(re.findall(r"^```\w*$", page.read_text(), re.M)) // 2
        assert built.count('<div class="highlight">') >= blocks and "```" not in built, page.name


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in config, page.name


def test_a_broken_link_fails_the_build(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not here (pip install -e '.[docs]')")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for wrong in ("[nowhere](missing.md)", "[nowhere](guide.md#no-such-heading)"):
        (tmp_path / "docs/index.md").write_text(f"# Start\n\n{wrong}\n")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and ("missing.md" in done.stderr or "no-such-heading" in done.stderr), done.stderr


def test_make_docs_builds_what_this_test_builds():
    """CI runs ``make test``, which installs mkdocs with the rest, so that none of these tests skips there."""
    makefile = (ROOT / "Makefile").read_text()
    assert "mkdocs build --strict" in makefile.split("\ndocs:")[1].split("\n\n")[0]
    assert "make test" in (ROOT / ".ci/run").read_text() and "-e '.[dev]'" in makefile
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any("docs" in re.split(r"[\[\],]", need) for need in extras["dev"])


DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_holds_its_script_and_is_linked(notebook):
    """It was written by make_notebook.py from the script beside it, has figures, and is found from a page."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == read_cells(notebook.with_suffix(".py"))
    shown = [o for c in cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert not any(o["output_type"] == "error" for o in shown)
    assert f"({notebook.name})" in (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")


def test_what_the_dockerfile_names_is_there():
    """The files that it copies, the extras that it installs, and the command that it starts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip()]
    assert steps[0][0] == "FROM" and {s[0] for s in steps} <= {"FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR",
                                                               "ENTRYPOINT", "CMD"}  # fmt: skip
    copied = set()
    for _, rest in (s for s in steps if s[0] == "COPY"):
        *names, _ = rest.split()
        copied |= set(names)
        assert all((ROOT / name).exists() for name in names), rest
    # what a build reads: the project file, what it names, and the packages
    needed = {"pyproject.toml", project["readme"], *project["license-files"], "vcelltools", "cli"}
    assert needed <= copied, needed - copied
    extras = re.search(r"'/src\[([\w,]+)\]'", DOCKERFILE)
    assert extras is not None and set(extras.group(1).split(",")) <= set(project["optional-dependencies"])
    python = re.search(r"FROM python:(3\.\d+)-slim", DOCKERFILE)
    assert python is not None
    assert f"Programming Language :: Python :: {python.group(1)}" in project["classifiers"]
    entry = json.loads(next(s[1] for s in steps if s[0] == "ENTRYPOINT"))
    assert entry[0] in project["scripts"]
    shown = re.search(r"docker run .* vcelltools (\w+) ", DOCKERFILE)
    assert shown is not None and shown.group(1) in COMMANDS
    users = [s[1] for s in steps if s[0] == "USER"]
    assert users and int(users[-1]) > 0 and f"useradd --uid {users[-1]} " in DOCKERFILE


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here")
def test_hadolint_accepts_the_dockerfile():
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def split_need(need: str) -> tuple[str, str]:
    """Return the name of a requirement, and its versions without spaces."""
    name, versions = re.fullmatch(r"([\w.-]+)\s*(.*)", need.split(";", maxsplit=1)[0].strip()).groups()  # type: ignore[union-attr]
    return name.lower().replace("_", "-"), versions.replace(" ", "")


def test_the_conda_recipe_has_the_dependencies_of_the_project():
    import yaml

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    recipe = yaml.safe_load((ROOT / "conda/recipe.yaml").read_text())
    run = dict(split_need(n) for n in recipe["requirements"]["run"])
    host = dict(split_need(n) for n in recipe["requirements"]["host"])
    python = project["project"]["requires-python"]
    assert run.pop("python") == host.pop("python") == python
    names = {"matplotlib-base": "matplotlib", "python-igraph": "igraph", "msgspec-python": "msgspec",
             "python-xxhash": "xxhash"}  # fmt: skip
    found = {names.get(k, k): v for k, v in run.items()}
    assert found == dict(split_need(n) for n in project["project"]["dependencies"])
    assert host.pop("pip") == "" and host == dict(split_need(n) for n in project["build-system"]["requires"])
    (script,) = recipe["build"]["python"]["entry_points"]
    assert dict([re.split(r"\s*=\s*", script)]) == project["project"]["scripts"]
    assert recipe["package"] == {"name": project["project"]["name"], "version": project["project"]["version"]}
    assert recipe["about"]["license"] == project["project"]["license"]
    assert (ROOT / "conda" / recipe["about"]["license_file"]).exists()
    assert (ROOT / "conda" / recipe["source"]["path"] / "pyproject.toml").exists()
    for command in recipe["tests"][1]["script"]:
        assert command.split()[0] == "vcelltools"
    for module in recipe["tests"][0]["python"]["imports"]:
        importlib.import_module(module)


@pytest.mark.skipif(shutil.which("rattler-build") is None, reason="rattler-build is not here")
def test_rattler_build_accepts_the_recipe(tmp_path):
    command = [
        "rattler-build",
        "build",
        "--render-only",
        "--recipe",
        "conda/recipe.yaml",
        "--output-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
