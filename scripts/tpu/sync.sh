#!/usr/bin/env bash
# Bring the stores, the split and the last checkpoints from the bucket to every worker, and the worker's script.
# Options: --dry-run prints the commands. Settings: see common.sh; BUCKET is needed.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"
need_bucket

copy_to_workers "$(dirname "$0")/worker_run.sh"
on_all_workers "mkdir -p project/runs/$RUN"
on_all_workers "gcloud storage rsync --recursive $BUCKET/project project"
# the first time there is no run to bring
on_all_workers "gcloud storage rsync --recursive $BUCKET/runs/$RUN project/runs/$RUN || true"
on_all_workers "env/bin/vcelltools verify project/stores/*"
