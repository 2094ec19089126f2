#!/usr/bin/env bash
# What tpu_pod.sh does on each worker; not meant to be called by hand.
#   bash tpu_worker.sh install [REQUIREMENT FILES] | run ARGUMENTS | status | logs LINES | stop
# The run's process number, exit code and output are in runs/worker/ of the copied folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=runs/worker
mkdir -p "$folder"

running() {
  [ -f "$folder/pid" ] && [ ! -f "$folder/exit_code" ] && kill -0 "$(cat "$folder/pid")" 2>/dev/null
}

tell() {
  if running; then
    echo "$(hostname): running as process $(cat "$folder/pid")"
  elif [ -f "$folder/exit_code" ]; then
    case "$(cat "$folder/exit_code")" in
      0) echo "$(hostname): done" ;;
      75) echo "$(hostname): stopped after saving (75); the same command goes on" ;;
      *) echo "$(hostname): ended with exit code $(cat "$folder/exit_code"); see logs" ;;
    esac
  elif [ -f "$folder/pid" ]; then
    echo "$(hostname): gone without an exit code, as when the machine restarts; the same command goes on"
  else
    echo "$(hostname): nothing was started"
  fi
}

action=$1
shift
case "$action" in
  install)
    # The images of TPU VMs may have an older Python only.
    if ! python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
      ! command -v python3.11 >/dev/null; then
      sudo apt-get update -qq
      sudo apt-get install -y -qq python3.11 python3.11-venv
    fi
    bash launch/install.sh "$@"
    ;;
  run)
    if running; then
      echo "error: $(hostname): a run is under way; stop it first" >&2
      exit 2
    fi
    rm -f "$folder/exit_code" "$folder/pid"
    # It outlives the connection that started it, and nothing of it keeps that open.
    EFAE_DISTRIBUTED=auto nohup bash launch/tpu_worker.sh supervise "$@" \
      >"$folder/log" 2>&1 </dev/null &
    for _ in $(seq 300); do
      if [ -f "$folder/pid" ]; then break; fi
      sleep 0.1
    done
    if [ ! -f "$folder/pid" ]; then
      echo "error: $(hostname): it did not start; see logs" >&2
      exit 1
    fi
    echo "$(hostname): started"
    ;;
  supervise) # run's background part
    .venv/bin/python main.py "$@" &
    echo $! >"$folder/pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$folder/exit_code"
    ;;
  status)
    tell
    tail -n 1 "$folder/log" 2>/dev/null || true
    ;;
  logs) tail -n "$1" "$folder/log" ;;
  stop)
    if running; then
      kill -TERM "$(cat "$folder/pid")"
      for _ in $(seq 600); do
        if ! running; then break; fi
        sleep 1
      done
      for _ in $(seq 100); do # until its exit code is written
        if [ -f "$folder/exit_code" ]; then break; fi
        sleep 0.1
      done
    fi
    tell
    ;;
esac
