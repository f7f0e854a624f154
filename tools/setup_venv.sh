#!/usr/bin/env bash
# Makes a virtual environment with sparsify in it, ready for tests and the demo.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparsify needs Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# A plain `torch` may pull gigabytes of CUDA: without a GPU the version that the tests run on is taken first.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null 2>&1; then
    pip install -q 'torch==2.13.0'
fi
pip install -q -e '.[test,lint]'
