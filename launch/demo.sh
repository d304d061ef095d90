#!/usr/bin/env bash
# The whole pipeline on a small real model, from a bare machine: set-up, then `aura-dist demo`.
# Usage: bash launch/demo.sh [flags of `aura-dist demo`, such as --model DIR --data FILE.csv --out runs/mine]
set -euo pipefail
bash "$(dirname "$0")/setup.sh" demo
exec "$(dirname "$0")/../.venv/bin/aura-dist" demo "$@"
