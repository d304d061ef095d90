#!/usr/bin/env bash
# The tests, from a bare machine: set-up with the test extras, then pytest.
# Usage: bash launch/test.sh [pytest's arguments, such as -m slow or -k auroc]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
# one more than cores, because tests of launches and of Slurm mostly wait
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-3}" "$@"
