#!/usr/bin/env bash
# Runs on a worker: train, or continue; the first worker copies its run folder to the bucket every minute.
# Arguments: BUCKET RUN. Returns train's exit code: 0 done, 5 stopped and resumable.

set -uo pipefail
bucket=$1
run=$2
cd ~/project || exit 1
mkdir -p "runs/$run"

push() {
  gcloud storage rsync --recursive "runs/$run" "$bucket/runs/$run" >/dev/null 2>&1
}

copier=
case $(hostname) in
  *-0)
    while sleep 60; do push; done &
    copier=$!
    ;;
esac
~/env/bin/vcelltools train --tpu --distributed auto --out "runs/$run" --resume
code=$?
if [ -n "$copier" ]; then
  kill "$copier"
  push
fi
exit "$code"
