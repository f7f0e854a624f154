#!/usr/bin/env bash
# Makes a virtual environment with sparsify in it, ready for tests and the demo.
#
#   setup_venv.sh FOLDER [tested|oldest|newest|newest-transformers|docs]
#
# tested: exactly the versions that last passed (tools/constraints/tested.txt). oldest: the oldest that are promised. newest: whatever the
# registry has. newest-transformers: likewise, but torch and triton as tested, since another torch is gigabytes and rarely what changed. docs: what builds
# the site (tools/constraints/docs.txt), without sparsify and torch: docstrings are read, not imported.
set -euo pipefail
venv=$1 kind=${2:-tested}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparsify needs Python 3.11 or newer; set PYTHON=" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if [ "$kind" = docs ]; then
    exec "$venv/bin/python" -m pip --disable-pip-version-check install -q -r "$here/constraints/docs.txt"
fi
constraints=$venv/constraints.txt
case $kind in
    tested | oldest) cp "$here/constraints/$kind.txt" "$constraints" ;;
    newest-transformers) grep -E '^(torch|triton)==' "$here/constraints/tested.txt" > "$constraints" ;;
    newest) : > "$constraints" ;;
    *) echo "unknown kind of environment: $kind" >&2; exit 2 ;;
esac
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q --upgrade --upgrade-strategy eager -c "$constraints" "$@"; }
# torch by itself first, free of triton's constraint: a CPU build asks for no triton and gets the tested one, a CUDA build brings the one that it
# needs. What torch says is asked, and not whether a triton is here: a second run would find the first one's, and take the newest.
sed -i.all '/^triton==/d' "$constraints"
pip torch
"$venv/bin/python" -c 'import sys; from importlib.metadata import requires; sys.exit(not any(one.startswith("triton") for one in requires("torch") or ()))' ||
    mv "$constraints.all" "$constraints"
pip -e "$here/..[test,lint]"
