# shellcheck shell=bash
# Shared by the scripts beside it: settings from the environment, and `run`, which --dry-run turns into printing.
#
#   TPU_NAME      name of the machine               (vcelltools)
#   TPU_ZONE      zone                              (us-west4-a)
#   TPU_TYPE      accelerator type                  (v5litepod-16)
#   TPU_VERSION   runtime                           (v2-alpha-tpuv5-lite)
#   TPU_PROJECT   project; gcloud's own by default
#   BUCKET        gs://... with stores/ and runs/
#   RUN           the run's name                    (rn)

set -euo pipefail

TPU_NAME=${TPU_NAME:-vcelltools}
TPU_ZONE=${TPU_ZONE:-us-west4-a}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5-lite}
RUN=${RUN:-rn}
DRY_RUN=0

# these names become part of commands on other machines
for name in TPU_NAME TPU_ZONE TPU_TYPE TPU_VERSION RUN BUCKET; do
  case ${!name:-} in
    *[!A-Za-z0-9._:/-]*)
      echo "$name=${!name}: letters, digits and . _ : / - only" >&2
      exit 2
      ;;
  esac
done

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

parse_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) DRY_RUN=1 ;;
      -h | --help)
        usage
        exit 0
        ;;
      *)
        echo "$0: unknown option $1 (--help)" >&2
        exit 2
        ;;
    esac
    shift
  done
}

need_bucket() {
  case ${BUCKET:-} in
    gs://?*) ;;
    *)
      echo "BUCKET is not set: export BUCKET=gs://your-bucket/path" >&2
      exit 2
      ;;
  esac
}

# Print a command, quoted as the shell would need it; run it unless --dry-run was given.
run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  if [ "$DRY_RUN" = 0 ]; then "$@"; fi
}

where=(--zone "$TPU_ZONE")
if [ -n "${TPU_PROJECT:-}" ]; then where+=(--project "$TPU_PROJECT"); fi

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$TPU_NAME" "${where[@]}" "$@"
}

# copy_to_workers FILE: into the home folder of every worker
copy_to_workers() {
  run gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$(basename "$1")" "${where[@]}" --worker all
}

on_all_workers() {
  tpu ssh --worker all --command "$1"
}

# READY, PREEMPTED, ... or MISSING; a dry run asks nobody.
get_state() {
  if [ "$DRY_RUN" = 1 ]; then
    echo READY
    return
  fi
  gcloud compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" --format 'value(state)' 2>/dev/null || echo MISSING
}
