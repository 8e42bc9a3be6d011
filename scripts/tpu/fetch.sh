#!/usr/bin/env bash
# Bring the run from the bucket to this machine: runs/RUN.
# Options: --dry-run prints the commands. Settings: see common.sh; BUCKET is needed.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"
need_bucket

run mkdir -p "runs/$RUN"
run gcloud storage rsync --recursive "$BUCKET/runs/$RUN" "runs/$RUN"
