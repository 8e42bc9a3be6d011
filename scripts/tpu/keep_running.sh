#!/usr/bin/env bash
# Train to the end on spot machines: create, sync, run; after a preemption delete, create again and resume.
# Options: --dry-run prints one round. Settings: see common.sh; BUCKET is needed. ATTEMPTS (20) rounds at most.

# shellcheck source-path=SCRIPTDIR
. "$(dirname "$0")/common.sh"
parse_options "$@"
need_bucket

here=$(dirname "$0")
dry=()
if [ "$DRY_RUN" = 1 ]; then dry=(--dry-run); fi
for attempt in $(seq 1 "${ATTEMPTS:-20}"); do
  state=$(get_state)
  echo "round $attempt: $TPU_NAME is $state" >&2
  case $state in
    READY) ;;
    MISSING) "$here/create.sh" "${dry[@]}" || { sleep "${PAUSE:-60}" && continue; } ;;
    *)
      tpu delete --quiet || true
      "$here/create.sh" "${dry[@]}" || { sleep "${PAUSE:-60}" && continue; }
      ;;
  esac
  code=0
  "$here/sync.sh" "${dry[@]}" && "$here/run.sh" "${dry[@]}" || code=$?
  if [ "$code" = 0 ]; then
    echo "done: $BUCKET/runs/$RUN" >&2
    exit 0
  fi
  if [ "$code" = 5 ]; then continue; fi # stopped by its own time limit or a signal: resumable
  if [ "$(get_state)" = READY ]; then
    echo "training failed on a healthy machine: look at its output" >&2
    exit 1
  fi
  sleep "${PAUSE:-60}"
done
echo "gave up after ${ATTEMPTS:-20} rounds" >&2
exit 1
