#!/usr/bin/env bash
# Trains on one machine with all its GPUs, in one process.
#   bash launch/gpu.sh [--gpus 0,1] [--dry-run] --config=FILE:VARIANT --workdir=DIR [--config.x=y ...]
# Everything but these options goes to main.py, whose exit code it returns. Relative paths are
# those of the repository's folder. --dry-run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

gpus=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage launch/gpu.sh ;;
    --dry-run) dry_run=yes ;;
    --gpus)
      gpus=$(value "$@")
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
check_training "${arguments[@]}"
if [ -z "$dry_run" ] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  mistake "nvidia-smi finds no GPU here; without one, run .venv/bin/python main.py"
fi

step bash launch/install.sh
if [ -n "$gpus" ]; then step export CUDA_VISIBLE_DEVICES="$gpus"; fi
command=(.venv/bin/python main.py "${arguments[@]}")
# In place of this shell, so that main.py is what a scheduler's SIGTERM reaches.
if [ -z "$dry_run" ]; then exec "${command[@]}"; fi
quoted "${command[@]}"
