#!/usr/bin/env bash
# Whether the product is right and fast on this machine's GPU: a table, and a report to file. At most 8 minutes.
# Usage: bash tests/gpu/run.sh [PART …] [--device DEVICE] [--tiny] [--wheels DIR] [--out FILE] [--minutes N] [--model DIR]
#
# It takes Python from $PYTHON, else from .venv of the checkout, else python3; nothing need be installed but what it
# names. Paths are as seen from where it is called.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$(cd "$root/.venv" && pwd -P)/bin/python" || command -v python3)}
# -P: not the directory where it is called, which may have a package `tests` of its own
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m tests.gpu "$@"
