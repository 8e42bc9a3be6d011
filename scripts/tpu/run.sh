#!/usr/bin/env bash
# Start training on every worker, or continue it.
# Options: --dry-run prints the commands. Settings: see common.sh; BUCKET is needed.
# Returns train's exit code: 0 done, 5 stopped and resumable.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"
need_bucket

on_all_workers "bash worker_run.sh $BUCKET $RUN"
