#!/usr/bin/env bash
# Delete the machine. The bucket stays.
# Options: --dry-run prints the commands. Settings: see common.sh.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"

tpu delete --quiet
