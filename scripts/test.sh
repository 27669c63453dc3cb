#!/usr/bin/env bash
# Lints, checks types and imports, and runs the tests, in .venv (installed at the first call).
# With arguments only pytest runs, and gets them: scripts/test.sh tests/layers/test_packing.py -k v1
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_setup.sh

prepare_venv "[test]"
if [ $# -eq 0 ]; then
    "$VENV/bin/ruff" check .
    "$VENV/bin/ruff" format --check .
    "$VENV/bin/mypy"
    PYTHONPATH=kernels "$VENV/bin/lint-imports"
    # Two processes of one thread each: models this small gain nothing from threads, and lose where they wait for cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder
fi
exec "$VENV/bin/python" -m pytest "$@"
