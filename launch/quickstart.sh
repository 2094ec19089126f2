#!/usr/bin/env bash
# Installs, trains EFAE on the built-in images, evaluates, and says where the pictures are.
#   bash launch/quickstart.sh [WORKDIR] [--config.field=value ...]
# About 8 minutes on 2 CPU cores.
set -euo pipefail
workdir=$PWD/runs/quickstart
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  workdir=$(realpath -m "$1")
  shift
fi
options=("$@")
set --
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
if [ "$device" = cpu ] && [ -z "${JAX_NUM_CPU_DEVICES:-}" ]; then
  # A device for each core, up to 8: the cores then work on parts of the batch side by side.
  JAX_NUM_CPU_DEVICES=1
  while [ $((JAX_NUM_CPU_DEVICES * 2)) -le "$(nproc)" ] && [ "$JAX_NUM_CPU_DEVICES" -lt 8 ]; do
    JAX_NUM_CPU_DEVICES=$((JAX_NUM_CPU_DEVICES * 2))
  done
  export JAX_NUM_CPU_DEVICES
fi
.venv/bin/python main.py --config=configs/efae.py:quickstart --workdir="$workdir" "${options[@]}"
