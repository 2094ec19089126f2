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
.venv/bin/python -m pytest "${options[@]}"
