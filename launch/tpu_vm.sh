#!/usr/bin/env bash
# Run a command on a Cloud TPU VM of any number of workers, and keep it running.
#
#   export NAME=roserag ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh run train --config configs/gemma2b.py --config.workdir=gs://BUCKET/gemma2b
#
#   create          ask for a queued resource and wait until it is there; a TPU VM of that name is used as it is
#   setup           copy this folder to all workers and install it there
#   start COMMAND   start the command on all workers; it keeps running when you disconnect
#   logs            follow the output of worker 0 until the command ends; exits with its status
#   run COMMAND     all of these, and again after a preemption, until the command is done or fails
#   status          the state of the queued resource and of the TPU VM
#   stop            send SIGTERM to the command on all workers, which saves and ends
#   delete          delete the TPU VM and its queued resource
#
# From the environment: NAME, ZONE, TYPE and RUNTIME (needed), PROJECT, SPOT=0 for capacity that is not preempted, RESTARTS
# (default 20) of the command on a VM that stays, and POLL, seconds between two looks (default 30).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $*" >&2
  exit 2
}

NAME=${NAME:-} ZONE=${ZONE:-} TYPE=${TYPE:-} RUNTIME=${RUNTIME:-}
POLL=${POLL:-30} RESTARTS=${RESTARTS:-20}
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

# The state of the VM and of the queued resource; empty where there is none.
vm_state() { "${vm[@]}" describe "$NAME" "${where[@]}" --format='value(state)' 2>/dev/null || true; }
queue_state() { "${queue[@]}" describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || true; }

on() { # WORKERS COMMAND
  "${vm[@]}" ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

create() {
  [ -n "$TYPE" ] && [ -n "$RUNTIME" ] || fail "set TYPE (v5litepod-16) and RUNTIME (v2-alpha-tpuv5-lite)"
  local spot=() state
  [ "${SPOT:-1}" = 0 ] || spot=(--spot)
  while state=$(vm_state) && [ "$state" != READY ]; do
    case "$state-$(queue_state)" in
      -) "${queue[@]}" create "$NAME" "${where[@]}" --node-id="$NAME" --accelerator-type="$TYPE" \
        --runtime-version="$RUNTIME" "${spot[@]}" ;;
      PREEMPTED-* | TERMINATED-* | *-SUSPENDED | *-FAILED) delete ;;
      *) echo "waiting for $NAME: VM ${state:-none}, queued resource $(queue_state)" ;;
    esac
    sleep "$POLL"
  done
}

setup() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --create --gzip --file="$archive"
  "${vm[@]}" scp "$archive" "$NAME:roserag_jax.tar.gz" "${where[@]}" --worker=all
  rm "$archive"
  on all 'mkdir -p roserag_jax && tar -xzf roserag_jax.tar.gz -C roserag_jax && roserag_jax/launch/setup_tpu_vm.sh'
}

start() {
  [ $# -gt 0 ] || fail "name a command, for example: train --config configs/gemma2b.py"
  local command
  command=$(printf '%q ' .venv/bin/python launch/local.py --restarts "$RESTARTS" -- "$@" --config.distributed=auto)
  # The exit status is written last, so that whoever follows the log knows when it is whole.
  on all "cd roserag_jax && rm -f ~/roserag.status && nohup setsid bash -c \
    $(printf '%q' "$command; echo \$? > ~/roserag.status") > ~/roserag.log 2>&1 < /dev/null &"
}

logs() {
  # shellcheck disable=SC2016  # the worker's shell expands these
  on 0 'tail -n +1 -F ~/roserag.log & shown=$!
    until [ -s ~/roserag.status ]; do sleep 2; done; sleep 1; kill $shown; exit "$(cat ~/roserag.status)"'
}

run() {
  local status
  while true; do
    create
    setup
    start "$@"
    while status=0 && { logs || status=$?; } && [ "$status" = 255 ] && [ "$(vm_state)" = READY ]; do
      echo "the connection was lost; following again"
      sleep "$POLL"
    done
    case $status in
      0 | 1 | 2) return "$status" ;;
    esac
    sleep "$POLL" # a preempted VM is still there for a moment
    # On a VM that stays the workers have restarted the command already, so often as RESTARTS allows, or it was stopped.
    [ "$(vm_state)" != READY ] || return "$status"
    echo "ended with status $status and the VM is gone; starting again"
  done
}

status() {
  echo "VM $(vm_state), queued resource $(queue_state)"
}

stop() {
  # shellcheck disable=SC2016  # the worker's shell expands it
  on all 'pkill -TERM -u "$(id -u)" -f [l]aunch/local.py'
}

delete() {
  [ -z "$(vm_state)" ] || "${vm[@]}" delete "$NAME" "${where[@]}" --quiet
  [ -z "$(queue_state)" ] || "${queue[@]}" delete "$NAME" "${where[@]}" --quiet --force
}

case ${1:-} in
  create | setup | start | logs | run | status | stop | delete)
    [ -n "$NAME" ] && [ -n "$ZONE" ] || fail "set NAME and ZONE"
    "$@"
    ;;
  *)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    [ "${1:-}" = --help ] || exit 2
    ;;
esac
