#!/usr/bin/env bash
# Installs the test tools, checks the style, runs all tests.
#   bash launch/test.sh [pytest options]
set -euo pipefail
options=("$@")
set -- requirements-test.txt
# shellcheck source=launch/install.sh
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Most of the time goes into compiling, each program on one core: a process per core halves it.
.venv/bin/python -m pytest -n auto --dist loadfile "${options[@]}"
