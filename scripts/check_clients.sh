#!/usr/bin/env bash
# Our exports in real clients: makes (or reuses) an environment with GPTQModel, optimum and transformers, and runs
# tests/test_clients.py against it.
#
#   scripts/check_clients.sh [ENVIRONMENT] [pytest arguments...]
#
# ENVIRONMENT defaults to ../envs/gm; about 90 seconds and 1.6 GB where it has to be made. The check scripts
# themselves (gptq_ref.py, check_transformers.py, ...) are looked for in ../shared/clients; pass --clients=DIR if
# they are elsewhere. PYTHON names the interpreter of this project's own environment (default: .venv, else python).
set -euo pipefail
cd "$(dirname "$0")/.."

environment=../envs/gm
if [[ $# -gt 0 && $1 != -* ]]; then
    environment=$1
    shift
fi
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

if [[ ! -x $environment/bin/python ]]; then
    echo "making $environment"
    "$python" -m venv "$environment"
    # torch first, so that nothing pulls another build of it
    "$environment/bin/pip" install --quiet torch==2.13.0
    "$environment/bin/pip" install --quiet torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0 transformers==5.23.0
fi
exec "$python" -m pytest tests/test_clients.py -v --client-env "$(realpath "$environment")" "$@"
