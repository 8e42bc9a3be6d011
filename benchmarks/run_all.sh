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
for name in store score score26 train models; do
    [ -f "benchmarks/bench_$name.py" ] && "$python" -m "benchmarks.bench_$name"
done
"$python" -m benchmarks.report tables
