#!/usr/bin/env bash
# Makes the peers' environments under .peers/, each in its own, with public packages alone.
#     benchmarks/make_peers.sh [NAME ...]        (all by default)
# Peers that need Python 3.12 use python3.12 from the PATH, or pyenv's, and are left out where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
base="${VCELLTOOLS_PEERS:-.peers}"
mkdir -p "$base"

. scripts/find_python.sh

make_peer() { # NAME PYTHON_VERSION PACKAGE...
    local name="$1" version="$2" python
    shift 2
    [ -x "$base/$name/bin/python" ] && [ -e "$base/$name/.ready" ] && return 0
    python="$(find_python "$version")"
    if [ -z "$python" ]; then
        echo "$name: left out, there is no python$version here" >&2
        return 0
    fi
    echo "$name: $*" >&2
    rm -rf "${base:?}/$name"
    "$python" -m venv "$base/$name"
    "$base/$name/bin/python" -m pip install --quiet "$@"
    touch "$base/$name/.ready"
}

want() { [ "${#names[@]}" -eq 0 ] || [[ " ${names[*]} " == *" $1 "* ]]; }
names=("$@")
want scanpy-1.11.5 && make_peer scanpy-1.11.5 3.11 scanpy==1.11.5 scikit-misc mudata
want scanpy-1.12.4 && make_peer scanpy-1.12.4 3.12 scanpy==1.12.4 scikit-misc mudata
want cell-eval-0.8.2 && make_peer cell-eval-0.8.2 3.11 torch==2.13.0 cell-eval==0.8.2 pdex==0.3.0 illico==0.6.0
want cell-eval-0.6.6 && make_peer cell-eval-0.6.6 3.11 torch==2.13.0 cell-eval==0.6.6 pdex==0.1.27
want cell-eval2-0.20.0 && make_peer cell-eval2-0.20.0 3.11 torch==2.13.0 cell-eval2==0.20.0 vcc-cli==0.3.0
want annbatch-0.3.1 && make_peer annbatch-0.3.1 3.12 annbatch==0.3.1 zarrs
want arc-state-0.11.1 && make_peer arc-state-0.11.1 3.11 torch==2.13.0 arc-state==0.11.1 cell-load==0.10.4
want scperteval-0.2.0 && make_peer scperteval-0.2.0 3.11 scperteval==0.2.0
want crispyx-0.2.2 && make_peer crispyx-0.2.2 3.11 crispyx==0.2.2
want pydeseq2-0.5.4 && make_peer pydeseq2-0.5.4 3.11 pydeseq2==0.5.4
if want spacetravlr-0.1.21; then # without its dependencies: torch and others are never called by what is timed
    make_peer spacetravlr-0.1.21 3.11 "numpy<2.3" "pandas==2.3.*" anndata numba tqdm pyarrow scanpy scikit-learn matplotlib seaborn joblib networkx easydict group-lasso
    "$base/spacetravlr-0.1.21/bin/python" -m pip install --quiet --no-deps SpaceTravLR==0.1.21
fi
want pertpy-1.0.3 && make_peer pertpy-1.0.3 3.12 pertpy==1.0.3 scanpy==1.11.5 "anndata<0.13" "mudata<0.4" "pandas<3" "scikit-learn<1.7" "statsmodels<0.15" filelock
want cvxpy-1.6.7 && make_peer cvxpy-1.6.7 3.11 cvxpy==1.6.7 clarabel
exit 0
