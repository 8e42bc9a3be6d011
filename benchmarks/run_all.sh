#!/usr/bin/env bash
# Every benchmark in one go; results go to benchmarks/results, the tables of README and docs are written from them.
# ROUNDS (3): runs of each side of a comparison of whole commands. The files take about 60 GB (VCELLTOOLS_BENCH_DATA).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
rounds="${ROUNDS:-3}"
mkdir -p .bench
"$python" -m pytest -q benchmarks/bench_kernels.py --benchmark-json .bench/kernels.json
"$python" -m benchmarks.report fold .bench/kernels.json
"$python" -m benchmarks.bench_hvg --newest --rounds "$rounds"
"$python" -m benchmarks.bench_hvg --scaling
for size in 1 2 3; do
    "$python" -m benchmarks.bench_score --size "$size" --rounds "$rounds"
done
"$python" -m benchmarks.bench_score --size full --rounds "$rounds"
for size in 1 2; do
    "$python" -m benchmarks.bench_score --size "$size" --profile full --rounds 1
done
"$python" -m benchmarks.bench_calibrated --size 2 --rounds "$rounds"
for size in 2 3; do
    "$python" -m benchmarks.bench_de --size "$size"
done
"$python" -m benchmarks.bench_de_crispyx --rounds "$rounds"
"$python" -m benchmarks.bench_score26 --rounds "$rounds"
"$python" -m benchmarks.bench_store
"$python" -m benchmarks.bench_models simulated --seeds 4
"$python" -m benchmarks.bench_models thp1
"$python" -m benchmarks.bench_train
"$python" -m benchmarks.report tables
