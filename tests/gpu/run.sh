#!/usr/bin/env bash
# Whether the product is right and fast on this machine's GPU: a table, and a report to file. At most 8 minutes.
# Usage: bash tests/gpu/run.sh [PART …] [--device DEVICE] [--tiny] [--wheels DIR] [--out FILE] [--minutes N] [--model DIR]
#
# It takes Python from $PYTHON, else from .venv, else python3; nothing need be installed but what it names.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo "$(cd .venv && pwd -P)/bin/python" || command -v python3)}
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m tests.gpu "$@"
