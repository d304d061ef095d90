#!/usr/bin/env bash
# Makes .venv at the top of the checkout and installs aura_dist with the extras named, pinned by constraints.txt.
# Usage: bash launch/setup.sh EXTRA[,EXTRA…]        (demo.sh and test.sh call it; a second call costs a second)
#
# Needs Python 3.11 or newer ($PYTHON, else the first python3.x found). On Debian and Ubuntu the package that makes
# virtual environments is installed if it is missing, and for the tests a C++ compiler: DeepSpeed compiles its
# collectives for the CPU, minutes once, into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: bash launch/setup.sh EXTRA[,EXTRA…]}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: expected Python 3.11 or newer, found $(python3 --version 2>&1 || echo none); name one with PYTHON=…" >&2
  exit 2
}

# Debian packages: the first of several sets that can be installed
install_packages() {
  local as_root="" packages
  [ "$(id -u)" = 0 ] || as_root=sudo
  if ! command -v apt-get >/dev/null; then
    echo "error: expected $1; install it with this system's package manager and run this again" >&2
    exit 2
  fi
  $as_root apt-get update -qq
  for packages in "${@:2}"; do
    # shellcheck disable=SC2086
    $as_root apt-get install -y -qq $packages >/dev/null && return
  done
  exit 2
}

python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

python=$(find_python)
# an environment does not survive a moved checkout or another interpreter
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    install_packages "Python's venv" "python$(python_version "$python")-venv" python3-venv
  rm -rf .venv
  "$python" -m venv .venv
fi

wanted=$(echo "$PWD $extras" | cat - pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)
stamp=.venv/installed-$extras
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing aura_dist[$extras] into .venv (a few minutes at the first time)" >&2
  # torch first: DeepSpeed's set-up looks for it. No operator is compiled now (DS_BUILD_OPS=0).
  .venv/bin/python -m pip install -q --disable-pip-version-check -c launch/constraints.txt torch numpy setuptools wheel
  DS_BUILD_OPS=0 .venv/bin/python -m pip install -q --disable-pip-version-check -c launch/constraints.txt -e ".[$extras]"
  echo "$wanted" > "$stamp"
fi

# for the tests of ZeRO 3; takes a second once it is built
if [ "$extras" != demo ] && [ ! -e .venv/torch_extensions/deepspeed_shm_comm/deepspeed_shm_comm.so ]; then
  header=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  if ! command -v g++ >/dev/null || [ ! -e "$header" ]; then
    install_packages "g++ and Python's headers" "g++ python$(python_version .venv/bin/python)-dev" "g++ python3-dev"
  fi
  echo "compiling DeepSpeed's collectives for the CPU (minutes, once)" >&2
  .venv/bin/python -m aura_dist.models.strategies.zero3
fi
