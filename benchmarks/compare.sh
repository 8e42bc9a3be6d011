#!/usr/bin/env bash
# Runs the quick part of the benchmarks into a scratch folder and holds its ratios against the committed ones.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export VCELLTOOLS_BENCH_RESULTS="$scratch/results"
python=.venv/bin/python
"$python" -m pytest -q benchmarks/bench_kernels.py --benchmark-json "$scratch/kernels.json"
"$python" -m benchmarks.report fold "$scratch/kernels.json"
"$python" -m benchmarks.bench_hvg --rounds 3 --only csr,gzip
"$python" -m benchmarks.report compare "$VCELLTOOLS_BENCH_RESULTS"
