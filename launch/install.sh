#!/usr/bin/env bash
# Makes .venv with what this machine needs. Sourced by the other scripts, or run alone:
#   bash launch/install.sh [more requirement files]
# EFAE_DEVICE=cpu|cuda12|cuda13|tpu overrides what is found; PYTHON=... the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer with its venv module is needed (Debian: apt install python3 python3-venv)" >&2
  return 2
}

find_device() {
  local driver
  if [ -n "${EFAE_DEVICE:-}" ]; then
    echo "$EFAE_DEVICE"
  elif driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) && [ -n "$driver" ]; then
    # CUDA 13 needs driver 580 or newer.
    if [ "$(echo "$driver" | head -n 1 | cut -d. -f1)" -ge 580 ]; then echo cuda13; else echo cuda12; fi
  elif grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor && { compgen -G '/dev/accel*' || compgen -G '/dev/vfio/[0-9]*'; } >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

device=$(find_device)
case "$device" in
  cpu) extra=() ;;
  cuda12 | cuda13 | tpu) extra=("jax[$device]") ;;
  *)
    echo "error: EFAE_DEVICE=$device is not one of cpu, cuda12, cuda13, tpu" >&2
    exit 2
    ;;
esac

files=(requirements.txt "$@")
wanted="$device $(cat "${files[@]}" | cksum)"
if [ "$(cat ".venv/installed-${#files[@]}" 2>/dev/null)" != "$wanted" ]; then
  python=$(find_python)
  echo "installing for $device into .venv ($("$python" --version))"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  arguments=()
  for file in "${files[@]}"; do arguments+=(-r "$file"); done
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${arguments[@]}" "${extra[@]}"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
  echo "$wanted" >".venv/installed-${#files[@]}"
fi
