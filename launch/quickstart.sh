#!/usr/bin/env bash
# Installs, trains EFAE on the built-in images, evaluates, and says where the pictures are.
#   bash launch/quickstart.sh [WORKDIR] [--config.field=value ...]
# About 12 minutes on 2 CPU cores.
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
.venv/bin/python main.py --config=configs/efae.py:quickstart --workdir="$workdir" "${options[@]}"
