#!/usr/bin/env bash
# Create a spot TPU VM and install vcelltools on every worker.
# Options: --dry-run prints the commands. Settings: see common.sh.
# The machine reads the bucket through its service account; no key is copied, and no metadata is set.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"

tpu create \
  --accelerator-type "$TPU_TYPE" \
  --version "$TPU_VERSION" \
  --scopes storage-rw,logging-write \
  --spot
"$(dirname "$0")/install.sh" "$@"
