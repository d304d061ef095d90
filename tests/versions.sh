#!/usr/bin/env bash
# Runs quick tests with the lowest version of every range in pyproject.toml, or with the newest that the index has.
# Usage: bash tests/versions.sh lowest|newest [pytest's arguments, in place of the quick tests]
#
# Each environment takes some minutes to make and 2 GB; it is kept in $VERSIONS_DIR (default: /tmp/aura-versions).
# TORCH=2.13.0 installs that version of torch in both, where the index has no other.
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:?usage: bash tests/versions.sh lowest|newest [pytest\'s arguments]}
shift
extras=datasets,report,slurm
quick="tests/config/test_config.py tests/text tests/store/test_grid_of_store.py tests/scoring/test_score.py
  tests/interventions/test_interventions.py tests/stages/test_pipeline.py tests/test_rooms.py"

place=${VERSIONS_DIR:-/tmp/aura-versions}/$which
python=$place/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$place"
"$python" - "$which" "$extras" > "$place/constraints.txt" <<'PYTHON'
import os, re, sys, tomllib

which, extras = sys.argv[1], sys.argv[2].split(",")
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
pins = dict(re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", r).groups() for r in wanted) if which == "lowest" else {}
if "TORCH" in os.environ:
    pins["torch"] = os.environ["TORCH"]
for name, version in pins.items():
    print(f"{name}=={version}")
PYTHON
install() {
  "$python" -m pip install --upgrade -c "$place/constraints.txt" "$@" > "$place/pip.log" 2>&1 ||
    { tail -n 20 "$place/pip.log" >&2 && exit 1; }
}
install torch numpy setuptools wheel # torch first: DeepSpeed's set-up looks for it
DS_BUILD_OPS=0 install -e ".[$extras]" pytest pytest-timeout hypothesis ml-dtypes psutil scikit-learn scipy
"$python" -m pip freeze | grep -iE "^(accelerate|dask|datasets|deepspeed|distributed|jinja2|matplotlib|msgspec|numba|numpy|\
pandas|pyarrow|pyyaml|safetensors|submitit|torch|transformers|xarray|zarr|zarrs|dask-jobqueue)=="
# warnings are no errors here: other versions warn of other things
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $quick
exec "$python" -m pytest -q -o filterwarnings=default "$@"
