#!/usr/bin/env bash
# Build the wheel of this checkout, copy it to every worker and install it with the TPU extra.
# Options: --dry-run prints the commands. Settings: see common.sh.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"

root=$(cd "$(dirname "$0")/../.." && pwd)
dist=$(mktemp -d)
trap 'rm -rf "$dist"' EXIT
run python3 -m build --wheel --outdir "$dist" "$root"
wheel=vcelltools.whl
for built in "$dist"/*.whl; do wheel=$(basename "$built"); done
if [ "$DRY_RUN" = 1 ]; then wheel=vcelltools-0.1.0-py3-none-any.whl; fi
copy_to_workers "$dist/$wheel"
on_all_workers "python3 -m venv env && env/bin/pip install --quiet './${wheel}[tpu]'"
on_all_workers "env/bin/vcelltools --version"
