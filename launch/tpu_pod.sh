#!/usr/bin/env bash
# One command on all workers of a TPU slice, a single host or a pod:
#   bash launch/tpu_pod.sh install --name NAME --zone ZONE [REQUIREMENT FILES]
#   bash launch/tpu_pod.sh run     --name NAME --zone ZONE --config=FILE:VARIANT --workdir=gs://... [--config.x=y ...]
#   bash launch/tpu_pod.sh status  --name NAME --zone ZONE
#   bash launch/tpu_pod.sh logs    --name NAME --zone ZONE [--worker N] [--lines N]
#   bash launch/tpu_pod.sh stop    --name NAME --zone ZONE
# install copies this folder to every worker and sets it up there; run starts main.py in the
# background, with a log on every worker, and returns; stop sends SIGTERM, waits until the run has
# saved and ended, and tells its exit code. Options: --project PROJECT; --worker N, one worker
# instead of all (logs: 0 unless given); --dry-run prints the commands. JAX_COMPILATION_CACHE_DIR,
# if set here, is set there. Needs gcloud with permission for `compute tpus tpu-vm ssh`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

name="" zone="" project="" worker="" lines=""
arguments=()
action=${1:-}
case "$action" in
  --help | -h) usage launch/tpu_pod.sh ;;
  install | run | status | logs | stop) shift ;;
  *) mistake "'$action' is not one of install, run, status, logs, stop; see --help" ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage launch/tpu_pod.sh ;;
    --dry-run) dry_run=yes ;;
    --name | --zone | --project | --worker | --lines)
      given=$(value "$@")
      printf -v "${1#--}" %s "$given"
      shift
      ;;
    --name=* | --zone=* | --project=* | --worker=* | --lines=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
if [ -z "$name" ]; then mistake "--name is missing: that of the TPU VM"; fi
if [ -z "$zone" ]; then mistake "--zone is missing: that of the TPU VM"; fi
case "$action" in
  run) check_training "${arguments[@]}" ;;
  install)
    for file in "${arguments[@]}"; do
      if [ ! -f "$file" ]; then mistake "there is no requirement file $file"; fi
    done
    ;;
  *) if [ ${#arguments[@]} -gt 0 ]; then mistake "unexpected argument ${arguments[0]}"; fi ;;
esac
if [ "$action" = logs ]; then worker=${worker:-0}; fi

where=(--zone="$zone" --worker="${worker:-all}")
if [ -n "$project" ]; then where+=(--project="$project"); fi

# A command on the workers, given as words.
on_workers() {
  step gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command="$(quoted "$@")"
}

case "$action" in
  install)
    archive=${TMPDIR:-/tmp}/efae.tar.gz
    # What a run writes and what is installed here stays here.
    step tar --create --gzip --file "$archive" --exclude=.git --exclude=.venv --exclude=./runs \
      --exclude=.jax_cache --exclude=__pycache__ --exclude=./images --exclude=./shards .
    step gcloud compute tpus tpu-vm scp "$archive" "$name:efae.tar.gz" "${where[@]}"
    on_workers bash -c 'mkdir -p efae && tar -xzf efae.tar.gz -C efae && bash efae/launch/tpu_worker.sh install "$@"' \
      install "${arguments[@]}"
    ;;
  run)
    environment=()
    if [ -n "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
      environment+=(env JAX_COMPILATION_CACHE_DIR="$JAX_COMPILATION_CACHE_DIR")
    fi
    on_workers "${environment[@]}" bash efae/launch/tpu_worker.sh run "${arguments[@]}"
    ;;
  logs) on_workers bash efae/launch/tpu_worker.sh logs "${lines:-50}" ;;
  *) on_workers bash efae/launch/tpu_worker.sh "$action" ;;
esac
