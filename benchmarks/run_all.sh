#!/usr/bin/env bash
# Every benchmark in one go; results go to benchmarks/results, the README's tables are written from them.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
mkdir -p .bench
"$python" -m pytest -q benchmarks/bench_kernels.py --benchmark-json .bench/kernels.json
"$python" -m benchmarks.report fold .bench/kernels.json
"$python" -m benchmarks.bench_hvg --newest
"$python" -m benchmarks.bench_hvg --scaling
for size in 1 2 3; do
    "$python" -m benchmarks.bench_score --size "$size"
done
"$python" -m benchmarks.bench_score --size full
for size in 2 3; do
    "$python" -m benchmarks.bench_de --size "$size"
done
"$python" -m benchmarks.bench_score26
"$python" -m benchmarks.bench_store
"$python" -m benchmarks.bench_models simulated --seeds 4
"$python" -m benchmarks.bench_models thp1
"$python" -m benchmarks.bench_train
"$python" -m benchmarks.report tables
