#!/usr/bin/env bash
# The newest version of every package that pyproject.toml allows, on another Python, with the tests where versions
# differ: containers, frames, the command line, numba, jax.
#     scripts/newest.sh VERSION prepare     makes build/pyVERSION
#     scripts/newest.sh VERSION test        makes what is missing, and runs the tests
#     scripts/newest.sh VERSION test TEST…  runs these instead
# Without that Python, both say so and do nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/find_python.sh
version="$1" step="$2" env="build/py$1"
shift 2
tests=(
    # zarr and its shards, anndata, mudata, pandas: reading, and what the libraries read of ours
    tests/unit/io/test_readers.py::test_zarr_of_every_format_is_read
    tests/unit/io/test_readers.py::test_zarr_written_by_anndata_is_read
    tests/unit/io/test_readers.py::test_nullable_columns_and_index_are_read
    tests/unit/io/test_readers.py::test_mudata_of_every_version_is_read
    tests/unit/io/test_readers.py::test_tenx_equals_scanpy
    tests/unit/io/test_write.py::test_anndata_reads_back
    tests/unit/io/test_write.py::test_mudata_reads_back
    tests/oracle/test_convert.py::test_zarr
    tests/oracle/test_mudata.py
    # numba, scanpy, typer
    tests/unit/kernels/test_transform.py
    tests/oracle/test_hvg_scanpy.py::test_scanpy_counts_in_every_layout_and_dtype
    tests/cli/test_help.py
    # a store; jax and optax: a short training and a prediction
    tests/unit/stores/test_store.py::test_values_counts_and_sums
    tests/unit/training/test_run_folder.py::test_a_prediction_takes_the_share_that_validation_chose
)

python="$(find_python "$version")"
if [ -z "$python" ]; then
    echo "there is no python$version here: the newest packages are not tried on it"
    exit 0
fi

make_env() {
    [ -n "$(find "$env/.ready" -newer pyproject.toml -mtime -1 2>/dev/null)" ] && return 0
    [ -x "$env/bin/python" ] || "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --upgrade pip
    # the requirements alone: installing the project writes into its folder, where another pip may be at work
    "$env/bin/python" - > "$env/requirements.txt" <<'PY'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
todo, found = [*project["dependencies"], f"{project['name']}[test]"], []
while todo:
    line = todo.pop()
    own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
    if own:
        todo += [x for extra in own[1].split(",") for x in project["optional-dependencies"][extra]]
    else:
        found.append(line)
print("\n".join(sorted(set(found))))
PY
    "$env/bin/python" -m pip install --quiet --upgrade -r "$env/requirements.txt"
    touch "$env/.ready"
}

make_env
[ "$step" = prepare ] && exit 0
"$env/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
[ $# -gt 0 ] || set -- "${tests[@]}"
"$env/bin/python" -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 -p no:benchmark "$@"
